"""Prefix reuse: what a slot still holds is not read again, and no answer changes by a token."""
import dataclasses
import functools
import json

import pytest
import torch
from conftest import by_hand, plant, prompt, received, serving, serving_in_processes
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exact import ENDS, RUNNERS

from bench.prefix import medians
from bench.results import DATA, ROOT
from cbserver import batch, cli, prefix, process
from cbserver.batch import BatchRunner
from cbserver.fast import FastStep
from cbserver.model.load import load_model
from cbserver.model.sampling import SamplingParams
from cbserver.prefix import PrefixEngine, PrefixStep
from cbserver.scheduler import ContinuousEngine
from cbserver.sequence import Sequence, Status

# On a CPU PrefixStep has no recordings, and takes the same passes.
RUNNERS = RUNNERS | {"resumed": PrefixStep,
                     "resumed, own pass": functools.partial(PrefixStep, fused=False)}
FAMILIES = [prompt(100 + family, 40) for family in range(3)]  # what prompts begin with

asks = st.fixed_dictionaries({
    "after": st.integers(0, 9),  # steps, since the request before
    "follows": st.none() | st.integers(0, 12),  # a conversation goes on: which answer it follows
    "again": st.none() | st.integers(1, 90),  # so much of that conversation, and nothing new
    "family": st.integers(0, 2),
    "cut": st.integers(0, 40),  # how much of the family's text it begins with
    "seed": st.integers(0, 5),
    "length": st.integers(1, 12),  # tokens of its own
    "max_tokens": st.integers(1, 12),
    "cancel_after": st.none() | st.none() | st.integers(0, 8),  # steps
    "cancel_before": st.sampled_from(["evict", "admit", "prefill_prompts", "deliver"]),
})
schedules = st.lists(asks, min_size=2, max_size=14)


@functools.cache
def runner(kind, model, slots, max_len):
    """One for many engines: what an earlier schedule left in its slots must not matter."""
    return RUNNERS[kind](model, slots, max_len)


def make(tiny, kind="plain", slots=3, budget=512, engine_class=PrefixEngine):
    engine = by_hand(engine_class(*tiny, slots=slots, max_len=96, prefill_budget=budget,
                                  runner=functools.partial(runner, kind)))
    engine.eos = ENDS
    return engine


def tokens_of(ask, sequences):
    """An ask's prompt: a family's beginning, or an earlier conversation, and words of its own."""
    own = prompt(ask["seed"], ask["length"])
    if ask["follows"] is not None and sequences:
        earlier = sequences[ask["follows"] % len(sequences)]
        said = earlier.prompt_tokens + earlier.generated_tokens
        return (said + own)[:84] if ask["again"] is None else said[:min(ask["again"], 84)]
    return FAMILIES[ask["family"]][:ask["cut"]] + own


def check(engine, reference, schedule, after=lambda: None):
    """Play a schedule; each answer is what `generate` makes of its prompt. Returns sequences.

    after: called after each step.
    """
    sequences = []
    cancels = []

    def cancelling(name):
        method = getattr(engine, name)

        def cancel_first(*arguments):
            for steps, before, sequence in cancels:
                if engine.steps >= steps and before == name:
                    engine.abort(sequence)
            return method(*arguments)

        return cancel_first

    for name in ("evict", "admit", "prefill_prompts", "deliver"):
        setattr(engine, name, cancelling(name))

    def step():
        engine.step()
        engine.steps += 1
        sitting = sorted(s.slot for s in [*engine.running, *engine.past])
        assert sitting == list(range(engine.slots)), "each slot has one owner, past or present"
        after()

    for ask in schedule:
        for _ in range(ask["after"]):
            step()
        tokens = tokens_of(ask, sequences)
        sequence = engine.submit(tokens, SamplingParams(ask["max_tokens"]))
        sequences.append(sequence)
        if ask["cancel_after"] is not None:
            steps = engine.steps + ask["cancel_after"]
            cancels.append((steps, ask["cancel_before"], sequence))
    for _ in range(400):
        if not (engine.waiting or engine.running):
            break
        step()
    for sequence in sequences:
        want = reference(sequence.prompt_tokens, sequence.params.max_tokens)
        ends = [i + 1 for i, token in enumerate(want) if token in ENDS]
        want = want[:ends[0]] if ends else want
        tokens = received(sequence)
        assert tokens == sequence.generated_tokens
        assert tokens == (want[:len(tokens)] if sequence.finish_reason == "abort" else want)
    return sequences


@pytest.mark.parametrize("kind", RUNNERS)
def test_any_schedule_with_shared_beginnings_gives_each_request_its_own_tokens(kind, tiny,
                                                                               reference):
    @settings(max_examples=40, deadline=None)
    @given(schedules, st.sampled_from([512, 25, 6]), st.integers(1, 3))
    def holds(schedule, budget, slots):
        check(make(tiny, kind, slots, budget), reference, schedule)

    holds()


@pytest.mark.parametrize("kind", ["plain", "fast"])
def test_what_a_prompt_may_take_over_has_its_own_tokens_keys(kind, tiny, reference):
    """Also of who was cancelled, and while a pass is under way whose tokens nobody has yet."""
    @settings(max_examples=25, deadline=None)
    @given(schedules, st.sampled_from([512, 25, 6]))
    def holds(schedule, budget):
        check_keys(make(tiny, kind, budget=budget), reference, schedule)

    holds()


def check_keys(engine, reference, schedule):
    """After each step, what each slot's sequence offers, against the keys of its tokens alone."""
    seen = []

    def look():
        for sequence in [*engine.running, *engine.past]:
            tokens = sequence.prompt_tokens + sequence.generated_tokens
            # A prompt leaves room for a token of the answer, and reads its last token itself.
            count = prefix.shared(sequence, tokens[:engine.max_len - 2])
            keys = engine.runner.cache.keys[:, sequence.slot, :, :count]
            seen.append((sequence, keys.clone()))

    check(engine, reference, schedule, look)
    for sequence in {sequence for sequence, keys in seen if keys.numel()}:
        right = keys_of(engine.model, sequence.prompt_tokens + sequence.generated_tokens)
        for keys in [keys for owner, keys in seen if owner is sequence]:
            torch.testing.assert_close(keys, right[:, :, :keys.shape[2]], rtol=1e-4, atol=1e-4)


def keys_of(model, tokens):
    """The keys of these tokens, read by a runner of their own: [layers, kv_heads, tokens, dim]."""
    alone = BatchRunner(model, 1, 96)
    alone.prefill(Sequence(tokens, slot=0), len(tokens))
    return alone.cache.keys[:, 0]


def serve(engine, *prompts, max_tokens=8, **params):
    """All of them at once, to their ends."""
    sequences = [engine.submit(tokens, SamplingParams(max_tokens, ignore_eos=True, **params))
                 for tokens in prompts]
    for _ in range(200):
        if all(s.status is Status.FINISHED for s in sequences):
            break
        engine.step()
    return sequences


SYSTEM = prompt(100, 40)


def talk(engine, turns=3, system=SYSTEM):
    """A conversation of so many turns; returns their sequences."""
    said = list(system)
    done = []
    for turn in range(turns):
        [sequence] = serve(engine, said + prompt(turn, 5))
        said = sequence.prompt_tokens + sequence.generated_tokens
        done.append(sequence)
    return done


@pytest.mark.parametrize("kind, read", [("plain", 7), ("fast", 8)])
def test_a_conversation_reads_only_what_is_new(kind, read, tiny, reference):
    """An answer's last token nobody has read, unless a runner was one pass ahead."""
    first, second, third = talk(make(tiny, kind))
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == len(first.prompt_tokens) + read
    assert third.num_cached_tokens == len(second.prompt_tokens) + read
    assert third.slot == second.slot == first.slot == 0
    assert third.generated_tokens == reference(third.prompt_tokens, 8)


def test_users_who_arrive_together_read_their_system_prompt_once(tiny, reference):
    engine = make(tiny, budget=25)
    users = serve(engine, *[SYSTEM + prompt(seed, 6) for seed in range(3)])
    assert [user.num_cached_tokens for user in users] == [0, 40, 40]
    assert engine.stats().num_cached_tokens == 80
    for user in users:
        assert user.generated_tokens == reference(user.prompt_tokens, 8)


def test_a_newcomer_does_not_cost_a_conversation_its_slot_while_others_are_older(tiny):
    engine = make(tiny)
    [first, second] = talk(engine, 2)
    [other] = serve(engine, SYSTEM + prompt(7, 6))  # it shares the system prompt
    assert other.num_cached_tokens == 40
    [third] = serve(engine, second.prompt_tokens + second.generated_tokens + [1, 2])
    assert third.num_cached_tokens == len(second.prompt_tokens) + 7


def test_the_least_recently_used_is_given_up(tiny):
    engine = make(tiny)
    texts = [prompt(seed, 20) for seed in range(4)]
    for text in texts:  # the fourth one takes the place of the first
        serve(engine, text)
    found = [serve(engine, text + [1, 2])[0].num_cached_tokens for text in (texts[1], texts[3])]
    assert found == [20 + 0, 20 + 0] and serve(engine, texts[0] + [1])[0].num_cached_tokens == 0


def test_one_user_alone_stays_in_the_lowest_slot(tiny):
    engine = make(tiny)
    for seed in range(7):
        [sequence] = serve(engine, prompt(seed % 4, 20))
        assert sequence.slot == 0


@pytest.mark.parametrize("kind", ["plain", "fast"])
@pytest.mark.parametrize("length", [1, 2, 30])
def test_the_same_prompt_again_reads_its_last_token_only(length, kind, tiny, reference):
    engine = make(tiny, kind)
    text = prompt(3, length)
    [once] = serve(engine, text)
    [again] = serve(engine, text)
    assert again.num_cached_tokens == length - 1
    assert again.generated_tokens == once.generated_tokens == reference(text, 8)


def test_a_prompt_whose_tokens_are_asked_about_is_read_whole(tiny):
    engine = make(tiny)
    text = prompt(3, 30)
    serve(engine, text)
    [asked] = serve(engine, text, echo=True, logprobs=1)
    assert asked.num_cached_tokens == 0 and len(asked.logprobs) == 29 + 8
    [chosen] = serve(engine, text, logprobs=1)
    assert chosen.num_cached_tokens == 29 and len(chosen.logprobs) == 8


def decoding(engine):
    """Somebody who decodes for long: beside it, prompts are read within the budget."""
    engine.submit(prompt(9, 1), SamplingParams(40, ignore_eos=True))
    engine.step()


def test_who_leaves_before_its_prompt_is_read_leaves_what_it_read(tiny, reference):
    engine = make(tiny, slots=2, budget=6)
    decoding(engine)
    gone = engine.submit(SYSTEM, SamplingParams(8))
    engine.step()
    engine.step()
    engine.abort(gone)
    [next_one] = serve(engine, SYSTEM + [1])
    assert next_one.num_cached_tokens == 12
    assert next_one.generated_tokens == reference(SYSTEM + [1], 8)


def test_who_leaves_before_anything_is_read_costs_nobody_their_conversation(tiny):
    engine = make(tiny)
    for family in range(2):
        serve(engine, FAMILIES[family])
    gone = engine.submit(FAMILIES[2], SamplingParams(8))
    engine.admit()
    engine.abort(gone)
    serve(engine, prompt(7, 20))
    again = [serve(engine, family + [1])[0] for family in FAMILIES[:2]]
    assert [sequence.num_cached_tokens for sequence in again] == [40, 40]


def test_who_comes_again_after_half_its_prompt_was_read_takes_that_half_over(tiny):
    engine = make(tiny, slots=4, budget=6)
    decoding(engine)
    serve(engine, FAMILIES[0])
    half = engine.submit(FAMILIES[1], SamplingParams(8))
    engine.step()
    engine.step()
    engine.abort(half)
    assert half.position == 12
    serve(engine, prompt(7, 20))
    serve(engine, FAMILIES[1])
    [again] = serve(engine, FAMILIES[0] + [1])
    assert again.num_cached_tokens == 40


def test_nobody_searches_when_most_of_a_steps_budget_is_spent(tiny):
    engine = make(tiny, budget=8)
    serve(engine, SYSTEM)
    decoding(engine)
    late = Sequence(SYSTEM + [1, 2], slot=1)
    assert engine.prefill(late, left=2) == 0
    assert late.num_cached_tokens == 0
    assert engine.prefill(late, left=3) == 1
    assert late.num_cached_tokens == 40


def test_the_lesson_tells_what_was_measured_on_a_gpu():
    lesson = (ROOT / "notebooks/appendix_prefix_reuse.ipynb").read_text(encoding="utf-8")
    found = {name: medians(json.loads((DATA / f"{name}-h200.json").read_text(encoding="utf-8")))
             for name in ("prefix", "prefix-unrecorded")}
    before, now = found["prefix-unrecorded"], found["prefix"]
    assert f"after {before['with reuse']['later']['p50']:.0f} ms with reuse" in lesson
    assert f"after {before['without']['later']['p50']:.0f} ms without" in lesson
    assert f"first tokens came after {now['with reuse']['later']['p50']:.0f} ms" in lesson
    assert (f"{now['with reuse']['tokens_per_s']:,.0f} against "
            f"{now['without']['tokens_per_s']:,.0f}") in lesson


def test_two_past_sequences_of_many_tokens_change_places_whole(tiny):
    engine = by_hand(PrefixEngine(*tiny, slots=2, max_len=1600))
    cache = engine.runner.cache
    cache.keys.normal_()
    cache.values.normal_()
    keys, values = cache.keys.clone(), cache.values.clone()
    one, two = engine.past = [Sequence(prompt(slot, length), slot=slot, position=length)
                              for slot, length in enumerate((1300, 700))]
    engine.swap(one, two)
    assert (one.slot, two.slot) == (1, 0)
    for now, before in ((cache.keys, keys), (cache.values, values)):
        assert torch.equal(now[:, :, :, :1300], before[:, :, :, :1300].flip(1))
        assert torch.equal(now[:, :, :, 1300:], before[:, :, :, 1300:])


# Planted bugs: the check must notice each


BUSY = [{"after": (0, 3, 20)[i % 3], "follows": i - 2 if i % 4 == 3 else None, "family": i % 2,
         "cut": 10 + 5 * (i % 7), "seed": i % 5, "length": 1 + 3 * i % 8,
         "again": {7: 12, 11: 1}.get(i), "max_tokens": 4 + 3 * i % 9, "cancel_after": None}
        for i in range(14)]
# Some leave: while their prompt is read, between a pass and its tokens, after their last token.
LEAVING = [ask | {"cancel_after": (None, 1, 3, 0)[i % 4],
                  "cancel_before": ("deliver", "prefill_prompts", "admit")[i % 3]}
           for i, ask in enumerate(BUSY)]


def caught(tiny, reference, engine_class=PrefixEngine, kind=None, check=check, schedule=BUSY):
    engine = make(tiny, engine_class=engine_class)
    if kind is not None:
        engine.runner = kind(tiny[0], 3, 96)
    try:
        check(engine, reference, schedule)
    except AssertionError:
        return True
    return False


def test_without_a_bug_the_busy_schedule_is_right_and_reuses(tiny, reference):
    sequences = check(make(tiny), reference, BUSY)
    assert sum(s.num_cached_tokens > 0 for s in sequences) >= 6
    assert not caught(tiny, reference)


def test_one_token_too_many_is_noticed(tiny, reference, monkeypatch):
    right = prefix.shared
    monkeypatch.setattr(prefix, "shared", lambda sequence, text: min(
        len(text), right(sequence, text) + 1) if sequence.prompt_tokens else 0)
    assert caught(tiny, reference)


def test_tokens_that_nobody_has_read_are_noticed(tiny, reference, monkeypatch):
    right = prefix.shared

    def all_tokens(sequence, text):
        return right(dataclasses.replace(sequence, position=96), text)

    monkeypatch.setattr(prefix, "shared", all_tokens)
    assert caught(tiny, reference)


@pytest.mark.parametrize("kind", [BatchRunner, PrefixStep])
def test_a_position_that_is_one_ahead_is_noticed_by_the_keys(kind, tiny, reference, monkeypatch):
    """An answer hardly shows it, of a runner that has read the newest token as well."""
    assert not caught(tiny, reference, kind=kind, check=check_keys, schedule=LEAVING)
    right = prefix.shared

    def one_more(sequence, text):
        return right(dataclasses.replace(sequence, position=sequence.position + 1), text)

    monkeypatch.setattr(prefix, "shared", one_more)
    assert caught(tiny, reference, kind=kind, check=check_keys, schedule=LEAVING)


@pytest.mark.parametrize("bug", [
    "0 < sequence.position == sequence.prefill_end",  # forgets prompts of one token
    "sequence.num_cached_tokens < sequence.prefill_end == sequence.position",  # and all reused
    "sequence.num_cached_tokens == 0 == sequence.position - sequence.prefill_end", "False"])
def test_a_prompts_last_token_that_the_fast_step_is_not_told_is_noticed(bug, tiny, reference,
                                                                        monkeypatch):
    assert not caught(tiny, reference, kind=PrefixStep)
    plant(monkeypatch, FastStep, "launch", "sequence.position == sequence.prefill_end", bug)
    assert caught(tiny, reference, kind=PrefixStep)


def test_a_copy_into_the_wrong_slot_is_noticed(tiny, reference):
    class Wrong(PrefixEngine):
        def reuse(self, sequence, holders):
            right = sequence.slot
            sequence.slot = (right + 1) % self.slots
            super().reuse(sequence, holders)
            sequence.slot = right

    assert caught(tiny, reference, Wrong)


def test_a_running_owners_slot_taken_over_is_noticed(tiny, reference):
    class Robber(PrefixEngine):
        def choose(self, text):
            running = [s for s in self.running[:-1] if prefix.shared(s, text)]
            if running:  # the keys of a runner are swapped away under it
                self.past.append(running[0])
                return running[0]
            return super().choose(text)

    assert caught(tiny, reference, Robber)


def test_a_swap_that_leaves_the_keys_behind_is_noticed(tiny, reference):
    class Forgets(PrefixEngine):
        def swap(self, a, b):
            a.slot, b.slot = b.slot, a.slot

    assert caught(tiny, reference, Forgets)


def test_an_idle_row_that_writes_into_a_kept_slot_is_noticed(tiny, reference):
    class Careless(BatchRunner):
        def decode_inputs(self, sequences):
            tokens, positions = super().decode_inputs(sequences)
            return tokens, positions.where(positions < self.cache.max_len - 1, 2)

    assert caught(tiny, reference, kind=Careless)


# Over HTTP


@pytest.fixture(scope="module", params=["a thread", "processes"])
def url(request, tiny):
    way = serving if request.param == "a thread" else serving_in_processes
    with way(PrefixEngine(*tiny, slots=3, max_len=512)) as url:
        yield url


def usage(url, **body):
    import httpx

    answer = httpx.post(f"{url}/v1/completions", json={"max_tokens": 4, **body}, timeout=60)
    assert answer.status_code == 200, answer.text
    if not body.get("stream"):
        return answer.json()["usage"]
    import json

    events = [json.loads(line[6:]) for line in answer.text.splitlines()
              if line.startswith("data: {")]
    return events[-1]["usage"]


def test_usage_says_how_much_was_cached_and_metrics_count_it(url):
    import httpx

    text = prompt(55, 60)
    assert usage(url, prompt=text)["prompt_tokens_details"] == {"cached_tokens": 0}
    assert usage(url, prompt=text)["prompt_tokens_details"] == {"cached_tokens": 59}
    streamed = usage(url, prompt=text, stream=True, stream_options={"include_usage": True})
    assert streamed["prompt_tokens_details"] == {"cached_tokens": 59}
    several = usage(url, prompt=text, n=3)
    assert several["prompt_tokens"] == 60
    assert several["prompt_tokens_details"] == {"cached_tokens": 59}
    asked = usage(url, prompt=text, logprobs=1)
    assert asked["prompt_tokens_details"] == {"cached_tokens": 59}
    lines = dict(line.split() for line in httpx.get(f"{url}/metrics").text.splitlines()
                 if line.startswith("prefix_cache") and "created" not in line)
    queries, hits = (float(lines[f"prefix_cache_{name}_total"]) for name in ("queries", "hits"))
    assert queries == 60 * 7 and hits == 59 * 6


# A pass that begins anywhere

@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("start, end, by", [
    (1, 40, "resume_pass"), (63, 70, "resume_pass"), (500, 513, "resume_pass"),
    (700, 1100, "resume_pass"), (1025, 1200, "resume_pass"), (1590, 1600, "resume_pass"),
    (1990, 2000, "resume_pass"), (0, 40, "prefill_pass"), (512, 600, "prefill_pass")])
def test_a_pass_from_anywhere_writes_the_keys_of_one_from_the_beginning(tiny, start, end, by,
                                                                        fused):
    whole, runner = long_runners(tiny[0].device, fused)
    taken = []

    def noting(one_pass, *sizes):
        taken.append(one_pass.__name__)
        recorded = (one_pass.__name__, *sizes) in runner.graphs
        assert recorded or not runner.graphs or start == 1990  # it would reach beyond max_len
        return PrefixStep.run(runner, one_pass, *sizes)

    before = runner.cache.keys[:, 0].clone()
    for mine, theirs in pairs_of(runner, whole):
        mine[:, 1] = 1e3  # what an earlier owner left: nobody may look at it
        mine[:, 1, :, :start] = theirs[:, 0, :, :start]
    runner.run = noting
    runner.prefill(Sequence(prompt(1, 2000), slot=1, position=start), end)
    assert taken == [by]
    for mine, theirs in pairs_of(runner, whole):
        torch.testing.assert_close(mine[:, 1, :, start:end], theirs[:, 0, :, start:end],
                                   rtol=1e-4, atol=1e-4)
    assert torch.equal(runner.cache.keys[:, 0], before), "another's slot is untouched"


def pairs_of(*runners):
    """(keys, keys), (values, values) of two runners."""
    caches = [runner.cache for runner in runners]
    return zip(*[(cache.keys, cache.values) for cache in caches])


@functools.cache
def long_runners(device, fused):
    """A plain runner whose slot 0 has read 2,000 tokens, and a PrefixStep of the same model.

    Both with a GPU's pieces, on every device.
    """
    model, _ = load_model("random:tiny", dtype=torch.float32, device=device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "piece_size", lambda device: 512)
        plain = BatchRunner(model, 1, 2048)
        step = PrefixStep(model, 2, 2048, fused=fused)
    sequence = Sequence(prompt(1, 2000), slot=0)
    for end in (512, 1024, 1536, 2000):
        plain.prefill(sequence, end)
    return plain, step


# The command line


def build(*arguments):
    return process.build_engine(cli.parse(["--model", "random:tiny", "--max-len", "96",
                                           *arguments]))


@pytest.mark.parametrize("arguments, engine_class", [
    ([], PrefixEngine), (["--no-prefix-reuse"], ContinuousEngine),
    (["--dtype", "bfloat16"], ContinuousEngine),
    (["--dtype", "bfloat16", "--prefix-reuse"], PrefixEngine)])
def test_it_is_on_in_float32_and_off_in_half_precision(arguments, engine_class):
    if "--dtype" not in arguments:  # a GPU's default is another
        arguments = [*arguments, "--dtype", "float32"]
    assert type(build(*arguments)) is engine_class


@pytest.mark.parametrize("reuse, step", [("--prefix-reuse", PrefixStep),
                                         ("--no-prefix-reuse", FastStep)])
def test_with_the_fast_step_its_passes_begin_anywhere(reuse, step):
    assert type(build("--fast", reuse).runner) is step


def test_half_precision_says_what_reuse_does_to_answers(capsys):
    build("--dtype", "bfloat16", "--prefix-reuse", "--fast")
    assert "with what is reused" in capsys.readouterr().out


def test_other_engines_have_no_prefix_reuse_and_say_so(capsys):
    with pytest.raises(SystemExit):
        cli.parse(["--engine", "static", "--prefix-reuse"])
    assert "--prefix-reuse needs --engine continuous" in capsys.readouterr().err


# What bench.prefix makes of its runs


def test_the_table_shows_medians_of_each_arm_and_the_pairs_ratio():
    from bench import prefix as bench

    def row(arm, ms, speed):
        return {"arm": arm, "failures": 0, "tokens_per_s": speed, "reused": 0.5,
                "first": {"p50": 900, "p99": 990}, "later": {"p50": ms, "p99": 2 * ms},
                "turns_p50": [900, ms]}

    result = {"model": "m", "hardware": "h", "slots": 4, "conversations": 8, "turns": 2,
              "command": "c", "pairs": [{"without": 10, "with reuse": 11},
                                        {"without": 10, "with reuse": 9}],
              "rows": [row("without", ms, 10) for ms in (800, 700, 900)]
              + [row("with reuse", ms, 20) for ms in (90, 80, 70)]}
    text = bench.table(result)
    assert "| without | 900, 990 ms | 800, 1,600 ms | 10 | 50% |" in text
    assert "| with reuse | 900, 990 ms | 80, 160 ms | 20 | 50% |" in text
    assert "in 2 alternating pairs: 1.000 (0.900 to 1.100)" in text and "medians of 3" in text
    assert len(bench.figure([result]).axes) == 1


def test_a_run_without_http_reuses_all_of_a_conversation_but_what_is_new():
    from bench.arms import run_child

    case = {"model": "random:tiny", "slots": 2, "max_len": 2048, "conversations": 2,
            "requests": 2, "seed": 0, "server_args": "", "work": "conversations"}
    found = {arm: run_child(case | {"arm": f"turns:{arm}"}) for arm in ("without", "with reuse")}
    assert found["without"]["reused"] == 0 and found["with reuse"]["reused"] > 0.8
    assert len(found["with reuse"]["turns_p50"]) == 6

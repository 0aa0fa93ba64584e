"""Greedy float32 output equals `model.generate` token for token, whatever else is in the batch."""
import functools
import os

import pytest
import torch
from conftest import by_hand, prompt, received
from hypothesis import given, settings
from hypothesis import strategies as st

from cbserver.baseline import generate_tokens
from cbserver.batch import BatchRunner, SlotCache, StaticEngine
from cbserver.fast import FastStep
from cbserver.model.load import load_model
from cbserver.model.sampling import SamplingParams
from cbserver.scheduler import ContinuousEngine
from cbserver.sequence import SequentialEngine, Status

ENDS = set(range(0, 512, 29))  # many ways to end, so that sequences end early and often

requests = st.fixed_dictionaries({
    "arrival": st.integers(0, 30),  # passes before it is submitted
    "seed": st.integers(0, 11),
    "length": st.integers(1, 40),
    "max_tokens": st.integers(1, 24),
    "ignore_eos": st.booleans(),
    "cancel_after": st.none() | st.integers(0, 12),  # passes after its arrival
})
schedules = st.lists(requests, min_size=1, max_size=14)
engines = pytest.mark.parametrize("engine_class", [StaticEngine, ContinuousEngine])


# Every way to run a pass. On a CPU FastStep has no graphs: those need a GPU.
RUNNERS = {"plain": BatchRunner, "fast": FastStep,
           "own pass": functools.partial(FastStep, fused=False),
           "few rows": functools.partial(FastStep, invariant=False)}
ON_GPU = os.environ.get("CB_TEST_DEVICE") == "cuda"
runners = pytest.mark.parametrize("runner", RUNNERS)


@functools.cache
def shared(runner, model, slots, max_len):
    """One runner for many engines: what an earlier schedule left in it must not matter."""
    made = RUNNERS[runner](model, slots, max_len)
    assert runner != "fast" or made.fused
    return made


def run(engine_class, tiny, schedule, runner="plain", prefill_budget=512):
    """Play a schedule, one tick a forward pass; returns [(request, sequence)] and the engine."""
    clock = [0]
    started = []
    aborting = []  # an abort is delivered, too: no tick for that
    arrivals = sorted(schedule, key=lambda r: r["arrival"])

    def runner_of(*arguments):
        made = shared(runner, *arguments)
        made.piece = min(64, prefill_budget)
        return made

    options = {"prefill_budget": prefill_budget} if engine_class is not StaticEngine else {}
    engine = by_hand(engine_class(*tiny, slots=3, max_len=96, runner=runner_of, **options),
                     after=lambda: aborting or tick())
    engine.eos = ENDS

    def tick():
        clock[0] += 1
        while arrivals and arrivals[0]["arrival"] <= clock[0]:
            r = arrivals.pop(0)
            params = SamplingParams(r["max_tokens"], ignore_eos=r["ignore_eos"])
            started.append((r, engine.submit(prompt(r["seed"], r["length"]), params), clock[0]))
        for r, sequence, begun in started:
            if r["cancel_after"] is not None and clock[0] >= begun + r["cancel_after"]:
                cancel(sequence)

    def cancel(sequence):
        if sequence.status is not Status.FINISHED:
            aborting.append(sequence)
            engine.abort(sequence)
            aborting.pop()

    for _ in range(2000):
        if not (arrivals or engine.waiting or engine.running):
            break
        if engine.waiting or engine.running:
            engine.step()
        else:
            tick()
    return [(r, sequence) for r, sequence, _ in started], engine


def expected(r, reference):
    tokens = reference(prompt(r["seed"], r["length"]), r["max_tokens"])
    if not r["ignore_eos"]:
        for i, token in enumerate(tokens):
            if token in ENDS:
                return tokens[:i + 1]
    return tokens


def check(engine_class, tiny, reference, schedule, runner="plain", prefill_budget=512):
    played, engine = run(engine_class, tiny, schedule, runner, prefill_budget)
    assert len(played) == len(schedule)
    for r, sequence in played:
        tokens = received(sequence)
        want = expected(r, reference)
        assert tokens == sequence.generated_tokens
        if sequence.finish_reason == "abort":
            assert tokens == want[:len(tokens)]
        else:
            assert tokens == want
            assert sequence.finish_reason == ("length" if tokens[-1] not in ENDS or r["ignore_eos"]
                                              else "stop")
    stats = engine.stats()
    assert stats.running == stats.waiting == 0 and not engine.running
    assert stats.num_generated_tokens == sum(len(s.generated_tokens) for _, s in played)


@engines
@runners
def test_any_schedule_gives_each_request_its_own_tokens(engine_class, runner, tiny, reference):
    @settings(max_examples=12 if ON_GPU else 40, deadline=None)
    @given(schedules, st.sampled_from([512, 25, 6]))
    def holds(schedule, prefill_budget):
        check(engine_class, tiny, reference, schedule, runner, prefill_budget)

    holds()


BUSY = [dict(arrival=i // 2, seed=i % 12, length=1 + 7 * i % 40, max_tokens=6 + 5 * i % 17,
             ignore_eos=True, cancel_after=None) for i in range(12)]


def mask_off_by_one(cache, slots, positions, span, mask):
    return mask.roll(1, -1)


def wrong_position(cache, slots, positions, span, mask):
    cache.positions = (positions + 1).clamp(max=95)
    return mask


def wrong_slot(cache, slots, positions, span, mask):
    cache.slots = torch.zeros_like(cache.all_slots[slots])
    return mask


def no_mask(cache, slots, positions, span, mask):
    return torch.ones_like(mask)


@engines
@pytest.mark.parametrize("bug", [mask_off_by_one, wrong_position, wrong_slot, no_mask])
def test_the_exactness_check_fails_on_a_planted_bug(engine_class, bug, tiny, reference,
                                                    monkeypatch):
    check(engine_class, tiny, reference, BUSY)
    select = SlotCache.select
    monkeypatch.setattr(SlotCache, "select", lambda cache, *where: bug(
        cache, *where, select(cache, *where)))
    with pytest.raises(AssertionError):
        check(engine_class, tiny, reference, BUSY)


@engines
def test_the_exactness_check_fails_when_rotary_positions_are_wrong(engine_class, tiny, reference,
                                                                   monkeypatch):
    rotary = type(tiny[0].base_model.rotary_emb)
    forward = rotary.forward

    def doubled(self, x, position_ids):  # rotary embeddings cannot see a constant shift
        return forward(self, x, position_ids * 2)

    monkeypatch.setattr(rotary, "forward", doubled)
    played, _ = run(engine_class, tiny, BUSY)
    monkeypatch.undo()
    assert any(s.generated_tokens != expected(r, reference) for r, s in played)


def test_a_new_sequence_sees_nothing_of_the_slots_last_owner(tiny, reference):
    engine = by_hand(ContinuousEngine(*tiny, slots=1, max_len=96))
    for seed, length in ((1, 40), (2, 3), (3, 17), (1, 40)):
        sequence = engine.submit(prompt(seed, length), SamplingParams(20, ignore_eos=True))
        while sequence.status is not Status.FINISHED:
            engine.step()
        assert sequence.slot == 0
        assert sequence.generated_tokens == reference(prompt(seed, length), 20)


def test_garbage_left_in_every_slot_changes_nothing(tiny, reference):
    engine = by_hand(ContinuousEngine(*tiny, slots=2, max_len=96))
    engine.runner.cache.keys.normal_(std=50)
    engine.runner.cache.values.normal_(std=50)
    sequence = engine.submit(prompt(5, 9), SamplingParams(20, ignore_eos=True))
    while sequence.status is not Status.FINISHED:
        engine.step()
    assert sequence.generated_tokens == reference(prompt(5, 9), 20)


def test_a_prompt_may_fill_the_context_to_the_last_token(tiny):
    model, _ = tiny
    tokens = prompt(1, 95)
    for engine_class in (SequentialEngine, StaticEngine, ContinuousEngine):
        engine = by_hand(engine_class(*tiny, max_len=96))
        sequence = engine.submit(tokens, SamplingParams(1, ignore_eos=True))
        while sequence.status is not Status.FINISHED:
            engine.step()
        assert sequence.generated_tokens == list(generate_tokens(model, tokens, SamplingParams(1)))


def test_end_of_sequence_may_be_a_list_as_in_llama_instruct(tiny, reference):
    model, tokenizer = tiny
    tokens = reference(prompt(4, 12), 20)
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [511, tokens[6]]
    try:
        ids = torch.tensor([prompt(4, 12)], device=model.device)
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20)
        for engine_class in (SequentialEngine, StaticEngine, ContinuousEngine):
            engine = by_hand(engine_class(model, tokenizer))
            sequence = engine.submit(prompt(4, 12), SamplingParams(20))
            while sequence.status is not Status.FINISHED:
                engine.step()
            assert sequence.generated_tokens == whole[0, 12:].tolist()
            assert sequence.finish_reason == "stop"
    finally:
        model.generation_config.eos_token_id = before


def test_the_tiny_model_is_sensitive_so_that_these_tests_can_fail(tiny, reference):
    model, _ = tiny
    changed = 0
    distinct = []
    gaps = []
    for seed in range(30):
        tokens = prompt(seed, 24)
        other = [(tokens[0] + 1) % 511, *tokens[1:]]
        changed += reference(tokens, 32) != reference(other, 32)
        distinct.append(len(set(reference(tokens, 32))))
        with torch.inference_mode():
            whole = torch.tensor([tokens + reference(tokens, 32)], device=model.device)
            best = model(whole).logits[0, 23:-1].topk(2).values
            gaps.append((best[:, 0] - best[:, 1]).min().item())
    assert changed > 0.8 * 30
    assert sorted(distinct)[15] >= 8, distinct
    assert min(gaps) > 1e-4, "a near tie: rounding could decide a token"


@pytest.mark.parametrize("runner", ["plain", "fast"])
def test_sampling_with_a_seed_is_the_same_whatever_else_is_in_the_batch(runner, tiny):
    def sampled(neighbours):
        engine = by_hand(ContinuousEngine(*tiny, slots=4, runner=RUNNERS[runner]))
        for seed in range(neighbours):
            engine.submit(prompt(seed, 10 + seed), SamplingParams(30, temperature=1.3, seed=seed))
        params = SamplingParams(16, temperature=0.9, top_p=0.95, seed=42, ignore_eos=True)
        sequence = engine.submit(prompt(9, 8), params)
        while sequence.status is not Status.FINISHED:
            engine.step()
        return sequence.generated_tokens

    assert sampled(0) == sampled(3) == sampled(6)


def test_top_k_1_and_a_tiny_top_p_are_greedy(tiny, reference):
    for params in (SamplingParams(12, temperature=1.0, top_k=1, ignore_eos=True),
                   SamplingParams(12, temperature=1.0, top_p=1e-6, ignore_eos=True)):
        engine = by_hand(ContinuousEngine(*tiny))
        sequence = engine.submit(prompt(3, 9), params)
        while sequence.status is not Status.FINISHED:
            engine.step()
        assert sequence.generated_tokens == reference(prompt(3, 9), 12)


def test_a_random_qwen3_is_exact_too(tiny, qwen3):
    engine = by_hand(ContinuousEngine(qwen3, tiny[1], slots=3, max_len=64))
    sequences = [engine.submit(prompt(i, 5 + 4 * i), SamplingParams(12)) for i in range(6)]
    while engine.waiting or engine.running:
        engine.step()
    for sequence in sequences:
        want = list(generate_tokens(qwen3, sequence.prompt_tokens, SamplingParams(12)))
        assert sequence.generated_tokens == want


def test_smollm2_in_changing_batches_equals_generate():
    model, tokenizer = load_model("smollm2", device="cpu")
    engine = by_hand(ContinuousEngine(model, tokenizer, slots=3, max_len=128))
    texts = ["The capital of France is", "Once upon a time", "def add(a, b):", "Water boils at",
             "The three primary colours are red, yellow and"]
    sequences = [engine.submit(tokenizer(text)["input_ids"], SamplingParams(6 + 4 * i))
                 for i, text in enumerate(texts)]
    while engine.waiting or engine.running:
        engine.step()
    for sequence in sequences:
        assert sequence.generated_tokens == list(
            generate_tokens(model, sequence.prompt_tokens, sequence.params))

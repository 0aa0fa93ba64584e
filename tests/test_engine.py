"""The engine's life: slots come back, limits are named, leavers cost nothing, faults reach all."""
import asyncio
import threading

import pytest
from conftest import by_hand, prompt, received

from cbserver.baseline import generate_tokens
from cbserver.batch import StaticEngine
from cbserver.model.load import ModelUnavailable, load_model
from cbserver.model.sampling import SamplingParams
from cbserver.scheduler import ContinuousEngine
from cbserver.sequence import EngineStopped, PromptTooLong, QueueFull, SequentialEngine, Status

ALL = pytest.mark.parametrize("engine_class", [SequentialEngine, StaticEngine, ContinuousEngine])
FOREVER = SamplingParams(40, ignore_eos=True)


async def collect(sequence):
    return [token async for token in sequence.stream()]


@ALL
def test_many_requests_in_flight_each_receive_their_own_tokens(engine_class, tiny, reference):
    async def main():
        engine = engine_class(*tiny)
        await engine.start()
        sequences = [engine.submit(prompt(i, 3 + i), SamplingParams(5 + i % 9, ignore_eos=True))
                     for i in range(12)]
        outputs = await asyncio.wait_for(asyncio.gather(*map(collect, sequences)), 60)
        await engine.stop()
        return outputs, engine.stats()

    outputs, stats = asyncio.run(main())
    assert outputs == [reference(prompt(i, 3 + i), 5 + i % 9) for i in range(12)]
    assert stats.running == stats.waiting == 0
    assert stats.num_generated_tokens == sum(map(len, outputs))
    assert stats.num_prompt_tokens == sum(3 + i for i in range(12))


def test_a_cancelled_request_frees_its_slot_by_the_next_step(tiny):
    engine = by_hand(ContinuousEngine(*tiny, slots=1))
    first, second = (engine.submit(prompt(i, 5), FOREVER) for i in (1, 2))
    engine.step()
    assert first.status is Status.RUNNING and second.status is Status.WAITING
    engine.abort(first)
    engine.step()
    assert second.status is Status.RUNNING and second.slot == first.slot
    assert received(first) == first.generated_tokens and first.finish_reason == "abort"


def test_a_client_that_leaves_during_its_prefill_harms_nobody(tiny, reference):
    engine = by_hand(ContinuousEngine(*tiny, slots=2))
    prefill = engine.runner.prefill

    def abort_meanwhile(sequence, end):
        engine.abort(sequence)
        prefill(sequence, end)

    engine.runner.prefill = abort_meanwhile
    gone = engine.submit(prompt(1, 5), FOREVER)
    engine.step()
    assert gone.finish_reason == "abort" and received(gone) == [] and not gone.generated_tokens
    engine.runner.prefill = prefill
    other = engine.submit(prompt(2, 5), SamplingParams(3, ignore_eos=True))
    while other.status is not Status.FINISHED:
        engine.step()
    assert other.generated_tokens == reference(prompt(2, 5), 3)


def test_a_cancelled_waiting_request_never_runs(tiny):
    engine = by_hand(ContinuousEngine(*tiny, slots=1))
    sequences = [engine.submit(prompt(i, 5), SamplingParams(4, ignore_eos=True)) for i in range(3)]
    engine.abort(sequences[1])
    while engine.waiting or engine.running:
        engine.step()
    assert [len(s.generated_tokens) for s in sequences] == [4, 0, 4]
    engine.abort(sequences[0])
    assert sequences[0].finish_reason == "length", "aborting what has finished changes nothing"


def test_slots_are_refilled_on_the_step_after_they_fall_free(tiny):
    engine = by_hand(ContinuousEngine(*tiny, slots=2))
    short, long, next_one = (engine.submit(prompt(i, 5), SamplingParams(n, ignore_eos=True))
                             for i, n in ((1, 3), (2, 30), (3, 3)))
    while short.status is not Status.FINISHED:
        engine.step()
    engine.step()
    assert next_one.status is Status.RUNNING and next_one.slot == short.slot
    assert long.status is Status.RUNNING


def test_static_batching_makes_the_next_wait_for_the_longest(tiny):
    engine = by_hand(StaticEngine(*tiny, slots=2))
    sequences = [engine.submit(prompt(i, 5), SamplingParams(n, ignore_eos=True))
                 for i, n in ((1, 3), (2, 30), (3, 3))]
    while sequences[1].status is not Status.FINISHED:
        assert sequences[2].status is Status.WAITING
        engine.step()
    assert sequences[0].finish_reason == "length"
    engine.step()
    assert sequences[2].status is Status.RUNNING


def test_while_a_stream_runs_a_step_reads_no_more_prompt_tokens_than_the_budget(tiny, reference):
    engine = by_hand(ContinuousEngine(*tiny, slots=8, prefill_budget=25))
    lengths = [1, 21, 61, 21]  # the third is longer than the budget: it is read in pieces
    sequences = [engine.submit(prompt(i, n), SamplingParams(9, ignore_eos=True))
                 for i, n in enumerate(lengths)]
    read = []
    generated = []
    for _ in range(5):
        engine.step()
        read.append([min(s.position, s.prefill_end) for s in sequences])
        generated.append([len(s.generated_tokens) for s in sequences])
    assert read == [[0, 20, 0, 0], [0, 20, 25, 0], [0, 20, 50, 0], [0, 20, 60, 0], [0, 20, 60, 20]]
    assert [g[0] for g in generated] == [1, 2, 3, 4, 5], "a running stream gets one a step"
    assert generated[-1] == [5, 5, 2, 1]
    for i, s in enumerate(sequences):
        assert s.generated_tokens == reference(prompt(i, lengths[i]), 9)[:len(s.generated_tokens)]


def test_while_no_stream_runs_a_step_reads_a_piece_for_every_slot(tiny):
    engine = by_hand(ContinuousEngine(*tiny, slots=4, prefill_budget=25))
    sequences = [engine.submit(prompt(i, 41), SamplingParams(9, ignore_eos=True)) for i in range(3)]
    engine.step()
    assert [s.position for s in sequences] == [41, 41, 0], "4 pieces of 25: 40, 40 and no more"
    engine.step()
    assert [s.position for s in sequences] == [42, 42, 25], "now two streams run"


@pytest.mark.parametrize("engine_class", [StaticEngine, ContinuousEngine])
@pytest.mark.parametrize("length", [1, 2, 5, 14])
def test_every_token_is_read_once_at_its_own_position(engine_class, length, tiny):
    engine = by_hand(engine_class(*tiny, slots=1))
    engine.runner.piece = engine.piece = 4
    read = []
    forward = engine.runner.forward

    def note(tokens, positions, slots, span):
        read.extend(zip(tokens[0].tolist(), positions[0].tolist()))
        return forward(tokens, positions, slots, span)

    engine.runner.forward = note
    sequence = engine.submit(prompt(length, length), SamplingParams(3, ignore_eos=True))
    while sequence.status is not Status.FINISHED:
        engine.step()
    tokens = sequence.prompt_tokens + sequence.generated_tokens
    assert read == [(token, position) for position, token in enumerate(tokens[:-1])]
    assert sequence.position == len(tokens) - 1, "nobody reads the last token"


def test_a_steps_news_goes_to_the_outbox_in_one_call_and_an_end_with_the_last_token(tiny):
    calls = []
    engine = ContinuousEngine(*tiny, slots=2)
    engine.open(calls.append)
    short, long = (engine.submit(prompt(i, 5), SamplingParams(n, ignore_eos=True))
                   for i, n in ((1, 1), (2, 2)))
    for _ in range(3):
        engine.step()
    [only] = short.generated_tokens
    [first, last] = long.generated_tokens
    assert calls == [[(short, only), (short, None), (long, first)], [(long, last), (long, None)]]
    assert short.queue.empty() and long.queue.empty(), "they went to the outbox alone"


@ALL
def test_what_cannot_be_served_is_refused_with_the_limit_in_the_message(engine_class, tiny):
    engine = by_hand(engine_class(*tiny, max_len=64, max_waiting=2))
    with pytest.raises(PromptTooLong, match="60 prompt tokens .* limit of 64"):
        engine.submit(prompt(1, 60), SamplingParams(5))
    for tokens, params in (([], FOREVER), ([1], SamplingParams(0)), ([1], SamplingParams(-3)),
                           ([-1], SamplingParams(4)), ([512], SamplingParams(4))):
        with pytest.raises(ValueError, match="under 512"):
            engine.submit(tokens, params)
    for _ in range(2):
        engine.submit([1], SamplingParams(4))
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        engine.submit([1], SamplingParams(4))
    engine.close(None)
    with pytest.raises(EngineStopped):
        engine.submit([1], SamplingParams(4))


@ALL
def test_stop_with_drain_finishes_and_without_drain_aborts(engine_class, tiny):
    async def main(drain):
        engine = engine_class(*tiny, slots=2)
        await engine.start()
        sequences = [engine.submit(prompt(i, 5), FOREVER) for i in range(5)]
        tasks = [asyncio.create_task(collect(s)) for s in sequences]
        await asyncio.wait_for(engine.stop(drain), 60)
        await asyncio.wait_for(asyncio.gather(*tasks), 60)
        with pytest.raises(EngineStopped):
            engine.submit([1], FOREVER)
        assert not engine.thread.is_alive()
        return {s.finish_reason for s in sequences}

    assert asyncio.run(main(drain=True)) == {"length"}
    assert "abort" in asyncio.run(main(drain=False))


@ALL
def test_when_a_step_raises_every_waiter_gets_an_error(engine_class, tiny, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda args: None)  # the traceback is expected

    async def main():
        engine = engine_class(*tiny, slots=2)
        engine.step = lambda: 1 / 0
        await engine.start()
        outcomes = []
        try:
            for i in range(4):
                outcomes.append(asyncio.create_task(collect(engine.submit(prompt(i, 4), FOREVER))))
        except EngineStopped:
            pass
        results = await asyncio.wait_for(asyncio.gather(*outcomes, return_exceptions=True), 30)
        assert results and all(isinstance(r, EngineStopped) for r in results)
        engine.thread.join(10)
        assert engine.stopping and not engine.waiting

    asyncio.run(main())


def test_an_engine_can_be_started_again(tiny, reference):
    async def main():
        engine = ContinuousEngine(*tiny)
        for _ in range(2):
            await engine.start()
            output = await collect(engine.submit(prompt(2, 7), SamplingParams(6, ignore_eos=True)))
            await engine.stop()
        return output

    assert asyncio.run(main()) == reference(prompt(2, 7), 6)


def test_an_engine_that_runs_cannot_be_started_once_more(tiny):
    async def main():
        engine = ContinuousEngine(*tiny)
        await engine.start()
        with pytest.raises(RuntimeError, match="runs already"):
            await engine.start()
        output = await collect(engine.submit([1, 2], SamplingParams(4, ignore_eos=True)))
        await engine.stop()
        return output

    assert len(asyncio.run(main())) == 4


def test_a_model_that_cannot_be_had_is_one_sentence(tmp_path):
    with pytest.raises(ModelUnavailable, match="random:tiny"):
        load_model("random:huge")
    with pytest.raises(ModelUnavailable, match="smollm2"):
        load_model(str(tmp_path / "nothing"))


def test_a_seeded_request_of_the_baseline_does_not_fix_the_draws_of_the_next(tiny):
    drawn = []
    for _ in range(3):
        for seed in (1, None):
            params = SamplingParams(30, temperature=1.0, seed=seed, ignore_eos=True)
            drawn.append(tuple(generate_tokens(tiny[0], [1, 2, 3], params)))
    assert len(set(drawn[::2])) == 1
    assert len(set(drawn)) == 4

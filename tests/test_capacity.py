"""The simulation schedules as the engine does, and the step model is the one that was measured."""
import functools
import json
from dataclasses import replace

import pytest
from conftest import by_hand, prompt
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import capacity, plan
from bench.simulate import ROUTES, Replica, StepModel, simulate, think_time
from bench.steps import NotedEngine, NotedRunner, fit, from_json, to_json
from cbserver.batch import BatchRunner
from cbserver.model.sampling import SamplingParams
from cbserver.scheduler import ContinuousEngine
from cbserver.sequence import Status
from load.process import LoadFailed


class EverySecond(StepModel):
    """A step takes one second, whatever is in it."""

    def by_rows(self, slots):
        return [1.0] * (slots + 1)


UNIT = EverySecond((), 0.0, 0.0, 0.0)
CPU = StepModel(((1, 0.03), (4, 0.05), (16, 0.12)), 1e-6, 0.01, 0.0008,
                overhead=((1, 0.004), (40, 0.02)))
MIX = [(20, 8), (40, 60), (16, 16), (60, 120)]


class InPieces(BatchRunner):
    """A BatchRunner that reads pieces of another size."""

    def __init__(self, *arguments, piece):
        super().__init__(*arguments)
        self.piece = piece


def steps_of(engine, arrivals, wanted):
    """[(step of its first token, of its last)] of a real engine that is stepped once a second."""
    sequences = {}
    seen = {}
    tokens_of = {}
    now = 0
    while len(seen) < len(wanted) or not all(s.status is Status.FINISHED
                                             for s in sequences.values()):
        for i, arrival in enumerate(arrivals):
            if arrival == now:
                length, tokens = wanted[i]
                sequences[i] = engine.submit(prompt(i, length),
                                             SamplingParams(tokens, ignore_eos=True))
        now += 1
        if engine.waiting or engine.running:
            engine.step()
        for i, s in sequences.items():
            if len(s.generated_tokens) > tokens_of.get(i, 0):
                tokens_of[i] = len(s.generated_tokens)
                seen[i] = seen.get(i, (now, now))[0], now
        assert now < 2000
    return [seen[i] for i in range(len(wanted))]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_every_token_comes_in_the_same_step_as_in_the_real_engine(tiny, data):
    slots = data.draw(st.integers(1, 5))
    budget = data.draw(st.integers(4, 40))
    piece = data.draw(st.integers(4, budget))
    wanted = data.draw(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 12)), min_size=1,
                                max_size=12))
    arrivals = data.draw(st.lists(st.integers(0, 20), unique=True, min_size=len(wanted),
                                  max_size=len(wanted)))  # the first of two would start a step
    engine = by_hand(ContinuousEngine(*tiny, slots=slots, max_len=128, prefill_budget=budget,
                                      runner=functools.partial(InPieces, piece=piece)))
    real = steps_of(engine, arrivals, wanted)
    model = replace(UNIT, budget=budget, piece=piece)
    run = simulate(model, wanted, len(wanted), len(wanted), slots=slots,
                   thinks=lambda i: float(arrivals[i]))
    assert [(round(a), round(b)) for a, b in zip(run.first, run.end)] == real


def test_many_steps_at_once_take_as_long_as_one_by_one():
    replica = Replica(CPU, 16, MIX)
    replica.comes(1, 0.0)
    replica.step_ends()
    each = []
    total = 0.0
    for k in range(50):
        total += replica.base[1] + CPU.per_key * (replica.span + k)
        each.append(total)
        assert replica.duration(k + 1) == pytest.approx(total)
    for k, boundary in enumerate(each):
        middle = replica.begin + boundary - 0.001
        assert replica.steps_until(middle) == k + 1, "the first boundary that is not before it"


@pytest.mark.parametrize("route", ROUTES)
def test_every_request_is_answered_and_no_answer_ends_before_it_began(route):
    run = simulate(CPU, MIX, users=60, requests=3000, replicas=3, think=2.0, route=route)
    assert all(s < f <= e for s, f, e in zip(run.start, run.first, run.end))
    assert 0 < run.busy <= 1


def p99(route, users):
    run = simulate(CPU, MIX, users, 6000, replicas=8, think=4.0, route=route)
    return sorted(f - s for s, f in zip(run.start, run.first))[5940]


def test_a_route_that_knows_the_load_has_the_shorter_tail():
    assert p99("least loaded", 250) < p99("two choices", 250) < p99("in turn", 250)


def test_a_closed_loop_obeys_littles_law():
    run = simulate(CPU, MIX, users=40, requests=4000, replicas=1, think=0.0)
    inside = sum(e - s for s, e in zip(run.start, run.end)) / max(run.end)
    assert inside == pytest.approx(40, rel=0.02), "nobody thinks: all users are always inside"


def test_an_unknown_route_is_refused_by_name():
    with pytest.raises(ValueError, match="two choices"):
        simulate(CPU, MIX, 1, 1, route="luck")


def test_the_fit_finds_the_model_that_made_the_steps():
    made = StepModel(((1, 0.03), (2, 0.036), (4, 0.05), (8, 0.07), (16, 0.12)), 2e-6, 0.01, 0.0008)
    base = made.by_rows(16)
    steps = []
    for k in range(800):
        rows = k % 17
        span = 20 + 37 * k % 300
        passes = int(k % 5 == 0)
        tokens = passes * (64 + k % 128)
        steps.append([rows, span if rows else 0, passes, tokens, base[rows] + made.per_key
                      * rows * span * (rows > 0) + 0.01 * passes + 0.0008 * tokens])
    found, quality = fit(steps, 16)
    assert quality["r2"] > 0.9999
    assert [k for k, _ in found.decode] == [1, 2, 4, 8, 16]
    assert [s for _, s in found.decode] == pytest.approx([s for _, s in made.decode])
    assert (found.per_key, found.per_pass, found.per_token) == pytest.approx((2e-6, 0.01, 0.0008))
    late = [[*content[:4], timed[4]] for content, timed in zip(steps[1:], steps)]
    shifted, quality = fit(late, 16, lag=1)
    assert quality["r2"] > 0.9999 and shifted.lag == 1
    assert (shifted.per_key, shifted.per_pass, shifted.per_token) == pytest.approx(
        (2e-6, 0.01, 0.0008))


def test_a_promise_that_cannot_be_kept_is_refused_with_the_best_there_is(tmp_path):
    planner = plan.Planner(CPU, 16, MIX, think=1.0, target=0.001, least=200)
    with pytest.raises(LoadFailed, match="raise --target"):
        planner.fewest(5, "least loaded", 1)


def load(speed, speed_off, ttft_off):
    return {"tokens_per_s": [speed, speed, speed_off], "ttft_p99_ms": [9.0, 9.0, ttft_off]}


def test_a_plan_goes_no_further_than_the_check_of_the_simulation_held():
    light, middle, heavy = load(10, 3.0, -19.0), load(20, -9.9, 12.0), load(30, 1.0, -20.5)
    assert plan.most_checked([light, middle]) == 20
    assert plan.most_checked([light, middle, heavy]) == 20, "its p99 was off by more than 20 %"
    assert plan.most_checked([light, load(20, 10.1, 0.0)]) == 10, "its tokens/s by more than 10 %"
    with pytest.raises(LoadFailed, match="wrong at every load"):
        plan.most_checked([heavy])
    free = plan.Planner(CPU, 16, MIX, think=1.0, target=10.0, least=400)
    bound = plan.Planner(CPU, 16, MIX, think=1.0, target=10.0, least=400, most=60)
    far, near = (planner.fewest(60, "least loaded", 2) for planner in (free, bound))
    assert far["tokens_per_s"] > 60 >= near["tokens_per_s"]
    assert near["replicas"] > far["replicas"]


def test_thinking_is_the_same_for_the_real_crowd_and_the_simulated():
    assert think_time(2, 0, 5) == think_time(2, 0, 5) != think_time(2, 0, 6)
    assert think_time(0, 0, 5) == 0


def test_the_noted_engine_notes_every_step(tiny):
    log = {}
    engine = by_hand(NotedEngine(*tiny, slots=2, max_len=64, log=log))
    engine.submit(prompt(1, 9), SamplingParams(3, ignore_eos=True))
    for _ in range(3):
        engine.step()
    assert [step[:4] for step in log["steps"]] == [[1, 9, 1, 8], [1, 10, 0, 0], [1, 11, 0, 0]]
    assert isinstance(engine.runner, NotedRunner) and all(
        step[4] > 0 for step in log["steps"])
    assert log["budget"] == engine.prefill_budget and log["piece"] == engine.piece


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_measure_and_plan_run_from_a_terminal_and_write_what_they_print(tmp_path, capsys):
    out = tmp_path / "capacity.json"
    assert capacity.main(["measure", "--model", "random:tiny", "--slots", "4", "--max-len", "128",
                          "--longest", "16", "--users", "6", "--think", "0.05", "--repeats", "1",
                          "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [row["users"] for row in result["verdict"]] == [6]
    assert capacity.validation_table(result) in capsys.readouterr().out
    assert len(from_json(result["step_model"]).by_rows(4)) == 5
    result["step_model"] = to_json(CPU)  # what a busy machine measures may make no sense
    result["verdict"] = [load(1e6, 0.0, 0.0)]  # a busy machine's may not hold
    out.write_text(json.dumps(result))
    assert capacity.main(["plan", str(out), "--users", "40", "--think", "1", "--target",
                          "1000", "--least", "2000", "--speed", "5000"]) == 0
    result = json.loads(out.read_text())
    assert {row["route"] for row in result["plan"]["rows"]} == set(ROUTES)
    assert plan.plan_table(result) in capsys.readouterr().out
    plan.capacity_figure(result).savefig(tmp_path / "capacity.png")

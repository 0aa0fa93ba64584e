"""How many replicas for how many users: measure steps, fit a model, check it, plan with it.

    python -m load.capacity measure --out figures/data/capacity-cpu.json
    python -m load.capacity plan figures/data/capacity-h100.json
"""
import argparse
import json
import math
import re
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cbserver.metrics import percentile
from cbserver.scheduler import ContinuousEngine
from load import users as crowd
from load.results import hardware, versions, write_json
from load.run import exit_with
from load.server import LoadFailed, ServerProcess, http, python_module
from load.simulate import ROUTES, StepModel, passes_of, simulate, think_time
from load.workload import TokenRequest, token_workload, vocabulary

# The steps of a real server


class Noted:
    """A runner that remembers what its last step read and decoded."""

    def __init__(self, runner):
        self.runner, self.pieces, self.rows, self.span = runner, [], 0, 0

    def prefill(self, sequences, budget):
        before = [s.position for s in sequences]
        self.runner.prefill(sequences, budget)
        self.pieces = [(start, s.position) for start, s in zip(before, sequences)
                       if s.position > start]

    def decode(self, sequences):
        self.rows = max((s.slot + 1 for s in sequences), default=0)
        self.span = max((s.position for s in sequences), default=0)
        return self.runner.decode(sequences)


class Recorded(ContinuousEngine):
    """Notes [rows, span, passes, prompt tokens with padding, seconds] of every step in `log`.

    A step's time runs from the end of the one before, if there was work: the engine's thread also
    waits for the lock, and for Python's while the event loop writes to the clients.
    """

    log = []  # of the one engine of a process

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.runner, self.ended = Noted(self.runner), None
        self.log.clear()

    def step(self):
        begin = self.ended or time.perf_counter()
        super().step()
        noted, now = self.runner, time.perf_counter()
        self.log.append([noted.rows, noted.span, *passes_of(noted.pieces), now - begin])
        self.ended = now if self.running or self.waiting else None


def serve(arguments):
    """`python -m cbserver`, with an engine that notes its steps; they are in a file at the end."""
    from cbserver import server

    server.ENGINES["continuous"] = Recorded
    log, *rest = arguments
    try:
        server.main(rest)
    finally:
        Path(log).write_text(json.dumps(Recorded.log))


# The model of a step


def fit(steps, slots, lag=0):
    """(StepModel, how well it fits) by least squares over measured steps.

    steps: what `Recorded` writes. lag: on a GPU a step's time is that of the work launched in the
    one before, so what was in it is looked up there.
    """
    rows = np.array([[*content[:4], timed[4]] for content, timed in
                     zip(steps, steps[lag:]) if content[0] or content[2]])
    knots = sorted({k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k < slots} | {slots})
    knots = [k for k in knots if (rows[:, 0] >= k).sum() >= 10]
    count, span, passes, tokens, seconds = rows.T
    # A hat for each knot: the weights with which a line from knot to knot mixes their values.
    hats = [np.interp(count, knots, np.eye(len(knots))[i]) * (count > 0)
            for i in range(len(knots))]
    columns = np.stack([*hats, count * span, passes, tokens], 1)
    found, *_ = np.linalg.lstsq(columns, seconds, rcond=None)
    off = columns @ found - seconds
    r2 = 1 - (off @ off) / ((seconds - seconds.mean()) ** 2).sum()
    *decode, per_key, per_pass, per_token = map(float, found)
    model = StepModel(tuple(zip(knots, decode)), max(per_key, 0.0), max(per_pass, 0.0),
                      max(per_token, 0.0), lag)
    return model, {"steps": len(rows), "r2": round(float(r2), 4),
                   "mean_error_ms": round(float(1e3 * np.abs(off).mean()), 3),
                   "mean_step_ms": round(float(1e3 * seconds.mean()), 3),
                   "slowest": [[*map(int, row[:4]), round(1e3 * row[4], 1)] for row in
                               rows[np.argsort(seconds)[:-9:-1]].tolist()]}


def as_json(model):
    return {"decode_ms": [[k, round(1e3 * s, 4)] for k, s in model.decode],
            "per_key_us": round(1e6 * model.per_key, 5),
            "per_pass_ms": round(1e3 * model.per_pass, 4),
            "per_token_ms": round(1e3 * model.per_token, 5), "lag": model.lag,
            "overhead_ms": [[n, round(1e3 * s, 3)] for n, s in model.overhead]}


def from_json(found):
    return StepModel(tuple((k, ms / 1e3) for k, ms in found["decode_ms"]),
                     found["per_key_us"] / 1e6, found["per_pass_ms"] / 1e3,
                     found["per_token_ms"] / 1e3, found["lag"],
                     tuple((n, ms / 1e3) for n, ms in found["overhead_ms"]))


# Measure and check


def calibrate(options, folder):
    """Serve from few users to more than there are slots, writing the steps down: (model, fit)."""
    log = folder / "steps.json"
    command = python_module("load.capacity", "serve", log, *server_options(options))
    with ServerProcess(command, folder / "calibration.log") as server:
        warm_up(server.url, options)
        waits = {}  # in flight -> how much later a client sees its first token than the engine
        for number in sorted({1, 2, 3, 5, options.slots // 2, 3 * options.slots // 4,
                              options.slots, 3 * options.slots // 2} - {0}):
            requests = prompts(options, 4 * number + 6, seed=1000 + number)
            before = first_tokens(server.url)
            outcomes = send(server.url, requests, number, thinks=lambda _: 0)
            count, seconds = (b - a for a, b in zip(before, first_tokens(server.url)))
            waits[number] = max(0.0, statistics.fmean(map(first, outcomes)) - seconds / count)
            print(f"calibration: {number} users, {len(requests)} requests", flush=True)
    steps = json.loads(log.read_text())
    model, quality = fit(steps, options.slots, options.lag)
    return replace(model, overhead=tuple(waits.items())), quality


def server_options(options):
    return ["--model", options.model, "--max-batch", options.slots, "--max-len", options.max_len]


def warm_up(url, options):
    send(url, prompts(options, 2, seed=999), 2)


def prompts(options, count, seed):
    """Requests of the chosen lengths, as token ids: list[TokenRequest]."""
    made = token_workload(options.workload, count, seed, options.longest,
                          vocabulary(options.model))
    limit = options.max_len // 2
    return [TokenRequest(r.prompt_tokens[:limit], r.max_tokens) for r in made]


def send(url, requests, number, thinks=None):
    outcomes, _ = crowd.run(url, requests, number, thinks)
    if failed := [o.error for o in outcomes if o.error]:
        raise LoadFailed(f"{len(failed)} requests failed, the first with: {failed[0]}")
    return outcomes


def first(outcome):
    return outcome.event_times[0] - outcome.start


def first_tokens(url):
    """(count, sum of seconds) of the server's own times to the first token."""
    text = http(f"{url}/metrics")[1]
    return tuple(float(re.search(rf"time_to_first_token_seconds_{part} (\S+)", text)[1])
                 for part in ("count", "sum"))


def compare(options, model, folder):
    """The real server and the simulated one, with the same users and requests: list of rows.

    A fresh server for each repeat; every other one takes the loads from the heaviest down.
    """
    rows = []
    for repeat in range(options.repeats):
        with ServerProcess(python_module("cbserver", *server_options(options)),
                           folder / "server.log") as server:
            warm_up(server.url, options)
            for number in options.users[::-1] if repeat % 2 else options.users:
                rows.append(one_load(server.url, options, model, number, repeat))
                print(f"{number} users, repeat {repeat}: {rows[-1]['measured']} measured, "
                      f"{rows[-1]['simulated']} simulated", flush=True)
    return rows


def one_load(url, options, model, number, repeat):
    """What `number` users see of the server at `url`, and of a simulated one."""
    requests = prompts(options, max(40, options.requests * number // 8), seed=repeat)
    lengths = [(len(r.prompt_tokens), r.max_tokens) for r in requests]

    def thinks(i):
        return think_time(options.think, repeat, i)

    real = send(url, requests, number, thinks)
    begin = time.perf_counter()
    run = simulate(model, lengths, number, len(requests), slots=options.slots, thinks=thinks)
    return {"users": number, "repeat": repeat, "requests": len(requests),
            "measured": seen([o.start for o in real], [o.event_times[0] for o in real],
                             [o.event_times[-1] for o in real], lengths),
            "simulated": seen(run.start, run.first, run.end, lengths),
            "simulation_s": round(time.perf_counter() - begin, 3)}


def seen(start, first, end, lengths):
    """What a crowd saw: tokens/s and TTFT, in ms."""
    ttft = [1e3 * (f - s) for s, f in zip(start, first)]
    tokens = sum(wanted for _, wanted in lengths)
    return {"tokens_per_s": round(tokens / (max(end) - min(start)), 2),
            "ttft_p50_ms": round(percentile(ttft, 50), 2),
            "ttft_p99_ms": round(percentile(ttft, 99), 2)}


def verdict(rows):
    """For each load the medians over repeats, and how far the simulation is off, in percent.

    Off is the median over repeats of simulated ÷ measured: each repeat has requests of its own.
    """
    found = []
    for number in sorted({row["users"] for row in rows}):
        mine = [row for row in rows if row["users"] == number]
        entry = {"users": number}
        for name in ("tokens_per_s", "ttft_p50_ms", "ttft_p99_ms"):
            real, made = ([row[kind][name] for row in mine] for kind in ("measured", "simulated"))
            off = statistics.median(b / a for a, b in zip(real, made)) - 1
            entry[name] = [statistics.median(real), statistics.median(made), round(100 * off, 1)]
        found.append(entry)
    return found


def measure(options):
    with tempfile.TemporaryDirectory() as folder:
        model, quality = calibrate(options, Path(folder))
        print(f"fit: {quality} {as_json(model)}", flush=True)
        rows = compare(options, model, Path(folder))
    result = {"command": options.command, "hardware": hardware(), "model": options.model,
              "versions": versions("torch", "transformers", "fastapi", "uvicorn", "numpy"),
              "slots": options.slots, "max_len": options.max_len, "think_s": options.think,
              "fit": quality,
              "step_model": as_json(model), "options": {
                  "workload": options.workload, "longest": options.longest,
                  "model": options.model, "max_len": options.max_len},
              "loads": rows, "verdict": verdict(rows)}
    write_json(result, options.out)
    print(validation_table(result))


def validation_table(result):
    """Measured against simulated, as Markdown."""
    lines = ["| users | tokens/s measured | simulated | off | TTFT p99 | simulated | off |",
             "|---:|---:|---:|---:|---:|---:|---:|"]
    for row in result["verdict"]:
        speed, tail = row["tokens_per_s"], row["ttft_p99_ms"]
        lines.append(f"| {row['users']} | {speed[0]:,.1f} | {speed[1]:,.1f} | {speed[2]:+.1f} % | "
                     f"{tail[0]:,.0f} ms | {tail[1]:,.0f} ms | {tail[2]:+.1f} % |")
    return "\n".join(lines)


# Plan


@dataclass(frozen=True)
class Planner:
    """How a crowd fares on many replicas. lengths: of the requests; think, target: seconds."""

    model: StepModel
    slots: int
    lengths: list
    think: float
    target: float  # of p99 TTFT
    least: int = 20_000  # requests of a simulation

    def try_out(self, users, replicas, route, requests):
        """(p99 TTFT, median time of an answer) once the crowd has settled, and the share of the
        whole time, its beginning and end included, in which a replica computes."""
        run = simulate(self.model, self.lengths, users, requests, replicas, self.slots,
                       route=route, think=self.think)
        begin = (self.think + run.supplied) / 2  # everybody began with a thought
        settled = [(f - s, e - s) for s, f, e in zip(run.start, run.first, run.end)
                   if begin < s < run.supplied]
        ttft, took = zip(*settled)
        return percentile(ttft, 99), percentile(took, 50), run.busy

    def fewest(self, users, route, guess):
        """The smallest number of replicas that keeps the target, to 2 %: a dict for the table."""
        requests, tried = max(self.least, 4 * users), {}
        factor = 1.25 if users < 100_000 else 1.02  # the guess comes from a smaller crowd

        def good(replicas):
            tried[replicas] = self.try_out(users, replicas, route, requests)
            print(f"{users:,} users, {route}, {replicas:,} replicas: p99 TTFT "
                  f"{1e3 * tried[replicas][0]:,.0f} ms", flush=True)
            return tried[replicas][0] <= self.target

        high = low = max(1, guess)
        while not good(high):
            if high > users:
                raise LoadFailed(f"A replica for each user gives a p99 TTFT of "
                                 f"{1e3 * tried[high][0]:,.0f} ms: raise --target above that.")
            low, high = high, math.ceil(high * factor)
        while low == high > 1:  # the guess was good: how much less would do?
            low = min(high - 1, int(high / factor))
            high = low if good(low) else high
        while high - low > max(1, high // 50):
            middle = (low + high) // 2
            low, high = (low, middle) if good(middle) else (middle, high)
        p99, took, busy = tried[high]
        return {"users": users, "route": route, "replicas": high, "requests": requests,
                "users_per_replica": round(users / high, 1), "ttft_p99_ms": round(1e3 * p99, 1),
                "answer_p50_s": round(took, 3), "busy": round(busy, 3)}

    def curve(self, route, replicas, most):
        """[[users a replica, p99 TTFT in ms], ...] up to `most`."""
        loads = sorted({max(1, round(most * part / 12)) for part in range(3, 15)})
        return [[load, round(1e3 * self.try_out(load * replicas, replicas, route, max(
            self.least, 4 * load * replicas))[0], 1)] for load in loads]


def make_plan(options):
    """Add the table and the curves to what `measure` wrote."""
    result = json.loads(options.data.read_text())
    model, slots = from_json(result["step_model"]), result["slots"]
    lengths = [(len(r.prompt_tokens), r.max_tokens) for r in
               prompts(argparse.Namespace(**result["options"]), 4096, seed=7)]
    planner = Planner(model, slots, lengths, options.think, options.target / 1e3, options.least)
    answer = statistics.fmean(wanted for _, wanted in lengths)
    rate = slots / (answer * model.by_rows(slots)[slots])  # answers a second, all slots at work
    rows = []
    for route in ROUTES:
        per_replica = 0.8 * rate * options.think
        for users in options.users:
            rows.append(planner.fewest(users, route, round(users / per_replica)))
            if rows[-1]["replicas"] > 1:  # one that has nothing to do says nothing of the next
                per_replica = rows[-1]["users_per_replica"]
    most = max(row["users_per_replica"] for row in rows)
    begin = time.perf_counter()
    simulate(model, lengths, options.speed // 10, options.speed,
             max(1, round(options.speed / 10 / most)), slots, think=options.think)
    result["plan"] = {"command": options.command, "target_ms": options.target,
                      "think_s": options.think, "rows": rows,
                      "timed": [options.speed, round(time.perf_counter() - begin, 1)],
                      "replicas": 16, "curves": {route: planner.curve(route, 16, most)
                                                 for route in ROUTES}}
    write_json(result, options.data)
    print(plan_table(result))


def plan_table(result):
    """Replicas for each crowd and route, as Markdown."""
    rows = result["plan"]["rows"]
    heads = [f"{route}: replicas (users each)" for route in ROUTES]
    lines = [f"| users | {' | '.join(heads)} |",
             "|---:|" + "---:|" * len(ROUTES)]
    for users in sorted({row["users"] for row in rows}):
        cells = [f"{row['replicas']:,} ({row['users_per_replica']:,.0f})" for route in ROUTES
                 for row in rows if (row["users"], row["route"]) == (users, route)]
        lines.append(f"| {users:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(result):
    """Left: the real server's p99 TTFT beside the simulated; right: what routing does to it."""
    import matplotlib.pyplot as plt

    from load.report import STYLE

    plan = result.get("plan")
    users = sorted({row["users"] for row in result["loads"]})
    with plt.rc_context(STYLE):
        drawn, panels = plt.subplots(1, 2 if plan else 1, figsize=(10 if plan else 5.5, 3.8),
                                     layout="constrained", squeeze=False)
        left, right = panels[0, 0], panels[0, -1]
        for kind, mark, color, aside in (("measured", "o", "#000000", -0.08),
                                         ("simulated", "x", "#0072B2", 0.08)):
            left.plot([users.index(row["users"]) + aside for row in result["loads"]],
                      [row[kind]["ttft_p99_ms"] for row in result["loads"]], mark, ms=8,
                      mfc="none", color=color, label=kind)
        left.set(xlabel=f"users of one server with {result['slots']} slots", yscale="log",
                 xticks=range(len(users)), xticklabels=users, xlim=(-0.5, len(users) - 0.5),
                 ylabel="TTFT p99, ms", title="One server, real and simulated")
        left.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
        left.legend(loc="upper left")
        if plan:
            colors = dict(zip(ROUTES, ("#D55E00", "#CC79A7", "#0072B2")))
            for route, points in plan["curves"].items():
                right.plot(*zip(*points), "o-", ms=4, color=colors[route], label=route)
            right.axhline(plan["target_ms"], color="black", ls="--", lw=1,
                          label=f"target, {plan['target_ms']:,.0f} ms")
            right.set(xlabel=f"users a replica ({plan['replicas']} replicas)", yscale="log",
                      ylabel="TTFT p99, ms", title="Simulated: which replica gets a request")
            right.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
            right.legend()
        drawn.suptitle(f"{result['model']} on {result['hardware']}", fontsize=10)
        return drawn


def parse(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m load.capacity",
                                     description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="what", required=True)
    add = commands.add_parser("measure", help="fit the step model and check it").add_argument
    add("--model", default="smollm2", help="as for cbserver (smollm2)")
    add("--slots", type=int, default=16, help="--max-batch of the server (16)")
    add("--max-len", type=int, default=512, help="--max-len of the server (512)")
    add("--lag", type=int, default=0, help="1 for a GPU: a token is seen one step later (0)")
    add("--workload", default="uniform", choices=("uniform", "chat"), help="lengths (uniform)")
    add("--longest", type=int, default=64, help="of uniform: longest prompt and answer (64)")
    add("--users", type=int, nargs="+", default=[6, 16, 40], help="the loads to check (6 16 40)")
    add("--think", type=float, default=2, help="mean seconds between two requests of a user (2)")
    add("--requests", type=int, default=30, help="for each 8 users, but 40 at least (30)")
    add("--repeats", type=int, default=3, help="of each load (3)")
    add("--out", type=Path, default=Path("figures/latest/capacity.json"), help="the result")
    plan = commands.add_parser("plan", help="replicas for 100 to a million users")
    plan.add_argument("data", type=Path, help="what `measure` wrote; the plan is added to it")
    plan.add_argument("--target", type=float, default=500, help="p99 TTFT, ms (500)")
    plan.add_argument("--think", type=float, default=30, help="mean seconds of thought (30)")
    plan.add_argument("--users", type=int, nargs="+", default=[100, 10_000, 100_000, 1_000_000],
         help="the crowds, from small to large (100 10000 100000 1000000)")
    plan.add_argument("--least", type=int, default=20_000, help="requests a simulation (20000)")
    plan.add_argument("--speed", type=int, default=1_000_000, help="requests to time it with")
    options = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    if options.what == "plan" and not options.think > 0:
        parser.error("--think must be above 0")
    options.command = shlex.join(["python", "-m", "load.capacity", *map(str, words)])
    return options


def main(arguments=None):
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["serve"]:
        return serve(words[1:])
    options = parse(arguments)
    return exit_with(lambda: {"measure": measure, "plan": make_plan}[options.what](options))


if __name__ == "__main__":
    sys.exit(main())

"""How many replicas for how many users: measure steps, fit a model, check it, plan with it.

    python -m bench.capacity measure --out figures/data/capacity-cpu.json
    python -m bench.capacity plan figures/data/capacity-h200.json
"""
import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from bench.plan import lengths_of, make_plan, prompts
from bench.results import command_line, hardware, versions, write_json
from bench.simulate import simulate, think_time
from bench.steps import NotedEngine, fit, to_json
from cbserver import cli
from cbserver.metrics import percentile
from load import client
from load.process import ServerProcess, http, python_module
from load.run import exit_with

SEEN = ("tokens_per_s", "ttft_p50_ms", "ttft_p99_ms")


def measure(options):
    """Fit a model to a server's steps, check it against the server, write both as they come."""
    with tempfile.TemporaryDirectory() as folder:
        model, quality = calibrate(options, Path(folder))
        print(f"fit: {quality} {to_json(model)}", flush=True)
        result = {"command": options.command, "hardware": hardware(), "model": options.model,
                  "versions": versions("torch", "transformers", "fastapi", "uvicorn", "numpy"),
                  "slots": options.slots, "max_len": options.max_len, "think_s": options.think,
                  "fit": quality, "step_model": to_json(model), "options": setting(options),
                  "loads": []}
        for row in check(options, model, Path(folder)):
            result["loads"].append(row)
            result["verdict"] = verdict(result["loads"])
            write_json(result, options.out)
    print(validation_table(result))


def setting(options):
    """What decides which prompts are sent, as `bench.plan.prompts` takes it."""
    return {"workload": options.workload, "longest": options.longest, "model": options.model,
            "max_len": options.max_len}


def server_options(options):
    return ["--model", options.model, "--max-batch", options.slots, "--max-len", options.max_len,
            "--no-prefix-reuse", *options.server_args.split()]


# The steps of a real server


def serve(arguments):
    """`python -m cbserver`, with an engine that notes its steps; they are in a file at the end."""
    path, *rest = arguments
    log = {}

    class ServingEngine(NotedEngine):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, log=log, **named)

    try:
        cli.main(rest, ServingEngine)
    finally:
        Path(path).write_text(json.dumps(log), encoding="utf-8")


def calibrate(options, folder):
    """Serve from few users to more than there are slots, writing the steps down: (model, fit)."""
    log = folder / "steps.json"
    command = python_module("bench.capacity", "serve", log, *server_options(options))
    waits = []  # (requests in flight, how much later a client sees its first token, seconds)
    with ServerProcess(command, folder / "calibration.log") as server:
        warm_up(server.url, options)
        for users in crowds(options.slots):
            waits.append((users, time_on_the_way(server.url, options, users)))
            print(f"calibration: {users} users", flush=True)
    noted = json.loads(log.read_text(encoding="utf-8"))
    model, quality = fit(noted["steps"], options.slots, options.lag)
    return replace(model, overhead=tuple(waits), budget=noted["budget"],
                   piece=noted["piece"]), quality


def crowds(slots):
    """Numbers of users from one to half as many again as there are slots: sorted list."""
    wanted = {1, 2, 3, 5, slots // 2, 3 * slots // 4, slots, 3 * slots // 2}
    return sorted(wanted - {0})


def time_on_the_way(url, options, users):
    """Seconds that HTTP takes of a request: a first token as the client and the server time it."""
    requests = prompts(setting(options), 4 * users + 6, seed=1000 + users)
    count_before, seconds_before = first_tokens(url)
    outcomes = send(url, requests, users, thinks=lambda _: 0)
    count, seconds = first_tokens(url)
    by_the_client = statistics.fmean(outcome.ttft for outcome in outcomes)
    by_the_server = (seconds - seconds_before) / (count - count_before)
    return max(0.0, by_the_client - by_the_server)


def first_tokens(url):
    """(count, sum of seconds) of the server's own times to the first token."""
    _, text = http(f"{url}/metrics")
    name = "time_to_first_token_seconds"
    count = re.search(rf"{name}_count (\S+)", text)
    seconds = re.search(rf"{name}_sum (\S+)", text)
    return float(count[1]), float(seconds[1])


def warm_up(url, options):
    """All slots once, and with them each process that serves HTTP: its first request is slow."""
    send(url, prompts(setting(options), 2 * options.slots, seed=999), options.slots)


def send(url, requests, users, thinks=None):
    """The outcomes of all requests; LoadFailed if one was not answered."""
    outcomes, _ = client.run(url, requests, users, thinks)
    client.expect_success(outcomes)
    return outcomes


# Measured against simulated


def check(options, model, folder):
    """The real server and the simulated one, with the same users and requests: yields rows.

    A fresh server for each repeat, with the budget that the calibrated one had; every other one
    takes the loads from the heaviest down.
    """
    for repeat in range(options.repeats):
        command = python_module("cbserver", *server_options(options), "--prefill-budget",
                                model.budget)
        with ServerProcess(command, folder / "server.log") as server:
            warm_up(server.url, options)
            for users in options.users[::-1] if repeat % 2 else options.users:
                row = one_load(server.url, options, model, users, repeat)
                print(f"{users} users, repeat {repeat}: {row['measured']} measured, "
                      f"{row['simulated']} simulated", flush=True)
                yield row


def one_load(url, options, model, users, repeat):
    """What so many users see of the server at `url`, and of a simulated one."""
    count = max(40, options.requests * users // 8)
    requests = prompts(setting(options), count, seed=repeat)
    lengths = lengths_of(requests)

    def thinks(i):
        return think_time(options.think, repeat, i)

    real = send(url, requests, users, thinks)
    begin = time.perf_counter()
    run = simulate(model, lengths, users, len(requests), slots=options.slots, thinks=thinks)
    took = time.perf_counter() - begin
    measured = seen([o.start for o in real], [o.event_times[0] for o in real],
                    [o.event_times[-1] for o in real], lengths)
    return {"users": users, "repeat": repeat, "requests": len(requests), "measured": measured,
            "simulated": seen(run.start, run.first, run.end, lengths),
            "simulation_s": round(took, 3)}


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
    for users in sorted({row["users"] for row in rows}):
        mine = [row for row in rows if row["users"] == users]
        entry = {"users": users}
        for name in SEEN:
            real = [row["measured"][name] for row in mine]
            made = [row["simulated"][name] for row in mine]
            off = statistics.median(m / r for r, m in zip(real, made)) - 1
            entry[name] = [statistics.median(real), statistics.median(made), round(100 * off, 1)]
        found.append(entry)
    return found


def validation_table(result):
    """Measured against simulated, as Markdown."""
    lines = ["| users | tokens/s measured | simulated | off | TTFT p99 | simulated | off |",
             "|---:|---:|---:|---:|---:|---:|---:|"]
    for row in result["verdict"]:
        real, made, off = row["tokens_per_s"]
        tail, made_tail, tail_off = row["ttft_p99_ms"]
        lines.append(f"| {row['users']} | {real:,.1f} | {made:,.1f} | {off:+.1f} % | "
                     f"{tail:,.0f} ms | {made_tail:,.0f} ms | {tail_off:+.1f} % |")
    return "\n".join(lines)


def parse(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.capacity",
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
    add("--server-args", default="", help="more options of the server, as one string")
    add("--out", type=Path, default=Path("figures/latest/capacity.json"), help="the result")
    add = commands.add_parser("plan", help="replicas for 100 to a million users").add_argument
    add("data", type=Path, help="what `measure` wrote; the plan is added to it")
    add("--target", type=float, default=500, help="p99 TTFT, ms (500)")
    add("--think", type=float, default=30, help="mean seconds of thought (30)")
    add("--users", type=int, nargs="+", default=[100, 10_000, 100_000, 1_000_000],
        help="the crowds, from small to large (100 10000 100000 1000000)")
    add("--least", type=int, default=20_000, help="requests a simulation (20000)")
    add("--speed", type=int, default=1_000_000, help="requests to time it with")
    options = parser.parse_args(arguments)
    if options.what == "plan" and not options.think > 0:
        parser.error("--think must be above 0")
    options.command = command_line("bench.capacity", arguments)
    return options


def main(arguments=None):
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["serve"]:
        return serve(words[1:])
    options = parse(arguments)
    if options.what == "plan":
        return exit_with(lambda: make_plan(options))
    return exit_with(lambda: measure(options))


if __name__ == "__main__":
    sys.exit(main())

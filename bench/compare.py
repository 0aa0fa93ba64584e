"""Serve the same model with one engine after the other, load each the same way, and report.

    python -m bench.compare --arms sequential,static,continuous --out figures/latest
"""
import argparse
import contextlib
import datetime
import functools
import json
import math
import os
import shlex
import statistics
import sys
import threading
import time
from pathlib import Path

import psutil

from bench import report
from bench.arms import run_child
from bench.results import command_line, first_gpu, hardware, order, versions, write_json
from cbserver.metrics import LATENCIES
from load.process import (
    LoadFailed,
    ServerProcess,
    first_model,
    gauges,
    make_folder,
    python_module,
    warm_up,
)
from load.run import add_load_options, cpu_curve, cpu_share, exit_with, read_records, run_load

# Every request reads its own prompt, so that only the batching differs.
ARMS = {
    "sequential": ["--engine", "sequential", "--max-batch", "1"],
    "static": ["--engine", "static"],
    "continuous": ["--engine", "continuous", "--no-prefix-reuse"],
    # Batching taken away and nothing else: the rest of a ratio to `sequential` is faster kernels.
    "one-slot": ["--engine", "continuous", "--no-prefix-reuse", "--max-batch", "1"],
}
SPEEDS = ["tokens_per_s", "requests_per_s", *(f"{name}_ms" for name in LATENCIES)]
POINTS = 120  # of a utilisation curve on disk


# How long an arm's load takes beside sequential's, roughly (figures/data/compare-cpu.json).
SHARE = {"sequential": 1.0, "one-slot": 1.0, "static": 0.45, "continuous": 0.25}


class TimeLeft:
    """How long the loads of a comparison still take, by the pace of what is done so far.

    arms: those of every run, in order. clock: seconds.
    """

    def __init__(self, arms, clock=time.monotonic):
        self.total = sum(SHARE[arm] for arm in arms)
        self.clock = clock
        self.begin = clock()
        self.before = 0.0  # shares done before this run
        self.share = 0.0  # of the run at work

    def start(self, arm):
        """The run before is done; the next is of this arm."""
        self.before += self.share
        self.share = SHARE[arm]

    def skip(self):
        """The run at work lies on disk already."""
        self.total -= self.share
        self.share = 0.0

    def words(self, done, of):
        """`, about 3 min left` after so many of its requests; nothing while it is a guess."""
        finished = self.before + self.share * done / of
        if done < 5:
            return ""
        seconds = (self.clock() - self.begin) / finished * (self.total - finished)
        if seconds < 1:
            return ""
        if seconds < 60:
            return f", about {max(10, round(seconds, -1)):.0f} s left"
        return f", about {seconds / 60:.0f} min left"


def compare(options):
    """Run every arm `options.repeats` times; the result as a dict, on disk after each run."""
    make_folder(options.out)
    path = options.out / "compare.json"
    result = describe(options)
    result["arms"] = {}
    result["before"] = {"load_average": psutil.getloadavg()[0], "cores": os.cpu_count()}
    result["roofline"] = roofline(options)
    runs = {arm: [] for arm in options.arms}
    texts = {}  # of each arm's first run
    plan = order(options.arms, options.repeats)
    begin = time.monotonic()
    left = TimeLeft([arm for _, arm in plan])
    for number, (repeat, arm) in enumerate(plan, 1):
        left.start(arm)

        def say(line, label=f"[{number}/{len(plan)}] {arm}"):
            print(f"{label}: {line} ({time.monotonic() - begin:.0f} s in all)", flush=True)

        run, records = run_or_resume(arm, repeat, options, say, left)
        say(f"{run['tokens_per_s']} tokens/s, {run['failures']} failures")
        runs[arm].append(run)
        texts.setdefault(arm, {r.index: r.text for r in records if not r.error})
        result["arms"] = {name: arm_result(runs[name]) for name in options.arms if runs[name]}
        result["same_text"] = same_text({name: texts[name] for name in result["arms"]})
        write_json(result, path)
    if options.sweep:
        result["sweep"] = sweep(options)
        write_json(result, path)
    return json.loads(path.read_text(encoding="utf-8"))


def roofline(options):
    """What bounds our servers' steps on this device; None for a server of another kind."""
    if options.server != python_module("cbserver"):
        return None
    print("measuring what memory bandwidth allows, for the cross-checks", flush=True)
    found = run_child({"arm": "roofline", "model": options.model, "dtype": None})
    return found | {"slots": 16}


def sweep(options):
    """Throughput and latency of the continuous arm at each number of users: list[dict]."""
    levels = []
    command = [*options.server, *server_arguments("continuous", options)]
    with ServerProcess(command, options.out / "sweep-server.log", options.start_timeout) as server:
        model = first_model(server.url, options.api_key)
        warm_up(server.url, model, options.api_key)
        for users in options.sweep:
            numbers = run_load(
                server.url, options.out, name=f"sweep-{users}", users=users, model=model,
                spawn_rate=max(users, 5), steady_seconds=options.sweep_seconds,
                min_requests=users, processes=min(users, options.processes),
                **same_load(options))["summary"]
            level = {"users": users}
            for key in ("requests", "failures", *SPEEDS, "goodput"):
                if key in numbers:
                    level[key] = numbers[key]
            levels.append(level)
            print(f"{users} users: {numbers['tokens_per_s']} tokens/s, TTFT p50 "
                  f"{numbers['ttft_ms']['p50']} ms", flush=True)
    return levels


def run_or_resume(arm, repeat, options, say, left):
    """One run, kept on disk; with --resume the one that lies there, if its setting is the same."""
    name = f"{arm}-{repeat + 1}"
    kept = options.out / f"{name}.json"
    setting = describe(options)
    del setting["command"], setting["date"], setting["workload"]["repeats"]
    if options.resume and kept.exists():
        before = json.loads(kept.read_text(encoding="utf-8"))
        if before["setting"] == setting:
            say("kept from an earlier run")
            left.skip()
            return before["run"], read_records(options.out / f"{name}.jsonl")
    kept.unlink(missing_ok=True)
    run, records = run_arm(arm, repeat, options, say, left)
    write_json({"setting": setting, "run": run}, kept)
    return run, records


def run_arm(arm, repeat, options, say, left):
    """Start the server of one arm, load it, stop it: (its numbers, its records)."""
    name = f"{arm}-{repeat + 1}"
    say("starting the server")
    command = [*options.server, *server_arguments(arm, options)]
    log = options.out / f"{name}-server.log"
    with ServerProcess(command, log, options.start_timeout, say) as server:
        model = first_model(server.url, options.api_key)
        warm_up(server.url, model, options.api_key)
        say("ready; the load begins")
        tell = None
        if not options.steady_seconds:
            tell = functools.partial(left.words, of=options.requests)
        with Utilization(server.process.pid, server.url, options.api_key) as watch:
            loaded = run_load(
                server.url, options.out, name=name, users=options.users, rate=options.rate,
                spawn_rate=options.spawn_rate, requests=options.requests, model=model,
                steady_seconds=options.steady_seconds, min_requests=options.min_requests,
                processes=options.processes, left=tell, **same_load(options))
    span = loaded["span"]
    run = loaded["summary"]
    run["utilization"] = watch.between(*span)
    run["utilization"]["client"] = thin(cpu_curve(loaded["cpu"], *span))
    run["server_cpu"] = cpu_share(watch.cpu, *span)
    run["in_flight"] = watch.mean_in_flight(*span)
    return run, loaded["records"]


def same_load(options):
    """What every load of a comparison has in common, as keywords of `run_load`."""
    return {"workload": options.workload, "seed": options.seed, "api_key": options.api_key,
            "timeout_s": options.timeout, "goodput_targets": options.goodput_targets}


def server_arguments(arm, options):
    """Command line of one arm's server, the arm's own options last, where they win: list[str]."""
    common = ["--model", options.model, "--max-batch", "16", "--max-len", str(options.max_len),
              "--max-waiting", "256"]
    return [*common, *shlex.split(options.engine_args), *ARMS[arm]]


class Utilization:
    """Samples how busy the device is, every half second, for the length of a `with`.

    gpu_use: [(time, % of it that any kernel ran)]. cpu: [(time, CPU seconds so far)] of the
    server's process `pid`. in_flight: [(time, requests that it has, waiting or running)], if it
    tells at `url`/metrics.
    """

    def __init__(self, pid, url, api_key=None, interval=0.5):
        self.url = url
        self.api_key = api_key
        self.interval = interval
        self.over = threading.Event()
        self.gpu_use = []
        self.cpu = []
        self.in_flight = []
        self.gpu = first_gpu()
        self.process = psutil.Process(pid)
        self.thread = threading.Thread(target=self.sample, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.over.set()
        self.thread.join()

    def sample(self):
        with contextlib.suppress(psutil.Error):  # the server is gone: so is the reason to sample
            while not self.over.wait(self.interval):
                now = time.perf_counter()
                times = self.process.cpu_times()
                self.cpu.append((now, times.user + times.system))
                if self.gpu is not None:
                    import pynvml

                    rates = pynvml.nvmlDeviceGetUtilizationRates(self.gpu)
                    self.gpu_use.append((now, rates.gpu))
                requests = gauges(self.url, self.api_key)
                if requests:
                    self.in_flight.append((now, sum(requests.values())))

    def between(self, first, last):
        """How busy the device was between two times.

        {"kind": "gpu" or "cpu", "mean": %, "series": [[seconds since first, %], ...]} and on a GPU
        {"server": as series, % of one core} beside it. % of a CPU are of all its cores.
        """
        server = cpu_curve(self.cpu, first, last)
        if self.gpu is None:
            kind = "cpu"
            series = [[t, percent / os.cpu_count()] for t, percent in server]
        else:
            kind = "gpu"
            series = [[t - first, percent] for t, percent in self.gpu_use if first <= t <= last]
        mean = round(statistics.fmean(percent for _, percent in series), 1) if series else None
        usage = {"kind": kind, "mean": mean, "series": thin(series)}
        if kind == "gpu":
            usage["server"] = thin(server)
        return usage

    def mean_in_flight(self, first, last):
        """Requests that the server had, on average between two times; None: too few samples."""
        inside = [requests for t, requests in self.in_flight if first <= t <= last]
        return round(statistics.fmean(inside), 2) if len(inside) >= 10 else None


def thin(samples):
    """At most POINTS points, each the mean of its neighbours: [[seconds, %], ...]."""
    size = max(1, math.ceil(len(samples) / POINTS))
    groups = [samples[i:i + size] for i in range(0, len(samples), size)]
    return [[round(statistics.fmean(column), 1) for column in zip(*group)] for group in groups]


def arm_result(runs):
    """What an arm's repeats come to: medians, sums of failures, and every repeat's own numbers."""
    names = [*SPEEDS, "tokens_per_event", "client_cpu", "server_cpu"]
    whole = {name: median([run[name] for run in runs]) for name in names}
    whole["itl_histogram"] = [sum(bins) for bins in zip(*[run["itl_histogram"] for run in runs])]
    whole["requests"] = min(run["requests"] for run in runs)
    whole["failures"] = sum(run["failures"] for run in runs)
    mean_use = median([run["utilization"]["mean"] for run in runs])
    whole["utilization"] = runs[0]["utilization"] | {"mean": mean_use}
    whole["repeats"] = [without_curves(run) for run in runs]
    return whole


def without_curves(run):
    """One curve an arm is enough for the picture: the repeats keep their means."""
    usage = run["utilization"]
    shorter = run | {"utilization": {"kind": usage["kind"], "mean": usage["mean"]}}
    del shorter["itl_histogram"]
    return shorter


def median(values):
    """Median of numbers, or of each entry of dicts; what is None is left out."""
    if isinstance(values[0], dict):
        return {key: median([value[key] for value in values]) for key in values[0]}
    numbers = [value for value in values if value is not None]
    return round(statistics.median(numbers), 3) if numbers else None


def same_text(texts):
    """How many answers of each arm equal the first arm's; texts: {arm: {request index: text}}."""
    reference, *others = texts
    counts = {"reference": reference}
    for arm in others:
        shared = texts[arm].keys() & texts[reference].keys()
        equal = sum(texts[arm][i] == texts[reference][i] for i in shared)
        counts[arm] = {"equal": equal, "compared": len(shared)}
    return counts


def describe(options):
    """Everything a reader needs to know to run this again."""
    packages = versions("torch", "transformers", "fastapi", "uvicorn", "locust")
    steady = options.steady_seconds
    if steady:
        protocol = (f"seeded stream, at least {options.min_requests} requests and {steady:g} s "
                    "with all users in flight")
    else:
        protocol = f"one list of {options.requests} requests"
    load = {"name": options.workload, "seed": options.seed, "users": options.users,
            "spawn_rate": options.spawn_rate, "rate": options.rate, "protocol": protocol,
            "requests": None if steady else options.requests, "repeats": options.repeats,
            "processes": options.processes}
    return {"hardware": hardware(), "model": options.model, "versions": packages,
            "command": options.command,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "workload": load, "max_len": options.max_len, "engine_args": options.engine_args}


def parse(arguments=None):
    """The command line as a namespace, with what depends on the device filled in."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare",
                                     description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", help="as for cbserver; default: smollm2, or Llama-3.2-1B-Instruct on a GPU")
    add("--arms", default="sequential,static,continuous", help=f"any of {','.join(ARMS)}")
    add("--repeats", type=int, default=1, help="fresh servers for each arm (1)")
    add("--out", type=Path, default=Path("figures/latest"), help="folder for all results")
    add("--max-len", type=int, default=512, help="longest prompt and answer, in tokens (512)")
    add("--engine-args", default="", help="more options for every server, as one string")
    add("--fast-device", action=argparse.BooleanOptionalAction,
        help="count a steady time instead of a fixed list; default: on a GPU")
    add("--steady-seconds", type=float, default=60, help="how long, on a fast device (60)")
    add("--start-timeout", type=float, default=900, help="seconds a server may take to start (900)")
    add("--sweep", help="then the continuous arm at so many users each: 1,2,4,8,16,32,50")
    add("--sweep-seconds", type=float, default=15, help="for each of these (15)")
    add("--resume", action="store_true", help="keep the runs that --out holds, make the others")
    add_load_options(parser)
    options = parser.parse_args(arguments)
    options.command = command_line("bench.compare", arguments)
    options.arms = options.arms.split(",")
    for arm in options.arms:
        if arm not in ARMS:
            parser.error(f"no arm {arm!r}; there are {', '.join(ARMS)}")
    options.sweep = [int(users) for users in options.sweep.split(",")] if options.sweep else []
    fill_in(options)
    return options


def fill_in(options):
    """Defaults by device: a small model and a list on a CPU, a larger one and a time on a GPU."""
    gpu = first_gpu() is not None
    if options.fast_device is None:
        options.fast_device = gpu
    if not options.fast_device:
        options.steady_seconds = 0
    if gpu and options.processes == 1 and os.cpu_count() >= 8:
        options.processes = 4  # thousands of events a second are too many for one
    if not options.model:
        from cbserver.model.load import default_model

        options.model = default_model(gpu)
    options.server = python_module("cbserver")
    if options.api_key:  # our servers and our client read the same key
        os.environ["CBSERVER_API_KEY"] = options.api_key


def show(result, options):
    """Table, ratios, and where everything is."""
    print("\n" + report.text_table(result) + "\n")
    print(report.ratios(result))
    print(report.notes(result))
    figures = report.save_figures(result, options.out, "compare")
    (options.out / "report.html").write_text(report.page(result, options.out), encoding="utf-8")
    pages = [options.out / f"{arm}-{i + 1}.html" for arm in options.arms
             for i in range(options.repeats)]
    written = {"plots": figures, "Locust's reports": pages,
               "numbers": [options.out / "compare.json"],
               "the report": [options.out / "report.html"]}
    for title, paths in written.items():
        print(f"{title}:\n" + "\n".join(f"  {path}" for path in paths))


def main(arguments=None):
    options = parse(arguments)

    def run():
        result = compare(options)
        show(result, options)
        if not any(arm["requests"] for arm in result["arms"].values()):
            raise LoadFailed("No request succeeded; the server logs are in the folder above.")

    return exit_with(run)


if __name__ == "__main__":
    import matplotlib

    matplotlib.use("Agg")
    sys.exit(main())

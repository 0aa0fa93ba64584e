"""Did a change cost anything? Old and new code in alternating pairs of fresh processes.

    python -m bench.pairs --old 01f6ed4 --out figures/latest/pairs.json

offline: the continuous engine without HTTP, tokens/s. http: CPU microseconds an event of the server
over an engine that costs nothing. passes: milliseconds of a decode step by rows, and of reading
prompts. stall: the longest pause of running streams when a prompt of 4,000 tokens arrives, ms.
"""
import argparse
import contextlib
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.results import ROOT, command_line, hardware, order, versions, write_json
from load.process import LoadFailed
from load.workload import vocabulary

LIMIT_S = 900  # for one run


@contextlib.contextmanager
def tree_of(old):
    """The folder of the old code: a folder as it is, a commit in a work tree of its own."""
    if Path(old).is_dir():
        yield Path(old).resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "old"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), old], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def run_in(tree, *words):
    """What `python -m …` prints in this tree; raises LoadFailed with its last words."""
    done = subprocess.run([sys.executable, "-m", *map(str, words)], cwd=tree, timeout=LIMIT_S,
                          capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tree)})
    if done.returncode:
        raise LoadFailed(f"{words[0]} in {tree} failed: {done.stderr.strip()[-400:]}")
    return done.stdout


def offline(tree, options):
    """Tokens a second of the engine alone."""
    case = {"arm": "continuous", "model": options.model, "dtype": None, "workload": "uniform",
            "seed": 0, "longest": 128, "short": None, "vocab": vocabulary(options.model),
            "prefill_budget": None, "max_len": 512, "slots": 16, "requests": options.requests}
    return json.loads(run_in(tree, "bench.arms", json.dumps(case)).splitlines()[-1])["tokens_per_s"]


def http(tree, options):
    """CPU microseconds of the server for an event."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "http.json"
        run_in(ROOT, "bench.http", "--arms", "server", "--repeats", 1, "--streams", 64,
               "--requests", 512, "--server-tree", tree, "--out", out)  # the clients are the same
        return json.loads(out.read_text(encoding="utf-8"))["rows"][0]["cpu_us_per_token"]


# Runs in either tree, with what both have. Each row sees 100 keys.
PASSES = """
import json, statistics, sys, time
import cbserver
from bench.arms import model_of, time_step
from cbserver.batch import BatchRunner
from cbserver.sequence import Sequence

model, _ = model_of({"model": sys.argv[1], "dtype": None})
runner = BatchRunner(model, 32, 1024)
found = {}
for rows in (1, 4, 16, 32):
    found[f"decode {rows} rows"] = time_step(runner, model, rows, 101, 1)["step_ms"]
for tokens in (64, 128, 512):
    times = []
    for _ in range(6):
        sequence = Sequence([7] * 600, slot=0)
        begin = time.perf_counter()
        runner.prefill(sequence, tokens)
        times.append(1e3 * (time.perf_counter() - begin))
    found[f"prefill {tokens} tokens"] = round(statistics.median(times[1:]), 2)
print(json.dumps(found))
"""


def passes(tree, options):
    """Milliseconds of the plain runner's passes: {name: ms}."""
    done = subprocess.run([sys.executable, "-c", PASSES, options.model], cwd=tree, check=True,
                          timeout=LIMIT_S, stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"PYTHONPATH": str(tree)})
    return json.loads(done.stdout.splitlines()[-1])


def stall(tree, options):
    """A prompt of 4,000 tokens among 15 streams: their pauses, its first token, in ms."""
    case = {"arm": "stall:continuous", "model": options.model, "dtype": None, "seed": 0,
            "workload": "uniform", "longest": 128, "short": None,
            "vocab": vocabulary(options.model), "prefill_budget": None, "requests": 16}
    found = json.loads(run_in(tree, "bench.arms", json.dumps(case)).splitlines()[-1])
    return {name: found[name] for name in ("worst_gap_ms", "usual_gap_ms", "ttft_ms")}


UNITS = {"offline": "engine without HTTP, tokens/s", "http": "server's CPU, µs an event",
         "worst_gap_ms": "longest pause of 15 streams when a prompt of 4,000 tokens arrives, ms",
         "usual_gap_ms": "their usual pause, ms", "ttft_ms": "that prompt's first token after, ms"}
MEASUREMENTS = {"offline": offline, "http": http, "passes": passes, "stall": stall}


def compare(name, trees, options):
    """The pairs of one measurement, and new ÷ old of each: a dict."""
    runs = {"old": [], "new": []}
    for repeat, side in order(["old", "new"], options.pairs):
        runs[side].append(MEASUREMENTS[name](trees[side], options))
        print(f"{name}, pair {repeat + 1}, {side}: {runs[side][-1]}", flush=True)
    return {"what": MEASUREMENTS[name].__doc__, **runs, "new_by_old": ratio(runs)}


def ratio(runs):
    """new ÷ old of the pairs, median and spread; of each number, where a run has several."""
    if isinstance(runs["old"][0], dict):
        return {name: ratio({side: [run[name] for run in runs[side]] for side in runs})
                for name in runs["old"][0]}
    ratios = sorted(new / old for old, new in zip(runs["old"], runs["new"]))
    return {"median": round(statistics.median(ratios), 4),
            "spread": [round(ratios[0], 4), round(ratios[-1], 4)]}


def table(result):
    """Markdown: old, new, and their ratio, for each number that was measured."""
    lines = ["| | before | now | now ÷ before, median (spread) |", "| --- | ---: | ---: | ---: |"]
    for name, found in result["measured"].items():
        if isinstance(found["old"][0], dict):
            for key, said in found["new_by_old"].items():
                lines.append(row(UNITS.get(key, f"{key}, ms"), *(
                    [run[key] for run in found[side]] for side in ("old", "new")), said))
        else:
            lines.append(row(UNITS[name], found["old"], found["new"], found["new_by_old"]))
    return "\n".join(lines)


def row(name, old, new, said):
    """A line of the table: medians of the runs, and what the pairs say."""
    low, high = said["spread"]
    return (f"| {name} | {statistics.median(old):,.1f} | {statistics.median(new):,.1f} | "
            f"{said['median']:.2f} ({low:.2f} to {high:.2f}) |")


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.pairs",
                                     description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--old", required=True, help="a commit, or the folder of another work tree")
    add("--measure", default="http,offline", help="of http, offline, passes, stall (the first two)")
    add("--pairs", type=int, default=5, help="how many (5)")
    add("--model", default="smollm2", help="for offline (smollm2)")
    add("--requests", type=int, default=48, help="for offline (48)")
    add("--out", type=Path, required=True, help="the result, as JSON")
    options = parser.parse_args(arguments)
    result = {"command": command_line("bench.pairs", arguments), "hardware": hardware(),
              "versions": versions("torch", "transformers", "uvicorn"),
              "date": datetime.date.today().isoformat(), "old": options.old, "measured": {}}
    with tree_of(options.old) as tree:
        for name in options.measure.split(","):
            result["measured"][name] = compare(name, {"old": tree, "new": ROOT}, options)
            write_json(result, options.out)
    for name, found in result["measured"].items():
        print(f"{name}: new ÷ old {found['new_by_old']}")


if __name__ == "__main__":
    main()

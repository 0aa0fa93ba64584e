"""The CPU engine beside other work: torch's threads as they wait by default, and as we set it.

    python -m bench.busy --out figures/data/busy-cpu.json

Every run is a fresh process: 16 streams in the engine, counted for some seconds, beside none, two
and four processes that do nothing but keep a core busy.
"""
import argparse
import asyncio
import contextlib
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench.results import command_line, hardware, order, versions, write_json

# libgomp's own number of rounds is 300,000, where nobody has chosen.
SETTINGS = {"default": {"GOMP_SPINCOUNT": "300000"}, "set": {}}
BESIDE = (0, 2, 4)


async def count_tokens(model_name, seconds, slots=16):
    """Tokens that the engine makes in so many seconds, all slots in use."""
    from bench.arms import model_of
    from cbserver.model.sampling import SamplingParams
    from cbserver.scheduler import ContinuousEngine

    model, tokenizer = model_of({"model": model_name, "dtype": None})
    engine = ContinuousEngine(model, tokenizer, slots, 512)
    await engine.start()
    params = SamplingParams(480, ignore_eos=True)
    sequences = [engine.submit([5 + i] * 8, params) for i in range(slots)]
    patience = time.monotonic() + 2 * seconds
    while not all(s.generated_tokens for s in sequences) and time.monotonic() < patience:
        await asyncio.sleep(0.05)
    made, begin = engine.stats().num_generated_tokens, time.perf_counter()
    await asyncio.sleep(seconds)
    made = engine.stats().num_generated_tokens - made
    speed = made / (time.perf_counter() - begin)
    print(json.dumps(round(speed, 2)), flush=True)
    os._exit(0)  # a step may take minutes, and its thread cannot be stopped


@contextlib.contextmanager
def busy(count, limit):
    """So many processes that keep a core busy; each ends by itself after `limit` seconds."""
    spin = f"import time; end = time.time() + {limit}\nwhile time.time() < end: pass"
    processes = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(setting, beside, options):
    """Tokens a second of one fresh process."""
    limit = 20 * options.seconds + 120
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    words = [sys.executable, "-m", "bench.busy", "--child", "--model", options.model,
             "--seconds", str(options.seconds)]
    with busy(beside, limit):
        done = subprocess.run(words, env=environment | SETTINGS[setting], timeout=limit, check=True,
                              stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(options):
    result = {"command": options.command, "hardware": hardware(), "model": options.model,
              "versions": versions("torch", "transformers"),
              "date": datetime.date.today().isoformat(), "slots": 16,
              "counted_s": options.seconds, "rows": []}
    for beside in BESIDE:
        speeds = {"default": [], "set": []}
        for repeat, setting in order(["default", "set"], options.pairs):
            speeds[setting].append(run(setting, beside, options))
            print(f"beside {beside}, pair {repeat + 1}, {setting}: {speeds[setting][-1]} tokens/s",
                  flush=True)
        medians = {name: statistics.median(found) for name, found in speeds.items()}
        result["rows"].append({"beside": beside, **speeds, "median": medians})
        write_json(result, options.out)
    return result


def spread(speeds):
    """Median, and the slowest and quickest run."""
    return f"{statistics.median(speeds):.1f} ({min(speeds):.1f} to {max(speeds):.1f})"


def table(result):
    """Markdown: tokens/s by what else the machine does."""
    lines = ["| beside | as torch has it, tokens/s | as set here, tokens/s |", "|---|---:|---:|"]
    for row in result["rows"]:
        what = f"{row['beside']} busy processes" if row["beside"] else "nothing"
        lines.append(f"| {what} | {spread(row['default'])} | {spread(row['set'])} |")
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.busy",
                                     description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--pairs", type=int, default=5, help="alternating pairs for each row (5)")
    add("--seconds", type=float, default=12, help="that are counted in a run (12)")
    add("--model", default="smollm2", help="as for cbserver (smollm2)")
    add("--out", type=Path, help="the result, as JSON")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.command = command_line("bench.busy", arguments)
    if options.child:
        return asyncio.run(count_tokens(options.model, options.seconds))
    if options.out is None:
        parser.error("--out says where the result goes")
    print(table(measure(options)))


if __name__ == "__main__":
    main()

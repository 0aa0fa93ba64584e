"""Our engine beside llama.cpp on a CPU: the same weights, as many streams, the same lengths.

    python -m bench.llama_cpp --binary llama-batched-bench --models smol-f32.gguf,smol-q8_0.gguf \\
        --out figures/latest/llama-cpp.json

llama-batched-bench reads the prompts of all streams, then decodes them side by side. Ours gets as
many requests at once. Both: generated tokens ÷ seconds from the first prompt to the last token.
"""
import argparse
import asyncio
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.results import command_line, hardware, versions, write_json

LIMIT_S = 900  # for one run


async def ours(streams, lengths):
    """Tokens a second of our engine in this process, for each (prompt, output) length."""
    from bench.arms import model_of
    from cbserver.model.sampling import SamplingParams
    from cbserver.scheduler import ContinuousEngine

    model, tokenizer = model_of({"model": "smollm2", "dtype": None})
    with ThreadPoolExecutor(1) as thread:  # as in the server: one team of OpenMP workers, no more
        engine = thread.submit(ContinuousEngine, model, tokenizer, streams, 512).result()
    await engine.start()
    speeds = []
    for prompt, output in [(16, 8), *lengths]:
        params = SamplingParams(output, ignore_eos=True)
        begin = time.perf_counter()
        sequences = [engine.submit([100 + i] * prompt, params) for i in range(streams)]
        await asyncio.gather(*[read(sequence) for sequence in sequences])
        speeds.append(round(streams * output / (time.perf_counter() - begin), 2))
    await engine.stop()
    print(json.dumps(speeds[1:]))  # the first warms up


async def read(sequence):
    async for _ in sequence.stream():
        pass


def run_ours(streams, lengths):
    words = [sys.executable, "-m", "bench.llama_cpp", "--child", str(streams), json.dumps(lengths)]
    done = subprocess.run(words, check=True, timeout=LIMIT_S, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_theirs(binary, model, streams, lengths):
    """The same of llama.cpp, from the table that it prints as JSON lines."""
    speeds = []
    for prompt, output in lengths:
        words = [binary, "-m", model, "-c", str(streams * (prompt + output + 16)), "-b", "2048",
                 "-ub", "512", "-npp", str(prompt), "-ntg", str(output), "-npl", str(streams),
                 "-t", str(os.cpu_count()), "--output-format", "jsonl"]
        done = subprocess.run(words, check=True, timeout=LIMIT_S, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True)
        row = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
        speeds.append(round(streams * output / row["t"], 2))
    return speeds


def measure(options):
    arms = {"ours, float32": None} | {f"llama.cpp, {Path(m).stem}": m for m in options.models}
    lengths = [tuple(map(int, pair.split(":"))) for pair in options.lengths.split(",")]
    result = {"command": options.command, "hardware": hardware(), "lengths": lengths,
              "llama.cpp": options.version, "versions": versions("torch", "transformers"),
              "date": datetime.date.today().isoformat(), "rows": []}
    for streams in map(int, options.streams.split(",")):
        for repeat in range(options.repeats):
            for arm, model in list(arms.items())[::-1 if repeat % 2 else 1]:
                speeds = (run_theirs(options.binary, model, streams, lengths) if model
                          else run_ours(streams, lengths))
                result["rows"].append({"engine": arm, "streams": streams, "tokens_per_s": speeds})
                print(f"{streams} streams, {arm}: {speeds}", flush=True)
                write_json(result, options.out)
    return result


def medians(result):
    """{arm: {streams: tokens/s}}: of each length the median of the repeats, then their mean."""
    found = {}
    for row in result["rows"]:
        by_streams = found.setdefault(row["engine"], {})
        by_streams.setdefault(row["streams"], []).append(row["tokens_per_s"])
    return {arm: {streams: statistics.fmean(map(statistics.median, zip(*runs)))
                  for streams, runs in by_streams.items()} for arm, by_streams in found.items()}


def table(result):
    """Markdown: tokens/s by streams, a row for each arm."""
    found = medians(result)
    counts = list(next(iter(found.values())))
    lines = [f"| tokens/s at so many streams | {' | '.join(map(str, counts))} |",
             f"| --- |{' ---: |' * len(counts)}"]
    for arm, by_streams in found.items():
        cells = [f"{by_streams[count]:.0f}" for count in counts]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments=None):
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["--child"]:
        return asyncio.run(ours(int(words[1]), json.loads(words[2])))
    parser = argparse.ArgumentParser(prog="python -m bench.llama_cpp",
                                     description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--binary", required=True, help="llama-batched-bench, built for this processor")
    add("--version", default="", help="of llama.cpp: its commit, for the record")
    add("--models", required=True, help="GGUF files of SmolLM2, with commas")
    add("--streams", default="1,4,16,32", help="at once (1,4,16,32)")
    add("--lengths", default="16:128,72:72,128:16", help="prompt:output (16:128,72:72,128:16)")
    add("--repeats", type=int, default=3, help="how often (3)")
    add("--out", type=Path, required=True, help="the result, as JSON")
    options = parser.parse_args(words)
    options.models = options.models.split(",")
    options.command = command_line("bench.llama_cpp", arguments)
    print(table(measure(options)))


if __name__ == "__main__":
    sys.exit(main())

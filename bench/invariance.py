"""The same answer at any load: each request alone, beside 15 and beside 63 others, bit for bit.

    python -m bench.invariance --out figures/data/invariance-h200.json     (a GPU)

With FastStep as it is, which decodes all slots in every pass, and with rows padded to the next of
a few sizes, as it was before: what fixed shapes bring, and what they cost, in one run.
"""
import argparse
import asyncio
import datetime
import functools
import json
import random
import statistics
import time
from pathlib import Path

import torch

from bench.results import command_line, hardware, versions, write_json
from cbserver.fast import FastStep
from cbserver.model.load import load_model
from cbserver.model.sampling import SamplingParams
from cbserver.scheduler import ContinuousEngine
from load.workload import token_workload, vocabulary

SLOTS = 64
NEIGHBOURS = (15, 63)


def probes(vocab, count):
    """Requests whose answers are compared: short and long prompts, greedy and seeded by turns."""
    rng = random.Random(3)
    made = []
    for number in range(count):
        length = rng.randint(16, 256) if number % 4 < 2 else rng.randint(600, 1500)
        tokens = [rng.randrange(vocab) for _ in range(length)]
        params = SamplingParams(64, ignore_eos=True)
        if number % 2:
            params = SamplingParams(64, temperature=0.8, top_p=0.95, seed=number, ignore_eos=True)
        made.append((tokens, params))
    return made


async def answer(engine, tokens, params):
    sequence = engine.submit(tokens, params)
    return [token async for token in sequence.stream()]


async def beside(engine, requests, crowd, neighbours, say=None):
    """Each request's answer while so many others are served, who come and go meanwhile.

    say: called with a line after each answer.
    """
    answers = []
    for number, (tokens, params) in enumerate(requests):
        others = [crowd[(7 * number + i) % len(crowd)] for i in range(neighbours)]
        tasks = [asyncio.create_task(answer(engine, r.prompt_tokens, SamplingParams(
            r.max_tokens, ignore_eos=True))) for r in others]
        answers.append(await answer(engine, tokens, params))
        await asyncio.gather(*tasks)
        if say is not None:
            say(f"{len(answers)} of {len(requests)} answers beside {neighbours} others")
    return answers


async def speed(engine, requests, at_once):
    """Tokens/s of greedy requests, so many at once."""
    waiting = iter(requests)

    async def user():
        tokens = 0
        for request in waiting:
            params = SamplingParams(request.max_tokens, ignore_eos=True)
            tokens += len(await answer(engine, request.prompt_tokens, params))
        return tokens

    begin = time.perf_counter()
    counts = await asyncio.gather(*[user() for _ in range(at_once)])
    return sum(counts) / (time.perf_counter() - begin)


async def measure_engine(engine, requests, crowd, repeats):
    """One engine: how many answers stay as they are alone, and its speed alone and when full."""
    await engine.start()
    await speed(engine, crowd[:8], 4)
    alone = await beside(engine, requests, crowd, 0)
    equal = {}
    for neighbours in NEIGHBOURS:
        answers = await beside(engine, requests, crowd, neighbours)
        equal[str(neighbours)] = sum(a == b for a, b in zip(alone, answers))
    found = {"requests": len(requests), "equal": equal}
    for name, count, at_once in (("alone", 12, 1), ("full", len(crowd), engine.slots)):
        speeds = [await speed(engine, crowd[:count], at_once) for _ in range(repeats)]
        found[f"tokens_per_s_{name}"] = round(statistics.median(speeds), 1)
    await engine.stop()
    return found


def measure(options):
    """Both ways to shape a pass, in both half precisions: the result, written and printed."""
    rows = []
    for dtype in options.dtypes:
        model, tokenizer = load_model(options.model, dtype=getattr(torch, dtype))
        vocab = vocabulary(options.model)
        requests = probes(vocab, options.requests)
        crowd = token_workload("uniform", 256, options.seed, 256, vocab)
        for invariant in (True, False):
            runner = functools.partial(FastStep, invariant=invariant)
            engine = ContinuousEngine(model, tokenizer, SLOTS, 2048, 1000, runner=runner)
            found = asyncio.run(measure_engine(engine, requests, crowd, options.repeats))
            shapes = "fixed" if invariant else "padded"
            rows.append({"dtype": dtype, "shapes": shapes, "promised": engine.runner.invariant}
                        | found)
            print(json.dumps(rows[-1]), flush=True)
            del engine
            torch.cuda.empty_cache()
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result = {"command": options.command, "date": now, "hardware": hardware(),
              "model": options.model, "versions": versions("torch", "transformers", "triton"),
              "slots": SLOTS, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(result, options.out)
    print(invariance_table(result))


def invariance_table(result):
    """How many answers are the same bit for bit beside others, as Markdown."""
    heads = [f"same beside {neighbours}" for neighbours in NEIGHBOURS]
    lines = [f"| dtype | shapes of a pass | {' | '.join(heads)} | tokens/s alone | "
             f"{result['slots']} at once |", "|---|---|" + "---:|" * (len(heads) + 2)]
    for row in result["rows"]:
        counts = [f"{row['equal'][str(n)]} of {row['requests']}" for n in NEIGHBOURS]
        lines.append(f"| {row['dtype']} | {row['shapes']} | {' | '.join(counts)} | "
                     f"{row['tokens_per_s_alone']:,.0f} | {row['tokens_per_s_full']:,.0f} |")
    return "\n".join(lines)


def parse(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.invariance",
                                     description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default="random:llama-3.2-1b", help="as for cbserver (random:llama-3.2-1b)")
    add("--requests", type=int, default=24, help="whose answers are compared (24)")
    add("--dtypes", nargs="+", choices=("bfloat16", "float16"), default=["bfloat16", "float16"],
        help="kinds of half precision to try (both)")
    add("--repeats", type=int, default=3, help="of each speed (3)")
    add("--seed", type=int, default=0, help="of the others (0)")
    add("--out", type=Path, default=Path("figures/latest/invariance.json"), help="the result")
    options = parser.parse_args(arguments)
    options.command = command_line("bench.invariance", arguments)
    return options


def main(arguments=None):
    options = parse(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("error: half precision needs a GPU here; a CPU promises it in float32.")
    measure(options)


if __name__ == "__main__":
    main()

"""A report of one machine, to be pasted back: its parts, speeds, equal answers, what fell back.

    python -m bench.offline --report
"""
import asyncio
import warnings

import torch

from bench.invariance import beside, probes
from bench.results import hardware, versions
from cbserver.batch import BatchRunner
from cbserver.fast import FastStep
from cbserver.model.load import load_model
from cbserver.scheduler import ContinuousEngine
from load.workload import token_workload

ARMS = {True: ["generate", "one-slot", "continuous", "continuous+graphs+fused+kernel"],
        False: ["generate", "one-slot", "continuous", "continuous+fused"]}
NEIGHBOURS = 15
MAX_LEN = 2048


def report(result, options):
    """The report as text. result: what bench.offline measured just now."""
    check = check_engine(options)
    lines = [f"cbserver report, {result['date'][:10]}",
             f"hardware: {hardware()}{memory_and_capability()}",
             "versions: " + ", ".join(f"{name} {version}" for name, version in versions(
                 "torch", "triton", "transformers").items()),
             f"model: {options.model}, {result['dtype']}"]
    for row in result["rows"]:
        lines.append(f"{row['arm']}, {row['slots']} slots: {row['tokens_per_s']:,.0f} tokens/s")
    for name, error in result.get("failed", {}).items():
        lines.append(f"{name}: failed, {error}")
    lines.append(f"same answer alone and beside {NEIGHBOURS}: {check['equal']} of "
                 f"{check['requests']} ({check['promise']})")
    lines.append("fell back: " + ("; ".join(check["fell_back"]) or "nothing"))
    return "\n".join(lines)


def memory_and_capability():
    if not torch.cuda.is_available():
        return ""
    card = torch.cuda.get_device_properties(0)
    return f", {card.total_memory / 2**30:.1f} GiB, compute capability {card.major}.{card.minor}"


def check_engine(options, requests=8):
    """The server's own engine here: answers that stay the same in company, and its warnings."""
    say("is an answer the same in company? Loading the model once more")
    dtype = getattr(torch, options.dtype) if options.dtype else None
    model, tokenizer = load_model(options.model, dtype=dtype)
    runner = FastStep if options.gpu else BatchRunner
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        engine = ContinuousEngine(model, tokenizer, NEIGHBOURS + 1, MAX_LEN, runner=runner)
    crowd = token_workload("uniform", 32, options.seed, 64, options.vocab)
    asked = probes(options.vocab, requests)
    equal = asyncio.run(count_equal(engine, asked, crowd))
    kept = getattr(engine.runner, "invariant", model.dtype == torch.float32)
    return {"requests": requests, "equal": equal,
            "promise": "promised" if kept else "not promised here",
            "fell_back": [str(warning.message) for warning in caught]}


def say(line):
    print(f"report: {line}", flush=True)


async def count_equal(engine, asked, crowd):
    await engine.start()
    alone = await beside(engine, asked, crowd, 0, say)
    together = await beside(engine, asked, crowd, NEIGHBOURS, say)
    await engine.stop()
    return sum(a == b for a, b in zip(alone, together))

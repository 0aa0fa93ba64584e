"""Measure engines without HTTP: every arm in a fresh process, through `submit()` and `stream()`.

One more arm, `http`, is the best of them behind the server, with 50 users or more: what HTTP costs.

    python -m load.offline --slots 16,64 --repeats 3 --out figures/data/offline-h100.json
"""
import argparse
import asyncio
import datetime
import functools
import hashlib
import importlib.util
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from load.results import first_gpu, hardware, order, versions, write_json
from load.server import ROOT, LoadFailed, ServerProcess, python_module
from load.workload import token_workload, vocabulary

# The ladder, a rung a row. An arm runs the first `requests` of the list: the slow ones fewer.
GPU_ARMS = {"generate": 16, "static": 64, "continuous": 64, "continuous+graphs": 256,
            "continuous+graphs+fused": 256, "continuous+graphs+compile": 256, "http": 256,
            "one-slot": 32, "transformers-cb": 128, "vllm": 256}
CPU_ARMS = {"generate": 16, "static": 64, "continuous": 160, "continuous+joined": 160,
            "http": 160, "one-slot": 16, "transformers-cb": 160}
SINGLE = ("generate", "one-slot")  # one request at a time, whatever --slots says
COMPARED = 64  # requests whose tokens are compared across arms
SPAN = 512  # keys that every row sees when a single step is timed


# One arm, in a process of its own


def run_arm(case):
    """Run one arm once; case: a dict of `cases`. Returns its numbers."""
    requests = token_workload(case["workload"], case["requests"], case["seed"], case["longest"],
                              case["vocab"])
    if case["short"]:
        requests = [type(r)(r.prompt_tokens, min(r.max_tokens, case["short"])) for r in requests]
    sys.setswitchinterval(5e-4)  # as the server does
    arm = {"transformers-cb": run_transformers, "vllm": run_vllm, "http": run_http}.get(
        case["arm"], run_engine)
    outputs, numbers = arm(case, requests)
    wrong = [i for i, (r, out) in enumerate(zip(requests, outputs)) if len(out) != r.max_tokens]
    if wrong:
        raise LoadFailed(f"{case['arm']}: request {wrong[0]} got {len(outputs[wrong[0]])} tokens "
                         f"instead of {requests[wrong[0]].max_tokens}.")
    tokens = sum(map(len, outputs))
    digests = {name: [hashlib.sha1(repr(out[:length]).encode()).hexdigest()[:8]
                      for out in outputs[:COMPARED]]
               for name, length in (("first 16 tokens", 16), ("whole", None))
               if case["arm"] != "http"}  # which answers in text
    return numbers | {"requests": len(requests), "tokens": tokens,
                      "tokens_per_s": round(tokens / numbers["seconds"], 2), "digests": digests}


def load(case):
    """(model, tokenizer) for a case; in a thread that ends, as the server does."""
    import torch

    from cbserver.baseline import load_model

    with ThreadPoolExecutor(1) as thread:
        dtype = getattr(torch, case["dtype"]) if case["dtype"] else None
        return thread.submit(load_model, case["model"], dtype=dtype).result()


def build(case, model, tokenizer):
    """The engine of an arm, its runner ready: graphs recorded, functions compiled."""
    from cbserver.batch import BatchRunner, StaticEngine
    from cbserver.fast import FastStep
    from cbserver.scheduler import ContinuousEngine
    from cbserver.sequence import SequentialEngine

    arm, waiting = case["arm"], case["requests"] + 1
    if arm == "generate":
        return SequentialEngine(model, tokenizer, 1, case["max_len"], waiting)
    fast = FastStep if model.device.type == "cuda" else BatchRunner
    runner = {"static": BatchRunner, "continuous": BatchRunner, "one-slot": fast,
              "continuous+graphs": functools.partial(FastStep, compiled=False),
              "continuous+graphs+fused": functools.partial(FastStep, kernel=False),
              "continuous+graphs+compile": FastStep,
              "continuous+joined": FastStep}[arm]
    kind = StaticEngine if arm == "static" else ContinuousEngine
    return kind(model, tokenizer, case["slots"], case["max_len"], waiting,
                prefill_budget=case["prefill_budget"], runner=runner)


def run_engine(case, requests):
    """(outputs, numbers) of one of our engines."""
    model, tokenizer = load(case)
    began = time.perf_counter()
    with ThreadPoolExecutor(1) as thread:  # as in the server: one team of OpenMP workers, no more
        engine = thread.submit(build, case, model, tokenizer).result()
    outputs, numbers = asyncio.run(serve(engine, requests, began))
    numbers["peak_memory_gb"] = peak_memory(model.device)
    numbers["bandwidth_gb_s"] = bandwidth = copy_bandwidth(model.device)
    if hasattr(engine, "runner"):
        numbers |= time_step(engine.runner, model, case["slots"], min(SPAN, case["max_len"]),
                             bandwidth)
    return outputs, numbers


async def serve(engine, requests, began):
    """All requests at once into a started engine; warm-up is left out of the seconds."""
    from cbserver.baseline import SamplingParams

    async def answer(request):
        params = SamplingParams(request.max_tokens, ignore_eos=True)
        sequence = engine.submit(request.prompt_tokens, params)
        return [token async for token in sequence.stream()], sequence.token_times

    await engine.start()
    few = [type(r)(r.prompt_tokens, min(r.max_tokens, 4)) for r in requests[:3]]
    await asyncio.gather(*map(answer, few))
    warmup, start = time.perf_counter() - began, time.perf_counter()
    answers = await asyncio.gather(*map(answer, requests))
    seconds = time.perf_counter() - start
    await engine.stop()
    gaps = sorted(b - a for _, times in answers for a, b in zip(times, times[1:]))
    return [out for out, _ in answers], {
        "seconds": round(seconds, 3), "warmup_s": round(warmup, 2), "steps": engine.steps,
        "itl_ms": {"p50": round(gaps[len(gaps) // 2] * 1e3, 2),
                   "p99": round(gaps[len(gaps) * 99 // 100] * 1e3, 2),
                   "worst": round(gaps[-1] * 1e3, 2)}}


def time_step(runner, model, rows, span, bandwidth):
    """One decode step of `rows` rows that see `span` keys each, against the bytes it must read.

    floor_ms: weights once and every row's keys and values, at the measured copy bandwidth.
    """
    import torch

    from cbserver.baseline import kv_shape

    layers, kv_heads, head_dim = kv_shape(model)
    weights = weight_bytes(model)
    cached = rows * span * 2 * layers * kv_heads * head_dim * model.dtype.itemsize
    times, in_a_row = [], 1 if model.device.type == "cpu" else 20
    with torch.inference_mode():
        for _ in range(12):
            synchronize(model.device)
            start = time.perf_counter()
            for _ in range(in_a_row):
                runner.positions.fill_(span - 1)
                runner.step(rows, span)
            synchronize(model.device)
            times.append((time.perf_counter() - start) / in_a_row)
    step, floor = statistics.median(times) * 1e3, (weights + cached) / bandwidth / 1e6
    return {"step_ms": round(step, 3), "step_floor_ms": round(floor, 3), "step_span": span,
            "step_gb_s": round((weights + cached) / step / 1e6, 1),
            "step_bandwidth_percent": round(100 * floor / step, 1)}


def weight_bytes(model):
    """Bytes of the weights that every step reads: all but an embedding that is only looked up."""
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    whole = sum(p.nbytes for p in model.parameters())
    return whole if tied else whole - model.get_input_embeddings().weight.nbytes


def run_roofline(case):
    """What bounds a step on this device: its weights in GB, and the bandwidth of a copy in GB/s."""
    model, _ = load(case)
    return {"dtype": str(model.dtype).removeprefix("torch."),
            "weights_gb": round(weight_bytes(model) / 1e9, 4),
            "bandwidth_gb_s": copy_bandwidth(model.device)}


def copy_bandwidth(device):
    """GB/s of a large copy on the device, bytes read plus bytes written; the best of ten."""
    import torch

    source = torch.zeros(2**28 if device.type == "cuda" else 2**26, device=device)  # float32
    target, times = torch.empty_like(source), []
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return round(2 * source.nbytes / min(times) / 1e9, 1)


def synchronize(device):
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device):
    """GB that were in use at the most: of the GPU's memory, or of this process's."""
    if device.type == "cuda":
        import torch

        return round(torch.cuda.max_memory_reserved(device) / 1e9, 2)
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9, 2)


def run_transformers(case, requests):
    """transformers' own continuous batching: CUDA graphs and double buffering where it has them."""
    from transformers import GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    model, _ = load(case)
    gpu, began = model.device.type == "cuda", time.perf_counter()
    # Without flash-attention a pass masks the whole cache: a cache of the size needed is fastest.
    pages = case["slots"] * (-(-case["max_len"] // 256) + 1)
    options = dict(max_requests_per_batch=case["slots"], use_cuda_graph=gpu, use_async_batching=gpu,
                   num_blocks=pages, max_batch_tokens=512)
    config = ContinuousBatchingConfig(**options)
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    outputs = {}
    with model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=config) as manager:
        def run(batch):
            for i, r in batch:
                manager.add_request(r.prompt_tokens, request_id=str(i), max_new_tokens=r.max_tokens,
                                    eos_token_id=-1)
            left = len(batch)
            while left:
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise LoadFailed("transformers' continuous batching ended early; see above.")
                if result is not None and result.is_finished():
                    outputs[result.request_id] = result.generated_tokens
                    left -= 1

        run([(f"warm-{i}", type(r)(r.prompt_tokens, 4)) for i, r in enumerate(requests[:3])])
        warmup, start = time.perf_counter() - began, time.perf_counter()
        run(list(enumerate(requests)))
        seconds = time.perf_counter() - start
    return [outputs[str(i)] for i in range(len(requests))], {
        "seconds": round(seconds, 3), "warmup_s": round(warmup, 2),
        "peak_memory_gb": peak_memory(model.device)}


def run_vllm(case, requests):
    """vLLM on the same model, saved to a folder; random weights are made anew there (dummy)."""
    import torch
    from vllm import LLM, SamplingParams, TokensPrompt

    from cbserver.baseline import load_model

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = load_model(case["model"], device="cpu", dtype=torch.bfloat16)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        engine = LLM(folder, max_num_seqs=case["slots"], max_model_len=case["max_len"])
    prompts = [TokensPrompt(prompt_token_ids=r.prompt_tokens) for r in requests]
    params = [SamplingParams(temperature=0, max_tokens=r.max_tokens, ignore_eos=True,
                             detokenize=False) for r in requests]
    engine.generate(prompts[:3], params[:3], use_tqdm=False)
    warmup, start = time.perf_counter() - began, time.perf_counter()
    outputs = engine.generate(prompts, params, use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in outputs], {
        "seconds": round(time.perf_counter() - start, 3), "warmup_s": round(warmup, 2)}


def run_http(case, requests):
    """The server as `python -m cbserver` starts it; users who each send their next request."""
    from load import users

    count = max(50, 2 * case["slots"])  # so that no slot waits for one
    if case["dtype"]:
        raise LoadFailed("the server takes the device's own dtype; leave --dtype out")
    began, me = time.perf_counter(), psutil.Process()
    command = python_module("cbserver", "--model", case["model"], "--max-batch", case["slots"],
                            "--max-len", case["max_len"], "--max-waiting", len(requests),
                            "--prefill-budget", case["prefill_budget"])
    with tempfile.TemporaryDirectory() as folder, ServerProcess(
            command, f"{folder}/server.log", say=lambda line: None) as server:
        few = [type(r)(r.prompt_tokens, min(r.max_tokens, 4)) for r in requests[:3]]
        users.run(server.url, few)
        process = psutil.Process(server.process.pid)
        before, warmup = cpu_seconds(me, process), time.perf_counter() - began
        outcomes, seconds = users.run(server.url, requests, count)
        mine, servers = (b - a for a, b in zip(before, cpu_seconds(me, process)))
        memory = round(process.memory_info().rss / 1e9, 2)
    if failed := [o.error for o in outcomes if o.error]:
        raise LoadFailed(f"{len(failed)} of {len(requests)} requests failed: {failed[0]}")
    events = sum(len(o.event_times) for o in outcomes)
    return [[None] * o.tokens for o in outcomes], {
        "seconds": round(seconds, 3), "warmup_s": round(warmup, 2), "users": count,
        "tokens_per_event": round(sum(o.tokens for o in outcomes) / events, 3),
        "client_cpu_percent": round(100 * mine / seconds, 1),  # of one core
        "server_cpu_percent": round(100 * servers / seconds, 1), "server_rss_gb": memory}


def cpu_seconds(*processes):
    return [sum(process.cpu_times()[:2]) for process in processes]


# What a long prompt does to running streams


def run_stall(case):
    """15 streams run, a prompt of 4,000 tokens arrives: the longest gap in them, in ms."""
    from cbserver.baseline import SamplingParams

    case |= {"arm": case["arm"].split(":")[1], "slots": 16, "max_len": 4608, "requests": 16}
    model, tokenizer = load(case)
    engine = build(case, model, tokenizer)
    requests = token_workload("uniform", 16, case["seed"], 64, case["vocab"])
    rng = random.Random(1)
    long = [rng.randrange(case["vocab"]) for _ in range(min(4000, engine.max_len - 100))]

    async def play():
        async def read(sequence):
            return [token async for token in sequence.stream()]

        async def once():
            streams = [engine.submit(r.prompt_tokens, SamplingParams(200, ignore_eos=True))
                       for r in requests[:15]]
            readers = [asyncio.create_task(read(s)) for s in streams]
            while min(len(s.generated_tokens) for s in streams) < 50:
                await asyncio.sleep(0.005)
            arrival = time.perf_counter()
            late = engine.submit(long, SamplingParams(8, ignore_eos=True))
            await asyncio.gather(read(late), *readers)
            first = late.token_times[0]
            gaps = [b - a for s in streams for a, b in zip(s.token_times, s.token_times[1:])]
            during = [b - a for s in streams for a, b in zip(s.token_times, s.token_times[1:])
                      if b > arrival and a < first]
            return {"worst_gap_ms": round(max(during) * 1e3, 2),
                    "ttft_ms": round((first - arrival) * 1e3, 1),
                    "usual_gap_ms": round(statistics.median(gaps) * 1e3, 2)}

        await engine.start()
        await once()  # what is allocated or compiled at the first sight of a long prompt
        runs = [await once() for _ in range(3)]
        await engine.stop()
        return sorted(runs, key=lambda run: run["worst_gap_ms"])[1]

    return asyncio.run(play()) | {"prompt_tokens": len(long),
                                  "prefill_budget": case["prefill_budget"]}


# All arms, in turn


def measure(options):
    """Run what is missing of every (arm, slots) × repeat; the result, on disk after each run."""
    result = begin(options)
    plan = order(list(cases(options)), options.repeats)
    for number, (repeat, case) in enumerate(plan, 1):
        row = find_row(result, case)
        if len(row["repeats"]) > repeat:
            continue
        print(f"[{number}/{len(plan)}] {name_of(case)}, repeat {repeat + 1}", end=": ", flush=True)
        try:
            run = run_child(case)
        except LoadFailed as error:
            print(error, flush=True)
            result["failed"] = result.get("failed", {}) | {name_of(case): str(error)[:400]}
            continue
        row["digests"] = row.get("digests") or run["digests"]
        row["repeats"].append({k: v for k, v in run.items() if k != "digests"})
        row |= summary(row["repeats"])
        print(f"{run['tokens_per_s']:.0f} tokens/s, warm-up {run['warmup_s']} s", flush=True)
        result["same_tokens"] = same_tokens(result["rows"])
        save(result, options)
    if options.stall:
        fast = "continuous+graphs+compile" if options.gpu else "continuous"
        case = next(iter(cases(options))) | {"arm": f"stall:{fast}"}
        for name, budget in (("in pieces", options.prefill_budget), ("whole", 8192)):
            run = run_child(case | {"prefill_budget": budget})
            result["stall"] = result.get("stall", {}) | {name: run}
            print(f"a long prompt, read {name}: {run}", flush=True)
            save(result, options)
    return result


def save(result, options):
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(result, options.out)


def begin(options):
    """The result so far: what is on disk, if it was measured the same way, or an empty one."""
    setting = {"hardware": hardware(), "model": options.model,
               "dtype": options.dtype or default_dtype(options.gpu),
               "versions": versions("torch", "transformers", "vllm"),
               "workload": {"name": options.workload, "seed": options.seed,
                            "longest": options.longest, "short": options.short}}
    if options.out.exists() and not options.fresh:
        before = json.loads(options.out.read_text())
        if all(before.get(key) == value for key, value in setting.items()):
            before["commands"] = list(dict.fromkeys([*before["commands"], options.command]))
            return before
        raise LoadFailed(f"{options.out} was measured with another setting: "
                         "choose another --out, or start anew with --fresh.")
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return setting | {"commands": [options.command], "date": now, "rows": []}


def default_dtype(gpu):
    """The name of the dtype that load_model takes on this device."""
    import torch

    from cbserver.baseline import default_dtype

    return str(default_dtype(torch.device("cuda" if gpu else "cpu"))).removeprefix("torch.")


def cases(options):
    """One dict for each (arm, slots), with all that its process needs to know."""
    common = {key: getattr(options, key) for key in
              ("model", "dtype", "workload", "seed", "longest", "short", "prefill_budget")}
    common |= {"vocab": options.vocab, "max_len": options.max_len}
    every = GPU_ARMS if options.gpu else CPU_ARMS
    for arm in options.arms:
        for slots in [1] if arm in SINGLE else options.slots:
            requests = min(every[arm], options.requests or every[arm])
            yield common | {"arm": arm, "slots": slots, "requests": requests}


def name_of(case):
    return f"{case['arm']}, {case['slots']} slots"


def find_row(result, case):
    """The result's row for this case; a new one at the end if there is none."""
    for row in result["rows"]:
        if (row["arm"], row["slots"]) == (case["arm"], case["slots"]):
            return row
    result["rows"].append({"arm": case["arm"], "slots": case["slots"], "repeats": []})
    return result["rows"][-1]


def run_child(case, limit=900):
    """Run one case in a fresh process: its numbers. Raises LoadFailed with its last words."""
    command = python_module("load.offline", "--case", json.dumps(case))
    with tempfile.TemporaryFile("w+") as log:
        try:
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True,
                                  timeout=limit)
        except subprocess.TimeoutExpired:
            raise LoadFailed(f"took more than {limit} s")
        log.seek(0)
        words = [line for line in log.read().strip().splitlines() if line.strip()]
    if done.returncode or not done.stdout.strip():
        raise LoadFailed(f"failed ({' | '.join(words[-3:])})")
    print(*[w for w in words if "No fused step" in w], sep="", end="")
    return json.loads(done.stdout.strip().splitlines()[-1])


def summary(repeats):
    """A row's medians over its repeats, and the spread of its speed."""
    speeds = [run["tokens_per_s"] for run in repeats]
    row = {"tokens_per_s": statistics.median(speeds), "spread": [min(speeds), max(speeds)],
           "requests": repeats[0]["requests"], "tokens": repeats[0]["tokens"]}
    for key in ("step_ms", "step_floor_ms", "step_gb_s", "step_bandwidth_percent", "bandwidth_gb_s",
                "warmup_s", "peak_memory_gb"):
        if values := [run[key] for run in repeats if key in run]:
            row[key] = round(statistics.median(values), 3)
    return row


def same_tokens(rows):
    """How many answers equal those of the first row: of their first 16 tokens, and whole."""
    rows = [row for row in rows if row.get("digests")]
    counts = []
    for row in rows[1:]:
        same = {"arm": row["arm"], "slots": row["slots"], "as": rows[0]["arm"]}
        for part, ours in row["digests"].items():
            pairs = list(zip(rows[0]["digests"].get(part, []), ours))
            same |= {part: sum(a == b for a, b in pairs), "compared": len(pairs)}
        counts.append(same)
    return counts


def table(result):
    """The ladder as a Markdown table."""
    lines = ["| arm | slots | tokens/s | spread | repeats | requests | tokens | step ms | floor ms "
             "| × floor | of bandwidth | warm-up s | memory GB |",
             "| --- " + "| ---: " * 12 + "|"]
    climb = list(CPU_ARMS | GPU_ARMS)
    for row in sorted((r for r in result["rows"] if r["repeats"]),
                      key=lambda r: (r["slots"], climb.index(r["arm"]))):
        step = [f"{row['step_ms']:.2f}", f"{row['step_floor_ms']:.2f}",
                f"{row['step_ms'] / row['step_floor_ms']:.2f}",
                f"{row['step_bandwidth_percent']:.0f} %"] if "step_ms" in row else ["", "", "", ""]
        low, high = row["spread"]
        cells = [row["arm"], row["slots"], f"{row['tokens_per_s']:,.0f}", f"{low:,.0f}–{high:,.0f}",
                 len(row["repeats"]), row["requests"], f"{row['tokens']:,}", *step,
                 f"{row['warmup_s']:.1f}" if "warmup_s" in row else "",
                 f"{row['peak_memory_gb']:.1f}" if "peak_memory_gb" in row else ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def parse(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m load.offline",
                                     description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", help="as for cbserver (random:llama-3.2-1b on a GPU, else smollm2)")
    add("--arms", help=f"any of {', '.join(CPU_ARMS | GPU_ARMS)} (default: all the device has)")
    add("--slots", help="sequences at once, a list (16,64 on a GPU, else 16)")
    add("--repeats", type=int, default=3, help="fresh processes for each arm (3)")
    add("--requests", type=int, help="at most so many for every arm (16 to 256, by its speed)")
    add("--workload", default="uniform", help="uniform or chat (uniform)")
    add("--seed", type=int, default=0, help="of the workload (0)")
    add("--longest", type=int, help="longest prompt and output, uniform (256 on a GPU, else 128)")
    add("--short", type=int, help="cut outputs to this many tokens, to compare them")
    add("--dtype", help="float32, float16 or bfloat16 (the device's default)")
    add("--prefill-budget", type=int, default=512, help="prompt tokens read in a turn (512)")
    add("--stall", action="store_true", help="also what a long prompt does to running streams")
    add("--with-vllm", action="store_true", help="add vLLM, if it is installed")
    add("--fresh", action="store_true", help="forget what --out already holds")
    add("--out", type=Path, help="figures/data/offline-DEVICE.json")
    add("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.command = shlex.join(["python", "-m", "load.offline", *(
        sys.argv[1:] if arguments is None else arguments)])
    fill_in(options, parser)
    return options


def fill_in(options, parser):
    """Defaults by device, and the lists as lists."""
    options.gpu = first_gpu() is not None
    gpu = options.gpu
    options.model = options.model or ("random:llama-3.2-1b" if gpu else
                                      os.environ.get("CBSERVER_MODEL", "smollm2"))
    options.slots = [int(n) for n in (options.slots or ("16,64" if gpu else "16")).split(",")]
    options.longest = options.longest or (256 if gpu else 128)
    options.max_len = 4608 if options.workload == "chat" else 2 * options.longest
    options.vocab = vocabulary(options.model)
    every = GPU_ARMS if gpu else CPU_ARMS
    options.arms = options.arms.split(",") if options.arms else [a for a in every if a != "vllm"]
    if unknown := [arm for arm in options.arms if arm not in every]:
        parser.error(f"no arm {unknown[0]!r} on this device; there are {', '.join(every)}")
    if options.with_vllm and importlib.util.find_spec("vllm") is None:
        print("vLLM is not installed here, so its row is left out: pip install vllm.", flush=True)
    elif options.with_vllm:
        options.arms.append("vllm")
    kind = "h100" if "H100" in hardware() else "gpu" if gpu else "cpu"
    options.out = options.out or Path(f"figures/data/offline-{kind}.json")


def main(arguments=None):
    options = parse(arguments)
    if options.case:
        run = {"stall": run_stall, "roofline": run_roofline}.get(
            options.case["arm"].split(":")[0], run_arm)
        print(json.dumps(run(options.case)), flush=True)
        return 0
    try:
        result = measure(options)
    except (LoadFailed, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n" + table(result) + "\n")
    for same in result.get("same_tokens", []):
        print("{arm}, {slots} slots: {whole} of {compared} answers as {as}".format(**same),
              f"(by their first 16 tokens {same.get('first 16 tokens', '?')})")
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

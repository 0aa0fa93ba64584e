"""Run one arm in a process of its own: an engine, transformers, vLLM, or the server over HTTP.

    python -m bench.arms CASE    # JSON, a dict of `bench.offline.cases`; prints the numbers as JSON

Also what bounds a step on this device, and what a long prompt does to the streams that run.
"""
import asyncio
import functools
import hashlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import psutil

from bench.results import ROOT
from cbserver.metrics import spread_ms
from load import client
from load.process import LoadFailed, ServerProcess, python_module
from load.workload import token_workload

COMPARED = 64  # requests whose tokens are compared across arms
SPAN = 512  # keys that every row sees when a single step is timed


def run_child(case, limit=900, say=None):
    """Run one case in a fresh process: its numbers. Raises LoadFailed with its last words.

    limit: seconds. say: called with a line every ten seconds of them.
    """
    command = python_module("bench.arms", json.dumps(case))
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True) as child:
        try:
            output = wait(child, limit, say)
        except BaseException:
            child.kill()
            raise
        log.seek(0)
        words = [line for line in log.read().splitlines() if line.strip()]
    if child.returncode or not output.strip():
        raise LoadFailed(f"failed ({' | '.join(words[-3:])})")
    for line in words:
        if "No fused step" in line:
            print(line, end="")
    return json.loads(output.strip().splitlines()[-1])


def wait(child, limit, say, every=10):
    """What a child printed, once it has ended; LoadFailed if it takes more than `limit` seconds."""
    begin = time.monotonic()
    while True:
        left = begin + limit - time.monotonic()
        try:
            return child.communicate(timeout=max(0, min(every, left)))[0]
        except subprocess.TimeoutExpired:
            seconds = time.monotonic() - begin
            if seconds >= limit:
                raise LoadFailed(f"took more than {limit} s")
            if say is not None:
                say(f"at work, {seconds:.0f} s")


def run_case(case):
    """Its numbers: what a stall costs, what bounds a step, conversations, or how fast an arm is."""
    if case["arm"].startswith("stall:"):
        return run_stall(case)
    if case["arm"] == "roofline":
        return run_roofline(case)
    if case["arm"].startswith("turns:"):
        from bench import prefix

        return prefix.run_case(case)
    return run_arm(case)


def run_arm(case):
    """How fast one arm answers the requests of its workload."""
    requests = token_workload(case["workload"], case["requests"], case["seed"], case["longest"],
                              case["vocab"])
    if case["short"]:
        requests = shortened(requests, case["short"])
    sys.setswitchinterval(5e-4)  # as the server does
    others = {"transformers-cb": run_transformers, "vllm": run_vllm, "http": run_http}
    run = others.get(case["arm"], run_engine)
    outputs, numbers = run(case, requests)
    for i, (request, output) in enumerate(zip(requests, outputs)):
        if len(output) != request.max_tokens:
            raise LoadFailed(f"{case['arm']}: request {i} got {len(output)} tokens instead of "
                             f"{request.max_tokens}.")
    tokens = sum(map(len, outputs))
    numbers["requests"] = len(requests)
    numbers["tokens"] = tokens
    numbers["tokens_per_s"] = round(tokens / numbers["seconds"], 2)
    answers_in_text = case["arm"] == "http"
    numbers["digests"] = {} if answers_in_text else digests(outputs)
    return numbers


def digests(outputs):
    """A digest of each of the first answers, for a comparison with those of another arm."""
    found = {}
    for part, length in (("first 16 tokens", 16), ("whole", None)):
        found[part] = [hashlib.sha1(repr(output[:length]).encode()).hexdigest()[:8]
                       for output in outputs[:COMPARED]]
    return found


def shortened(requests, most):
    """The same requests, with answers of at most so many tokens."""
    return [replace(r, max_tokens=min(r.max_tokens, most)) for r in requests]


def warm_up_requests(requests):
    """A few short ones, whose time nobody counts."""
    return shortened(requests[:3], 4)


def model_of(case):
    """(model, tokenizer) of a case; loaded in a thread that ends, as the server does."""
    import torch

    from cbserver.model.load import load_model

    dtype = getattr(torch, case["dtype"]) if case["dtype"] else None
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(load_model, case["model"], dtype=dtype).result()


# Our engines


def build(case, model, tokenizer):
    """The engine of an arm, its runner ready: graphs recorded, functions compiled."""
    from cbserver.batch import BatchRunner, StaticEngine
    from cbserver.fast import FastStep
    from cbserver.scheduler import ContinuousEngine
    from cbserver.sequence import SequentialEngine

    waiting = case["requests"] + 1
    if case["arm"] == "generate":
        return SequentialEngine(model, tokenizer, 1, case["max_len"], waiting)
    runners = {
        "static": BatchRunner,
        "continuous": BatchRunner,
        "one-slot": FastStep if model.device.type == "cuda" else BatchRunner,
        "continuous+fused": FastStep,
        "continuous+graphs": functools.partial(FastStep, fused=False),
        "continuous+graphs+fused": functools.partial(FastStep, kernel=False),
        "continuous+graphs+fused+kernel": FastStep,
    }
    arguments = [model, tokenizer, case["slots"], case["max_len"], waiting, runners[case["arm"]]]
    if case["arm"] == "static":
        return StaticEngine(*arguments)
    return ContinuousEngine(*arguments, prefill_budget=case["prefill_budget"])


def run_engine(case, requests):
    """(outputs, numbers) of one of our engines."""
    model, tokenizer = model_of(case)
    began = time.perf_counter()
    with ThreadPoolExecutor(1) as thread:  # as in the server: one team of OpenMP workers, no more
        engine = thread.submit(build, case, model, tokenizer).result()
    outputs, numbers = asyncio.run(answer_all(engine, requests, began))
    bandwidth = copy_bandwidth(model.device)
    numbers["peak_memory_gb"] = peak_memory(model.device)
    numbers["bandwidth_gb_s"] = bandwidth
    if case["arm"] not in ("generate", "static"):
        numbers["prefill_budget"] = engine.prefill_budget
    if case["arm"] != "generate":
        span = min(SPAN, case["max_len"])
        numbers |= time_step(engine.runner, model, case["slots"], span, bandwidth)
    return outputs, numbers


async def answer_all(engine, requests, began):
    """All requests at once into an engine: (outputs, numbers). The warm-up is not counted."""
    await engine.start()
    await asyncio.gather(*[answer(engine, request) for request in warm_up_requests(requests)])
    start = time.perf_counter()
    answers = await asyncio.gather(*[answer(engine, request) for request in requests])
    seconds = time.perf_counter() - start
    await engine.stop()
    outputs = [output for output, _ in answers]
    gaps = [later - earlier for _, times in answers for earlier, later in zip(times, times[1:])]
    itl_ms = spread_ms(gaps)
    itl_ms["worst"] = round(max(gaps) * 1e3, 2)
    return outputs, {"seconds": round(seconds, 3), "warmup_s": round(start - began, 2),
                     "steps": engine.stats().steps, "itl_ms": itl_ms}


async def answer(engine, request):
    """(tokens, when each was made) of one request."""
    from cbserver.model.sampling import SamplingParams

    params = SamplingParams(request.max_tokens, ignore_eos=True)
    sequence = engine.submit(request.prompt_tokens, params)
    tokens = [token async for token in sequence.stream()]
    return tokens, sequence.token_times


# What bounds a step


def time_step(runner, model, rows, span, bandwidth):
    """One decode step of `rows` rows that see `span` keys each, against the bytes it must read.

    floor_ms: weights once and every row's keys and values, at the measured copy bandwidth.
    """
    from cbserver.model.attention import kv_shape
    from cbserver.sequence import Sequence

    layers, kv_heads, head_dim = kv_shape(model)
    cached = rows * span * 2 * layers * kv_heads * head_dim * model.dtype.itemsize
    gigabytes = (weight_bytes(model) + cached) / 1e9
    in_a_row = 1 if model.device.type == "cpu" else 20
    sequences = [Sequence([0], slot=slot) for slot in range(rows)]
    times = []
    for _ in range(12):
        synchronize(model.device)
        start = time.perf_counter()
        for _ in range(in_a_row):
            for sequence in sequences:
                sequence.position = span - 2  # a row at the very end would be idle
            runner.decode(sequences)
        synchronize(model.device)
        times.append((time.perf_counter() - start) / in_a_row)
    seconds = statistics.median(times)
    floor = gigabytes / bandwidth
    return {"step_ms": round(1e3 * seconds, 3), "step_floor_ms": round(1e3 * floor, 3),
            "step_span": span, "step_gb_s": round(gigabytes / seconds, 1),
            "step_bandwidth_percent": round(100 * floor / seconds, 1)}


def weight_bytes(model):
    """Bytes of the weights that every step reads: all but an embedding that is only looked up."""
    whole = sum(p.nbytes for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    tied = embedding is model.get_output_embeddings().weight
    return whole if tied else whole - embedding.nbytes


def run_roofline(case):
    """What bounds a step on this device: its weights in GB, and the bandwidth of a copy in GB/s."""
    model, _ = model_of(case)
    return {"dtype": str(model.dtype).removeprefix("torch."),
            "weights_gb": round(weight_bytes(model) / 1e9, 4),
            "bandwidth_gb_s": copy_bandwidth(model.device)}


def copy_bandwidth(device):
    """GB/s of a large copy on the device, bytes read plus bytes written; the best of ten."""
    import torch

    source = torch.zeros(2**28 if device.type == "cuda" else 2**26, device=device)  # float32
    target = torch.empty_like(source)
    times = []
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

    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return round(psutil.Process().memory_info().peak_wset / 1e9, 2)
    scale = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9, 2)


# Other people's


def run_transformers(case, requests):
    """transformers' own continuous batching: CUDA graphs and double buffering where it has them."""
    from transformers import GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    model, _ = model_of(case)
    gpu = model.device.type == "cuda"
    began = time.perf_counter()
    # Without flash-attention a pass masks the whole cache: a cache of the size needed is fastest.
    pages_each = -(-case["max_len"] // 256) + 1
    batching = ContinuousBatchingConfig(
        max_requests_per_batch=case["slots"], use_cuda_graph=gpu, use_async_batching=gpu,
        num_blocks=case["slots"] * pages_each, max_batch_tokens=512)
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    with model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=batching) as manager:
        ask_manager(manager, warm_up_requests(requests), "warm-")
        start = time.perf_counter()
        outputs = ask_manager(manager, requests, "")
        seconds = time.perf_counter() - start
    return outputs, {"seconds": round(seconds, 3), "warmup_s": round(start - began, 2),
                     "peak_memory_gb": peak_memory(model.device)}


def ask_manager(manager, requests, prefix):
    """The answers of transformers' manager, in the order of the requests."""
    names = [f"{prefix}{i}" for i in range(len(requests))]
    for name, request in zip(names, requests):
        manager.add_request(request.prompt_tokens, request_id=name,
                            max_new_tokens=request.max_tokens, eos_token_id=-1)
    outputs = {}
    while len(outputs) < len(requests):
        result = manager.get_result(timeout=1)
        if result is None and not manager.is_running():
            raise LoadFailed("transformers' continuous batching ended early; see above.")
        if result is not None and result.is_finished():
            outputs[result.request_id] = result.generated_tokens
    return [outputs[name] for name in names]


def run_vllm(case, requests):
    """vLLM on the same model, saved to a folder."""
    import torch
    from vllm import LLM, SamplingParams, TokensPrompt

    from cbserver.model.load import load_model

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
    start = time.perf_counter()
    answers = engine.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    outputs = [list(answer.outputs[0].token_ids) for answer in answers]
    return outputs, {"seconds": round(seconds, 3), "warmup_s": round(start - began, 2)}


# The server


def run_http(case, requests):
    """The server as `python -m cbserver` starts it; users who each send their next request."""
    if case["dtype"]:
        raise LoadFailed("the server takes the device's own dtype; leave --dtype out")
    users = max(50, 2 * case["slots"])  # so that no slot waits for one
    command = python_module("cbserver", "--model", case["model"], "--max-batch", case["slots"],
                            "--max-len", case["max_len"], "--max-waiting", len(requests),
                            "--no-prefix-reuse")
    if case["prefill_budget"]:
        command += ["--prefill-budget", str(case["prefill_budget"])]
    me = psutil.Process()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, ServerProcess(
            command, f"{folder}/server.log", say=lambda line: None) as server:
        client.run(server.url, warm_up_requests(requests))
        warmup = time.perf_counter() - began
        process = psutil.Process(server.process.pid)
        client_before = cpu_seconds(me)
        server_before = cpu_seconds(process)
        outcomes, seconds = client.run(server.url, requests, users)
        client_cpu = cpu_seconds(me) - client_before
        server_cpu = cpu_seconds(process) - server_before
        memory = process.memory_info().rss
    client.expect_success(outcomes)
    tokens = sum(outcome.tokens for outcome in outcomes)
    events = sum(len(outcome.event_times) for outcome in outcomes)
    outputs = [[None] * outcome.tokens for outcome in outcomes]  # which ones, nobody looks at
    return outputs, {
        "seconds": round(seconds, 3), "warmup_s": round(warmup, 2), "users": users,
        "tokens_per_event": round(tokens / events, 3),
        "client_cpu_percent": round(100 * client_cpu / seconds, 1),  # of one core
        "server_cpu_percent": round(100 * server_cpu / seconds, 1),
        "server_rss_gb": round(memory / 1e9, 2)}


def cpu_seconds(process):
    times = process.cpu_times()
    return times.user + times.system


# What a long prompt does to running streams


def run_stall(case):
    """15 streams run, a prompt of 4,000 tokens arrives: the longest gap in them, in ms."""
    arm = case["arm"].removeprefix("stall:")
    case = case | {"arm": arm, "slots": 16, "max_len": 4608, "requests": 16}
    model, tokenizer = model_of(case)
    with ThreadPoolExecutor(1) as thread:  # as in the server: one team of OpenMP workers, no more
        engine = thread.submit(build, case, model, tokenizer).result()
    requests = token_workload("uniform", 15, case["seed"], 64, case["vocab"])
    rng = random.Random(1)
    length = min(4000, engine.max_len - 100)
    prompt = [rng.randrange(case["vocab"]) for _ in range(length)]
    numbers = asyncio.run(median_stall(engine, requests, prompt))
    numbers["prompt_tokens"] = length
    numbers["prefill_budget"] = engine.prefill_budget
    return numbers


async def median_stall(engine, requests, prompt):
    """The middle one of three tries, by its worst gap."""
    await engine.start()
    await stall(engine, requests, prompt)  # allocates and compiles what a long prompt needs
    runs = [await stall(engine, requests, prompt) for _ in range(3)]
    await engine.stop()
    return sorted(runs, key=lambda run: run["worst_gap_ms"])[1]


async def stall(engine, requests, prompt):
    """One try: the gaps in the streams, and how long the prompt waits for its first token."""
    from cbserver.model.sampling import SamplingParams

    params = SamplingParams(200, ignore_eos=True)
    streams = [engine.submit(request.prompt_tokens, params) for request in requests]
    readers = [asyncio.create_task(read_all(sequence)) for sequence in streams]
    while min(len(sequence.generated_tokens) for sequence in streams) < 50:
        await asyncio.sleep(0.005)
    arrival = time.perf_counter()
    late = engine.submit(prompt, SamplingParams(8, ignore_eos=True))
    await asyncio.gather(read_all(late), *readers)
    first = late.token_times[0]
    gaps = []
    gaps_meanwhile = []
    for sequence in streams:
        for earlier, later in zip(sequence.token_times, sequence.token_times[1:]):
            gaps.append(later - earlier)
            if later > arrival and earlier < first:
                gaps_meanwhile.append(later - earlier)
    return {"worst_gap_ms": round(max(gaps_meanwhile) * 1e3, 2),
            "ttft_ms": round((first - arrival) * 1e3, 1),
            "usual_gap_ms": round(statistics.median(gaps) * 1e3, 2)}


async def read_all(sequence):
    async for _ in sequence.stream():
        pass


if __name__ == "__main__":
    print(json.dumps(run_case(json.loads(sys.argv[1]))), flush=True)

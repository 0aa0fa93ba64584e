"""What an event costs over HTTP: the server with a model that costs nothing, or with a real one.

    python -m bench.http                                       writes figures/data/http-cpu.json
    python -m bench.http --model random:llama-3.2-1b --streams 16,64,128,256 --slots 256 \\
        --clients 4 --requests 1024 --longest 256 --out figures/data/http-h200.json

Without --model the engine is ours and its runner sleeps `--step-ms` in place of a pass. So what is
left is the way of a token to its client, and a CPU shows what it costs. Beside it is the floor: a
program that writes events which are ready, to as many connections, as often.
"""
import argparse
import asyncio
import datetime
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil

from bench.arms import cpu_seconds, run_child
from bench.results import DATA, command_line, first_gpu, hardware, order, versions, write_json
from cbserver.metrics import spread_ms
from load import client
from load.process import ServerProcess, python_module
from load.workload import TokenRequest, token_workload, vocabulary

TOKEN = 260  # some word of random:tiny's
SAMPLE_S = 0.002


# The server's side


def serve(words):
    """Child process: `cbserver` with a costless engine, if asked for; its profile at the end."""
    import uvicorn

    from cbserver import cli
    from cbserver.scheduler import ContinuousEngine

    step_ms, profile, *argv = words

    class CostlessRunner:
        """A BatchRunner that sleeps instead of computing."""

        piece = 512

        def __init__(self, model, slots, max_len):
            self.seconds = float(step_ms) / 1e3

        def prefill(self, sequence, end):
            sequence.position = end

        def decode(self, sequences):
            time.sleep(self.seconds if sequences else 0)
            for sequence in sequences:
                sequence.position += 1
            return [(sequence, TOKEN) for sequence in sequences]

    class CostlessEngine(ContinuousEngine):
        def __init__(self, *arguments, prefill_budget):
            super().__init__(*arguments[:-1], CostlessRunner, prefill_budget or 2048)

    if profile != "-":
        serving = uvicorn.Server.run

        def watched(server, sockets=None):
            threading.Thread(target=sample, args=(Path(profile),), daemon=True).start()
            serving(server, sockets)

        uvicorn.Server.run = watched
    cli.main(argv, CostlessEngine if float(step_ms) else None)


def sample(path):
    """Note, 500 times a second, whose line the event loop's thread is at; on disk each 0.1 s."""
    thread = threading.main_thread().ident
    seen = Counter()
    while True:
        for _ in range(50):
            time.sleep(SAMPLE_S)
            frame = sys._current_frames()[thread]
            seen[group_of(frame.f_code.co_filename, frame.f_code.co_name)] += 1
        write_json(seen, path)


def group_of(filename, function):
    """What a line of code belongs to, from its file."""
    parts = Path(filename).parts
    if "cbserver" in parts:
        return "/".join(parts[parts.index("cbserver"):])
    for name in ("uvicorn", "starlette", "fastapi", "anyio", "transformers", "tokenizers"):
        if name in parts:
            return name
    if function in ("run", "run_until_complete", "select"):
        return "asleep"
    return parts[-2] if "site-packages" in parts else "the standard library"


async def write_events(port, streams, step_ms):
    """The floor: events that are ready, on `streams` connections, every `step_ms`."""
    chunk = b'{"id": "cmpl-0123456789", "choices": [{"index": 0, "text": " word"}]}'
    chunk = b"data: " + chunk.ljust(180) + b"\n\n"
    framed = b"%x\r\n%s\r\n" % (len(chunk), chunk)
    writers = []

    async def accept(reader, writer):
        writers.append(writer)

    async with await asyncio.start_server(accept, "127.0.0.1", port):
        while True:
            await asyncio.sleep(step_ms / 1e3)
            for writer in writers:
                if not writer.is_closing():
                    writer.write(framed)


def write_floor(words):
    """Child process of the floor."""
    import uvloop

    port, streams, step_ms = words
    uvloop.run(write_events(int(port), int(streams), float(step_ms)))


# The clients' side


def load(url, requests, users):
    """One client process: a dict of its first and last moment, CPU seconds, counts and TTFTs."""
    me = psutil.Process()
    before = cpu_seconds(me)
    begin = time.perf_counter()
    outcomes, _ = client.run(url, requests, users)
    end = time.perf_counter()
    client.expect_success(outcomes)
    return {"begin": begin, "end": end, "cpu_s": cpu_seconds(me) - before,
            "events": sum(len(outcome.event_times) for outcome in outcomes),
            "tokens": sum(outcome.tokens for outcome in outcomes),
            "ttft": [outcome.ttft for outcome in outcomes]}


def run_server(options, levels, profile=None):
    """One fresh server under so many users, one number of them after the other: yields numbers."""
    step_ms = 0 if options.model else options.step_ms
    slots = options.slots or max(levels)
    arguments = ["serve", step_ms, profile or "-", "--model", options.model or "random:tiny",
                 "--max-batch", slots, "--max-len", options.max_len,
                 "--max-waiting", 2 * options.requests, *options.server_args.split()]
    command = python_module("bench.http", *arguments)
    if options.server_tree:  # -P: its code, and not this folder's, comes first
        os.environ["PYTHONPATH"] = options.server_tree
        command.insert(1, "-P")
    with tempfile.TemporaryDirectory() as folder, ServerProcess(
            command, f"{folder}/log",
            say=lambda line: None) as server, ProcessPoolExecutor(
            options.clients, get_context("spawn")) as pool:
        process = psutil.Process(server.process.pid)
        short = [TokenRequest(r.prompt_tokens, 4) for r in requests_of(options, max(levels))]
        load_all(pool, server.url, [short] * options.clients, max(levels))
        for streams in levels:
            requests = requests_of(options, most(options, streams))
            shares = deal(requests, options.clients)
            family = [process, *process.children(recursive=True)]
            before = [cpu_seconds(one) for one in family]
            found = load_all(pool, server.url, shares, streams)
            used = [cpu_seconds(one) - cpu for one, cpu in zip(family, before)]
            yield numbers(streams, found, [cpu for cpu in used if cpu])


def deal(requests, clients):
    """A list of requests for each client, each with about as many tokens to wait for as another.

    A client that is done early would leave slots empty, which the engine alone never has.
    """
    shares = [[] for _ in range(clients)]
    tokens = [0] * clients
    for request in requests:
        least = tokens.index(min(tokens))
        shares[least].append(request)
        tokens[least] += request.max_tokens
    return shares


def load_all(pool, url, shares, streams):
    """All client processes at once."""
    count = len(shares)
    return list(pool.map(load, [url] * count, shares, [streams // count] * count))


def numbers(streams, found, used):
    """What the clients found, and the CPU seconds of the server's processes, in one row."""
    seconds = max(f["end"] for f in found) - min(f["begin"] for f in found)
    tokens = sum(f["tokens"] for f in found)
    events = sum(f["events"] for f in found)
    ttft = [seconds for f in found for seconds in f["ttft"]]
    spread = spread_ms(ttft)
    return {"streams": streams, "requests": len(ttft), "tokens_per_s": round(tokens / seconds, 1),
            "events_per_s": round(events / seconds, 1),
            "tokens_per_event": round(tokens / events, 3),
            "cpu_us_per_token": round(1e6 * sum(used) / tokens, 2),
            "ttft_p50_ms": spread["p50"], "ttft_p99_ms": spread["p99"],
            "server_cpu_percent": [round(100 * cpu / seconds, 1) for cpu in used],
            "client_cpu_percent": [round(100 * f["cpu_s"] / seconds, 1) for f in found]}


def most(options, streams):
    """How many requests: few users need fewer."""
    return min(options.requests, 16 * streams)


def requests_of(options, count):
    """The same seeded requests for all."""
    if not options.model:
        return [TokenRequest([5 + i % 200] * 16, options.tokens) for i in range(count)]
    return token_workload("uniform", count, 0, options.longest, vocabulary(options.model))


def run_alone(options, levels):
    """The engine with as many slots, without HTTP, all requests submitted at once."""
    for streams in levels:
        yield alone(options, streams)


def alone(options, streams):
    case = {"arm": "continuous+graphs+fused+kernel" if options.gpu else "continuous",
            "model": options.model, "dtype": None, "workload": "uniform", "seed": 0,
            "longest": options.longest, "short": None, "vocab": vocabulary(options.model),
            "prefill_budget": None, "max_len": options.max_len,
            "slots": streams, "requests": most(options, streams)}
    run = run_child(case)
    return {"streams": streams, "tokens_per_s": run["tokens_per_s"]}


def run_floor(options, levels):
    """CPU time an event where nothing is left but to write it."""
    for streams in levels:
        yield floor(options, streams)


def floor(options, streams):
    from load.process import free_port, spawn, stop

    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        process = spawn(python_module("bench.http", "floor", port, streams, options.step_ms),
                        f"{folder}/log")
        try:
            return asyncio.run(read_floor(process.pid, port, streams))
        finally:
            stop(process)


async def read_floor(pid, port, streams, seconds=5):
    for _ in range(100):
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            break
        except OSError:
            await asyncio.sleep(0.1)
    events = 0

    async def read():
        nonlocal events
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while True:
            await reader.readuntil(b"\n\n")
            events += 1

    readers = [asyncio.create_task(read()) for _ in range(streams)]
    await asyncio.sleep(1)
    process = psutil.Process(pid)
    before, count, begin = cpu_seconds(process), events, time.perf_counter()
    await asyncio.sleep(seconds)
    used, count, took = cpu_seconds(process) - before, events - count, time.perf_counter() - begin
    for reader in readers:
        reader.cancel()
    return {"streams": streams, "events_per_s": round(count / took, 1),
            "cpu_us_per_token": round(1e6 * used / count, 2)}


# All of it


def parse(argv):
    parser = argparse.ArgumentParser("python -m bench.http", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", help="a real one; without: a step that only sleeps")
    add("--streams", default="128", help="users at once; several with commas (128)")
    add("--slots", type=int, help="of the server (as many as streams)")
    add("--requests", type=int, default=512, help="how many, all users together (512)")
    add("--tokens", type=int, default=200, help="of each answer, without --model (200)")
    add("--longest", type=int, default=256, help="prompt and answer, with --model (256)")
    add("--max-len", type=int, default=1024, help="of the server (1024)")
    add("--step-ms", type=float, default=12, help="how long a costless step sleeps (12)")
    add("--clients", type=int, default=1, help="processes of clients (1)")
    add("--repeats", type=int, default=3, help="fresh servers (3)")
    add("--arms", default="floor,server", help="of floor, server, alone (floor,server)")
    add("--server-args", default="", help="more options of the server, as one string")
    add("--server-tree", help="another work tree, whose server is measured with these clients")
    add("--name", default="server", help="what to call the server's rows (server)")
    add("--profile", action="store_true", help="one more run: whose lines the event loop is at")
    add("--out", type=Path, default=DATA / "http-cpu.json")
    options = parser.parse_args(argv)
    options.gpu = first_gpu() is not None
    return options


def main(argv):
    if argv[:1] == ["serve"]:
        return serve(argv[1:])
    if argv[:1] == ["floor"]:
        return write_floor(argv[1:])
    options = parse(argv)
    result = {"rows": [], "profiles": {}}
    if options.out.exists():  # other names' rows stay
        result = json.loads(options.out.read_text(encoding="utf-8"))
    arms = {"floor": run_floor, "server": run_server, "alone": run_alone}
    chosen = options.arms.split(",")
    names = {arm: options.name if arm == "server" else arm for arm in chosen}
    result["rows"] = [row for row in result["rows"] if row["name"] not in names.values()]
    levels = [int(users) for users in options.streams.split(",")]
    for repeat, arm in order(chosen, options.repeats):
        for row in arms[arm](options, levels):
            result["rows"].append({"name": names[arm], "repeat": repeat} | row)
            print(json.dumps(result["rows"][-1]), flush=True)
            save(result, options, argv)
    if options.profile:
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/profile.json"
            list(run_server(options, levels[:1], path))
            result["profiles"][options.name] = shares(json.loads(Path(path).read_text()))
        print(json.dumps(result["profiles"][options.name]))
    save(result, options, argv)


def save(result, options, argv):
    """On disk after each run."""
    result |= {"hardware": hardware(), "model": options.model or "none: a step sleeps",
               "versions": versions("torch", "transformers", "uvicorn", "starlette", "fastapi",
                                  "uvloop", "httptools"),
               "date": datetime.date.today().isoformat()}
    result.setdefault("commands", {})[options.name] = command_line("bench.http", argv)
    write_json(result, options.out)


def shares(seen):
    """Percent of the time that the event loop was awake, the largest first."""
    awake = {group: count for group, count in seen.items() if group != "asleep"}
    whole = sum(awake.values())
    return {group: round(100 * count / whole, 1)
            for group, count in sorted(awake.items(), key=lambda pair: -pair[1])}



# What it says


def middle(rows, name, streams, key):
    """The median over the repeats of one row; None without data."""
    found = [row[key] for row in rows if row["name"] == name and row["streams"] == streams]
    return statistics.median(found) if found else None


def names_of(result):
    """The ways of serving that were measured with a model, in order."""
    return [name for name in dict.fromkeys(row["name"] for row in result["rows"])
            if name != "alone"]


def http_table(result):
    """Tokens/s of each way at each number of users, beside the engine alone: Markdown."""
    rows = result["rows"]
    lines = ["| users | served by | tokens/s | of the engine alone | TTFT p50 | p99 "
             "| tokens an event |", "| ---: | --- | ---: | ---: | ---: | ---: | ---: |"]
    for streams in sorted({row["streams"] for row in rows}):
        engine = middle(rows, "alone", streams, "tokens_per_s")
        for name in names_of(result):
            speed = middle(rows, name, streams, "tokens_per_s")
            if speed is None:
                continue
            share = f"{speed / engine:.0%}" if engine else "–"
            ttft = [middle(rows, name, streams, f"ttft_{q}_ms") for q in ("p50", "p99")]
            lines.append(f"| {streams} | {name} | {speed:,.0f} | {share} | {ttft[0]:.0f} ms | "
                         f"{ttft[1]:.0f} ms | "
                         f"{middle(rows, name, streams, 'tokens_per_event'):.2f} |")
    return "\n".join(lines)


def http_figure(result):
    """Tokens/s against users, with the range over the repeats."""
    import matplotlib.pyplot as plt

    from bench.report import STYLE

    looks = [("#0072B2", "o-"), ("#E69F00", "s-"), ("#009E73", "^-")]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
        for name, (color, style) in zip([*names_of(result), "alone"],
                                        [*looks[:len(names_of(result))], ("#333333", "D")]):
            levels = sorted({r["streams"] for r in result["rows"] if r["name"] == name})
            speeds = [[r["tokens_per_s"] for r in result["rows"]
                       if r["name"] == name and r["streams"] == level] for level in levels]
            center = [statistics.median(speed) for speed in speeds]
            errors = [[c - min(speed) for c, speed in zip(center, speeds)],
                      [max(speed) - c for c, speed in zip(center, speeds)]]
            label = "the engine alone" if name == "alone" else name
            axes.errorbar(levels, center, errors, fmt=style, color=color, label=label, capsize=3)
        axes.set(xlabel="users at once", ylabel="tokens/s", ylim=(0, None), xlim=(0, None),
                 xticks=sorted({row["streams"] for row in result["rows"]}),
                 title=f"{result['model']} on {result['hardware']}")
        axes.legend(frameon=False)
    return figure


def event_text(result):
    """The CPU time of an event, before and after, and what it goes to: Markdown."""
    rows = result["rows"]
    streams = rows[0]["streams"]

    def said(name):
        times = [row["cpu_us_per_token"] for row in rows if row["name"] == name]
        return f"{statistics.median(times):.0f} µs ({min(times):.0f} to {max(times):.0f})"

    profiles = result["profiles"]
    groups = [group for group in profiles["after"] | profiles["before"]
              if max(profile.get(group, 0) for profile in profiles.values()) >= 2]
    lines = ["| the event loop's time, % | before | after |", "| --- | ---: | ---: |"]
    lines += [f"| {group} | {profiles['before'].get(group, 0):.0f} | "
              f"{profiles['after'].get(group, 0):.0f} |" for group in groups]
    return (f"CPU time an event at {streams} streams on {result['hardware']}, one process: "
            f"{said('before')} before, {said('after')} now, and {said('floor')} at the floor "
            f"(`{result['commands']['after']}`). {result.get('note', '')}\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])

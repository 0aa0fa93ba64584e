"""What the live page's feed costs the server, and what a Ray replica costs over bare uvicorn.

    python -m bench.overhead [feed] [ray]     writes figures/data/overhead-cpu.json

A machine's speed drifts by more than the feed costs. So the feed's cost is the CPU time that open
pages add to a server whose batch is full and held still; and, as a check that is less sharp, what
they do to tokens/s in one long run, where neighbouring stretches with and without are compared.
"""
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil

from bench.results import DATA, command_line, hardware, order, versions, write_json
from cbserver import cli
from cbserver.scheduler import ContinuousEngine
from load import client
from load.process import LoadFailed, ServerProcess, python_module
from load.workload import TokenRequest, token_workload, vocabulary

OUT = DATA / "overhead-cpu.json"
USERS = 24
VIEWERS = 4
SLOTS = 16
MODELS = {"smollm2": 32, "random:tiny": 400}  # requests of a run
LONG = 32  # requests of the feed's run
STRETCH = 2.5  # seconds


def bare(model, log):
    """A server on uvicorn alone."""
    return ServerProcess(python_module("cbserver", "--model", model, "--max-batch", SLOTS), log)


def speed(url, model, seed):
    """{"tokens_per_s", "ttft_p50_ms"} that 24 users see."""
    requests = token_workload("uniform", MODELS[model], seed, 64, vocabulary(model))
    outcomes, seconds = client.run(url, requests, USERS)
    client.expect_success(outcomes)
    tokens = sum(outcome.tokens for outcome in outcomes)
    ttft = statistics.median(outcome.ttft for outcome in outcomes)
    return {"tokens_per_s": round(tokens / seconds, 2), "ttft_p50_ms": round(1e3 * ttft, 1)}


# The feed


def feed(model, log):
    """What pages cost a full server that stands still, and what they do to one that works."""
    still = cost_of_pages(log)
    rows = speed_beside_pages(model, log)
    without = [used for pages, used in still if not pages]
    with_them = [used for pages, used in still if pages]
    added = statistics.median(with_them) - statistics.median(without)
    return {"share_of_a_core": round(added / 1e3, 5), "held": still,
            "tokens_per_s": with_pages(rows), "model": model, "rows": rows}


class StillEngine(ContinuousEngine):
    """Stands still, and computes nothing, once all slots are at work."""

    def step(self):
        if self.running and min(len(s.generated_tokens) for s in self.running) > 9:
            time.sleep(0.02)
        else:
            super().step()


def cost_of_pages(log):
    """[[open pages, milliseconds of the server's CPU in a second], ...], all slots full."""
    command = python_module("bench.overhead", "serve", "--model", "random:tiny",
                            "--max-batch", SLOTS)
    with ServerProcess(command, log) as server:
        process = psutil.Process(server.process.pid)
        return asyncio.run(watch_the_still_server(process, server.url, repeats=5))


async def watch_the_still_server(process, url, repeats):
    requests = token_workload("uniform", SLOTS, 7, 64, vocabulary("random:tiny"))
    requests = [replace(request, max_tokens=400) for request in requests]
    load = asyncio.create_task(client.closed_loop(url, requests, SLOTS))
    await asyncio.sleep(5)
    rows = []
    for _, pages in order((0, VIEWERS), repeats):
        viewers = open_pages(url, pages)
        await asyncio.sleep(1)
        begin = time.perf_counter()
        before = sum(process.cpu_times()[:2])
        await asyncio.sleep(10)
        used = sum(process.cpu_times()[:2]) - before
        rows.append([pages, round(1e3 * used / (time.perf_counter() - begin), 2)])
        print("held", rows[-1], flush=True)
        await close_pages(viewers)
    if load.done():
        raise LoadFailed("The slots did not stay full: a request ended or was refused.")
    load.cancel()
    return rows


def speed_beside_pages(model, log):
    """[[open pages, tokens/s], ...] of the stretches of one run, the server on its own core."""
    os.sched_setaffinity(0, {0})  # the server has a core, and whoever reads has the other
    with bare(model, log) as process:
        os.sched_setaffinity(0, {1})
        speed(process.url, model, 99)
        requests = token_workload("uniform", LONG, 7, 64, vocabulary(model))
        longer = [TokenRequest(request.prompt_tokens[:16], 480) for request in requests]
        streams, stretches = asyncio.run(watch_the_busy_server(process.url, longer))
    os.sched_setaffinity(0, range(os.cpu_count()))
    rows = []
    for pages, begin, end in stretches:
        tokens = sum(tokens_between(times, begin, end) for times in streams)
        rows.append([pages, round(tokens / (end - begin), 2)])
    return rows


def tokens_between(times, begin, end):
    """How many tokens came; a stream's count grows evenly from token to token."""
    before, after = np.interp([begin, end], times, range(len(times)))
    return float(after - before)


async def watch_the_busy_server(url, requests):
    """When each stream's tokens came, and [(open pages, begin, end)].

    Without, with, with, without: so a steady drift falls out of two pairs.
    """
    load = asyncio.create_task(client.closed_loop(url, requests, SLOTS))
    stretches = []
    await asyncio.sleep(STRETCH)
    while not load.done():
        pages = VIEWERS if len(stretches) % 4 in (1, 2) else 0
        viewers = open_pages(url, pages)
        await asyncio.sleep(0.5)
        begin = time.perf_counter()
        await asyncio.wait([load], timeout=STRETCH)
        stretches.append((pages, begin, time.perf_counter()))
        await close_pages(viewers)
    outcomes, _ = load.result()
    client.expect_success(outcomes)
    full = max(outcome.start for outcome in outcomes)  # from the last one on, slots stay empty
    return ([outcome.event_times for outcome in outcomes],
            [stretch for stretch in stretches if stretch[2] < full])


def open_pages(url, count):
    """So many readers of /events: list of tasks."""
    return [asyncio.create_task(view(url)) for _ in range(count)]


async def close_pages(viewers):
    """End them; one that has ended by itself raises why."""
    for viewer in viewers:
        if not viewer.cancel():
            await viewer


async def view(url):
    """Read /events and throw it away."""
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        writer.write(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        status = await reader.readline()
        if b" 200 " not in status:
            raise LoadFailed(f"/events answered {status.decode().strip()!r}.")
        while await reader.read(65536):
            pass
        raise LoadFailed("The server closed /events.")
    finally:
        writer.close()


def with_pages(rows):
    """Speed with pages over without: median of neighbours, and where 95 % of resamples put it."""
    ratios = []
    for pair in zip(rows[::2], rows[1::2]):
        (_, without), (_, with_them) = sorted(pair)
        ratios.append(with_them / without)
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return {"pairs": len(ratios), "median": round(statistics.median(ratios), 4),
            "interval": [round(medians[50], 4), round(medians[-51], 4)]}


# Ray


class RayServer(ServerProcess):
    """`serve run` with one replica; its command takes no --host and no --port."""

    def __init__(self, model, log):
        super().__init__([], log)
        program = str(Path(sys.executable).with_name("serve"))
        self.command = [program, "run", "cbserver.on_ray:app", "replicas=1",
                        f"cpus={os.cpu_count()}", f"model={model}", f"max_batch={SLOTS}",
                        f"port={self.port}"]


def ray(model, folder, repeats):
    """A fresh server for each run, bare and on Ray by turns."""
    servers = {"uvicorn": bare, "ray": RayServer}
    rows = []
    for repeat, kind in order(servers, repeats):
        with servers[kind](model, folder / f"{kind}.log") as process:
            speed(process.url, model, 99)
            rows.append({"repeat": repeat, "server": kind, **speed(process.url, model, repeat)})
            print(model, rows[-1], flush=True)
    return rows


def on_ray(rows):
    """Speed on Ray over bare, by repeat: median and spread."""
    speeds = {(row["repeat"], row["server"]): row["tokens_per_s"] for row in rows}
    found = sorted(speeds[repeat, "ray"] / speeds[repeat, "uvicorn"]
                   for repeat in {row["repeat"] for row in rows})
    return {"median": round(statistics.median(found), 4),
            "spread": [round(found[0], 4), round(found[-1], 4)]}


def main(arguments=None):
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["serve"]:
        return cli.main(words[1:], StillEngine)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    parts = words or ["feed", "ray"]
    result = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {"models": {}}
    result |= {"command": command_line("bench.overhead", []), "hardware": hardware(),
               "versions": versions("torch", "transformers", "fastapi", "uvicorn", "ray"),
               "users": USERS, "slots": SLOTS, "viewers": VIEWERS, "stretch_s": STRETCH}
    with tempfile.TemporaryDirectory() as folder:
        if "feed" in parts:
            result["feed"] = feed("smollm2", Path(folder) / "feed.log")
            write_json(result, OUT)
        if "ray" in parts:
            for model in MODELS:
                runs = ray(model, Path(folder), repeats=3)
                result["models"][model] = {"ray": on_ray(runs), "ray_runs": runs}
                write_json(result, OUT)


if __name__ == "__main__":
    main()

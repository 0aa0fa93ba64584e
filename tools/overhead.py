"""What the live page's feed costs the server, and what a Ray replica costs over bare uvicorn.

    python tools/overhead.py [feed] [ray]     writes figures/data/overhead-cpu.json

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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cbserver import server  # noqa: E402
from cbserver.scheduler import ContinuousEngine  # noqa: E402
from load import users as crowd  # noqa: E402
from load.results import hardware, order, versions, write_json  # noqa: E402
from load.server import LoadFailed, ServerProcess, python_module  # noqa: E402
from load.workload import TokenRequest, token_workload, vocabulary  # noqa: E402

OUT = ROOT / "figures" / "data" / "overhead-cpu.json"
USERS, VIEWERS, SLOTS = 24, 4, 16
MODELS = {"smollm2": 32, "random:tiny": 400}  # requests of a run
LONG, STRETCH = 32, 2.5  # the feed's run: requests; seconds


def speed(url, model, seed):
    """{"tokens_per_s", "ttft_p50_ms"} that 24 users see."""
    requests = token_workload("uniform", MODELS[model], seed, 64, vocabulary(model))
    outcomes, seconds = crowd.run(url, requests, USERS)
    if failed := [o.error for o in outcomes if o.error]:
        raise LoadFailed(f"{len(failed)} requests failed, the first with: {failed[0]}")
    return {"tokens_per_s": round(sum(o.tokens for o in outcomes) / seconds, 2),
            "ttft_p50_ms": round(1e3 * statistics.median(
                o.event_times[0] - o.start for o in outcomes), 1)}


def bare(model, log):
    return ServerProcess(python_module("cbserver", "--model", model, "--max-batch", SLOTS), log)


class Held(ContinuousEngine):
    """Stands still, and computes nothing, once all slots are at work."""

    def step(self):
        if self.running and min(len(s.generated_tokens) for s in self.running) > 9:
            time.sleep(0.02)
        else:
            super().step()


def serve_held(arguments):
    server.ENGINES["continuous"] = Held
    server.main(arguments)


async def held(process, url, repeats):
    """[[open pages, milliseconds of the server's CPU in a second], ...], all slots full."""
    requests = token_workload("uniform", SLOTS, 7, 64, vocabulary("random:tiny"))
    load = asyncio.create_task(crowd.closed_loop(
        url, [replace(r, max_tokens=400) for r in requests], SLOTS))
    await asyncio.sleep(5)
    rows = []
    for _, pages in order((0, VIEWERS), repeats):
        viewers = [asyncio.create_task(view(url)) for _ in range(pages)]
        await asyncio.sleep(1)
        begin, before = time.perf_counter(), sum(process.cpu_times()[:2])
        await asyncio.sleep(10)
        used = sum(process.cpu_times()[:2]) - before
        rows.append([pages, round(1e3 * used / (time.perf_counter() - begin), 2)])
        print("held", rows[-1], flush=True)
        for viewer in viewers:
            viewer.cancel() or await viewer  # one that has ended says why
    if load.done():
        raise LoadFailed("The slots did not stay full: a request ended or was refused.")
    load.cancel()
    return rows


def feed(model, log):
    """What pages cost a full server that stands still, and what they do to one that works."""
    command = [sys.executable, __file__, "serve", "--model", "random:tiny", "--max-batch",
               str(SLOTS)]
    with ServerProcess(command, log) as process:
        still = asyncio.run(held(psutil.Process(process.process.pid), process.url, 5))
    os.sched_setaffinity(0, {0})  # the server has a core, and whoever reads has the other
    with bare(model, log) as process:
        os.sched_setaffinity(0, {1})
        speed(process.url, model, 99)
        requests = token_workload("uniform", LONG, 7, 64, vocabulary(model))
        streams, stretches = asyncio.run(watched(process.url, [
            TokenRequest(r.prompt_tokens[:16], 480) for r in requests]))
    rows = []
    for pages, begin, end in stretches:  # a stream's count grows evenly from token to token
        before, after = sum(np.interp([begin, end], times, range(len(times))) for times in streams)
        rows.append([pages, round(float(after - before) / (end - begin), 2)])
    os.sched_setaffinity(0, range(os.cpu_count()))
    none, some = ([used for pages, used in still if bool(pages) == seen] for seen in (0, 1))
    return {"share_of_a_core": round((statistics.median(some) - statistics.median(none)) / 1e3, 5),
            "held": still, "tokens_per_s": with_pages(rows), "model": model, "rows": rows}


async def watched(url, requests):
    """When each stream's tokens came, and [(open pages, begin, end)].

    Without, with, with, without: so a steady drift falls out of two pairs.
    """
    load, stretches = asyncio.create_task(crowd.closed_loop(url, requests, SLOTS)), []
    await asyncio.sleep(STRETCH)
    while not load.done():
        pages = VIEWERS * (len(stretches) % 4 in (1, 2))
        viewers = [asyncio.create_task(view(url)) for _ in range(pages)]
        await asyncio.sleep(0.5)
        begin = time.perf_counter()
        await asyncio.wait([load], timeout=STRETCH)
        stretches.append((pages, begin, time.perf_counter()))
        for viewer in viewers:
            viewer.cancel() or await viewer  # one that has ended says why
    outcomes, _ = load.result()
    if failed := [o.error for o in outcomes if o.error]:
        raise LoadFailed(f"{len(failed)} requests failed, the first with: {failed[0]}")
    full = max(o.start for o in outcomes)  # from the last request on, slots stay empty
    return [o.event_times for o in outcomes], [row for row in stretches if row[2] < full]


async def view(url):
    """Read /events and throw it away."""
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        writer.write(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        if b" 200 " not in (status := await reader.readline()):
            raise LoadFailed(f"/events answered {status.decode().strip()!r}.")
        while await reader.read(65536):
            pass
        raise LoadFailed("The server closed /events.")
    finally:
        writer.close()


def with_pages(rows):
    """Speed with pages over without: median of neighbours, and where 95 % of resamples put it."""
    ratios = [max(pair)[1] / min(pair)[1] for pair in zip(rows[::2], rows[1::2])]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return {"pairs": len(ratios), "median": round(statistics.median(ratios), 4),
            "interval": [round(medians[50], 4), round(medians[-51], 4)]}


class RayServer(ServerProcess):
    """`serve run` with one replica; its command takes no --host and no --port."""

    def __init__(self, model, log):
        super().__init__([], log)
        self.command = [str(Path(sys.executable).with_name("serve")), "run", "tools.ray_serve:app",
                        "replicas=1", f"cpus={os.cpu_count()}", f"model={model}",
                        f"max_batch={SLOTS}", f"port={self.port}"]


def ray(model, folder, repeats):
    """A fresh server for each run, bare and on Ray by turns."""
    rows = []
    for repeat, kind in order(("uvicorn", "ray"), repeats):
        log = folder / f"{kind}.log"
        with bare(model, log) if kind == "uvicorn" else RayServer(model, log) as process:
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


def main():
    if sys.argv[1:2] == ["serve"]:
        return serve_held(sys.argv[2:])
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    parts = sys.argv[1:] or ["feed", "ray"]
    result = json.loads(OUT.read_text()) if OUT.exists() else {"models": {}}
    result |= {"command": "python tools/overhead.py", "hardware": hardware(),
               "versions": versions("torch", "transformers", "fastapi", "uvicorn", "ray"),
               "users": USERS, "slots": SLOTS, "viewers": VIEWERS, "stretch_s": STRETCH}
    with tempfile.TemporaryDirectory() as folder:
        if "feed" in parts:
            result["feed"] = feed("smollm2", Path(folder) / "feed.log")
            write_json(result, OUT)
        for model in MODELS if "ray" in parts else ():
            runs = ray(model, Path(folder), repeats=3)
            result["models"][model] = {"ray": on_ray(runs), "ray_runs": runs}
            write_json(result, OUT)


if __name__ == "__main__":
    main()

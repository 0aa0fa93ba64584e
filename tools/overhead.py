"""What the live page's feed costs the server, and what a Ray replica costs over bare uvicorn.

    python tools/overhead.py [feed] [ray]     writes figures/data/overhead-cpu.json

The feed's cost is the server's CPU seconds a token, with open pages against without: the pages'
own reading, which a phone would do, and the machine's ups and downs do not count.
"""
import asyncio
import json
import os
import statistics
import sys
import tempfile
import threading
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from load import users as crowd  # noqa: E402
from load.results import hardware, order, versions, write_json  # noqa: E402
from load.server import LoadFailed, ServerProcess, python_module  # noqa: E402
from load.workload import token_workload, vocabulary  # noqa: E402

OUT = ROOT / "figures" / "data" / "overhead-cpu.json"
USERS, VIEWERS, SLOTS = 24, 4, 16
MODELS = {"smollm2": 32, "random:tiny": 400}  # requests of a run


class Viewers:
    """So many pages that read /events, for the length of a `with`; `events`: what they got."""

    def __init__(self, url, count):
        self.url, self.count, self.events = url, count, 0

    def __enter__(self):
        self.thread = threading.Thread(target=lambda: asyncio.run(self.all()), daemon=True)
        self.over = False
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over = True
        self.thread.join(30)

    async def all(self):
        async with httpx.AsyncClient(timeout=30) as client:
            await asyncio.gather(*[self.one(client) for _ in range(self.count)])

    async def one(self, client):
        async with client.stream("GET", f"{self.url}/events") as response:
            async for line in response.aiter_lines():
                self.events += bool(line)
                if self.over:
                    return


def speed(url, model, seed):
    """{"tokens", "tokens_per_s", "ttft_p50_ms"} that 24 users see."""
    requests = token_workload("uniform", MODELS[model], seed, 64, vocabulary(model))
    outcomes, seconds = crowd.run(url, requests, USERS)
    if failed := [o.error for o in outcomes if o.error]:
        raise LoadFailed(f"{len(failed)} requests failed, the first with: {failed[0]}")
    tokens = sum(o.tokens for o in outcomes)
    return {"tokens": tokens, "tokens_per_s": round(tokens / seconds, 2),
            "ttft_p50_ms": round(1e3 * statistics.median(
                o.event_times[0] - o.start for o in outcomes), 1)}


def bare(model, log):
    return ServerProcess(python_module("cbserver", "--model", model, "--max-batch", SLOTS), log)


def feed(model, log, pairs):
    """Pairs of runs on one server, without and with viewers, every other pair the other way."""
    rows = []
    with bare(model, log) as server:
        speed(server.url, model, 99)
        for repeat, watched in order((False, True), pairs):
            process = psutil.Process(server.process.pid)
            with Viewers(server.url, VIEWERS if watched else 0) as viewers:
                before = sum(process.cpu_times()[:2])
                row = speed(server.url, model, repeat)
                used = sum(process.cpu_times()[:2]) - before
            rows.append({"repeat": repeat, "viewers": viewers.count, "events": viewers.events,
                         "server_cpu_ms_a_token": round(1e3 * used / row["tokens"], 4), **row})
            print(model, rows[-1], flush=True)
    return rows


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
        with bare(model, log) if kind == "uvicorn" else RayServer(model, log) as server:
            speed(server.url, model, 99)
            rows.append({"repeat": repeat, "server": kind, **speed(server.url, model, repeat)})
            print(model, rows[-1], flush=True)
    return rows


def ratio(rows, name, of, to, value="tokens_per_s"):
    """Median over repeats of `of`'s value over `to`'s, and the spread."""
    speeds = {(row["repeat"], row[name]): row[value] for row in rows}
    found = sorted(speeds[repeat, of] / speeds[repeat, to]
                   for repeat in {row["repeat"] for row in rows})
    return {"median": round(statistics.median(found), 4),
            "spread": [round(found[0], 4), round(found[-1], 4)]}


def main():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    parts = sys.argv[1:] or ["feed", "ray"]
    result = json.loads(OUT.read_text()) if OUT.exists() else {"models": {}}
    result = {"command": "python tools/overhead.py", "hardware": hardware(),
              "versions": versions("torch", "transformers", "fastapi", "uvicorn", "ray"),
              "users": USERS, "slots": SLOTS, "viewers": VIEWERS, "models": result["models"]}
    with tempfile.TemporaryDirectory() as folder:
        for model in MODELS:
            found = result["models"].setdefault(model, {})
            if "feed" in parts:
                runs = feed(model, Path(folder) / "feed.log", 4 if model == "smollm2" else 10)
                found["feed"] = ratio(runs, "viewers", VIEWERS, 0, "server_cpu_ms_a_token")
                found["feed_runs"] = runs
            if "ray" in parts:
                runs = ray(model, Path(folder), repeats=3)
                found["ray"], found["ray_runs"] = ratio(runs, "server", "ray", "uvicorn"), runs
            write_json(result, OUT)


if __name__ == "__main__":
    main()

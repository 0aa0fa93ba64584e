"""What the live page's feed costs the server, and what a Ray replica costs over bare uvicorn.

    python tools/overhead.py            writes figures/data/overhead-cpu.json
"""
import asyncio
import os
import shlex
import statistics
import sys
import tempfile
import threading
from pathlib import Path

import httpx

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


def feed(model, log, pairs):
    """Pairs of runs on one server, without and with viewers, every other pair the other way."""
    rows = []
    with bare(model, log) as server:
        speed(server.url, model, 99)
        for repeat, watched in order((False, True), pairs):
            with Viewers(server.url, VIEWERS if watched else 0) as viewers:
                row = speed(server.url, model, repeat)
            rows.append({"repeat": repeat, "viewers": viewers.count, "events": viewers.events,
                         **row})
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


def ratio(rows, name, of, to):
    """Median over repeats of what `of` reaches of `to`, and the spread."""
    speeds = {(row["repeat"], row[name]): row["tokens_per_s"] for row in rows}
    found = sorted(speeds[repeat, of] / speeds[repeat, to]
                   for repeat in {row["repeat"] for row in rows})
    return {"median": round(statistics.median(found), 4),
            "spread": [round(found[0], 4), round(found[-1], 4)]}


def main():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    result = {"command": shlex.join(["python", *sys.argv]), "hardware": hardware(),
              "versions": versions("torch", "transformers", "fastapi", "uvicorn", "ray"),
              "users": USERS, "slots": SLOTS, "viewers": VIEWERS, "models": {}}
    with tempfile.TemporaryDirectory() as folder:
        for model in MODELS:
            watched = feed(model, Path(folder) / "feed.log", pairs=4 if model == "smollm2" else 10)
            served = ray(model, Path(folder), repeats=3)
            result["models"][model] = {
                "feed": ratio(watched, "viewers", VIEWERS, 0), "feed_runs": watched,
                "ray": ratio(served, "server", "ray", "uvicorn"), "ray_runs": served}
            write_json(result, OUT)


if __name__ == "__main__":
    main()

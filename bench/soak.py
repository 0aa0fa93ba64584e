"""Load a server for a long time and watch what should not move: its memory, and its latency.

    python -m bench.soak --minutes 30
    python -m bench.soak --minutes 10 --users 20 --abuse --http-processes 2 --out …

With --abuse rude clients do beside it what `bench.abuse` lists, and now and then a process for HTTP
stands still.
"""
import argparse
import asyncio
import datetime
import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from bench import abuse
from bench.results import command_line, hardware, versions, write_json
from cbserver.metrics import spread_ms
from load.client import Outcome, connect
from load.process import LoadFailed, ServerProcess, gauges, python_module
from load.workload import token_workload, vocabulary

PATIENCE = 300  # seconds for a request
KEY = "soak"  # of a server that is abused
LEAVES = 5  # every fifth user's request is cut off by the client after a few tokens


async def soak(url, options, watch):
    """Users without pause until the time is over; `watch([(outcome, port)])` once an interval."""
    requests = itertools.cycle(token_workload("uniform", 512, options.seed, options.longest,
                                              vocabulary(options.model)))
    numbers = itertools.count()
    end = time.monotonic() + 60 * options.minutes
    done = []

    async def user():
        connection = None
        while time.monotonic() < end:
            if connection is None:
                connection = await connect(url, options.key)
            leaves = next(numbers) % LEAVES == 0
            asked = connection.ask(next(requests), leave_after=3 if leaves else None)
            try:
                outcome = await asyncio.wait_for(asked, PATIENCE)
            except TimeoutError:
                outcome = Outcome(error=f"no answer within {PATIENCE} s")
            done.append((outcome, connection.writer.get_extra_info("sockname")[1]))
            if outcome.error:
                connection.close()
                connection = None
        if connection:
            connection.close()

    users = [asyncio.create_task(user()) for _ in range(options.users)]
    while not all(task.done() for task in users):
        await asyncio.wait(users, timeout=options.interval)
        finished = done[:]
        done.clear()
        watch(finished)
    await asyncio.gather(*users)


def interval_row(done, seconds, process, url, began, key):
    """What one interval looked like: speed, latencies in ms, the server's memory and gauges."""
    outcomes = [outcome for outcome, _ in done]
    served = [o for o in outcomes if not o.error]
    left = [o for o in outcomes if o.error == Outcome.LEFT]
    times = [o.event_times for o in served]
    gaps = [later - earlier for t in times for earlier, later in zip(t, t[1:])]
    first = [o.ttft for o in served if o.event_times]
    family = [process, *process.children(recursive=True)]
    errors = Counter(o.error for o in outcomes if o.error and o.error != Outcome.LEFT)
    return {"minute": round((time.monotonic() - began) / 60, 2), "requests": len(served),
            "errors": dict(errors),
            "left": len(left), "failures": len(outcomes) - len(served) - len(left),
            "tokens_per_s": round(sum(o.tokens for o in served) / seconds, 1),
            "ttft_ms": spread_ms(first), "itl_ms": spread_ms(gaps),
            "rss_mb": round(sum(one.memory_info().rss for one in family) / 1e6, 1),
            "fds": sum(one.num_fds() for one in family),
            "threads": sum(one.num_threads() for one in family), **gauges(url, key)}


def longest_gaps(done, stops):
    """The longest gap between two tokens of a client, in ms: {"others": …, "of the frozen": …}.

    Others: whose process for HTTP did not stand still between the two.
    """
    longest = {"others": 0.0, "of the frozen": 0.0}
    for outcome, port in done:
        for earlier, later in zip(outcome.event_times, outcome.event_times[1:]):
            frozen = any(port in held and earlier < end and later > begin
                         for begin, end, held in stops)
            who = "of the frozen" if frozen else "others"
            longest[who] = max(longest[who], round(1e3 * (later - earlier), 1))
    return longest


def run(options):
    """Start the server, soak it; the result is on disk after every interval."""
    began = time.monotonic()
    rows = []
    everyone = []
    result = {"hardware": hardware(), "model": options.model, "command": options.command,
              "versions": versions("torch", "transformers", "fastapi", "uvicorn"),
              "date": datetime.date.today().isoformat(), "users": options.users, "rows": rows}
    command = python_module("cbserver", "--model", options.model, "--max-batch", 16,
                            "--max-len", 2 * options.longest,
                            "--http-processes", options.http_processes)
    if options.key:
        command += ["--api-key", options.key]
    with tempfile.TemporaryDirectory() as folder, ServerProcess(
            command, f"{folder}/server.log") as server:
        process = psutil.Process(server.process.pid)
        last = time.monotonic()

        def watch(outcomes):
            nonlocal last
            now = time.monotonic()
            row = interval_row(outcomes, now - last, process, server.url, began, options.key)
            everyone.extend(outcomes)
            last = now
            rows.append(row)
            result["verdict"] = verdict(rows)
            write_json(result, options.out)
            print(f"minute {row['minute']:5.1f}: {row['tokens_per_s']:7.1f} tokens/s, "
                  f"{row['rss_mb']:.0f} MB, TTFT p99 {row['ttft_ms']['p99']} ms, "
                  f"{row['failures']} failures", flush=True)

        async def all_of_them():
            end = time.monotonic() + 60 * options.minutes
            tasks = [soak(server.url, options, watch)]
            if options.key:
                tasks += [abuse.abuse(server.url, options.key, end),
                          abuse.freeze(process, server.port, end)]
            return await asyncio.gather(*tasks)

        _, *found = asyncio.run(all_of_them())
        if found:
            result["abuse"] = {name: dict(counts) for name, counts in found[0].items()}
            result["stops"] = len(found[1])
            result["longest_gap_ms"] = longest_gaps(everyone, found[1])
        result["at_rest"] = settle(server.url, options.key)
        result["fds_at_rest"] = sum(one.num_fds() for one in
                                    [process, *process.children(recursive=True)])
    write_json(result, options.out)
    return result


def verdict(rows):
    """First against last third, without the intervals in which it warms up and runs out."""
    steady = rows[1:-1] or rows
    third = max(1, len(steady) // 3)

    def thirds(value):
        return [mean_of(value, steady[:third]), mean_of(value, steady[-third:])]

    return {"requests": sum(row["requests"] for row in steady),
            "failures": sum(row["failures"] for row in rows),
            "rss_mb": thirds(lambda row: row["rss_mb"]),
            "itl_p50_ms": thirds(lambda row: row["itl_ms"]["p50"]),
            "tokens_per_s": thirds(lambda row: row["tokens_per_s"])}


def mean_of(value, rows):
    """The mean of a value over the intervals in which requests ended; 0 if there are none."""
    values = [value(row) for row in rows if row["requests"]]
    return round(sum(values) / len(values), 1) if values else 0.0


def settle(url, key):
    """The gauges once everybody has gone: both should be 0."""
    for _ in range(100):
        if not any(gauges(url, key).values()):
            break
        time.sleep(0.1)
    return gauges(url, key)


def soak_figure(result):
    """RSS and latency over time."""
    import matplotlib.pyplot as plt

    from bench.report import STYLE

    rows = [row for row in result["rows"] if row["itl_ms"].get("p50")]  # {} or None: no request
    minutes = [row["minute"] for row in rows]
    with plt.rc_context(STYLE):
        drawn, (top, bottom) = plt.subplots(2, 1, figsize=(7, 4.6), sharex=True,
                                            layout="constrained")
        top.plot(minutes, [row["rss_mb"] for row in rows], color="#0072B2")
        top.set(ylabel="server RSS, MB", ylim=(0, 1.2 * max(row["rss_mb"] for row in rows)))
        for q, style in (("p50", "-"), ("p99", "--")):
            bottom.plot(minutes, [row["itl_ms"][q] for row in rows], style, color="#0072B2",
                        label=f"gap between tokens, {q}")
            bottom.plot(minutes, [row["ttft_ms"][q] for row in rows], style, color="#D55E00",
                        label=f"first token, {q}")
        bottom.set(ylabel="ms", yscale="log", xlabel="minutes")
        bottom.legend(fontsize=8, ncols=2)
        drawn.suptitle(f"{result['users']} users without pause, every fifth request cut off: "
                       f"{result['model']}\n{result['hardware']}", fontsize=9)
        return drawn


def parse(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.soak",
                                     description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--minutes", type=float, default=30, help="how long (30)")
    add("--users", type=int, default=24, help="how many at once, more than there are slots (24)")
    add("--interval", type=float, default=30, help="seconds for each row (30)")
    add("--model", default="smollm2", help="as for cbserver (smollm2)")
    add("--longest", type=int, default=64, help="longest prompt and output in tokens (64)")
    add("--http-processes", type=int, default=0, help="of the server (0)")
    add("--abuse", action="store_const", const=KEY, dest="key", help="rude clients beside them")
    add("--seed", type=int, default=0, help="of the workload (0)")
    add("--out", type=Path, default=Path("figures/data/soak-cpu.json"), help="the result")
    options = parser.parse_args(arguments)
    options.command = command_line("bench.soak", arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    return options


def main(arguments=None):
    try:
        result = run(parse(arguments))
    except (LoadFailed, OSError) as error:
        print(f"error: {error}; what was measured before it is in the file", file=sys.stderr)
        return 1
    print(json.dumps(result["verdict"]))
    at_rest = result["at_rest"] == {"running": 0, "waiting": 0}
    well = at_rest and result["verdict"]["failures"] == 0
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())

"""Send a workload to any OpenAI-compatible server with headless Locust, and sum it up.

    python -m load.run --host http://127.0.0.1:8000 --users 50 --spawn-rate 5 --out figures/latest
"""
import argparse
import bisect
import collections
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil

from cbserver.metrics import LATENCIES, RequestRecord, summarize
from load.process import (
    LoadFailed,
    base_url,
    check_alive,
    first_model,
    make_folder,
    proxy_of,
    python_module,
    spawn,
    stop,
    tail,
)
from load.workload import NAMES, maker

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
FEW = 100  # with fewer requests, p99 is simply the slowest


def run_load(host, out, users=50, spawn_rate=5, workload="mixed", requests=64, seed=0, model=None,
             api_key=None, steady_seconds=0, min_requests=100, timeout_s=3600, name="load",
             rate=0, goodput_targets=(), processes=1, chat=False, body=None, left=None):
    """Send `requests` requests of a workload from `users` users; `spawn_rate` users start a second.

    rate: requests a second with Poisson arrivals, however many are in flight (open loop); `users`
    must then be more than that. 0: each user sends its next when its last is done (closed loop).
    goodput_targets: as `targets` takes them. processes: Locust's workers, for more load than one
    core can make. chat, body: /v1/chat/completions, and fields for every request's body.
    With steady_seconds, for fast devices: no fixed list; go on until `min_requests` are done and
    all users have been in flight for that many seconds, and count the tokens of that time only.
    left: a function of the requests done so far, for words to put behind the progress.
    Returns {"records": list[RequestRecord], "summary": dict, "span": (first, last) of what counts,
    "cpu": samples of `follow`, "html": Path, "jsonl": Path}; `out`/`name`.jsonl and
    `out`/`name`.html stay. Raises LoadFailed with one sentence.
    """
    if requests < 1 and not steady_seconds:
        raise LoadFailed(f"--requests is {requests}; send at least one.")
    wanted = targets(goodput_targets)
    try:
        maker(workload)
    except ValueError as error:
        raise LoadFailed(str(error))
    host = base_url(host)
    proxy = proxy_of(host)
    if proxy:
        print(f"{host} is asked for its model and counters through {proxy}; the load goes there "
              "directly, so that no proxy is measured", flush=True)
    check_alive(host)
    out = Path(out)
    make_folder(out)
    jsonl = out / f"{name}.jsonl"
    html = out / f"{name}.html"
    log = out / f"{name}-locust.log"
    for stale in (jsonl, html, *notes(jsonl, "window"), *notes(jsonl, "progress")):
        stale.unlink(missing_ok=True)
    limit = 0 if steady_seconds else requests
    command = python_module(
        "locust", "-f", LOCUSTFILE, "--headless", "--only-summary", "--host", host,
        "--users", users, "--spawn-rate", spawn_rate, "--stop-timeout", 600, "--html", html,
        "--exit-code-on-error", 0,  # failed requests are for us to count
        "--workload", workload, "--requests", limit, "--seed", seed, "--out", jsonl,
        "--rate", rate, "--steady-seconds", steady_seconds, "--min-requests", min_requests,
        "--model", model or first_model(host, api_key), "--body", json.dumps(body or {}))
    if chat:
        command.append("--chat")
    if processes > 1:
        command += ["--processes", str(processes)]
    # The key goes by environment: a command line is for everyone to read.
    key = {"CBSERVER_API_KEY": api_key} if api_key else {}
    process = spawn(command, log, **key)
    try:
        cpu = follow(process, jsonl, Progress(name, limit, left), timeout_s)
    finally:
        stop(process)
        for file in notes(jsonl, "progress"):
            file.unlink(missing_ok=True)
    ended = count_lines(jsonl)
    if process.returncode or ended < max(1, limit):
        full = ", and the disk is full" if shutil.disk_usage(out).free < 2**20 else ""
        raise LoadFailed(f"Locust ended after {ended} requests with exit code "
                         f"{process.returncode}{full}; from {log}:\n{tail(log)}")
    records = read_records(jsonl)
    window = read_window(jsonl) if steady_seconds else None
    span = window or busy_span(records)
    numbers = summary(records, window, span, cpu, wanted)
    return {"records": records, "summary": numbers, "span": span, "cpu": cpu, "html": html,
            "jsonl": jsonl}


def summary(records, window, span, cpu, wanted):
    """`summarize`, and what tells whether to believe it, of the requests that ended in `span`.

    tokens_per_event: above 1, gaps between events are not gaps between tokens. errors: how often
    each came. client_cpu: % of one core that a process of Locust used; near 100 the client was the
    limit. client_in_flight: for Little's law.
    """
    ended = ended_within(records, *span)
    tokens = sum(r.completion_tokens for r in ended)
    events = sum(len(r.token_times) for r in ended)
    numbers = summarize(records, window)
    numbers["itl_histogram"] = histogram([1e3 * gap for r in ended for gap in r.itl])
    numbers["window_s"] = window and round(window[1] - window[0], 3)
    numbers["tokens_per_event"] = round(tokens / events, 3) if events else None
    numbers["errors"] = dict(collections.Counter(r.error for r in records if r.error))
    numbers["client_cpu"] = cpu_share(cpu, *span)
    numbers["client_in_flight"] = mean_in_flight(records, *span)
    if wanted:
        met = goodput(records, wanted, *span)
        numbers["goodput"] = {"targets_ms": wanted, "requests_per_s": met}
    return numbers


EDGES = [round(0.25 * 1.25**k, 3) for k in range(52)]  # ms, from a quarter of one to 21 s


def histogram(values):
    """How many values lie in each bin, EDGES[i] to EDGES[i + 1]; the first and last are open."""
    counts = [0] * (len(EDGES) - 1)
    inner = EDGES[1:-1]
    for value in values:
        counts[bisect.bisect_right(inner, value)] += 1
    return counts


def targets(words):
    """["ttft:500", "tpot:100"] -> {"ttft": 500.0, "tpot": 100.0}, in ms."""
    wanted = {}
    for word in words or []:
        name, _, limit = word.partition(":")
        try:
            wanted[name] = float(limit)
        except ValueError:
            wanted[name] = -1.0
        if name not in ("ttft", "tpot", "e2e") or not wanted[name] > 0:
            raise LoadFailed(f"{word!r} is no target; write ttft:500, tpot:100 or e2e:5000, in ms.")
    return wanted


def goodput(records, wanted, first, last):
    """Requests a second that met every target, of those that ended between two times.

    wanted: {"ttft", "tpot" or "e2e": ms}.
    """
    def met(record):
        for name, limit in wanted.items():
            seconds = getattr(record, name)  # TPOT is None where there was one token only
            if seconds is not None and 1e3 * seconds > limit:
                return False
        return True

    return round(sum(map(met, ended_within(records, first, last))) / (last - first), 3)


def ended_within(records, first, last):
    """The requests that were answered, and whose last token came between two times."""
    return [r for r in records if not r.error and first <= r.token_times[-1] <= last]


def mean_in_flight(records, first, last):
    """Requests in flight on average between two times, by the client's log.

    Little's law as it holds for any stretch of time, a queue that still grows included: arrivals a
    second × their mean time in the system, both inside the stretch. Failures have no end here.
    """
    inside = 0.0
    for record in records:
        if not record.error:
            begin = max(record.start, first)
            end = min(record.token_times[-1], last)
            inside += max(0, end - begin)
    return round(inside / (last - first), 2)


def busy_span(records):
    """(first request sent, last token), seconds on the records' clock."""
    ends = [r.token_times[-1] for r in records if r.token_times]
    return min(r.start for r in records), max(ends, default=float("inf"))


def cpu_share(samples, first, last):
    """% of one core between two times, out of [(time, CPU seconds so far)]; None if too short."""
    # perf_counter is one clock for all processes of a machine, so the records' times fit ours.
    inside = [s for s in samples if first <= s[0] <= last]
    if len(inside) < 2:
        return None
    t0, cpu0 = inside[0]
    t1, cpu1 = inside[-1]
    return round(100 * (cpu1 - cpu0) / (t1 - t0), 1)


def cpu_curve(samples, first, last):
    """[[seconds since first, % of one core], ...] of the samples between two times."""
    inside = [s for s in samples if first <= s[0] <= last]
    return [[t1 - first, 100 * (cpu1 - cpu0) / (t1 - t0)]
            for (t0, cpu0), (t1, cpu1) in zip(inside, inside[1:])]


def notes(jsonl, kind):
    """What each of Locust's workers wrote beside its records, as files: list[Path].

    kind: "window", when its users were all in flight, or "progress", what is in flight now.
    """
    return sorted(jsonl.parent.glob(f"{jsonl.name}.{kind}*"))


def read_window(jsonl):
    """(first, last): the time when all users of all workers were in flight."""
    windows = [json.loads(path.read_text(encoding="utf-8"))["window"]
               for path in notes(jsonl, "window")]
    if not windows:
        raise LoadFailed("Locust ended before all users had been in flight for --steady-seconds.")
    return max(first for first, _ in windows), min(last for _, last in windows)


def follow(process, jsonl, progress, timeout_s):
    """Count lines until Locust ends; returns [(perf_counter, CPU seconds so far)].

    Of several processes it is their mean, without the master, which only adds up.
    """
    samples = []
    begin = time.perf_counter()
    master = psutil.Process(process.pid)
    try:
        while process.poll() is None:
            progress.show(count_lines(jsonl), in_flight(jsonl))
            now = time.perf_counter()
            if now - begin > timeout_s:
                raise LoadFailed(f"The load did not end within {timeout_s:.0f} s.")
            with contextlib.suppress(psutil.Error):  # it ended between the poll and here
                working = master.children(recursive=True) or [master]
                times = [worker.cpu_times() for worker in working]
                samples.append((now, sum(t.user + t.system for t in times) / len(times)))
            time.sleep(0.25)
        progress.show(count_lines(jsonl), "")
    finally:
        progress.close()
    return samples


def in_flight(jsonl):
    """`, 8 in flight, 312 tokens so far` of all workers; nothing before they tell."""
    told = []
    for path in notes(jsonl, "progress"):
        with contextlib.suppress(OSError, ValueError):  # it is being written
            told.append(json.loads(path.read_text(encoding="utf-8")))
    if not told:
        return ""
    requests, tokens = map(sum, zip(*told))
    return f", {requests} in flight, {tokens:,} tokens so far"


def count_lines(path):
    """Lines so far in a file that somebody else writes; 0 before it is there."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def read_records(path):
    """list[RequestRecord] out of a JSONL file; a last line cut in the middle is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [RequestRecord(**json.loads(line)) for line in lines if line.endswith("\n")]


class Progress:
    """How many requests are done and in flight: a bar on a terminal, else a line every 10 s."""

    def __init__(self, label, total, left=None):
        self.label = label
        self.total = total
        self.left = left or (lambda done: "")
        self.done = 0
        self.flying = ""  # what is in flight, in words
        self.begin = time.monotonic()
        self.told = self.begin
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total or None, desc=label, unit=" requests")

    def show(self, done, flying):
        if self.bar is not None:
            self.bar.update(done - self.done)
            self.bar.set_postfix_str(f"{flying}{self.left(done)}".removeprefix(", "))
        self.done = done
        self.flying = flying
        if self.bar is None and time.monotonic() - self.told >= 10:
            self.tell()

    def tell(self):
        self.told = time.monotonic()
        of = f" of {self.total}" if self.total else ""
        print(f"{self.label}: {self.done}{of} requests{self.flying}, "
              f"{self.told - self.begin:.0f} s{self.left(self.done)}", flush=True)

    def close(self):
        if self.bar is not None:
            self.bar.close()
        else:
            self.tell()


def add_load_options(parser):
    """The options that `load.run` and `bench.compare` share."""
    add = parser.add_argument
    add("--users", type=int, default=50, help="how many send at once (50)")
    add("--spawn-rate", type=float, default=5, help="users started a second (5)")
    add("--workload", default="mixed", help=f"which requests (mixed): {', '.join(NAMES)}")
    add("--requests", type=int, default=64, help="how many requests, without --steady-seconds (64)")
    add("--seed", type=int, default=0, help="of the workload (0)")
    add("--rate", type=float, default=0, help="open loop: requests a second (0: closed loop)")
    add("--goodput", nargs="*", default=(), dest="goodput_targets", metavar="NAME:MS",
        help="count requests/s that met them: ttft:500 tpot:100")
    add("--processes", type=int, default=1, help="of Locust, for more load than one can make (1)")
    add("--min-requests", type=int, default=100, help="with --steady-seconds: at least (100)")
    add("--timeout", type=float, default=3600, help="seconds that one run may take (3600)")
    add("--api-key", default=os.environ.get("CBSERVER_API_KEY"),
        help="bearer token; may come from CBSERVER_API_KEY")


def interrupt_on_termination():
    """Let SIGTERM unwind like Ctrl-C, so that no process of ours is left behind."""
    def interrupt(*_):
        raise KeyboardInterrupt

    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), interrupt)


def exit_with(action):
    """Run a program: its exit code, with one sentence on stderr where it fails."""
    interrupt_on_termination()
    try:
        action()
        return 0
    except LoadFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; every process that was started is stopped", file=sys.stderr)
        return 130


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m load.run", description=__doc__.split("\n")[0])
    parser.add_argument("--host", default="http://127.0.0.1:8000",
                        help="URL of the server, with or without its /v1")
    parser.add_argument("--out", default="figures/latest", help="folder for JSONL and HTML")
    parser.add_argument("--model", help="model name to ask for; default: the first listed")
    parser.add_argument("--steady-seconds", type=float, default=0,
                        help="for fast devices: no list, but so long with all users in flight")
    parser.add_argument("--json", action="store_true",
                        help="print the summary as JSON, and all else to stderr")
    parser.add_argument("--chat", action="store_true", help="ask /v1/chat/completions")
    parser.add_argument("--body", type=json.loads, metavar="JSON", help="fields for every request's"
                        """ body; null takes one of ours out: '{"ignore_eos": null}'""")
    add_load_options(parser)
    return parser.parse_args(arguments)


def table(numbers):
    """A summary for a terminal: what was done, what it took, what failed."""
    lines = [f"{numbers['requests']} requests answered, {numbers['failures']} failed, "
             f"in {numbers['wall_s']:.1f} s",
             f"{numbers['tokens_per_s']:,.1f} tokens/s, {numbers['requests_per_s']:.2f} requests/s"]
    if numbers["window_s"] is not None:
        lines[0] += " with all users in flight"
    if numbers["tokens_per_event"] is not None:
        lines.append(f"{numbers['tokens_per_event']:g} tokens an event")
    if "goodput" in numbers:
        targets_ms = numbers["goodput"]["targets_ms"]
        met = ", ".join(f"{name.upper()} ≤ {limit:g} ms" for name, limit in targets_ms.items())
        lines.append(f"goodput {numbers['goodput']['requests_per_s']:.2f} requests/s: {met}")
    if numbers["client_cpu"] is not None:
        lines.append(f"the client used {numbers['client_cpu']:.0f} % of a core")
    if numbers["requests"]:
        lines += ["", f"{'ms':4}{'p50':>12}{'p90':>12}{'p99':>12}{'mean':>12}"]
        lines += [latency_line(name, numbers[f"{name}_ms"]) for name in LATENCIES]
    if 0 < numbers["requests"] < FEW:
        lines.append(f"Of fewer than {FEW} requests p99 is simply the slowest (gaps are more).")
    return "\n".join(lines + failure_lines(numbers["errors"]))


def latency_line(name, spread):
    values = ["–" if ms is None else f"{ms:,.1f}" for ms in spread.values()]
    return f"{name.upper():4}" + "".join(f"{value:>12}" for value in values)


def failure_lines(errors, most=5):
    """What failed how often, the commonest first: list[str]."""
    common = sorted(errors.items(), key=lambda item: -item[1])
    lines = [f"{count} × {error}" for error, count in common[:most]]
    if len(common) > most:
        lines.append(f"{sum(count for _, count in common[most:])} × other errors")
    return ["", "failures:", *lines] if lines else []


def main(arguments=None):
    options = vars(parse(arguments))
    options["timeout_s"] = options.pop("timeout")
    as_json = options.pop("json")

    def run():
        words = sys.stderr if as_json else sys.stdout
        with contextlib.redirect_stdout(words):
            result = run_load(**options)
        if as_json:
            print(json.dumps(result["summary"], indent=2))
        else:
            print(f"\n{table(result['summary'])}\n")
        print(f"every request: {result['jsonl']}\nLocust's report: {result['html']}", file=words)
        expect_an_answer(result["records"])

    return exit_with(run)


def expect_an_answer(records):
    """Raise LoadFailed, with the commonest reason, where every request failed."""
    errors = collections.Counter(record.error for record in records)
    if None not in errors:
        error, count = errors.most_common(1)[0]
        raise LoadFailed(f"Every request failed, {count} of {len(records)} with: {error}")


if __name__ == "__main__":
    sys.exit(main())

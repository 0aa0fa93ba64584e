"""The load test tells the truth: checked against a server whose delays and failures are planted.

Run as a script it is that server: `python tests/test_load.py --host 127.0.0.1 --port 8000`.
"""
import argparse
import asyncio
import io
import itertools
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, finished

from bench import compare, report
from cbserver.metrics import RequestRecord, percentile, summarize
from load import client
from load.process import LoadFailed, base_url, free_port, python_module
from load.run import (
    Progress,
    busy_span,
    exit_with,
    goodput,
    mean_in_flight,
    read_records,
    run_load,
    summary,
    table,
    targets,
)
from load.sse import StreamFailed, data_of, read_event
from load.workload import LENGTHS, arrivals, conversations, token_workload, workload

TTFT = 0.2  # seconds, planted
GAP = 0.02
STALL = 0.6


class FakeServer(BaseHTTPRequestHandler):
    """Streams words after a known delay; `failures` says which requests (by order) go wrong.

    A failure that is bytes goes out as it is between two tokens. pack: tokens in an event.
    log: {prompt: [request read, event sent, event sent, ...]}, seconds of
    the clock that the client has too. bodies: what was asked.
    """

    protocol_version = "HTTP/1.1"
    failures = {}
    usage = True
    order = iter(range(10**9))
    lock = threading.Lock()
    connections = set()
    pack = 1
    log = {}
    bodies = []

    def do_GET(self):
        known = {"/health": {}, "/v1/models": {"data": [{"id": "fake"}]}}
        self.answer(200 if self.path in known else 404, known.get(self.path, {}))

    def do_POST(self):
        self.connections.add(self.client_address)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.times = [time.perf_counter()]
        self.chat = "messages" in body
        prompt = body["messages"][0]["content"] if self.chat else body["prompt"]
        self.log[str(prompt)] = self.times
        self.bodies.append((self.path, body))
        with self.lock:
            failure = self.failures.get(next(self.order))
        if failure == "full":
            error = {"message": "the queue is full", "type": "x", "param": None, "code": None}
            return self.answer(429, {"error": error})
        if failure == "no HTTP":
            self.close_connection = True
            return self.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.stream(body["max_tokens"], len(str(prompt).split()), failure)

    def stream(self, wanted, said, failure):
        if self.chat:
            self.event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for i in range(0, wanted, self.pack):
            time.sleep(GAP if i else TTFT)
            if (failure, i) in (("slow", 0), ("stall", 8)):
                time.sleep(STALL)
            if failure == "error" and i == 2:
                self.event({"error": {"message": "the engine died"}})
                break
            if isinstance(failure, bytes) and i == 2:
                self.chunk(failure)
            if failure == "cut" and i == 3:
                self.close_connection = True
                return self.connection.shutdown(socket.SHUT_RDWR)
            self.times.append(time.perf_counter())
            # An empty text is a token all the same; in a chat it may be no more than the role.
            text = f"{said} " * self.pack if i or self.chat else ""
            self.event({"choices": [{"delta": {"content": text}} if self.chat else
                                    {"text": text, "finish_reason": None}]})
        else:
            usage = {"prompt_tokens": said, "completion_tokens": wanted, "total_tokens": 0}
            if self.usage:
                self.event({"choices": [], "usage": usage})
        if failure != "undone":
            self.chunk(b"data: [DONE]\n\n")
        self.chunk(b"")

    def event(self, data):
        self.chunk(f"data: {json.dumps(data)}\n\n".encode())

    def chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def answer(self, status, data):
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Fleet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, address):
        """A client that went away is no news."""


@pytest.fixture
def serve():
    """Start a fake server with these class attributes; returns its URL."""
    servers = []

    def start(**attributes):
        handler = type("Handler", (FakeServer,), {"order": iter(range(10**9)), **attributes})
        servers.append(Fleet(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_workload_is_the_same_every_time_and_request_i_whatever_the_length():
    assert workload("mixed", 64, seed=3) == workload("mixed", 64, seed=3)
    assert workload("mixed", 64)[:10] == workload("mixed", 10)
    assert workload("mixed", 10, seed=1) != workload("mixed", 10, seed=2)


def test_the_mixed_workload_mixes_short_and_long_and_repeats_no_prompt():
    requests = workload()
    lengths = [r.max_tokens for r in requests]
    assert 2900 <= sum(lengths) <= 3300
    assert (min(lengths), max(lengths)) == (8, 128)
    assert sorted(lengths)[len(lengths) // 2] < sum(lengths) / len(lengths)  # many short, some long
    assert len({r.prompt for r in workload(requests=1000)}) == 1000
    assert {r.max_tokens for r in workload("short", 20)} == {16}
    assert set(LENGTHS) == {"mixed", "short", "short-mixed"}


def test_chat_lengths_scatter_widely_and_a_long_prompt_comes_every_sixteenth():
    words = sorted(len(r.prompt.split()) for r in workload("chat", 400))
    wanted = sorted(r.max_tokens for r in workload("chat", 400))
    assert 75 < words[200] < 110 and words[0] < 20 and words[-1] > 400
    assert 130 < wanted[200] < 170 and wanted[0] < 50 and wanted[-1] > 400
    long = [len(r.prompt.split()) > 1000 for r in workload("long-prompt", 64)]
    assert sum(long) == 4 and long == [i % 16 == 5 for i in range(64)]
    assert workload("chat", 9, seed=1) != workload("chat", 9, seed=2)


def test_the_medians_of_chat_lengths_hold_in_tokens():
    from cbserver.model.load import load_model  # not above: the script does without torch

    _, tokenizer = load_model("smollm2", device="cpu")
    sent = [len(ids) for ids in tokenizer([r.prompt for r in workload("chat", 2000)])["input_ids"]]
    wanted = [r.max_tokens for r in workload("chat", 2000)]
    assert 110 < statistics.median(sent) < 130 and 142 < statistics.median(wanted) < 158


def test_half_precision_says_why_answers_differ_and_float32_makes_no_excuse():
    same = {"reference": "sequential", "continuous": {"equal": 3, "compared": 4}}
    result = {"arms": {}, "same_text": same, "roofline": {"dtype": "bfloat16"}}
    assert "bfloat16 rounds" in report.notes(result)
    assert "rounds" not in report.notes(result | {"roofline": {"dtype": "float32"}})
    same["continuous"] = {"equal": 4, "compared": 4}
    assert "rounds" not in report.notes(result)


def test_a_fixed_workload_has_exactly_the_lengths_of_its_name():
    for r in workload("fixed:128x64", 9):
        assert len(r.prompt) == 128 and r.max_tokens == 64
        assert all(isinstance(token, int) and 100 <= token < 500 for token in r.prompt)
    for name in ("fixed", "fixed:0x5", "fixed:5", "fixed:5x-1", "chat2"):
        with pytest.raises(ValueError, match="fixed:INxOUT"):
            workload(name, 1)


def test_an_unknown_workload_is_refused_by_name():
    with pytest.raises(LoadFailed, match="No workload 'nothing'"):
        run_load("http://127.0.0.1:9", ".", workload="nothing")
    with pytest.raises(ValueError, match="mixed, short"):
        workload("nothing", 1)


def test_every_request_is_counted_and_its_times_are_the_planted_ones(serve, tmp_path):
    result = run_load(serve(), tmp_path, users=8, spawn_rate=50, workload="short", requests=24)
    records = result["records"]
    summary = result["summary"]
    assert sorted(r.index for r in records) == list(range(24))
    assert (summary["requests"], summary["failures"], summary["errors"]) == (24, 0, {})
    assert summary["completion_tokens"] == 24 * 16
    for record, request in zip(sorted(records, key=lambda r: r.index), workload("short", 24)):
        words = len(request.prompt.split())
        assert record.prompt_tokens == words and record.text == f"{words} " * 15
        assert len(record.token_times) == 16  # the empty text counts
        assert TTFT <= record.ttft < TTFT + 0.3
        assert record.e2e >= TTFT + 15 * GAP
    assert GAP * 1e3 <= summary["itl_ms"]["mean"] < 3 * GAP * 1e3
    assert summary["tokens_per_event"] == 1
    page = result["html"].read_text()
    assert "TTFT" in page and "TPOT" in page and "/v1/completions" in page


def test_measured_times_are_the_servers_own_within_5_ms_or_2_percent(serve, tmp_path):
    log = {}
    result = run_load(serve(log=log), tmp_path, users=8, spawn_rate=50, workload="short",
                      requests=24)
    pairs = [(record, log[request.prompt]) for record, request in
             zip(sorted(result["records"], key=lambda r: r.index), workload("short", 24))]
    for name, theirs in (("ttft", lambda t: t[1] - t[0]), ("e2e", lambda t: t[-1] - t[0]),
                         ("tpot", lambda t: (t[-1] - t[1]) / 15)):
        measured, true = zip(*[(getattr(record, name), theirs(times)) for record, times in pairs])
        off = statistics.median(a - b for a, b in zip(measured, true))
        assert abs(off) <= max(0.005, 0.02 * statistics.median(true)), f"{name} is off by {off} s"
    gaps = [b - a for _, times in pairs for a, b in zip(times[1:], times[2:])]
    summary = result["summary"]
    assert summary["itl_ms"]["p50"] == pytest.approx(1e3 * statistics.median(gaps), abs=5)
    seconds = max(times[-1] for _, times in pairs) - min(times[0] for _, times in pairs)
    assert summary["tokens_per_s"] == pytest.approx(24 * 16 / seconds, rel=0.02)


def test_a_conversation_sends_what_was_really_answered_in_its_earlier_turns(serve, tmp_path):
    bodies = []
    records = run_load(serve(bodies=bodies, failures={3: "full"}, pack=8), tmp_path, users=2,
                       spawn_rate=50, workload="chat-turns", requests=12)["records"]
    answers = {r.index: r.text for r in records if not r.error}
    asked = workload("chat-turns", 12)
    assert len(bodies) == 12 and len(answers) == 11
    for path, body in bodies:
        assert path == "/v1/chat/completions"
        system, *said = body["messages"]
        request = next(r for r in asked if r.prompt == said[-1]["content"])
        assert system == {"role": "system", "content": request.system}
        earlier = [r for r in asked[request.index - request.turn:request.index]
                   if r.index in answers]
        assert [m["content"] for m in said[:-1]] == [
            text for r in earlier for text in (r.prompt, answers[r.index])]
        assert [m["role"] for m in said] == ["user", "assistant"] * len(earlier) + ["user"]
    assert len({r.system for r in asked}) == 1 and len(asked[0].system.split()) > 700


def test_users_share_whole_conversations_out_among_them():
    requests = workload("chat-turns", 14)
    assert [r.turn for r in requests] == [0, 1, 2, 3, 4, 5] * 2 + [0, 1]
    assert [len(turns) for turns in conversations(requests)] == [6, 6, 2]
    assert [len(turns) for turns in conversations(workload("short", 3))] == [1, 1, 1]


def test_a_slow_start_is_in_ttft_and_a_stall_in_the_gaps(serve, tmp_path):
    url = serve(failures={3: "slow", 5: "stall"})
    records = run_load(url, tmp_path, users=2, spawn_rate=50, workload="short",
                       requests=8)["records"]
    late = [r for r in records if r.ttft > TTFT + STALL]
    stalled = [r for r in records if max(r.itl) > STALL]
    assert len(late) == len(stalled) == 1 and late != stalled
    assert sum(gap > STALL for r in records for gap in r.itl) == 1
    assert all(r.e2e > TTFT + STALL + 15 * GAP for r in late + stalled)


def test_several_tokens_in_an_event_are_counted_as_tokens(serve, tmp_path):
    result = run_load(serve(pack=4), tmp_path, users=4, spawn_rate=50, workload="short", requests=8)
    summary = result["summary"]
    assert summary["completion_tokens"] == 8 * 16 and summary["tokens_per_event"] == 4
    assert all(len(r.itl) == 3 for r in result["records"])
    for r in result["records"]:
        assert r.tpot == pytest.approx((r.e2e - r.ttft) / 15)
    arm = {"client_cpu": 5, "tokens_per_event": summary["tokens_per_event"], "requests": 8}
    assert "ITL is the gap between events" in report.notes({"arms": {"continuous": arm}})


@pytest.mark.slow
def test_several_processes_share_one_list_and_a_steady_time(serve, tmp_path):
    result = run_load(serve(), tmp_path, users=5, spawn_rate=50, workload="short", requests=11,
                      processes=2)
    assert sorted(r.index for r in result["records"]) == list(range(11))
    assert result["summary"]["failures"] == 0 and result["html"].exists()
    result = run_load(serve(), tmp_path, users=4, spawn_rate=50, workload="short", processes=2,
                      steady_seconds=1, min_requests=6)
    indices = [r.index for r in result["records"]]
    assert len(set(indices)) == len(indices) >= 6 and {i % 2 for i in indices} == {0, 1}
    assert 0.9 <= result["summary"]["window_s"] < 4


def test_chats_are_asked_as_chats_and_a_role_is_no_token(serve, tmp_path):
    bodies = []
    result = run_load(serve(bodies=bodies), tmp_path, users=2, spawn_rate=50, workload="short",
                      requests=4, chat=True, body={"ignore_eos": None, "top_p": 1})
    for path, body in bodies:
        assert path == "/v1/chat/completions" and body["messages"][0]["role"] == "user"
        assert body["top_p"] == 1 and "ignore_eos" not in body and "prompt" not in body
    assert len(bodies) == 4 and result["summary"]["completion_tokens"] == 4 * 16
    for record in result["records"]:
        assert len(record.token_times) == 16 and record.ttft >= TTFT


def test_a_user_keeps_its_connection_from_one_request_to_the_next(serve, tmp_path):
    connections = set()
    url = serve(connections=connections)
    run_load(url, tmp_path, users=2, spawn_rate=50, workload="short", requests=6)
    assert len(connections) == 2


def test_failures_are_counted_and_called_what_they_are(serve, tmp_path):
    url = serve(failures={2: "full", 4: "cut", 6: "error", 8: "undone"})
    result = run_load(url, tmp_path, users=4, spawn_rate=50, workload="short", requests=12)
    assert (result["summary"]["requests"], result["summary"]["failures"]) == (8, 4)
    errors = " | ".join(sorted(result["summary"]["errors"]))
    assert "HTTP 429: the queue is full" in errors
    assert "the connection broke after the token" in errors
    assert "error event: the engine died" in errors
    assert "the stream ended without [DONE]" in errors


def test_without_usage_an_event_is_a_token_and_steady_time_makes_a_window(serve, tmp_path):
    result = run_load(serve(usage=False), tmp_path, users=4, spawn_rate=50, workload="short",
                      steady_seconds=2, min_requests=5)
    assert all(r.completion_tokens == 16 for r in result["records"])
    summary = result["summary"]
    assert summary["failures"] == 0 and summary["requests"] >= 8
    assert 2 <= summary["window_s"] < 4 and summary["wall_s"] == pytest.approx(summary["window_s"])
    sent = sum(r.completion_tokens for r in result["records"])
    assert summary["completion_tokens"] < sent, "only those inside the window"


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_a_servers_address_may_end_in_v1_as_clients_have_it(end):
    assert base_url(f"http://127.0.0.1:8000{end}") == "http://127.0.0.1:8000"
    assert base_url(f"https://host/of/v1models{end}") == "https://host/of/v1models"


def test_load_run_and_locust_alone_take_a_host_with_its_v1(serve, tmp_path):
    url = serve() + "/v1"
    numbers = run_load(url, tmp_path, users=1, spawn_rate=50, workload="short",
                       requests=1)["summary"]
    assert (numbers["requests"], numbers["failures"]) == (1, 0)
    alone = tmp_path / "alone.jsonl"
    subprocess.run(python_module("locust", "-f", ROOT / "load" / "locustfile.py", "--headless",
                                 "--host", f"{url}/", "--users", 1, "--workload", "short",
                                 "--requests", 1, "--out", alone),
                   check=True, capture_output=True, timeout=60)
    record, = read_records(alone)
    assert record.error is None and record.completion_tokens == 16


def test_what_answers_but_not_in_http_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as door:
        def answer():
            with door.accept()[0] as connection:
                connection.recv(4096)
                connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(LoadFailed, match="No server answers at .*SSH-2.0"):
            run_load(f"http://127.0.0.1:{door.getsockname()[1]}", ".")


def test_a_system_without_sighup_can_be_interrupted_too(monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP", raising=False)
    before = signal.getsignal(signal.SIGTERM)

    def terminate():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)  # for the signal to come

    try:
        assert exit_with(terminate) == 130
    finally:
        signal.signal(signal.SIGTERM, before)


def test_locusts_own_table_keeps_whole_milliseconds():
    # In a process of its own: importing Locust patches the one that does.
    code = ("import load.locustfile, locust.stats\n"
            "row = locust.stats.RequestStats().get('a', 'POST')\n"
            "row.log(147.4, 0)\nrow.log(58760, 0)\nprint(sorted(row.response_times))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=60)
    assert done.stdout.strip() == "[147, 58760]", done.stderr


def test_locusts_percentiles_are_as_the_pages_say_a_rank_above_ours():
    code = ("import json, locust.stats\n"
            "theirs = locust.stats.calculate_response_time_percentile\n"
            "print(json.dumps([[theirs(dict.fromkeys(range(1, n + 1), 1), n, q / 100)\n"
            "                   for q in (50, 90)] for n in range(1, 101)]))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    for n, found in enumerate(json.loads(done.stdout), 1):
        for q, theirs in zip((50, 90), found):
            whole = n * q % 100 == 0
            assert theirs == percentile(range(1, n + 1), q) + whole, f"p{q} of {n}"


def test_no_server_is_one_sentence_and_exit_code_1(tmp_path):
    command = python_module("load.run", "--host", f"http://127.0.0.1:{free_port()}", "--out",
                            tmp_path)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == ""
    assert "No server answers at" in done.stderr and len(done.stderr.splitlines()) == 1


def terminal(*arguments, **options):
    """`python -m load.run` as a user runs it: its code, its words, its errors."""
    return subprocess.run(python_module("load.run", *arguments), capture_output=True, text=True,
                          timeout=120, **options)


def test_a_terminal_gets_a_table_and_json_if_it_asks_for_it(serve, tmp_path):
    load = ["--host", serve(failures={2: "full"}), "--users", 4, "--spawn-rate", 50, "--workload",
            "short", "--requests", 8, "--goodput", "ttft:5000", "--out", tmp_path]
    done = terminal(*load)
    assert done.returncode == 0 and done.stderr == ""
    assert "7 requests answered, 1 failed" in done.stdout and "{" not in done.stdout
    assert re.search(r"^TTFT( +[\d,.]+){4}$", done.stdout, re.M) and "TTFT ≤ 5000 ms" in done.stdout
    assert "1 × HTTP 429: the queue is full" in done.stdout and "load.jsonl" in done.stdout
    assert len(done.stdout.splitlines()) < 25
    done = terminal(*load, "--json")
    assert json.loads(done.stdout)["requests"] == 8 and "load.jsonl" in done.stderr


def test_when_every_request_failed_the_exit_code_is_1_and_the_reason_stands_there(serve, tmp_path):
    url = serve(failures={0: "full", 1: "full", 2: "undone"})
    done = terminal("--host", url, "--users", 1, "--workload", "short", "--requests", 3, "--out",
                    tmp_path)
    assert done.returncode == 1 and "0 requests answered, 3 failed" in done.stdout
    assert done.stderr == "error: Every request failed, 2 of 3 with: HTTP 429: the queue is full\n"


def test_a_table_of_nothing_and_of_many_errors_is_a_table_too():
    failed = [RequestRecord(start=0.0, error=f"HTTP {400 + i % 8}") for i in range(20)]
    said = table(summary(failed, None, busy_span(failed), [], {}))
    assert "0 requests answered, 20 failed" in said and "TTFT" not in said
    assert said.splitlines()[-6:] == [*(f"3 × HTTP {400 + i}" for i in range(4)), "2 × HTTP 404",
                                      "6 × other errors"]


@pytest.mark.parametrize("out", ["a file", "a file/below"])
def test_results_that_cannot_have_a_folder_are_one_sentence(serve, tmp_path, out):
    (tmp_path / "a file").write_text("mine")
    done = terminal("--host", serve(), "--out", tmp_path / out)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "cannot be a folder for results" in done.stderr and "--out" in done.stderr
    assert (tmp_path / "a file").read_text() == "mine"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no file's size")
@pytest.mark.parametrize("most, lost", [(2_000, "a record"), (60_000, "the report")])
def test_what_cannot_be_written_is_an_error_and_no_report_cut_short(serve, tmp_path, most, lost):
    import resource

    def limit():  # no file may grow beyond it, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    done = terminal("--host", serve(), "--users", 2, "--spawn-rate", 50, "--workload", "short",
                    "--requests", 8, "--out", tmp_path, preexec_fn=limit)
    assert done.returncode == 1 and "Locust ended after" in done.stderr, lost
    assert "exit code 1" in done.stderr and "tokens/s" not in done.stdout


def test_progress_tells_what_is_in_flight_before_anything_has_ended(serve, tmp_path, monkeypatch):
    seen = []

    class Watched(Progress):
        def show(self, done, flying):
            seen.append((done, flying))
            super().show(done, flying)

    monkeypatch.setattr("load.run.Progress", Watched)
    url = serve(failures=dict.fromkeys(range(3), "slow"))  # 1.2 s for the first ones
    run_load(url, tmp_path, users=3, spawn_rate=50, workload="short", requests=6)
    early = [flying for done, flying in seen if done == 0 and flying]
    assert any(re.fullmatch(r", 3 in flight, \d+ tokens so far", flying) for flying in early), seen
    assert not list(tmp_path.glob("*.progress*"))


def test_a_line_of_progress_has_requests_flight_seconds_and_what_is_left(capsys):
    progress = Progress("load", 24, lambda done: ", about 1 min left")
    progress.show(0, ", 8 in flight, 1,312 tokens so far")
    progress.tell()
    assert capsys.readouterr().out == ("load: 0 of 24 requests, 8 in flight, 1,312 tokens so far, "
                                       "0 s, about 1 min left\n")


def test_a_server_that_dies_at_start_is_reported_with_its_last_words(tmp_path):
    options = compare.parse(["--arms", "static", "--out", str(tmp_path)])
    options.server = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with pytest.raises(LoadFailed, match="(?s)exited with code 1.*no such model"):
        compare.compare(options)


def test_compare_runs_every_arm_and_leaves_report_and_plots(tmp_path):
    options = compare.parse(["--arms", "sequential,continuous", "--workload", "short", "--users",
                             "4", "--requests", "8", "--no-fast-device", "--spawn-rate", "50",
                             "--out", str(tmp_path), "--repeats", "1"])
    options.server = [sys.executable, __file__]
    result = compare.compare(options)
    assert json.loads((tmp_path / "compare.json").read_text()) == result
    for arm in ("sequential", "continuous"):
        row = result["arms"][arm]
        assert row["requests"] == 8 and row["failures"] == 0 and row["tokens_per_s"] > 0
        assert row["utilization"]["kind"] in ("cpu", "gpu")
        assert (tmp_path / f"{arm}-1.jsonl").exists() and (tmp_path / f"{arm}-1.html").exists()
    assert result["same_text"] == {"reference": "sequential",
                                   "continuous": {"equal": 8, "compared": 8}}
    page = report.page(result, tmp_path)
    assert page.count("data:image/png") == 5 and 'href="continuous-1.html"' in page
    assert "TTFT p50 / p90 / p99" in page and "request sent → last token" in page
    assert "slowest" in report.table(result) and "continuous ÷ sequential" in report.ratios(result)
    for path in report.save_figures(result, tmp_path, "compare"):
        assert path.stat().st_size > 10_000


def test_the_cross_checks_flag_numbers_that_cannot_be(tmp_path):
    run = {"client_in_flight": 4.0, "in_flight": 4.1,
           "tokens_per_s": 90}
    result = {"arms": {"continuous": {"repeats": [run]}, "one-slot": {"repeats": [run]}},
              "roofline": {"slots": 16, "bandwidth_gb_s": 20, "weights_gb": 0.5}}
    held = {text: holds for text, holds in report.checks(result)}
    assert [holds for text, holds in held.items() if "arrival rate" in text] == [True, True]
    roof = {text.split(":")[0]: holds for text, holds in held.items() if "at most" in text}
    assert roof == {"continuous": True, "one-slot": False}, "90 > 1 row × 20 ÷ 0.5"
    result["arms"]["continuous"]["repeats"] = [run, run | {"in_flight": 12.0}]
    held = [holds for text, holds in report.checks(result) if "arrival rate" in text]
    assert held == [True, False], "the repeat that breaks it is the one that is told"
    run["in_flight"] = 12.0
    assert not any(holds for text, holds in report.checks(result) if "arrival rate" in text)


def compared(failures, load_average=0.3):
    """What bench.compare found of two arms, in each of which so many of 50 requests failed."""
    arms = {}
    for (name, failed), speed in zip(failures.items(), (10.0, 44.0)):
        good = [RequestRecord(start=0.0, token_times=[1.0, 2.0], completion_tokens=2)]
        bad = [RequestRecord(start=0.0, error="HTTP 503: out of time")]
        records = good * (50 - failed) + bad * failed
        run = summary(records, None, busy_span(records), [], {}) | {"tokens_per_s": speed}
        usage = {"kind": "cpu", "mean": 50.0, "series": [[0, 50]]}
        arms[name] = compare.arm_result([run | {"utilization": usage, "server_cpu": None}])
    return {"arms": arms, "model": "tiny", "hardware": "2 CPU cores", "workload": {"users": 50},
            "versions": {}, "command": "make demo", "date": "today",
            "before": {"load_average": load_average, "cores": 2}}


@pytest.mark.parametrize("failures", [{"sequential": 37, "continuous": 37},
                                      {"sequential": 0, "continuous": 37},
                                      {"sequential": 37, "continuous": 0}])
def test_no_ratio_is_made_of_failures_and_the_report_says_how_many_and_why(failures, tmp_path):
    result = compared(failures, load_average=14.2)
    said = report.ratios(result)
    assert "×" not in said and "4.40" not in said and "no ratio" in said
    for name, failed in failures.items():
        told = f"✗ {name}: 37 of 50 requests failed, most of them with: HTTP 503: out of time"
        assert (told in said) == (failed > 0)
    failing = [name for name in ("continuous", "sequential") if failures[name]]
    assert f"no ratio, since requests failed in {' and '.join(failing)}" in said
    assert "busy before the first run (load average 14.2 on 2 cores)" in said
    assert "37 of 50" in report.text_table(result) and "37 of 50" in report.table(result)
    page = report.page(result, tmp_path)
    assert "no ratio" in page and "37 of 50 requests failed" in page
    labels = [text.get_text() for text in report.throughput_figure(result).axes[0].texts]
    assert "×" not in "".join(labels) and "37 of 50\nfailed" in "".join(labels)


def test_a_few_failures_leave_the_ratio_and_a_quiet_machine_is_not_called_busy():
    assert report.ratios(compared({"sequential": 0, "continuous": 0})) == \
        "continuous ÷ sequential: 4.40×"
    few = compared({"sequential": 0, "continuous": 0})
    few["arms"]["continuous"] |= {"failures": 1, "repeats": [{"requests": 199, "failures": 1}]}
    assert "4.40×" in report.ratios(few) and "1 of 200" in report.text_table(few)
    said = report.ratios(compared({"sequential": 37, "continuous": 0}))
    assert "load average was 0.3 on 2 cores" in said and "machine was busy" not in said
    del few["arms"]["continuous"]
    assert report.ratios(few) == "", "without the arm there is nothing to compare"


def test_the_knee_is_where_more_users_stop_helping():
    levels = [{"users": n, "tokens_per_s": speed, "ttft_ms": {"p50": 5}}
              for n, speed in ((1, 10), (4, 38), (16, 92), (32, 99), (50, 100))]
    assert report.knee(levels) == 16


@pytest.mark.slow
def test_a_comparison_that_was_cut_off_goes_on_where_it_stopped(tmp_path):
    arguments = ["--arms", "sequential,continuous", "--workload", "short", "--users", "4",
                 "--requests", "8", "--no-fast-device", "--spawn-rate", "50", "--out",
                 str(tmp_path)]
    options = compare.parse(arguments)
    options.server = [sys.executable, __file__]
    before = compare.compare(options)
    (tmp_path / "continuous-1.json").unlink()  # as if it had been cut off there
    again = compare.parse([*arguments, "--resume"])
    again.server = [sys.executable, "-c", "raise SystemExit('started')"]
    with pytest.raises(LoadFailed, match="started"):
        compare.compare(again)
    again.server = options.server
    after = compare.compare(again)
    assert after["arms"]["sequential"] == before["arms"]["sequential"]
    assert after["same_text"] == before["same_text"]
    other = compare.parse([*arguments, "--resume", "--seed", "5"])
    other.server = [sys.executable, "-c", "raise SystemExit('started')"]
    with pytest.raises(LoadFailed, match="started"):
        compare.compare(other)


@pytest.mark.slow
def test_an_open_loop_keeps_its_arrivals_and_counts_from_when_a_request_was_due(serve, tmp_path):
    due = list(itertools.islice(arrivals(40, seed=3), 1000))
    assert due[-1] == pytest.approx(25, rel=0.15), "40 a second on average"
    for users, name in ((12, "enough"), (1, "few")):
        result = run_load(serve(), tmp_path, users=users, spawn_rate=1000, workload="short",
                          requests=12, seed=3, rate=40, name=name)
        records = sorted(result["records"], key=lambda r: r.index)
        begun = records[0].start - due[0]
        for record, moment in zip(records, due):
            assert record.start - begun == pytest.approx(moment, abs=0.01)
    # One user serves one at a time: the last waits for all before it, and that is in its TTFT.
    assert records[-1].ttft > 11 * TTFT - due[11]


def test_goodput_counts_the_requests_that_met_every_target():
    fast = RequestRecord(start=0.0, token_times=[0.4, 0.45, 0.5], completion_tokens=3)
    late = RequestRecord(start=0.0, token_times=[0.6, 0.65, 0.7], completion_tokens=3)
    slow = RequestRecord(start=0.0, token_times=[0.4, 1.4, 2.4], completion_tokens=3)
    alone = RequestRecord(start=0.0, token_times=[0.1], completion_tokens=1)  # has no TPOT to miss
    failed = RequestRecord(start=0.0, error="HTTP 429")
    records = [fast, late, slow, alone, failed]
    assert goodput(records, {"ttft": 500, "tpot": 100}, 0, 2.5) == 0.8
    assert goodput(records, {"ttft": 500}, 0, 2.5) == 1.2
    assert goodput(records, {"e2e": 600}, 0, 2.5) == 0.8
    assert goodput(records, {"ttft": 500}, 0, 2) == 1.0, "slow ended later than that"
    assert targets(["ttft:500", "tpot:100.5"]) == {"ttft": 500, "tpot": 100.5}
    for wrong in ("ttft", "ttft:x", "speed:5", "ttft:-1"):
        with pytest.raises(LoadFailed, match="ttft:500"):
            targets([wrong])


def test_littles_law_holds_for_a_stretch_of_a_log():
    records = [RequestRecord(start=0.0, token_times=[1.0, 4.0]),  # inside 1..3: 2 s
               RequestRecord(start=2.0, token_times=[2.5]),  # 0.5 s
               RequestRecord(start=2.5, token_times=[9.0]),  # 0.5 s
               RequestRecord(start=5.0, token_times=[6.0]), RequestRecord(start=1.0, error="x")]
    assert mean_in_flight(records, 1.0, 3.0) == 1.5


def test_a_hand_made_log_gives_hand_computed_numbers():
    records = [RequestRecord(start=0.0, token_times=[1.0, 1.5, 2.0], completion_tokens=3),
               RequestRecord(start=1.0, token_times=[4.0, 6.0], completion_tokens=2),
               RequestRecord(start=1.0, error="HTTP 429: full")]
    summary = summarize(records)
    assert (summary["requests"], summary["failures"]) == (2, 1)
    assert summary["tokens_per_s"] == pytest.approx(5 / 6, abs=0.01)  # 5 tokens in 0 s .. 6 s
    assert summary["ttft_ms"]["p50"] == 1000 and summary["ttft_ms"]["p99"] == 3000
    assert summary["e2e_ms"]["p50"] == 2000 and summary["e2e_ms"]["p99"] == 5000
    assert summary["itl_ms"]["p50"] == 500 and summary["itl_ms"]["mean"] == 1000
    assert summary["tpot_ms"]["p50"] == 500 and summary["tpot_ms"]["p99"] == 2000


def test_latencies_are_of_the_requests_that_ended_in_the_window_as_throughput_is():
    ramp = [RequestRecord(start=0.0, token_times=[0.01, 5.0], completion_tokens=2)] * 60
    steady = [RequestRecord(start=12.0, token_times=[13.0, 18.0], completion_tokens=2)] * 40
    cut = [RequestRecord(start=9.0, token_times=[10.5, 30.0], completion_tokens=2)]  # ends later
    failed = [RequestRecord(start=1.0, error="HTTP 429: full")]
    numbers = summarize(ramp + steady + cut + failed, (10.0, 20.0))
    assert (numbers["requests"], numbers["requests_per_s"]) == (40, 4.0)
    assert numbers["failures"] == 1, "no failure is hidden, whenever it was"
    assert numbers["completion_tokens"] == 81 and numbers["tokens_per_s"] == 8.1
    assert numbers["ttft_ms"] == {"p50": 1000, "p90": 1000, "p99": 1000, "mean": 1000}
    assert numbers["e2e_ms"]["p50"] == 6000 and numbers["itl_ms"]["p99"] == 5000
    early = summarize(cut, (10.0, 20.0))
    assert (early["requests"], early["ttft_ms"]["p50"], early["tokens_per_s"]) == (0, None, 0.1)


def test_gaps_and_tokens_an_event_are_of_the_window_too():
    ramp = RequestRecord(start=0.0, token_times=[1.0, 2.0], completion_tokens=20)
    steady = RequestRecord(start=11.0, token_times=[12.0, 12.1], completion_tokens=2)
    numbers = summary([ramp, steady], (10.0, 20.0), (10.0, 20.0), [], {})
    assert numbers["tokens_per_event"] == 1 and sum(numbers["itl_histogram"]) == 1
    assert numbers["itl_ms"]["p50"] == 100


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    address, _ = parser.parse_known_args()
    Fleet((address.host, address.port), FakeServer).serve_forever()


if __name__ == "__main__":
    main()


@pytest.mark.parametrize("name", ["content", "reasoning_content", "reasoning"])
def test_what_a_model_thinks_aloud_counts_as_its_text(name):
    event = {"choices": [{"delta": {name: "hm"}}], "usage": None, "error": None}
    assert read_event(json.dumps(event).encode()).texts == ["hm"]


# What servers were seen to send, or might: the data of an event, and what is said of it.
BROKEN = {
    b'{broken': "an event is no JSON", b"[" * 100_000: "an event is no JSON",
    b'"a string"': "an event is no JSON object", b"null": "an event is no JSON object",
    b"\xff\xfe": "an event is no JSON", b"[1]": "an event is no JSON object",
    b'{"choices": null}': "an event's choices are no list",
    b'{"choices": {"0": 1}}': "an event's choices are no list",
    b'{"choices": ["hm"]}': "an event's choice is no object",
    b'{"choices": [{"text": 5}]}': "an event's text is no text",
    b'{"choices": [{"delta": "hm"}]}': "an event's delta is no object",
    b'{"choices": [{"delta": {"content": ["hm"]}}]}': "an event's content is no text",
    b'{"usage": "many"}': "an event's usage is no object",
    b'{"usage": {"completion_tokens": 5}}': "an event's usage has no prompt_tokens",
    b'{"usage": {"prompt_tokens": 5}}': "an event's usage has no completion_tokens",
    b'{"usage": {"prompt_tokens": 5, "completion_tokens": "5"}}':
        "an event's usage has no completion_tokens",
    b'{"usage": {"prompt_tokens": 5, "completion_tokens": -1}}':
        "an event's usage has no completion_tokens",
    b'{"usage": {"prompt_tokens": 5, "completion_tokens": 1' + b"0" * 400 + b"}}":
        "an event's usage has no completion_tokens",
    b'{"error": "the engine died"}': "error event: the engine died",
}


@pytest.mark.parametrize("data", BROKEN, ids=lambda data: data.decode("latin-1")[:40])
def test_an_event_that_cannot_be_understood_is_named(data):
    with pytest.raises(StreamFailed) as caught:
        read_event(data)
    assert str(caught.value) == BROKEN[data]


@pytest.mark.parametrize("line", [b": ping\n", b":\n", b"\r\n", b"data: \n", b"data:\r\n",
                                  b"event: ping\n", b"database: 5\n", b"id: 7\n", b"1a\r\n"])
def test_comments_heartbeats_and_other_fields_bring_no_event(line):
    assert data_of(line) == b""
    assert data_of(b"data:{}\r\n") == data_of(b"data: {}\n") == b"{}"


def test_the_run_goes_on_past_every_broken_event_and_is_summed_up(serve, tmp_path):
    failures = {i: b"data: " + data + b"\n\n" for i, data in enumerate(BROKEN)}
    failures[len(failures)] = "no HTTP"
    url = serve(failures=failures)
    result = run_load(url, tmp_path, users=8, spawn_rate=50, workload="short",
                      requests=len(failures) + 4)
    assert sorted(r.index for r in result["records"]) == list(range(len(failures) + 4))
    numbers = result["summary"]
    assert (numbers["requests"], numbers["failures"]) == (4, len(failures))
    no_answer = {name for name in numbers["errors"] if name not in BROKEN.values()}
    assert set(BROKEN.values()) <= numbers["errors"].keys()
    assert len(no_answer) == 1 and no_answer.pop().startswith("no answer: ")
    page = result["html"].read_text()
    assert "an event is no JSON object" in page and "no answer: " in page


def test_pings_are_no_tokens_to_either_client(serve, tmp_path):
    ping = b": ping\n\ndata: \n\nevent: ping\n\n"
    url = serve(failures=dict.fromkeys(range(10), ping))
    result = run_load(url, tmp_path, users=2, spawn_rate=50, workload="short", requests=4)
    numbers = result["summary"]
    assert (numbers["failures"], numbers["tokens_per_event"]) == (0, 1)
    assert all(len(r.token_times) == r.completion_tokens == 16 for r in result["records"])
    outcomes, _ = finished(client.closed_loop(url, token_workload("uniform", 3, longest=16), 1))
    assert [o.error for o in outcomes] == [None] * 3
    assert all(len(o.event_times) == o.tokens == 16 for o in outcomes)


@pytest.mark.parametrize("last, said", [
    (b'"a string"', "an event is no JSON object"), (b"{broken", "an event is no JSON"),
    (b'{"usage": {"prompt_tokens": 5}}', "an event's usage has no completion_tokens"),
    (b'{"choices": []}', "the last event brings no usage"),
    (b'{"error": {"message": "it died"}}', "error event: it died"),
    (b"", "the stream brought no event")])
def test_the_lean_client_names_what_a_last_event_lacks(last, said):
    stream = (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\ndata: " + last
              + b"\n\n\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    async def ask():
        reader = asyncio.StreamReader()
        reader.feed_data(stream)
        reader.feed_eof()
        asked = types.SimpleNamespace(prompt_tokens=[1], max_tokens=1)
        return await client.Connection(reader, io.BytesIO()).ask(asked)

    assert finished(ask()).error == said


def test_the_time_left_follows_the_pace():
    now = [0.0]
    left = compare.TimeLeft(["sequential", "static", "continuous"], clock=lambda: now[0])
    left.start("sequential")
    now[0] = 10.0
    assert left.words(4, 64) == "", "a guess from four requests"
    now[0] = 50.0  # half of the first arm; 0.5 + 0.45 + 0.25 of it are left
    assert left.words(32, 64) == ", about 2 min left"
    left.start("static")
    now[0] = 100.0
    left.start("continuous")
    now[0] = 145.0
    assert left.words(32, 64) == ", about 10 s left"
    assert left.words(64, 64) == "", "all is done"


def test_what_lies_on_disk_takes_no_time():
    now = [0.0]
    left = compare.TimeLeft(["sequential", "continuous"], clock=lambda: now[0])
    left.start("sequential")
    left.skip()
    left.start("continuous")
    now[0] = 60.0
    assert left.words(32, 64) == ", about 1 min left"

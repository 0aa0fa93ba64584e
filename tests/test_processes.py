"""HTTP in processes of its own: what is true of one process is true of all of them together."""
import asyncio
import contextlib
import http.client
import json
import multiprocessing
import os
import signal
import socket
import sys

import httpx
import psutil
import pytest
from conftest import metrics_say, serving_in_processes, until

from cbserver.scheduler import ContinuousEngine
from load.process import ServerProcess, free_port, python_module, spawn, stop

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs Linux or macOS")


def ask(url, **body):
    """One request over a connection of its own, which any of the processes may take."""
    return httpx.post(f"{url}/v1/completions", timeout=60,
                      json={"prompt": "hello", "max_tokens": 3, "ignore_eos": True} | body)


def test_the_requests_of_all_processes_are_numbered_and_counted_in_one_row(tiny):
    with serving_in_processes(ContinuousEngine(*tiny)) as url:
        numbers = [int(ask(url).headers["x-request-number"]) for _ in range(20)]
        metrics_say(url, 'request_success_total{finished_reason="length"} 20.0')
    assert numbers == list(range(1, 21))


def test_the_live_page_of_any_process_shows_the_batch_of_all(tiny):
    with serving_in_processes(ContinuousEngine(*tiny, slots=2), model_name="tiny") as url:
        for _ in range(6):
            with httpx.stream("GET", f"{url}/events", timeout=60) as events:
                line = next(events.iter_lines())
            assert '"slots": [null, null]' in line and '"model": "tiny"' in line


@contextlib.contextmanager
def two_processes(tmp_path, *flags):
    """The command line's server with two processes for HTTP."""
    command = python_module("cbserver", "--model", "random:tiny", "--http-processes", 2, *flags)
    with ServerProcess(command, tmp_path / "log", timeout=120) as running:
        yield running


@pytest.fixture
def server(tmp_path):
    with two_processes(tmp_path) as running:
        yield running


def said_by(server):
    return server.log.read_text(encoding="utf-8")


def family_of(server):
    """(the engine's process, the processes for HTTP)."""
    engine = psutil.Process(server.process.pid)
    every = engine.children(recursive=True)
    serving = [one for one in every if any(c.laddr.port == server.port and c.status == "LISTEN"
                                           for c in one.net_connections())]
    return engine, serving


def connection_to(process, server):
    """A connection that this one of the processes has accepted; the kernel chooses one."""
    for _ in range(100):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=100)
        connection.request("GET", "/ready")
        connection.getresponse().read()
        port = connection.sock.getsockname()[1]
        if any(c.raddr and c.raddr.port == port for c in process.net_connections()):
            return connection
        connection.close()
    raise AssertionError("the kernel never chose this process")


def get(connection, path):
    """(status, text)."""
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read().decode()


class Stream:
    """A streamed answer of so many tokens; its first event has come."""

    def __init__(self, connection, tokens=800):
        body = {"prompt": "hello", "max_tokens": tokens, "ignore_eos": True, "temperature": 0,
                "stream": True, "stream_options": {"include_usage": True}}
        connection.request("POST", "/v1/completions", json.dumps(body),
                           {"Content-Type": "application/json"})
        self.response = connection.getresponse()
        self.first = self.response.readline()
        assert self.first.startswith(b"data: ")

    def all(self):
        """(text, tokens) when it has come to its end."""
        whole = self.first + self.response.read()
        events = [line[6:] for line in whole.decode().splitlines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        *chunks, usage = [json.loads(event) for event in events[:-1]]
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        return text, usage["usage"]["completion_tokens"]


def test_connections_are_shared_out_among_the_processes(server):
    _, serving = family_of(server)
    connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(40)]

    def counts():
        return [sum(c.laddr.port == server.port and c.status == "ESTABLISHED"
                    for c in one.net_connections()) for one in serving]

    until(lambda: sum(counts()) >= 40)
    assert min(counts()) >= 4, counts()
    for connection in connections:
        connection.close()


def test_a_process_that_stands_still_costs_its_own_clients_and_nobody_else(tmp_path):
    with two_processes(tmp_path, "--stall-timeout", 200) as server:
        _, (still, other) = family_of(server)
        scrape = connection_to(other, server)
        own = [Stream(connection_to(still, server)) for _ in range(2)]
        asked = connection_to(still, server)
        others = [Stream(connection_to(other, server)) for _ in range(2)]
        still.suspend()
        asked.request("GET", "/metrics")
        found = {stream.all() for stream in others}
        assert {tokens for _, tokens in found} == {800}
        status, metrics = get(scrape, "/metrics")
        assert status == 200 and "generation_tokens_total" in metrics
        still.resume()
        assert {stream.all() for stream in own} == found, "nothing was lost"
        assert "generation_tokens_total" in asked.getresponse().read().decode()
        for connection in (asked, scrape):
            status, metrics = get(connection, "/metrics")
            assert "generation_tokens_total 3200.0" in metrics


def test_a_process_that_stands_still_for_too_long_ends_the_server(tmp_path):
    with two_processes(tmp_path, "--stall-timeout", 5) as server:
        _, (still, other) = family_of(server)
        cut_off = Stream(connection_to(still, server), 1900)
        still.suspend()
        assert server.process.wait(100) == 1
        with pytest.raises((OSError, http.client.HTTPException)):
            cut_off.response.read()
        psutil.wait_procs([still, other], 10)
        assert not still.is_running() and not other.is_running()
        assert f"({still.pid}) stands still" in said_by(server)


def test_sigterm_ends_a_server_of_which_a_process_stands_still(tmp_path):
    flags = ("--stall-timeout", 500, "--drain-timeout", 1)
    with two_processes(tmp_path, *flags) as server:
        _, (still, other) = family_of(server)
        still.suspend()
        server.process.terminate()
        assert server.process.wait(100) == 1
        psutil.wait_procs([still, other], 10)
        assert not still.is_running() and not other.is_running()
        assert f"({still.pid}) does not end" in said_by(server)


def test_while_the_engines_process_stands_still_metrics_are_a_503_and_later_right_again(tmp_path):
    with two_processes(tmp_path, "--stall-timeout", 8) as server:
        engine, (one, _) = family_of(server)
        connection = connection_to(one, server)
        with httpx.stream("GET", f"{server.url}/events", timeout=100) as viewer:
            lines = viewer.iter_lines()
            assert next(lines).startswith("data: {")
            engine.suspend()
            try:
                status, answer = get(connection, "/metrics")
                assert status == 503 and "does not answer" in json.loads(answer)["error"]["message"]
                assert get(connection, "/health")[0] == 503
                for line in lines:  # the viewer's stream ends, and ends well
                    assert not line or line.startswith("data: {")
            finally:
                engine.resume()
        until(lambda: get(connection, "/health")[0] == 200)
        for count in range(1, 4):
            ask(server.url)
            metrics_say(server.url, f'request_success_total{{finished_reason="length"}} {count}.0')
        with httpx.stream("GET", f"{server.url}/events", timeout=100) as viewer:
            assert '"slots"' in next(viewer.iter_lines())


def test_a_late_answer_is_not_taken_for_the_answer_to_another_question():
    from cbserver.http.errors import APIError
    from cbserver.processes import RemoteEngine

    ours, theirs = multiprocessing.Pipe()
    asked = []

    def question():
        asked.extend(ours.recv())
        return asked[-1][1]

    async def main():
        engine = RemoteEngine(theirs, {}, None, None, stall_timeout=0.05)
        await engine.start()
        with pytest.raises(APIError) as raised:
            await engine.ask("metrics")
        assert raised.value.status_code == 503
        late = await asyncio.to_thread(question)
        engine.stall_timeout = 30
        answer = asyncio.create_task(engine.ask("snapshot"))
        number = await asyncio.to_thread(question)
        ours.send([("answer", late, "late"), ("answer", number, "in time")])
        assert await answer == "in time"
        ours.send([("ended",)])
        await engine.stop()
        with pytest.raises(APIError):  # at once: nobody is there to answer
            await engine.ask("metrics")

    asyncio.run(asyncio.wait_for(main(), 60))


def test_what_the_handler_of_a_signal_sends_is_sent_whenever_the_signal_comes():
    from cbserver.processes import Channel

    ours, theirs = multiprocessing.Pipe()
    channel = Channel(theirs)
    count = 0

    def handle(number, frame):
        nonlocal count
        count += 1
        channel.send("handler")

    before = signal.signal(signal.SIGVTALRM, handle)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.001, 0.001)
        for _ in range(20_000):
            channel.send("program")
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    channel.send("ended")
    names = [name for batch in Channel(ours).batches() for name, in batch]
    assert names.count("program") == 20_000 and names.count("handler") == count


@pytest.mark.parametrize("children", [0, 3, 4])  # of the engine's process, two are Python's own
def test_sigterm_during_the_start_ends_the_server_without_a_traceback(tmp_path, children):
    log = tmp_path / "log"
    process = spawn(python_module("cbserver", "--model", "random:tiny", "--http-processes", 2,
                                  "--port", free_port()), log)
    try:
        engine = psutil.Process(process.pid)
        until(lambda: "Serving" in log.read_text(), 120)
        until(lambda: len(engine.children(recursive=True)) >= children)
        family = engine.children(recursive=True)
        process.terminate()
        assert process.wait(60) in (0, -signal.SIGTERM)
        assert not psutil.wait_procs(family, 30)[1]
    finally:
        stop(process)
    assert "Traceback" not in log.read_text()


def test_ctrl_c_twice_ends_all_at_once(tmp_path):
    with two_processes(tmp_path, "--max-batch", 1) as server:
        _, serving = family_of(server)
        clients = [http.client.HTTPConnection("127.0.0.1", server.port) for _ in range(8)]
        body = {"prompt": "a", "max_tokens": 1900, "ignore_eos": True}
        for client in clients:
            client.request("POST", "/v1/completions", json.dumps(body),
                           {"Content-Type": "application/json"})
        metrics_say(server.url, "num_requests_waiting 7.0")
        os.killpg(server.process.pid, signal.SIGINT)  # as a terminal does
        until(lambda: "Answers to finish" in said_by(server))
        os.killpg(server.process.pid, signal.SIGINT)
        assert server.process.wait(30) == 1
        assert not psutil.wait_procs(serving, 10)[1]
        assert "Traceback" not in said_by(server) and "Fatal" not in said_by(server)


def test_a_folder_for_temporary_files_may_have_a_long_name(tmp_path):
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    command = ["env", f"TMPDIR={folder}", *python_module(
        "cbserver", "--model", "random:tiny", "--http-processes", 1)]
    with ServerProcess(command, tmp_path / "log", timeout=120) as server:
        assert ask(server.url).status_code == 200


def test_when_a_process_for_http_is_killed_the_server_ends_and_says_so(server):
    _, serving = family_of(server)
    assert len(serving) == 2
    serving[0].kill()
    assert server.process.wait(30) == 1
    psutil.wait_procs(serving, 10)
    assert not any(one.is_running() for one in serving)
    assert "process for HTTP" in said_by(server)


def test_when_the_engines_process_is_killed_nothing_is_left(server):
    engine, serving = family_of(server)
    engine.kill()
    gone, alive = psutil.wait_procs(serving, 30)
    assert len(gone) == 2 and not alive


def test_a_negative_number_of_processes_is_refused():
    from cbserver.cli import parse

    assert parse(["--http-processes", "3"]).http_processes == 3
    with pytest.raises(SystemExit):
        parse(["--http-processes", "-1"])

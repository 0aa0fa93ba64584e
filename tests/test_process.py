"""The life of a server's process: its port, its signals, its end."""
import asyncio
import importlib.util
import signal
import socket
import subprocess
import sys
import threading
from unittest import mock

import httpx
import pytest
import torch
from conftest import ROOT, held, until

from cbserver import process
from cbserver.cli import take_port
from cbserver.process import DrainingServer
from cbserver.scheduler import ContinuousEngine
from cbserver.server import create_app
from load.process import ServerProcess, free_port, python_module, spawn, stop

UNIX = pytest.mark.skipif(sys.platform == "win32", reason="needs Linux or macOS")
WAYS = [[], pytest.param(["--http-processes", "2"], marks=UNIX)]


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# The port


@pytest.mark.parametrize("flags", WAYS)
def test_a_second_server_does_not_get_the_port_though_the_first_one_still_loads(tmp_path, flags):
    port = free_port()
    command = python_module("cbserver", "--model", "random:tiny", "--port", port, *flags)
    first = spawn(command, tmp_path / "log")
    try:
        until(lambda: listens(port))
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert "Serving" not in second.stdout and second.returncode == 1
        assert "choose another port with --port" in second.stderr
        assert len(second.stderr.strip().splitlines()) == 1
        # Who connected to the first one while it loaded is served.
        assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=120).status_code == 200
    finally:
        stop(first)


@UNIX
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_a_port_is_taken_for_all_processes_and_by_nobody_else(host):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, 0), family=family).close()
    except OSError:
        pytest.skip("no such address here")
    for processes in (1, 2, 3):
        listeners = take_port(host, 0, processes)
        ports = {listener.getsockname()[1] for listener in listeners}
        assert len(listeners) == processes and len(ports) == 1
        if family == socket.AF_INET6:  # with any number of processes: IPv6 and no IPv4
            assert all(listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
                       for listener in listeners)
        for another in (1, 2):
            with pytest.raises(SystemExit, match="choose another port"):
                take_port(host, *ports, another)
        for listener in listeners:
            listener.close()


@pytest.mark.parametrize("host", ["a..b", "nowhere.invalid", "203.0.113.7"])
def test_a_host_that_is_not_this_machine_is_told_apart_from_a_port_that_is_taken(host):
    with pytest.raises(SystemExit, match="--host takes an address of this machine"):
        take_port(host, free_port())


# Signals and the end


def running(app, **options):
    """(server, its thread) on a free port."""
    server = DrainingServer(app, "127.0.0.1", 0, **options)
    thread = threading.Thread(target=server.run, args=[take_port("127.0.0.1", 0)], daemon=True)
    return server, thread


def test_a_signal_that_comes_while_the_app_starts_is_not_forgotten(tiny):
    server, thread = running(create_app(ContinuousEngine(*tiny)), drain_timeout=1000)
    server.handle_exit(signal.SIGTERM, None)
    thread.start()
    thread.join(60)
    assert not thread.is_alive() and server.problem is None


def test_a_program_goes_on_after_a_server_in_it_has_ended_late(tiny, monkeypatch):
    watch = mock.Mock()
    monkeypatch.setattr(process, "faulthandler", watch)
    engine = ContinuousEngine(*tiny)
    server, thread = running(create_app(engine), drain_timeout=0.1)
    with held(engine) as go_on:
        thread.start()
        until(lambda: server.started)
        sequence = engine.submit([1, 2, 3])
        server.handle_exit(signal.SIGTERM, None)
        until(lambda: watch.dump_traceback_later.called)
        go_on.set()
        thread.join(60)
    assert not thread.is_alive() and sequence.finish_reason == "abort"
    assert watch.method_calls[-1] == mock.call.cancel_dump_traceback_later()
    assert "cut off" in server.problem and server.problem.endswith(": 1.")


@pytest.mark.parametrize("flags", WAYS)
def test_a_drain_says_that_it_begins_and_that_answers_were_cut_off(tmp_path, flags):
    command = python_module("cbserver", "--model", "random:tiny", "--max-batch", 1,
                            "--drain-timeout", 1, *flags)
    with ServerProcess(command, tmp_path / "log") as server:
        async def ask_and_stop():
            async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
                body = {"prompt": [[1]] * 16, "max_tokens": 1900, "ignore_eos": True}
                answers = [asyncio.create_task(client.post("/v1/completions", json=body))
                           for _ in range(8)]
                while "num_requests_running 1.0" not in (await client.get("/metrics")).text:
                    await asyncio.sleep(0.01)
                server.process.terminate()
                return await asyncio.gather(*answers)

        answers = asyncio.run(ask_and_stop())
        assert {answer.status_code for answer in answers} <= {200, 503}
        assert server.process.wait(60) == 1
    said = server.log.read_text()
    assert "Answers to finish: " in said and "a second signal ends at once" in said
    assert "Answers cut off at the end of --drain-timeout: " in said
    assert "Traceback" not in said


@pytest.mark.parametrize("flags", WAYS)
def test_ctrl_c_while_the_model_is_loaded_leaves_no_traceback(tmp_path, flags):
    port = free_port()
    log = tmp_path / "log"
    loading = spawn(python_module("cbserver", "--model", "random:tiny", "--port", port, *flags),
                    log)
    try:
        until(lambda: listens(port))
        loading.send_signal(signal.SIGINT)
        assert loading.wait(60) in (0, -signal.SIGINT)
    finally:
        stop(loading)
    assert "Traceback" not in log.read_text()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None or torch.cuda.is_available(),
                    reason="needs triton, and no GPU")
def test_a_clean_end_on_a_cpu_is_free_of_triton_s_complaints(tmp_path):
    with ServerProcess(python_module("cbserver", "--model", "random:tiny"),
                       tmp_path / "log") as server:
        server.process.terminate()
        assert server.process.wait(60) == 0
    assert "leaked" not in server.log.read_text()


@UNIX
@pytest.mark.parametrize("flags", WAYS)
def test_a_server_whose_output_is_closed_serves(tmp_path, flags):
    closed = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh"]
    command = [*closed, *python_module("cbserver", "--model", "random:tiny", *flags)]
    with ServerProcess(command, tmp_path / "log") as server:
        server.process.terminate()
        assert server.process.wait(60) == 0


# The engine's failures


def test_only_the_engines_thread_fails_for_the_engine(monkeypatch, capsys):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # put back at the end
    monkeypatch.setattr(sys, "setswitchinterval", lambda seconds: None)
    failures = process.prepare()
    for name, count in (("another", 0), ("engine", 1)):
        thread = threading.Thread(target=lambda: 1 / 0, name=name)
        thread.start()
        thread.join()
        assert len(failures) == count
        assert "ZeroDivisionError" in capsys.readouterr().err

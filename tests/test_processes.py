"""HTTP in processes of its own: what is true of one process is true of all of them together."""
import sys

import httpx
import psutil
import pytest
from conftest import metrics_say, serving_in_processes

from cbserver.scheduler import ContinuousEngine
from load.process import ServerProcess, python_module

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
    with serving_in_processes(ContinuousEngine(*tiny, max_batch=2), model_name="tiny") as url:
        for _ in range(6):
            with httpx.stream("GET", f"{url}/events", timeout=60) as events:
                line = next(events.iter_lines())
            assert '"slots": [null, null]' in line and '"model": "tiny"' in line


@pytest.fixture
def server(tmp_path):
    """The command line's server with two processes for HTTP."""
    command = python_module("cbserver", "--model", "random:tiny", "--http-processes", 2)
    with ServerProcess(command, tmp_path / "log", timeout=120) as running:
        yield running


def family_of(server):
    """(the engine's process, the processes for HTTP)."""
    engine = psutil.Process(server.process.pid)
    every = engine.children(recursive=True)
    serving = [one for one in every if any(c.laddr.port == server.port and c.status == "LISTEN"
                                           for c in one.net_connections())]
    return engine, serving


def test_when_a_process_for_http_is_killed_the_server_ends_and_says_so(server):
    _, serving = family_of(server)
    assert len(serving) == 2
    serving[0].kill()
    assert server.process.wait(30) == 1
    psutil.wait_procs(serving, 10)
    assert not any(one.is_running() for one in serving)
    assert "process for HTTP" in server.log.read_text(encoding="utf-8")


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

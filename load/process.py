"""Ask a server whether it is there and which model it has; start one for a test, and stop it."""
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException
from pathlib import Path

import psutil

# ngrok's free plan shows browsers a page of its own first; this header passes it by.
SKIP_WARNING = {"ngrok-skip-browser-warning": "1"}


class LoadFailed(RuntimeError):
    """The load test cannot go on; the message is one sentence that says why and what to do."""


def http(url, body=None, api_key=None, timeout=10):
    """GET, or POST `body` as JSON: (status, text). timeout: seconds. Raises OSError: no server."""
    headers = {"Content-Type": "application/json"} | SKIP_WARNING
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data=data, headers=headers)
        with opener(url).open(request, timeout=timeout) as response:
            return response.status, response.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode("utf-8", "replace")
    except HTTPException as error:
        raise ConnectionError(f"no HTTP answer: {error!r}")


def base_url(host):
    """A server's address without what clients call its base URL: a slash, or /v1, at the end."""
    return host.strip().rstrip("/").removesuffix("/v1").rstrip("/")


def opener(url):
    """What opens URLs: by the proxy of the environment, but never to this machine itself."""
    if is_loopback(url):
        return urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return urllib.request.build_opener()


def is_loopback(url):
    """Whether a URL names this machine by its loopback address."""
    name = urllib.parse.urlsplit(url).hostname or ""
    return name == "localhost" or name == "::1" or name.startswith("127.")


def proxy_of(url):
    """The proxy through which a URL is reached, or None."""
    parts = urllib.parse.urlsplit(url)
    if is_loopback(url) or urllib.request.proxy_bypass(parts.netloc):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def check_alive(host):
    """Any HTTP answer will do: a lesson's small app has no /health. Raises LoadFailed if none."""
    try:
        http(f"{host}/health")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise LoadFailed(f"No server answers at {host} ({reason}); start one with "
                         "`python -m cbserver`, or name another with --host.")


def first_model(host, api_key=None):
    """The name of the model that the server lists first; "default" where it lists none."""
    try:
        status, text = http(f"{host}/v1/models", api_key=api_key)
        if status != 200:
            return "default"
        return str(json.loads(text)["data"][0]["id"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return "default"


def gauges(host, api_key=None):
    """{"running": …, "waiting": …}: requests at this moment, by the server's own count.

    Empty if it does not tell; vLLM's names are known too.
    """
    try:
        status, text = http(f"{host}/metrics", api_key=api_key)
    except (OSError, ValueError):
        return {}
    if status != 200:
        return {}
    found = re.findall(r"^(?:vllm:)?num_requests_(running|waiting)(?:\{.*\})? (\S+)", text, re.M)
    return {name: float(value) for name, value in found}


def warm_up(host, model, api_key=None, timeout=300):
    """One short request whose time nobody counts. timeout: seconds."""
    body = {"model": model, "prompt": "Hello, how are you?", "max_tokens": 8, "temperature": 0,
            "ignore_eos": True, "stream": True}
    status, text = http(f"{host}/v1/completions", body, api_key, timeout)
    if status != 200:
        raise LoadFailed(f"The warm-up request got HTTP {status}: {text[:200]}")


def make_folder(path):
    """Make a folder for results, unless it is there. Raises LoadFailed if that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(path, os.W_OK) else "it cannot be written"
    except OSError as error:
        reason = error.strerror
    if reason:
        raise LoadFailed(f"{path} cannot be a folder for results ({reason}): "
                         "name another with --out.")


def free_port():
    """A TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def spawn(command, log, **env):
    """Start `command` in the background with all its output in the file `log`.

    In a session of its own: Ctrl-C reaches only us, and we stop our children in order.
    """
    with open(log, "wb") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | env, start_new_session=True)


def stop(process, grace=20):
    """End one process that we started: ask, wait at most `grace` seconds, then kill it and its."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            kill(process)
    process.wait()


def kill(process):
    """End a process and all that it started, at once."""
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.kill()


def tail(log, lines=12):
    """The last lines of a log file, indented."""
    text = Path(log).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return "\n".join(f"    {line}" for line in text[-lines:])


class ServerProcess:
    """A server in a subprocess, for the length of a `with`: alive inside, gone after.

    command: what to run; `--host` and `--port` are added. log: a file for its output.
    timeout: seconds until /health must answer 200. say: called with a line while we wait.
    """

    def __init__(self, command, log, timeout=600, say=print):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [*command, "--host", "127.0.0.1", "--port", str(self.port)]
        self.log = log
        self.timeout = timeout
        self.say = say
        self.process = None  # while it runs

    def __enter__(self):
        self.process = spawn(self.command, self.log)
        try:
            self.wait_until_healthy()
        except BaseException:
            stop(self.process)
            raise
        return self

    def __exit__(self, *error):
        stop(self.process)

    def wait_until_healthy(self):
        """Poll /health until it answers 200; a line every 10 s; LoadFailed when it never does."""
        begin = time.monotonic()
        told = begin
        while not self.healthy():
            now = time.monotonic()
            if self.process.poll() is not None:
                self.fail(f"exited with code {self.process.returncode} before it was ready")
            if now - begin > self.timeout:
                self.fail(f"was not ready within {self.timeout:.0f} s")
            if now - told >= 10:
                self.say(f"loading the model, {now - begin:.0f} s")
                told = now
            time.sleep(0.2)

    def healthy(self):
        try:
            return http(f"{self.url}/health", timeout=5)[0] == 200
        except OSError:
            return False

    def fail(self, what):
        raise LoadFailed(f"The server {what}; its last words, from {self.log}:\n{tail(self.log)}")


def python_module(name, *arguments):
    """The command that runs a module with this Python: list[str]."""
    return [sys.executable, "-m", name, *map(str, arguments)]

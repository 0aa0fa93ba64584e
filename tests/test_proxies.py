"""Behind nginx and HAProxy, which cut off a connection that is silent for too long."""
import contextlib
import shutil
import subprocess

import httpx
import pytest
from conftest import held, serving, until

from cbserver.scheduler import ContinuousEngine
from load.process import free_port

NGINX = """
daemon off; pid {folder}/pid; error_log {folder}/error.log;
events {{ }}
http {{
  access_log off; client_body_temp_path {folder}; proxy_temp_path {folder};
  fastcgi_temp_path {folder}; uwsgi_temp_path {folder}; scgi_temp_path {folder};
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://127.0.0.1:{behind}; proxy_read_timeout 1s; }}
  }}
}}
"""
HAPROXY = """
defaults
  mode http
  timeout connect 5s
  timeout client 1s
  timeout server 1s
listen front
  bind 127.0.0.1:{port}
  server behind 127.0.0.1:{behind}
"""
PROXIES = {"nginx": (NGINX, ["nginx", "-e", "{folder}/error.log", "-c"]),
           "haproxy": (HAPROXY, ["haproxy", "-f"])}


@contextlib.contextmanager
def proxy(name, behind, folder):
    """A proxy of this name before a server's URL, which gives up after a second: its URL."""
    text, command = PROXIES[name]
    places = {"folder": folder, "port": free_port(), "behind": behind.rsplit(":")[-1]}
    config = folder / "proxy.conf"
    config.write_text(text.format(**places), encoding="utf-8")
    words = [word.format(**places) for word in command]
    with subprocess.Popen([*words, str(config)], stderr=subprocess.DEVNULL) as process:
        url = f"http://127.0.0.1:{places['port']}"

        def answers():
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{url}/health").status_code == 200

        try:
            until(answers)
            yield url
        finally:
            process.terminate()


def streamed(url, go_on, comments):
    """The text of a stream whose engine goes on after so many comments, or "cut off"."""
    body = {"prompt": "hello", "max_tokens": 3, "ignore_eos": True, "stream": True}
    text = ""
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            for line in response.iter_lines():
                text += f"{line}\n"
                if text.count(": still here") >= comments:
                    go_on.set()
    except httpx.TransportError:
        pass
    return text if text.endswith("data: [DONE]\n\n") else "cut off"


@pytest.mark.slow
@pytest.mark.parametrize("name", PROXIES)
def test_a_stream_that_waits_for_longer_than_a_proxy_does_is_not_cut_off(tiny, name, tmp_path):
    if not shutil.which(name):
        pytest.skip(f"{name} is not installed")
    for silence, comments in ((0, 1), (0.25, 10)):  # without comments, and for 2.5 seconds
        engine = ContinuousEngine(*tiny)
        with held(engine) as go_on, serving(engine, silence=silence) as behind:
            with proxy(name, behind, tmp_path) as url:
                got = streamed(url, go_on, comments)
            go_on.set()
        assert (got == "cut off") == (silence == 0), got

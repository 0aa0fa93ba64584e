"""Before there is a request: the key at the door, endless heads and bodies, crowds, silence."""
import contextlib
import errno
import json
import socket
import threading
import urllib.parse
from types import SimpleNamespace

import httpx
import pytest
from conftest import held, serving, until

from cbserver.cli import parse
from cbserver.http.connection import MAX_HEAD
from cbserver.http.keys import usable_key
from cbserver.process import DrainingServer
from cbserver.scheduler import ContinuousEngine
from cbserver.server import OPEN, create_app

KEY = "a-key"


@contextlib.contextmanager
def shipped(engine, max_connections=4096, receive_timeout=30, **options):
    """The server that the command line starts, in a thread here: its URL."""
    app = create_app(engine, receive_timeout=receive_timeout, **options)
    server = DrainingServer(app, "127.0.0.1", 0, max_connections=max_connections,
                            receive_timeout=receive_timeout)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "it did not start"
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)


def connected(url):
    """A raw connection to a server."""
    where = urllib.parse.urlsplit(url)
    return socket.create_connection((where.hostname, where.port), timeout=60)


def everything(connection):
    """All that a server sends until it ends the connection."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(65536):
            received += data
    return received


def status(answer):
    return int(answer.split()[1])


# The key


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/nothing"])
def test_without_the_key_the_answer_is_401_before_any_of_the_body_is_there(tiny, path):
    with shipped(ContinuousEngine(*tiny), api_key=KEY) as url:
        for sent in ("", "Authorization: Bearer wrong\r\n", f"Authorization: Basic {KEY}\r\n"):
            with connected(url) as connection:
                connection.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\n{sent}"
                                   "Content-Length: 1000000\r\n\r\n".encode())
                assert status(connection.recv(65536)) == 401  # though no byte of it was sent
        assert httpx.post(url + path, headers={"Authorization": f"bearer {KEY}"}, json={}
                          ).status_code in (400, 404)
        page = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    assert 'requests_refused_total{status="401"} 3.0' in page


def test_only_what_is_listed_is_open_whatever_the_host_is_called(tiny):
    with serving(ContinuousEngine(*tiny), api_key=KEY) as url:
        for path in OPEN:
            assert httpx.get(url + path).status_code == 200, path
        for path in ("/metrics", "/events", "/v1/models", "/health/", "/healthz", "//health"):
            assert httpx.get(url + path).status_code == 401, path
        with connected(url) as connection:  # a Host that would make a URL with another path
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x/health?\r\n"
                               b"Connection: close\r\n\r\n")
            assert status(everything(connection)) == 401


def test_a_key_that_is_empty_or_cannot_be_sent_ends_the_start_with_a_sentence(tiny, capsys,
                                                                              monkeypatch):
    for key in ("", " \n", "schlüssel", "two words", "a\nb"):
        monkeypatch.setenv("CBSERVER_API_KEY", key)
        with pytest.raises(SystemExit):
            parse([])
        assert "API key" in capsys.readouterr().err
        with pytest.raises(ValueError):
            create_app(ContinuousEngine(*tiny), api_key=key)
    monkeypatch.setenv("CBSERVER_API_KEY", "from-a-file\n")
    assert parse([]).api_key == "from-a-file"
    monkeypatch.delenv("CBSERVER_API_KEY")
    assert parse([]).api_key is None and usable_key(None) is None


# Heads, bodies and crowds


@pytest.mark.parametrize("begin", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\nX-Drip: "])
def test_a_connection_whose_head_never_comes_is_closed(tiny, begin):
    with shipped(ContinuousEngine(*tiny), receive_timeout=0.5) as url:
        with connected(url) as connection:
            connection.sendall(begin)
            assert everything(connection) == b""  # it ends; a wait for ever would be a time-out


def test_a_further_head_on_the_same_connection_has_its_time_too(tiny):
    whole = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with shipped(ContinuousEngine(*tiny), receive_timeout=0.5) as url:
        with connected(url) as connection:
            for _ in range(2):
                connection.sendall(whole)
                assert status(connection.recv(65536)) == 200
            connection.sendall(whole[:20])
            assert everything(connection) == b""


@pytest.mark.parametrize("line", ["X-Long: {}", "GET /{} HTTP/1.1"], ids=["header", "first line"])
def test_a_head_that_is_too_large_is_refused_while_it_arrives(tiny, line):
    with shipped(ContinuousEngine(*tiny)) as url:
        with connected(url) as connection:
            connection.sendall(line.format("a" * MAX_HEAD).encode() if line.startswith("GET") else
                               b"GET / HTTP/1.1\r\n" + line.format("a" * MAX_HEAD).encode())
            answer = everything(connection)
        assert status(answer) == 431
        assert str(MAX_HEAD) in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
        body = {"prompt": "a" * 3 * MAX_HEAD, "max_tokens": 1}  # large, in the same segment: taken
        assert "exceed" in httpx.post(f"{url}/v1/completions", json=body).text


def test_connections_over_the_limit_are_told_and_the_others_served(tiny):
    with shipped(ContinuousEngine(*tiny), max_connections=3) as url:
        with contextlib.ExitStack() as stack:
            inside = [stack.enter_context(connected(url)) for _ in range(3)]
            for connection in inside:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                assert status(connection.recv(65536)) == 200
            with connected(url) as outside:
                outside.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                answer = everything(outside)
            assert status(answer) == 503 and b"3 connections are open" in answer
            with connected(url) as silent:
                assert everything(silent) == b""
            inside[0].sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert status(inside[0].recv(65536)) == 200


def test_an_http_1_0_client_gets_a_stream_without_chunk_sizes(tiny):
    body = json.dumps({"prompt": "hello", "max_tokens": 3, "ignore_eos": True, "stream": True})
    head = ("POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n")
    with shipped(ContinuousEngine(*tiny)) as url:
        with connected(url) as connection:
            connection.sendall(f"{head}{body}".encode())
            head, _, text = everything(connection).partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower()
    assert text.startswith(b"data: ") and text.endswith(b"data: [DONE]\n\n")
    assert all(line.startswith(b"data: ") for line in text.split(b"\n") if line)


@pytest.mark.parametrize("requests", [1, 2, 3])
def test_a_client_that_pipelines_and_leaves_frees_its_slot_too(tiny, requests, caplog):
    body = json.dumps({"prompt": "hello", "max_tokens": 1900, "ignore_eos": True})
    one = ("POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
           f"Content-Length: {len(body)}\r\n\r\n{body}").encode()
    engine = ContinuousEngine(*tiny, max_len=2048)
    with shipped(engine) as url:
        with connected(url) as connection:
            connection.sendall(one * requests)
            until(lambda: engine.stats().num_generated_tokens > 3)
        until(lambda: engine.stats().running == 0)
    assert engine.stats().num_generated_tokens < 1900
    assert not [record for record in caplog.records if record.exc_info]


def test_scarce_files_are_told_once_and_not_for_each_try(tiny, caplog):
    server = DrainingServer(create_app(ContinuousEngine(*tiny)), "127.0.0.1", 0)
    others = []
    loop = SimpleNamespace(default_exception_handler=others.append)
    for _ in range(1000):
        server.note_trouble(loop, {"exception": OSError(errno.EMFILE, "too many open files")})
    server.note_trouble(loop, {"message": "something else"})
    assert [record.message for record in caplog.records] == [
        "No file is left for another connection (ulimit -n), so new ones wait"]
    assert others == [{"message": "something else"}]


# Silence


def silent_until_asked(engine, silence=0.05):
    """A server whose engine stands still until an event is set: (what ends it, event, URL)."""
    stack = contextlib.ExitStack()
    go_on = stack.enter_context(held(engine))
    return stack, go_on, stack.enter_context(serving(engine, silence=silence))


ASKED = {"prompt": "hello", "max_tokens": 3, "ignore_eos": True, "temperature": 0}


def test_a_stream_that_waits_says_so_in_comments_and_its_events_stay_the_same(tiny):
    lines = []
    stack, go_on, url = silent_until_asked(ContinuousEngine(*tiny))
    with stack:
        with httpx.stream("POST", f"{url}/v1/completions", json=ASKED | {"stream": True},
                          timeout=60) as response:
            for line in response.iter_lines():
                lines.append(line)
                if line.startswith(":"):
                    go_on.set()  # only a comment lets the engine go on
        whole = httpx.post(f"{url}/v1/completions", json=ASKED, timeout=60).json()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(e["choices"][0]["text"] for e in events) == whole["choices"][0]["text"]
    assert all(line[:6] in ("data: ", ": stil", "") for line in lines)
    assert lines[-2:] == ["data: [DONE]", ""]


def test_for_the_openai_package_a_comment_is_no_event(tiny):
    import openai

    stack, go_on, url = silent_until_asked(ContinuousEngine(*tiny))
    with stack:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        stream = client.completions.create(model="cbserver", stream=True,
                                           extra_body={"ignore_eos": True}, prompt="hello",
                                           max_tokens=3, temperature=0)
        threading.Timer(0.5, go_on.set).start()  # some comments later
        text = "".join(chunk.choices[0].text for chunk in stream)
        assert text == httpx.post(f"{url}/v1/completions", json=ASKED).json()["choices"][0]["text"]

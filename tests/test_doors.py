"""What stands before the app: HEAD, odd and slow bodies, crowds, fields that must not vanish."""
import asyncio
import json
import socket
import sys
import urllib.parse

import httpx
import pytest
from conftest import prompt, serving

from cbserver.cli import parse, reach
from cbserver.http.doors import with_direct_send
from cbserver.http.errors import APIError
from cbserver.http.schema import ELSEWHERE, Message
from cbserver.http.text import chat_tokens
from cbserver.model.random_llama import byte_tokenizer
from cbserver.model.sampling import SamplingParams
from cbserver.process import DrainingServer
from cbserver.scheduler import ContinuousEngine
from cbserver.sequence import queues_of
from cbserver.server import create_app
from load.process import ServerProcess, proxy_of, python_module


def test_an_idle_connection_is_kept_for_longer_than_clients_keep_it(tiny):
    server = DrainingServer(create_app(ContinuousEngine(*tiny, max_len=64)), "127.0.0.1", 0)
    assert server.config.timeout_keep_alive > httpx.Limits().keepalive_expiry


@pytest.fixture(scope="module")
def url(tiny):
    engine = ContinuousEngine(*tiny, max_len=256)
    with serving(engine, model_name="tiny", timeout=2, max_viewers=2) as url:
        yield url


def ask(url, **body):
    return httpx.post(url + "/v1/completions", timeout=60,
                      json={"prompt": "hello", "max_tokens": 4, "temperature": 0, **body})


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/"])
def test_head_is_answered_as_get_without_a_body(url, path):
    got = httpx.get(url + path)
    head = httpx.head(url + path)
    assert head.status_code == got.status_code == 200
    assert head.headers["content-type"] == got.headers["content-type"]
    assert head.content == b""


def test_the_events_of_a_stream_go_past_the_middleware_its_start_and_end_through(tiny):
    import lesson

    seen = []

    class Watch:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            async def noted(message):
                seen.append((message["type"], message.get("body")))
                await send(message)

            await self.app(scope, receive, noted)

    app = create_app(ContinuousEngine(*tiny, max_len=64))
    app.add_middleware(Watch)
    server = lesson.Server(with_direct_send(app))
    text = ask(server.url, stream=True, ignore_eos=True).text
    server.stop()
    assert text.count("data: ") >= 2 and text.endswith("data: [DONE]\n\n")
    answered = [message for message in seen if message[0].startswith("http")]
    assert answered == [("http.response.start", None), ("http.response.body", b"")]


def test_a_body_without_its_content_type_is_told_the_header(url):
    body = json.dumps({"prompt": "hello", "max_tokens": 4})
    for headers in ({}, {"content-type": "application/x-www-form-urlencoded"}):
        answer = httpx.post(f"{url}/v1/completions", content=body, headers=headers)
        assert answer.status_code == 400
        assert "Content-Type: application/json" in answer.json()["error"]["message"]


def test_a_body_that_never_comes_is_given_up(url):
    where = urllib.parse.urlsplit(url)
    with socket.create_connection((where.hostname, where.port), timeout=30) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
                           b"Content-Type: application/json\r\n\r\n{")
        answer = connection.recv(65536)
    assert b" 408 " in answer.splitlines()[0]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_field_of_another_server_that_would_change_the_answer_is_refused_by_name(url, name):
    assert ask(url, **{name: ELSEWHERE[name]}).status_code == 200
    for value in ({"a": 1}, "yes", 3, [1]):
        answer = ask(url, **{name: value})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == name


def test_a_burst_of_viewers_gets_no_more_places_than_there_are(url):
    async def view(client, codes):
        async with client.stream("GET", "/events") as response:
            codes.append(response.status_code)
            while len(codes) < 10:  # who has a place keeps it until all have been answered
                await asyncio.sleep(0.01)

    async def burst():
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            codes = []
            await asyncio.wait_for(asyncio.gather(*[view(client, codes) for _ in range(10)]), 60)
            assert sorted(codes) == [200] * 2 + [503] * 8
            for _ in range(200):  # then the places fall free
                async with client.stream("GET", "/events") as response:
                    if response.status_code == 200:
                        return
                await asyncio.sleep(0.05)
            raise AssertionError("no place fell free")

    asyncio.run(burst())


def test_an_engine_whose_event_loop_is_closed_says_nothing(tiny):
    loop = asyncio.new_event_loop()
    engine = ContinuousEngine(*tiny)
    engine.open(queues_of(loop))
    engine.submit(prompt(1, 5), SamplingParams(4))
    loop.close()
    engine.step()
    engine.close("abort")


# Chat templates

TEMPLATES = {
    "all roles": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "no others": "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}"
                 "{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}",
    "names": "{% for m in messages %}{{ m.name }}: {{ m.content }}{% endfor %}"
             "{% if shout %}!{% endif %}{% if add_generation_prompt %}>{% endif %}"}


def said(role, content, name=None):
    """A message, as the schema makes it."""
    return Message(role=role, content=content, name=name)


def text(template, *messages, **options):
    tokenizer = byte_tokenizer(512)
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer.decode(chat_tokens(tokenizer, messages, options or None))


def test_a_developer_is_the_system_where_a_template_does_not_know_it():
    turns = said("developer", "be brief"), said("user", "hi")
    assert text("all roles", *turns) == "developer: be brief\nuser: hi\n"
    assert text("no others", *turns) == "system: be brief\nuser: hi\n"


FIRST_ONLY = ("{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
              "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}")
IN_TURN = ("{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
           "{{ raise_exception('Roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}")


def test_a_role_is_judged_by_where_it_stands():
    tokenizer = byte_tokenizer(512)
    tokenizer.chat_template = FIRST_ONLY
    system = said("system", "be brief")
    assert tokenizer.decode(chat_tokens(tokenizer, [system, said("user", "hi")])) == "be briefhi"
    with pytest.raises(APIError, match="role 'system'"):
        chat_tokens(tokenizer, [said("user", "hi"), system])


def test_a_template_that_demands_an_order_says_so_in_its_own_words():
    tokenizer = byte_tokenizer(512)
    tokenizer.chat_template = IN_TURN
    turns = [said("user", "hi"), said("assistant", "ho"), said("user", "hum")]
    assert tokenizer.decode(chat_tokens(tokenizer, turns)) == "hihohum"
    assert tokenizer.decode(chat_tokens(tokenizer, [turns[0], said("banana", "b")])) == "hib"
    with pytest.raises(APIError, match="must alternate"):
        chat_tokens(tokenizer, [turns[0], turns[0]])


@pytest.mark.parametrize("role", ["tool", "banana"])
def test_a_role_that_a_template_drops_is_refused_by_name(role):
    assert role in text("all roles", said("user", "hi"), said(role, "42"))
    with pytest.raises(APIError) as raised:
        text("no others", said("user", "hi"), said(role, "42"))
    assert raised.value.status_code == 400
    assert role in raised.value.detail["error"]["message"]


def test_names_and_variables_go_to_the_template():
    message = said("user", "hi", "Ann")
    assert text("names", message) == "Ann: hi>"
    assert text("names", message, shout=True, add_generation_prompt=False) == "Ann: hi!"


def test_variables_of_a_template_are_no_arguments_of_the_tokenizer(url):
    for name in ("tokenize", "chat_template", "conversation"):
        answer = httpx.post(f"{url}/v1/chat/completions", json={
            "messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {name: "x"}})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "chat_template_kwargs"


def test_a_content_of_null_is_a_content_left_out(url):
    answer = httpx.post(f"{url}/v1/chat/completions",
                        json={"messages": [{"role": "user", "content": None}]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages"


# Crowds, addresses, proxies


def test_a_crowd_beyond_the_limit_of_open_files_is_answered_and_never_cut_off(tmp_path):
    limited = ("import resource, sys\n"
               "resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))\n"
               "from cbserver.cli import main\nmain(sys.argv[1:])")
    command = [sys.executable, "-c", limited, "--model", "random:tiny", "--max-waiting", "8"]

    async def one(port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = json.dumps({"prompt": [5], "max_tokens": 40, "ignore_eos": True}).encode()
        head = (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body))
        writer.write(head + body)
        answer = await reader.read()
        writer.close()
        return int(answer.split()[1]) if answer else 0

    async def crowd(port):
        return await asyncio.gather(*[one(port) for _ in range(400)])

    with ServerProcess(command, tmp_path / "server.log") as server:
        codes = asyncio.run(crowd(server.port))
    counts = {code: codes.count(code) for code in set(codes)}
    assert set(counts) <= {200, 429, 503}, counts
    assert counts[200] >= 16


def test_an_ipv6_address_is_shown_in_brackets():
    args = parse(["--host", "::1", "--port", "8123"])
    assert reach(args) == (None, "http://[::1]:8123")


def test_loopback_is_never_asked_through_a_proxy(monkeypatch, url):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens there
    from load.process import check_alive, first_model

    check_alive(url)
    assert first_model(url) == "tiny"
    assert proxy_of(url) is None
    assert proxy_of("http://example.com/v1") == "http://127.0.0.1:9"


def test_an_ascii_locale_does_not_break_the_page(tmp_path):
    command = ["env", "LC_ALL=C", "PYTHONUTF8=0", "PYTHONCOERCECLOCALE=0",
               *python_module("cbserver", "--model", "random:tiny")]
    with ServerProcess(command, tmp_path / "server.log") as server:
        page = httpx.get(f"{server.url}/")
    assert page.status_code == 200
    assert "</html>" in page.text

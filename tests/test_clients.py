"""Real clients: the official openai package, a fuzzer on our own schema, a supervisor's signals."""
import asyncio
import importlib.util
import json
import os
import signal
import subprocess
import sys

import httpx
import openai
import pytest
import schemathesis
from conftest import ROOT, held, prompt, serving
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable

from cbserver.http.schema import ChatRequest, CompletionRequest
from cbserver.scheduler import ContinuousEngine
from load.process import free_port

CHAT = dict(model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=8, temperature=0,
            extra_body={"ignore_eos": True})
TEXT = dict(model="tiny", prompt="hello", max_tokens=8, temperature=0,
            extra_body={"ignore_eos": True})


@pytest.fixture(scope="module")
def url(tiny):
    with serving(ContinuousEngine(*tiny, max_len=256), model_name="tiny", api_key="sesame") as url:
        yield url


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="sesame", max_retries=0)


def test_completions_whole_and_streamed(client):
    whole = client.completions.create(**TEXT)
    assert whole.object == "text_completion" and whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 8 and whole.usage.total_tokens == 11
    assert whole._request_id == whole.id
    chunks = list(client.completions.create(**TEXT, stream=True,
                                            stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert {c.id for c in chunks} == {chunks[0].id} and len(chunks) > 2


def test_chat_whole_and_streamed(client):
    whole = client.chat.completions.create(**CHAT)
    assert whole.choices[0].message.role == "assistant" and whole.usage.completion_tokens == 8
    chunks = list(client.chat.completions.create(**CHAT, stream=True))
    assert [c.choices[0].delta.role for c in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    text = "".join(c.choices[0].delta.content for c in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    with client.chat.completions.stream(**CHAT) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
    assert "".join(deltas) == text


def test_a_seed_repeats_an_answer_and_stop_ends_it(client):
    sampled = TEXT | {"temperature": 1.5, "seed": 7}
    texts = {client.completions.create(**sampled).choices[0].text for _ in range(3)}
    assert len(texts) == 1
    text = client.completions.create(**TEXT).choices[0].text
    ended = client.completions.create(**TEXT, stop=[text[3:5], "never"])
    assert ended.choices[0].text == text[:text.index(text[3:5])]
    assert ended.choices[0].finish_reason == "stop"


def test_the_async_client_streams_many_at_once(url, reference, tiny):
    async def main():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="sesame") as client:
            async def one(i):
                stream = await client.completions.create(
                    model="tiny", prompt=prompt(i, 5 + i), max_tokens=10, temperature=0,
                    stream=True, extra_body={"ignore_eos": True})
                return "".join([c.choices[0].text async for c in stream])

            assert [m.id async for m in await client.models.list()] == ["tiny"]
            assert (await client.models.retrieve("tiny")).id == "tiny"
            with pytest.raises(openai.NotFoundError, match="no model"):
                await client.models.retrieve("org/other")
            return await asyncio.gather(*map(one, range(20)))

    texts = asyncio.run(main())
    assert texts == [tiny[1].decode(reference(prompt(i, 5 + i), 10), skip_special_tokens=True)
                     for i in range(20)]


@pytest.mark.parametrize("change, kind, words", [
    (dict(model="gpt-17"), openai.NotFoundError, "it serves 'tiny'"),
    (dict(max_tokens=10_000), openai.BadRequestError, "limit of 256"),
    (dict(n=17), openai.BadRequestError, "n: Input should be less than or equal to 16"),
    (dict(tools=[{"type": "function", "function": {"name": "f"}}]), openai.BadRequestError,
     "tools"),
    (dict(response_format={"type": "json_object"}), openai.BadRequestError, "response_format")])
def test_a_refusal_is_the_clients_own_exception(client, change, kind, words):
    with pytest.raises(kind) as refused:
        client.chat.completions.create(**CHAT | change)
    assert words in refused.value.body["message"] and refused.value.request_id is None


def test_a_wrong_key_is_an_authentication_error(url):
    with pytest.raises(openai.AuthenticationError, match="API key"):
        openai.OpenAI(base_url=f"{url}/v1", api_key="sesam", max_retries=0).models.list()


def test_overload_is_a_rate_limit_error_and_a_fault_an_internal_one(tiny, monkeypatch):
    monkeypatch.setattr("threading.excepthook", lambda args: None)  # the traceback is expected
    engine = ContinuousEngine(*tiny, slots=1, max_waiting=1)
    with held(engine) as go_on, serving(engine, model_name="tiny") as url:
        async def main():
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-",
                                          max_retries=0) as client:
                first = asyncio.create_task(client.completions.create(**TEXT))
                while engine.stats().waiting < 1 and not first.done():
                    await asyncio.sleep(0.01)
                with pytest.raises(openai.RateLimitError, match="waiting"):
                    await client.completions.create(**TEXT)
                engine.step = lambda: 1 / 0
                go_on.set()
                for status in (500, 503):  # it was running; it came too late
                    with pytest.raises(openai.InternalServerError) as failed:
                        await (first if status == 500 else client.completions.create(**TEXT))
                    assert failed.value.status_code == status

        asyncio.run(main())


HOSTILE = [
    {"stop": ""}, {"stop": ["", ""]}, {"stop": ["x"] * 1000}, {"stop": [["x"]]}, {"stop": "\ud800"},
    {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_p": float("nan")},
    {"max_tokens": 2**70}, {"max_tokens": 1.5}, {"max_tokens": True}, {"max_tokens": "7"},
    {"seed": 2**63 - 1}, {"seed": -2**63}, {"seed": 10**400}, {"seed": 1e300},
    {"prompt": [["a"]]}, {"prompt": [[1], [2]]}, {"prompt": [[[1]]]}, {"prompt": [1.5]},
    {"prompt": [None]}, {"prompt": ["a", 1]}, {"prompt": [2**70]}, {"prompt": "\ud800"},
    {"prompt": "\x00"}, {"prompt": "<|end|>"}, {"prompt": {}}, {"model": "\ud800"}, {"model": 7},
    {"stream": "maybe"}, {"stream_options": {"include_usage": None}}, {"stream_options": []},
    {"top_k": 2**63}, {"n": float("nan")}, {"logit_bias": []}, {"unheard_of": {"a": [1]}},
]


@pytest.mark.parametrize("entry", ["{}", '["a"]', "[1.5]", "1.5"])
@pytest.mark.parametrize("path, field", [("completions", "prompt"),
                                         ("chat/completions", "messages")])
def test_a_million_wrong_entries_cost_no_more_than_one(url, path, field, entry):
    many = ",".join([entry] * (1_000_000 // (len(entry) + 1)))
    response = httpx.post(f"{url}/v1/{path}", content=f'{{"{field}": [{many}]}}', timeout=30,
                          headers={"Authorization": "Bearer sesame",
                                   "Content-Type": "application/json"})
    assert response.status_code == 400 and len(response.content) < 1000


@pytest.mark.parametrize("change", HOSTILE, ids=lambda change: repr(change)[:40])
def test_hostile_fields_are_served_or_refused_and_harm_nobody(url, change):
    body = json.dumps({"prompt": "hello", "max_tokens": 2, **change})
    headers = {"Authorization": "Bearer sesame", "Content-Type": "application/json"}
    response = httpx.post(f"{url}/v1/completions", content=body, headers=headers, timeout=30)
    assert response.status_code in (200, 400, 404), response.text
    assert response.status_code == 200 or response.json()["error"]["message"]
    assert httpx.get(f"{url}/health").status_code == 200


OTHER = {"n": 2, "logit_bias": {"1": 2}, "stop_token_ids": [3], "best_of": 2, "echo": True,
         "logprobs": 1, "suffix": "end", "top_logprobs": 2, "tools": [{}], "functions": [{}],
         "tool_choice": "required", "modalities": ["audio"], "response_format": {"type": "json"},
         "presence_penalty": 0.1, "frequency_penalty": -0.1, "repetition_penalty": 1.2,
         "min_p": 0.1, "min_tokens": 1, "function_call": {"name": "f"}, "audio": {"voice": "x"},
         "prediction": {"type": "content"}, "reasoning_effort": "low", "web_search_options": {}}


@pytest.mark.parametrize("path, chat", [("/v1/completions", False), ("/v1/chat/completions", True)])
def test_the_table_in_api_md_is_up_to_date_and_true(url, path, chat):
    spec = importlib.util.spec_from_file_location("api_tool", ROOT / "tools" / "api.py")
    api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(api)
    page = (ROOT / "docs" / "api.md").read_text()
    assert page == api.filled(page), "api.md has drifted: run `make figures`"
    rows = [row.split(" | ") for row in api.rows(ChatRequest if chat else CompletionRequest)]
    refused = [row[0].strip("| `") for row in rows if row[1] == "only the default"]
    assert len(refused) >= 6 and len(rows) - len(refused) >= 11
    body = {"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": "a"}
    for name in refused:
        response = httpx.post(url + path, json={**body, name: OTHER[name]},
                              headers={"Authorization": "Bearer sesame"})
        assert response.status_code == 400 and response.json()["error"]["param"] == name


@pytest.mark.slow
@pytest.mark.parametrize("mode", schemathesis.GenerationMode)
def test_nothing_that_the_schema_allows_or_forbids_is_a_server_error(url, mode):
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 7
    for operation in operations:
        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck),
                  database=None)
        @given(operation.as_strategy(generation_mode=mode))
        def holds(case):
            response = case.call(headers={"Authorization": "Bearer sesame"}, timeout=30)
            assert response.status_code < 500, response.text

        try:
            holds()
        except Unsatisfiable:  # a GET without parameters cannot be wrong
            assert operation.method == "get"
    assert httpx.get(f"{url}/health").status_code == 200


STREAM = json.dumps({"prompt": "a", "max_tokens": 1500, "ignore_eos": True, "stream": True})


class Process:
    """A server in a process of its own, with a stream that has begun."""

    def __init__(self, *arguments, script="from cbserver.cli import main; main()"):
        port = free_port()
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, "--model", "random:tiny", "--port", str(port),
             *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def __enter__(self):
        for _ in range(900):
            try:
                self.client.get("/ready")
                return self
            except httpx.TransportError:
                assert self.process.poll() is None, self.process.stderr.read()
                self.process.poll() or signal.sigtimedwait([], 0.1)
        raise AssertionError("the server did not start")

    def __exit__(self, *error):
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)
        self.process.stderr.close()

    def stream(self):
        return self.client.stream("POST", "/v1/completions", content=STREAM,
                                  headers={"Content-Type": "application/json"})


def test_sigterm_drains_new_requests_are_refused_and_the_exit_code_is_0():
    with Process("--drain-timeout", "600") as server:
        with server.stream() as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            refused = None
            for _ in range(100):
                refused = httpx.post(response.url, json={"prompt": "a"}).status_code
                if refused == 503:
                    break
            rest = [line for line in lines if line]
        assert refused == 503
        assert rest[-1] == "data: [DONE]" and '"finish_reason": "length"' in rest[-2]
        assert server.process.wait(30) == 0


def test_a_drain_is_bounded_and_a_second_signal_ends_at_once():
    slow = ("import time, cbserver.cli as s; from cbserver.batch import StaticEngine as E;"
            "step = E.step; E.step = lambda self: (time.sleep(0.02), step(self)); s.main()")
    with Process("--drain-timeout", "1", script=slow) as server:
        with server.stream() as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert '"engine_stopped"' in rest[-2] and rest[-1] == "data: [DONE]"
        assert server.process.wait(30) == 1  # an answer was cut off
    with Process(script=slow) as server, server.stream() as response:
        lines = response.iter_lines()  # kept: a client that drops it has left
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        for _ in range(100):
            if httpx.get(f"{server.client.base_url}/ready").status_code == 503:
                break
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 1


@pytest.mark.parametrize("error, words, draining", [
    ("torch.OutOfMemoryError('CUDA out of memory')", "lower --max-batch or --max-len", False),
    ("RuntimeError('planted')", "planted", True)])
def test_after_a_fault_the_process_ends_with_an_error_code(error, words, draining):
    fault = ("import torch, cbserver.cli as s\n"
             "from cbserver.scheduler import ContinuousEngine as E\n"
             "step = E.step\n"
             "def fail(self):\n"
             f"    if self.num_generated_tokens > 5 and self.stopping >= {draining}:\n"
             f"        raise {error}\n"
             "    step(self)\n"
             "E.step = fail; s.main()")
    with Process(script=fault) as server:
        with server.stream() as response:
            if draining:
                server.process.send_signal(signal.SIGTERM)
            lines = [line for line in response.iter_lines() if line]
        assert '"engine_failed"' in lines[-2] and lines[-1] == "data: [DONE]"
        assert server.process.wait(30) == 1
        said = server.process.stderr.read()
        assert words in said and "The engine failed" in said

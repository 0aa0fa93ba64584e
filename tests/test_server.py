"""The HTTP layer: every client its own tokens, bad requests a 4xx that names the limit."""
import asyncio
import json
import threading

import httpx
import pytest
from conftest import added_text, by_asgi, by_hand, held, metrics_say, prompt, serving

from cbserver.batch import StaticEngine
from cbserver.http.answers import pieces_of
from cbserver.http.text import Detokenizer
from cbserver.model.sampling import SamplingParams
from cbserver.scheduler import ContinuousEngine
from cbserver.sequence import SequentialEngine
from cbserver.server import create_app


@pytest.fixture(scope="module")
def url(tiny):
    with serving(ContinuousEngine(*tiny, max_len=256), model_name="tiny") as url:
        yield url


def post(url, path="/v1/completions", **body):
    return httpx.post(url + path, json={"prompt": "hello", "max_tokens": 8, "temperature": 0,
                                        "ignore_eos": True, **body}, timeout=60)


def events(text):
    """The JSON of each server-sent event; checks the frame on the way."""
    frames = text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""] and "\r" not in text
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


@pytest.mark.parametrize("engine_class", [SequentialEngine, StaticEngine, ContinuousEngine])
def test_50_concurrent_clients_each_get_exactly_their_own_tokens(engine_class, served, tiny,
                                                                  reference):
    _, tokenizer = tiny

    async def client(session, i):
        body = {"prompt": prompt(i, 2 + i % 20), "max_tokens": 3 + i % 15, "temperature": 0,
                "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        response = await session.post("/v1/completions", json=body)
        assert response.status_code == 200
        *chunks, usage = events(response.text)
        # Tokens that came while this client lagged share an event; all of them are counted.
        assert 1 <= len(chunks) <= usage["usage"]["completion_tokens"] == body["max_tokens"]
        assert usage["usage"]["prompt_tokens"] == len(body["prompt"])
        reasons = [c["choices"][0]["finish_reason"] for c in chunks]
        assert reasons == [None] * (len(chunks) - 1) + ["length"]
        assert len({c["id"] for c in [*chunks, usage]}) == 1
        tokens = reference(body["prompt"], body["max_tokens"])
        want = added_text(tokenizer, body["prompt"], tokens)
        assert "".join(c["choices"][0]["text"] for c in chunks) == want

    async def main(url):
        limits = httpx.Limits(max_connections=50)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as session:
            await asyncio.gather(*[client(session, i) for i in range(50)])
            metrics = (await session.get("/metrics")).text
        total = sum(3 + i % 15 for i in range(50))
        assert f"generation_tokens_total {float(total)}" in metrics
        assert "num_requests_running 0.0" in metrics and "num_requests_waiting 0.0" in metrics

    with served(engine_class(*tiny)) as url:
        asyncio.run(main(url))


def test_tokens_that_came_while_a_stream_lagged_are_sent_together(tiny, reference):
    async def late():
        engine = by_hand(ContinuousEngine(*tiny))
        sequence = engine.submit(prompt(1, 5), SamplingParams(6, ignore_eos=True))
        while sequence.finish_reason is None:
            engine.step()
        return [part[:3] async for part in pieces_of(engine, sequence)]

    want = added_text(tiny[1], prompt(1, 5), reference(prompt(1, 5), 6))
    assert asyncio.run(late()) == [(want, "length", 6)]


def test_an_answer_is_the_same_whole_and_streamed(url):
    whole = post(url).json()
    streamed = events(post(url, stream=True).text)
    assert whole["choices"][0]["text"] == "".join(c["choices"][0]["text"] for c in streamed)
    assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11,
                              "prompt_tokens_details": {"cached_tokens": 0}}
    assert whole["choices"][0]["finish_reason"] == "length"
    assert all("usage" not in c for c in streamed), "usage is sent only when asked for"


def test_chat_answers_in_chats_shape_and_the_role_comes_with_the_first_token(url):
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}
    whole = post(url, "/v1/chat/completions", max_completion_tokens=5, **body).json()
    assert whole["object"] == "chat.completion" and whole["usage"]["completion_tokens"] == 5
    chunks = events(post(url, "/v1/chat/completions", stream=True, **body).text)
    assert chunks[0]["choices"][0]["delta"].keys() == {"role", "content"}
    assert all(c["choices"][0]["delta"].keys() == {"content"} for c in chunks[1:])


BAD = [
    ({"prompt": ""}, "1 token or more"),
    ({"prompt": [-1]}, "under 512"),
    ({"prompt": [512]}, "under 512"),
    ({"prompt": "x" * 300}, "limit of 256"),
    ({"max_tokens": 10**9}, "limit of 256"),
    ({"max_tokens": 0}, "send echo true with it, or 1 and more"),
    ({"max_tokens": -5}, "greater than or equal to 0"),
    ({"temperature": -1}, "greater than or equal to 0"),
    ({"temperature": 1e9}, "less than or equal to 2"),
    ({"top_p": 0}, "greater than 0"),
    ({"top_k": -2}, "greater than or equal to -1"),
    ({"best_of": 2}, "best_of"),
    ({"presence_penalty": 0.5}, "presence_penalty: Input should be less than or equal to 0"),
    ({"repetition_penalty": 1.1}, "repetition_penalty"),
    ({"logit_bias": {"7": 1}}, "logit_bias"),
    ({"response_format": {"type": "json_object"}}, "response_format: 'json_object' needs"),
    ({"stop": "x" * 1001}, "at most 1000"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"stream_options": 3}, "stream_options"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("body, words", BAD)
def test_bad_input_is_a_400_that_names_the_limit(url, body, words, stream):
    response = post(url, stream=stream, **body)
    assert response.status_code == 400, response.text
    assert words in response.json()["error"]["message"]


def test_other_refusals_have_their_own_status(url):
    assert post(url, model="gpt-17").status_code == 404
    assert "tiny" in post(url, model="gpt-17").json()["error"]["message"]
    assert post(url, model="tiny").status_code == 200
    for content in ('{"prompt', "[1]", "", '{"prompt": "a", "temperature": NaN}',
                    '{"prompt": "\\ud800"}'):
        response = httpx.post(f"{url}/v1/completions", content=content,
                              headers={"content-type": "application/json"})
        assert response.status_code == 400 and response.json()["error"]["message"]
    assert post(url).status_code == 200, "the server goes on"


def test_a_path_or_method_that_is_not_there_is_named_with_those_that_are(url):
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)):
        answer = httpx.request(method, url + path)
        assert answer.status_code == status
        message = answer.json()["error"]["message"]
        assert f"no {method} '{path}'" in message and "POST /v1/completions" in message


def test_null_and_default_values_of_unsupported_fields_are_accepted(url):
    fields = dict(n=1, logprobs=None, stop=None, seed=None, echo=False, user="me", top_k=-1,
                  presence_penalty=0, repetition_penalty=1.0, logit_bias={}, stop_token_ids=[],
                  response_format={"type": "text"}, min_p=0, best_of=1, suffix="")
    assert post(url, **fields).status_code == 200
    chat = dict(messages=[{"role": "user", "content": "a"}], tools=[], tool_choice="auto",
                logprobs=False, top_logprobs=0, modalities=["text"])
    assert post(url, "/v1/chat/completions", **chat).status_code == 200
    nulls = dict.fromkeys(("temperature", "top_p", "stream", "stream_options", "max_tokens"))
    assert post(url, **nulls).status_code == 200


def test_a_temperature_too_small_to_divide_by_is_greedy(url):
    assert post(url, temperature=1e-40).json()["choices"] == post(url).json()["choices"]


def test_content_that_is_not_text_is_refused_not_dropped(url):
    body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}
    response = post(url, "/v1/chat/completions", **body)
    assert response.status_code == 400 and "should be 'text'" in response.json()["error"]["message"]


def test_a_key_is_required_where_there_is_one(tiny, served):
    with served(ContinuousEngine(*tiny), api_key="sesame") as url:
        assert post(url).status_code == 401
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/health").status_code == 200
        right = {"Authorization": "Bearer sesame"}
        assert httpx.get(f"{url}/v1/models", headers=right).json()["data"][0]["id"] == "cbserver"
        for wrong in ("Bearer sesam", "sesame", "Bearer sesame "  "x", "Bearer é"):
            headers = {"Authorization": wrong.encode()}
            assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 401


def test_a_full_queue_is_a_429_with_retry_after(tiny, served):
    engine = ContinuousEngine(*tiny, slots=1, max_waiting=1)
    # Nobody is admitted before the queue is full.
    with held(engine) as go_on, served(engine) as url:
        async def main():
            async with httpx.AsyncClient(base_url=url, timeout=60) as session:
                body = {"prompt": "a", "max_tokens": 2}
                first = asyncio.create_task(session.post("/v1/completions", json=body))
                while engine.stats().waiting < 1 and not first.done():
                    await asyncio.sleep(0.01)
                refused = await session.post("/v1/completions", json=body)
                go_on.set()
                return await first, refused

        first, refused = asyncio.run(main())
    assert first.status_code == 200
    assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
    assert "1 requests are waiting" in refused.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(tiny, stream, served):
    engine = ContinuousEngine(*tiny, slots=1)
    with served(engine) as url:
        async def main():
            async with httpx.AsyncClient(base_url=url, timeout=60) as session:
                body = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "stream": stream}
                task = asyncio.create_task(session.post("/v1/completions", json=body))
                while engine.stats().num_generated_tokens < 3 and not task.done():
                    await asyncio.sleep(0.01)
                task.cancel()
            for _ in range(1000):
                if engine.stats().running == 0:
                    break
                await asyncio.sleep(0.01)

        asyncio.run(main())
        assert engine.stats().running == 0
        assert engine.stats().num_generated_tokens < 2000, "it was ended early"
        assert post(url).status_code == 200


def test_when_the_engine_dies_every_waiter_is_told_and_health_says_so(tiny, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda args: None)  # the traceback is expected
    engine, count = ContinuousEngine(*tiny), [0]
    step = engine.step

    def fail_later():
        count[0] += 1
        if count[0] > 4:
            raise RuntimeError("CUDA error: planted")
        step()

    engine.step = fail_later
    with serving(engine) as url:
        *chunks, last = events(post(url, stream=True).text)
        assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * len(chunks)
        assert last["error"]["code"] == "engine_failed" and "planted" not in str(last)
        engine.thread.join(10)
        assert httpx.get(f"{url}/health").status_code == 503
        assert httpx.get(f"{url}/ready").status_code == 503
        for stream in (False, True):
            assert post(url, stream=stream).status_code == 503
        assert "num_requests_running 0.0" in httpx.get(f"{url}/metrics").text


def test_a_fault_before_the_first_token_is_a_500(tiny, monkeypatch, served):
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    engine = ContinuousEngine(*tiny)
    engine.step = lambda: 1 / 0
    with served(engine) as url:
        response = post(url)
    assert response.status_code == 500 and response.json()["error"]["code"] == "engine_failed"


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_misses_its_deadline_is_ended(tiny, stream, served):
    engine = ContinuousEngine(*tiny, slots=1)
    with held(engine, after=3) as go_on, served(engine, timeout=1.5) as url:
        response = post(url, stream=stream)
        if stream:
            *chunks, last = events(response.text)
            assert response.status_code == 200 and len(chunks) >= 1
        else:
            assert response.status_code == 408 and response.headers["x-should-retry"] == "false"
            last = response.json()
        assert last["error"]["code"] == "timeout"
        assert last["error"]["type"] == "timeout_error"
        go_on.set()
        metrics_say(url, 'request_success_total{finished_reason="timeout"} 1.0')
        assert post(url).status_code == 200, "its slot is free again"


def test_while_it_drains_it_is_alive_not_ready_and_finishes_what_it_has(tiny, reference, served):
    engine = ContinuousEngine(*tiny, slots=1)
    with held(engine, after=2) as go_on, served(engine) as url:
        async def main():
            async with httpx.AsyncClient(base_url=url, timeout=60) as session:
                body = {"prompt": [5], "max_tokens": 9, "temperature": 0, "ignore_eos": True}
                running = asyncio.create_task(session.post("/v1/completions", json=body))
                while engine.stats().num_generated_tokens < 1 and not running.done():
                    await asyncio.sleep(0.01)
                engine.close(None)
                for _ in range(1000):  # processes for HTTP hear of it a moment later
                    if (await session.get("/ready")).status_code == 503:
                        break
                    await asyncio.sleep(0.01)
                answers = [await session.get("/health"), await session.get("/ready"),
                           await session.post("/v1/completions", json=body)]
                go_on.set()
                return [a.status_code for a in answers], (await running).json()

        statuses, answer = asyncio.run(main())
    assert statuses == [200, 503, 503]
    assert answer["choices"][0]["text"] == added_text(tiny[1], [5], reference([5], 9))


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_a_413(url, chunked):
    body = json.dumps({"prompt": "x" * 10_000_000}).encode()
    sent = (body[i:i + 65536] for i in range(0, len(body), 65536)) if chunked else body
    try:
        response = httpx.post(f"{url}/v1/completions", content=sent, timeout=30)
    except httpx.WriteError:  # it hung up on a body that it does not want: fair too
        response = None
    if response is not None:
        assert response.status_code == 413
        assert "limit of 1048576 bytes" in response.json()["error"]["message"]
    assert post(url).status_code == 200


def test_browsers_of_other_origins_are_let_in_only_if_asked_for(tiny, url):
    origin = {"Origin": "https://example.org"}
    assert "access-control-allow-origin" not in httpx.get(f"{url}/health", headers=origin).headers
    with serving(ContinuousEngine(*tiny), cors=["https://example.org"]) as open_url:
        headers = httpx.get(f"{open_url}/health", headers=origin).headers
    assert headers["access-control-allow-origin"] == "https://example.org"


def test_a_request_is_logged_in_one_line_without_what_it_says(tiny, caplog):
    with caplog.at_level("INFO", "cbserver"), serving(ContinuousEngine(*tiny)) as url:
        answer = post(url, prompt="a secret")
    lines = [r.getMessage() for r in caplog.records if r.name == "cbserver"]
    assert len(lines) == 1 and lines[0].startswith(f"{answer.json()['id']} length: 6 + 8 tokens, ")
    assert answer.headers["x-request-id"] == answer.json()["id"]
    assert "secret" not in caplog.text


def test_metrics_count_every_request_once_by_the_names_that_dashboards_know(tiny, served):
    with served(ContinuousEngine(*tiny)) as url:
        for stream in (False, True):
            assert post(url, stream=stream).status_code == 200
        assert post(url, n=17).status_code == 400
        metrics_say(url, 'request_success_total{finished_reason="length"} 2.0',
                    "request_queue_time_seconds_count 2.0", "time_to_first_token_seconds_count 2.0",
                    "inter_token_latency_seconds_count 14.0", "prompt_tokens_total 6.0",
                    "e2e_request_latency_seconds_count 2.0", "generation_tokens_total 16.0",
                    'requests_refused_total{status="400"} 1.0',
                    "num_requests_waiting 0.0", "kv_cache_usage_perc 0.0")


def test_metrics_say_how_much_of_prompts_a_step_may_read(tiny, served):
    with served(ContinuousEngine(*tiny, prefill_budget=96)) as url:
        metrics_say(url, "prefill_budget_tokens 96.0")
    with served(StaticEngine(*tiny)) as url:
        metrics_say(url, "num_requests_running 0.0")
        assert "prefill_budget" not in httpx.get(f"{url}/metrics").text


async def for_ever(message=None):
    await asyncio.Event().wait()


def test_a_client_that_leaves_before_its_stream_begins_frees_its_slot(tiny):
    engine = ContinuousEngine(*tiny, slots=1)

    async def gone():
        return {"type": "http.disconnect"}

    by_asgi(create_app(engine), engine, gone, send=for_ever)
    assert engine.stats().running == 0 and engine.stats().num_generated_tokens < 1900


def test_a_client_that_never_reads_is_given_up_at_its_deadline(tiny):
    engine = ContinuousEngine(*tiny, slots=1)
    app, sent = create_app(engine, timeout=0.5), []  # and 5 s more to read what is there

    async def send(message):  # takes the headers and one event, as a socket's buffer does
        sent.append(message)
        if len(sent) > 2:
            await for_ever()

    by_asgi(app, engine, for_ever, send)
    assert engine.stats().running == 0 and len(sent) == 3
    assert app.state.monitor.registry.get_sample_value("e2e_request_latency_seconds_count") == 1


def pieces(tokenizer, tokens, stop=()):
    detokenizer = Detokenizer(tokenizer, stop)
    out = []
    for token in tokens:
        out.append(detokenizer.push(token))
        if detokenizer.stopped:
            return out
    return [*out, detokenizer.finish()]


def test_pieces_add_up_to_the_text_and_hold_no_broken_character(tiny):
    _, tokenizer = tiny
    text = "Crème brûlée, 京都 🍜 — naïve façade"
    out = pieces(tokenizer, tokenizer(text)["input_ids"])
    assert "".join(out) == text
    assert not any("\ufffd" in piece for piece in out)
    for seed in range(50):  # random bytes, mostly no text at all
        tokens = prompt(seed, 40)
        assert "".join(pieces(tokenizer, tokens)) == added_text(tokenizer, [], tokens)


def test_a_stop_string_never_leaks_not_even_its_first_half(tiny):
    _, tokenizer = tiny
    text = "one two END three"
    for stop, want in ((("END",), "one two "), (("two", "END"), "one "), (("ENX",), text),
                       (("three and more",), text), ((" END three!", "e t"), "on")):
        out = pieces(tokenizer, tokenizer(text)["input_ids"], stop)
        assert "".join(out) == want
        for n in range(len(out)):
            assert want.startswith("".join(out[:n]))


def test_a_stop_string_ends_the_request_and_usage_counts_what_was_read(url):
    text = post(url, max_tokens=30).json()["choices"][0]["text"]
    stop = text[3:5]
    answer = post(url, max_tokens=30, stop=stop).json()
    assert answer["choices"][0] | {"logprobs": None} == {
        "index": 0, "text": text[:text.index(stop)], "logprobs": None, "finish_reason": "stop"}
    assert answer["usage"]["completion_tokens"] < 30

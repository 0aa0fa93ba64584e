"""Several answers to a request, log-probabilities and echo over HTTP, what may end an answer."""
import asyncio
import threading

import httpx
import pytest
from conftest import added_text, held, metrics_say, prompt, serving, until
from test_server import events, post
from test_tools import engine_that_says

from cbserver.model.sampling import SamplingParams
from cbserver.scheduler import ContinuousEngine
from cbserver.sequence import SequentialEngine

HOT = dict(temperature=1.5, seed=11, max_tokens=12)


@pytest.fixture(scope="module", params=["a thread", "processes"])
def url(request, tiny):
    from conftest import serving, serving_in_processes

    serve = serving if request.param == "a thread" else serving_in_processes
    with serve(ContinuousEngine(*tiny, max_len=256), model_name="tiny") as url:
        yield url


def texts(response):
    assert response.status_code == 200, response.text
    return [choice["text"] for choice in response.json()["choices"]]


def streamed(response):
    """{index: text} of a stream, and the usage of its last event, if there is one."""
    found = {}
    usage = None
    for event in events(response.text):
        usage = event.get("usage", usage)
        for choice in event["choices"]:
            found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
    return found, usage


def test_each_prompt_of_a_list_has_its_own_answer(url):
    prompts = ["hello", "you", "and a third, longer one"]
    single = [texts(post(url, prompt=one))[0] for one in prompts]
    together = post(url, prompt=prompts)
    assert texts(together) == single and len(set(single)) == 3
    choices = together.json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    usages = [post(url, prompt=one).json()["usage"] for one in prompts]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert together.json()["usage"][name] == sum(usage[name] for usage in usages)
    by_ids = post(url, prompt=[prompt(1, 5), prompt(2, 9)])
    assert texts(by_ids) == [texts(post(url, prompt=prompt(1, 5)))[0],
                             texts(post(url, prompt=prompt(2, 9)))[0]]


def test_n_answers_draw_from_seeds_in_a_row_and_the_prompt_counts_once(url):
    several = post(url, n=3, **HOT)
    single = [texts(post(url, **HOT | {"seed": 11 + k}))[0] for k in range(3)]
    assert texts(several) == single and len(set(single)) == 3
    assert several.json()["usage"] == {"prompt_tokens": 3, "completion_tokens": 36,
                                       "total_tokens": 39,
                                       "prompt_tokens_details": {"cached_tokens": 0}}


def test_a_stream_has_all_answers_side_by_side_and_they_are_those_of_a_whole(url):
    body = dict(prompt=["hello", "you"], n=2, **HOT)
    found, usage = streamed(post(url, stream=True, stream_options={"include_usage": True}, **body))
    whole = post(url, **body)
    assert [found[index] for index in range(4)] == texts(whole)
    assert usage == whole.json()["usage"]


def test_a_chats_answers_each_begin_with_their_role(url):
    body = {"messages": [{"role": "user", "content": "hi"}], "n": 2, "stream": True, **HOT}
    chunks = events(post(url, "/v1/chat/completions", **body).text)
    for index in range(2):
        deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"][0]["index"] == index]
        assert deltas[0]["role"] == "assistant"
        assert all("role" not in delta for delta in deltas[1:])


def test_a_model_may_be_called_as_the_place_for_text_in_a_chunk(tiny):
    with serving(ContinuousEngine(*tiny), model_name="TEXT") as url:
        assert streamed(post(url, stream=True))[0] == {0: texts(post(url))[0]}


def test_a_full_queue_refuses_all_answers_of_a_request(tiny, served):
    engine = ContinuousEngine(*tiny, slots=1, max_waiting=3)
    with held(engine) as go_on, served(engine) as url:
        async def main():
            async with httpx.AsyncClient(base_url=url, timeout=60) as session:
                body = {"prompt": "a", "max_tokens": 2, "temperature": 0}
                first = asyncio.create_task(session.post("/v1/completions", json=body | {"n": 2}))
                while engine.stats().waiting < 2 and not first.done():
                    await asyncio.sleep(0.01)
                refused = await session.post("/v1/completions", json=body | {"n": 3})
                await asyncio.to_thread(until, lambda: engine.stats().waiting == 2)
                go_on.set()
                return await first, refused

        first, refused = asyncio.run(main())
        assert first.status_code == 200 and len(first.json()["choices"]) == 2
        assert refused.status_code == 429
        assert post(url, n=3).status_code == 200, "their places in the queue are free again"
        too_many = post(url, n=4).json()["error"]
    assert too_many["param"] == "n" and "1 to 3" in too_many["message"]


def test_answers_that_were_refused_together_count_nowhere(tiny, served):
    engine = ContinuousEngine(*tiny, slots=1, max_waiting=3)
    with held(engine) as go_on, served(engine) as url:
        async def main():
            async with httpx.AsyncClient(base_url=url, timeout=60) as session:
                body = {"prompt": "a", "max_tokens": 2, "ignore_eos": True}
                first = asyncio.create_task(session.post("/v1/completions", json=body | {"n": 2}))
                while engine.stats().waiting < 2 and not first.done():
                    await asyncio.sleep(0.01)
                for _ in range(20):
                    refused = await session.post("/v1/completions", json=body | {"n": 3})
                    assert refused.status_code == 429
                go_on.set()
                return await first

        assert asyncio.run(main()).status_code == 200
        metrics_say(url, 'request_success_total{finished_reason="length"} 2.0',
                    'requests_refused_total{status="429"} 20.0',
                    "e2e_request_latency_seconds_count 2.0")
        assert 'finished_reason="abort"' not in httpx.get(f"{url}/metrics").text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_slots_of_all_its_answers(tiny, stream, served):
    engine = ContinuousEngine(*tiny, slots=3)
    with served(engine) as url:
        async def main():
            async with httpx.AsyncClient(base_url=url, timeout=60) as session:
                body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 2000, "ignore_eos": True,
                        "stream": stream}
                task = asyncio.create_task(session.post("/v1/completions", json=body))
                while engine.stats().num_generated_tokens < 9 and not task.done():
                    await asyncio.sleep(0.01)
                task.cancel()

        asyncio.run(main())
        until(lambda: engine.stats().running == engine.stats().waiting == 0)
        assert engine.stats().num_generated_tokens < 8000, "they were ended early"
        assert post(url, n=3).status_code == 200


def test_a_client_that_leaves_a_whole_answer_is_aborted_and_not_refused(tiny, served):
    engine = ContinuousEngine(*tiny, slots=1)
    with held(engine, after=3) as go_on, served(engine) as url:
        async def main():
            async with httpx.AsyncClient(base_url=url, timeout=60) as session:
                body = {"prompt": "a", "max_tokens": 1900, "ignore_eos": True}
                task = asyncio.create_task(session.post("/v1/completions", json=body))
                while engine.stats().num_generated_tokens < 2 and not task.done():
                    await asyncio.sleep(0.01)
                task.cancel()

        asyncio.run(main())
        go_on.set()
        metrics_say(url, 'request_success_total{finished_reason="abort"} 1.0')
        assert post(url, n=17).status_code == 400
        metrics_say(url, 'requests_refused_total{status="400"} 1.0')
        assert 'requests_refused_total{status="503"}' not in httpx.get(f"{url}/metrics").text


def test_whoever_waits_when_the_server_shuts_down_is_told(tiny):
    engine = ContinuousEngine(*tiny, slots=1)
    with serving(engine) as url:
        async def main():
            async with httpx.AsyncClient(base_url=url, timeout=60) as session:
                body = {"prompt": "a", "max_tokens": 1900, "ignore_eos": True}
                task = asyncio.create_task(session.post("/v1/completions", json=body))
                while engine.stats().num_generated_tokens < 2 and not task.done():
                    await asyncio.sleep(0.01)
                engine.close("abort")
                return await task

        response = asyncio.run(main())
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_stopped"


def test_when_the_engine_dies_a_request_with_several_answers_is_told(tiny, monkeypatch, served):
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    engine = ContinuousEngine(*tiny)
    engine.step = lambda: 1 / 0
    with served(engine) as url:
        response = post(url, n=4)
    assert response.status_code == 500 and response.json()["error"]["code"] == "engine_failed"


def test_a_seed_of_minus_one_is_none(url):
    body = {"temperature": 1.5, "max_tokens": 24, "seed": -1}
    assert texts(post(url, **body)) != texts(post(url, **body))


# Log-probabilities and echo


@pytest.mark.parametrize("stream", [False, True])
def test_max_tokens_0_with_echo_scores_the_prompt_and_nothing_more(url, stream):
    asked = {"prompt": "hello you", "echo": True, "logprobs": 2, "stream": stream,
             "stream_options": {"include_usage": True}}
    scored = post(url, max_tokens=0, **asked)
    more = post(url, max_tokens=1, **asked | {"stream": False}).json()
    chunks = events(scored.text) if stream else [scored.json()]
    [choice] = [choice for chunk in chunks for choice in chunk["choices"]]
    assert choice["text"] == "hello you" and choice["finish_reason"] == "length"
    usage = chunks[-1]["usage"]
    assert (usage["completion_tokens"], usage["total_tokens"]) == (0, usage["prompt_tokens"])
    for name, values in more["choices"][0]["logprobs"].items():
        assert choice["logprobs"][name] == values[:-1]


def test_logprobs_of_a_completion_are_the_same_whole_and_streamed(url, tiny):
    whole = post(url, logprobs=2).json()
    found = whole["choices"][0]["logprobs"]
    assert found.keys() == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert all(len(values) == whole["usage"]["completion_tokens"] for values in found.values())
    for token, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"]):
        assert top[token] == logprob == max(top.values()), "greedy: the likeliest was chosen"
        assert logprob < 0 and len(top) == 2
    pieces = [event["choices"][0]["logprobs"] for event in
              events(post(url, logprobs=2, stream=True).text)]
    for name, values in found.items():
        assert [value for piece in pieces for value in piece[name]] == values


def test_logprobs_of_a_chat_are_named_with_their_bytes(url):
    body = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 3}
    choice = post(url, "/v1/chat/completions", **body).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 8
    assert all(len(token["top_logprobs"]) == 3 for token in content)
    known = b"".join(bytes(token["bytes"]) for token in content if token["token"] != "<|end|>")
    assert known.decode(errors="replace").replace("\ufffd", "") == \
        choice["message"]["content"].replace("\ufffd", "")
    assert all(bytes(token["bytes"]).decode() == token["token"] for token in content
               if not token["token"].startswith("bytes:"))
    streamed = events(post(url, "/v1/chat/completions", stream=True, **body).text)
    assert [token for event in streamed
            for token in event["choices"][0]["logprobs"]["content"]] == content
    without = post(url, "/v1/chat/completions", messages=body["messages"], logprobs=True).json()
    assert without["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_echo_puts_the_prompt_first_and_its_logprobs_too(url, tiny):
    plain = post(url, prompt="hello").json()["choices"][0]["text"]
    echoed = post(url, prompt="hello", echo=True)
    assert texts(echoed) == ["hello" + plain]
    assert streamed(post(url, prompt="hello", echo=True, stream=True))[0] == {0: "hello" + plain}
    assert echoed.json()["usage"] == post(url, prompt="hello").json()["usage"]
    ids = tiny[1]("hello, you")["input_ids"]
    asked = post(url, prompt=[ids], max_tokens=1, logprobs=1, echo=True, seed=1234).json()
    found = asked["choices"][0]["logprobs"]
    assert all(len(values) == len(ids) + 1 for values in found.values())
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    assert all(value < 0 for value in found["token_logprobs"][1:])
    assert "".join(found["tokens"][:len(ids)]) == "hello, you"
    pieces = [event["choices"][0]["logprobs"]["tokens"] for event in events(
        post(url, prompt=[ids], max_tokens=3, logprobs=1, echo=True, stream=True).text)]
    assert len(pieces[0]) > len(ids)  # the prompt comes with the first token, or the first two
    assert sum(map(len, pieces)) == len(ids) + 3


def test_text_offset_is_where_a_tokens_text_begins_whole_and_streamed(url, tiny):
    text = texts(post(url, max_tokens=30))[0]
    body = dict(prompt="<|end|>Fire 🔥 and<|end|>", max_tokens=30, logprobs=0, echo=True)
    for more in ({}, {"stop": text[8:10]}, {"stop": "never " * 10}):
        choice = post(url, **body | more).json()["choices"][0]
        found = choice["logprobs"]
        assert choice["text"].startswith("<|end|>Fire 🔥 and<|end|>")
        offsets = found["text_offset"]
        assert offsets == sorted(offsets) and "<|end|>" == found["tokens"][0]
        whole = [(name, offset) for name, offset in zip(found["tokens"], offsets)
                 if not name.startswith("bytes:")]
        assert all(choice["text"][offset:].startswith(name) for name, offset in whole
                   if offset + len(name) <= len(choice["text"]) and name != "<|end|>")
        streamed = events(post(url, stream=True, **body | more).text)
        assert [offset for event in streamed
                for offset in event["choices"][0]["logprobs"]["text_offset"]] == offsets


def test_a_prompt_that_ends_within_a_character_and_its_answer_are_one_text(tiny):
    tokens = tiny[1]("Look: 🌶 it is")["input_ids"]
    begun = tiny[1]("Look: 🌶")["input_ids"][:-2]
    answer = tokens[len(begun):]
    engine = engine_that_says(tiny, answer)
    with serving(engine) as url:
        for echo, want in ((False, "🌶 it is"), (True, "Look: 🌶 it is")):
            body = dict(prompt=begun, max_tokens=len(answer), echo=echo)
            assert texts(post(url, **body)) == [want]
            assert streamed(post(url, stream=True, **body))[0] == {0: want}


def test_generate_has_no_logprobs_and_says_so(tiny, served):
    with served(SequentialEngine(*tiny)) as url:
        error = post(url, logprobs=1).json()["error"]
        assert error["param"] == "logprobs" and "--engine continuous" in error["message"]
        assert post(url, n=2).status_code == 200


# What ends an answer


def test_stop_token_ids_end_an_answer_and_are_not_of_its_text(url, tiny, reference):
    tokens = reference(prompt(5, 9), 12)
    stop = tokens[6]
    count = tokens.index(stop) + 1
    answer = post(url, prompt=prompt(5, 9), max_tokens=12, stop_token_ids=[stop]).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == count
    assert answer["choices"][0]["text"] == added_text(tiny[1], prompt(5, 9), tokens[:count - 1])


def test_before_min_tokens_nothing_ends_an_answer(url, tiny, reference):
    tokens = reference(prompt(5, 9), 12)
    text = added_text(tiny[1], prompt(5, 9), tokens)
    body = dict(prompt=prompt(5, 9), max_tokens=12, min_tokens=12)
    by_text = post(url, stop=text[1:3], **body).json()
    assert by_text["choices"][0]["text"] == text
    by_token = post(url, stop_token_ids=[tokens[6]], **body).json()
    assert by_token["usage"]["completion_tokens"] == 12
    ended = post(url, stop=text[1:3], **body | {"min_tokens": 1}).json()
    assert ended["usage"]["completion_tokens"] < 12


def test_sixty_four_stop_strings_are_watched_for(url):
    text = texts(post(url, max_tokens=20))[0]
    stop = [f"never {i}" for i in range(63)] + [text[4:6]]
    assert texts(post(url, max_tokens=20, stop=stop)) == [text[:text.index(text[4:6])]]


def test_min_p_leaves_what_is_nearly_as_likely(url):
    greedy = texts(post(url))
    assert texts(post(url, min_p=1, temperature=1.5)) == greedy, "only the likeliest is left"
    assert texts(post(url, min_p=0.01, **HOT)) == texts(post(url, min_p=0.01, **HOT))


@pytest.mark.parametrize("change, param, words", [
    ({"n": 17}, "n", "less than or equal to 16"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": "two"}, "n", "integer"),
    ({"n": 9, "prompt": ["a", "b"]}, "n", "18 answers"),
    ({"prompt": ["a"] * 17}, "prompt", "17 answers"),
    ({"prompt": []}, "prompt", "0 answers"),
    ({"prompt": ["a", ""]}, "prompt", "1 token or more"),
    ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
    ({"logprobs": -1}, "logprobs", "greater than or equal to 0"),
    ({"echo": "perhaps"}, "echo", "boolean"),
    ({"min_p": 1.5}, "min_p", "less than or equal to 1"),
    ({"min_tokens": 9}, "min_tokens", "more than max_tokens 8"),
    ({"min_tokens": -1}, "min_tokens", "greater than or equal to 0"),
    ({"stop_token_ids": [512]}, "stop_token_ids", "ids under 512"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "greater than or equal to 0"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids", "integer"),
    ({"stop": ["a"] * 65}, "stop", "at most 64"),
])
def test_a_field_out_of_range_is_a_400_by_name(url, change, param, words):
    response = post(url, **change)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param and words in error["message"]


@pytest.mark.parametrize("change, param, words", [
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "less than or equal to 20"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs true"),
    ({"logprobs": 3}, "logprobs", "boolean"),
    ({"echo": True}, "echo", "False"),
    ({"tool_choice": "required"}, "tool_choice", "constrained decoding"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice",
     "constrained decoding"),
    ({"response_format": {"type": "json_object"}}, "response_format", "constrained decoding"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format",
     "constrained decoding"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "no place for tools"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools", "required"),
    ({"messages": [{"role": "user"}]}, "messages", "needs content"),
])
def test_a_chats_field_out_of_range_is_a_400_by_name(url, change, param, words):
    body = {"messages": [{"role": "user", "content": "hi"}], **change}
    response = post(url, "/v1/chat/completions", **body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param and words in error["message"]


def test_the_engine_masks_the_ends_as_generate_does(tiny, monkeypatch):
    from conftest import by_hand, received

    from cbserver.baseline import generate_tokens
    from cbserver.fast import FastStep

    model, tokenizer = tiny
    monkeypatch.setattr(model.generation_config, "eos_token_id", list(range(0, 512, 7)))
    for runner in ({}, {"runner": FastStep}):
        engine = by_hand(ContinuousEngine(model, tokenizer, max_len=96, **runner))
        wishes = [(prompt(i, 4 + 3 * i), SamplingParams(24, min_tokens=3 * i)) for i in range(8)]
        sequences = [engine.submit(*wish) for wish in wishes]
        while engine.waiting or engine.running:
            engine.step()
        early = 0
        for sequence, wish in zip(sequences, wishes):
            assert received(sequence) == list(generate_tokens(model, *wish))
            early += sequence.finish_reason == "stop"
        assert early > 2, "some ended by a sign for the end"

"""Work is bounded before the queue: what is too much by its count is refused before it is read."""
import asyncio
import json

import httpx
import pytest
from conftest import serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from cbserver.http.schema import CALLS, ROLES, ChatRequest, CompletionRequest, Message
from cbserver.http.text import CUT, chat_tokens, decoder_of, longest_token, prompt_tokens
from cbserver.model.random_llama import byte_tokenizer
from cbserver.scheduler import ContinuousEngine

# As SmolLM2 and Qwen have it: any role is shown.
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
          "{% for c in m.tool_calls or [] %}{{ c.function.name }}"
          "{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
MAX_LEN = 256
LARGEST = 2**20  # bytes of a body


class CountingTokenizer(PreTrainedTokenizerFast):
    """Counts the work that is done with it: messages rendered, characters tokenized."""

    renders = 0
    messages = 0
    characters = 0

    def apply_chat_template(self, turns, **options):
        self.renders += 1
        self.messages += len(turns)
        return super().apply_chat_template(turns, **options)

    def __call__(self, text, **options):
        self.characters += len(text)
        return super().__call__(text, **options)


def counting_tokenizer():
    inner = byte_tokenizer(512).backend_tokenizer
    tokenizer = CountingTokenizer(tokenizer_object=inner, eos_token="<|end|>", chat_template=CHATML)
    tokenizer.messages = 0
    return tokenizer


def conversation(count, roles=("user", "assistant")):
    return [Message(role=roles[i % len(roles)], content="abc") for i in range(count)]


ROLE_NAMES = ["user", "assistant", *[f"role{i}" for i in range(ROLES - 2)]]


def test_a_conversation_is_rendered_once_and_the_template_is_judged_once():
    tokenizer = counting_tokenizer()
    chat_tokens(tokenizer, conversation(ROLES, ROLE_NAMES))
    for count in (100, 200, 400):
        tokenizer.renders = 0
        tokenizer.messages = 0
        chat_tokens(tokenizer, conversation(count, ROLE_NAMES))
        assert tokenizer.renders == 1
        assert tokenizer.messages == count


def test_to_judge_a_template_costs_the_same_for_any_conversation():
    costs = []
    for count in (100, 200, 400):
        tokenizer = counting_tokenizer()
        chat_tokens(tokenizer, conversation(count, ROLE_NAMES))
        costs.append(tokenizer.messages - count)
    assert costs[0] == costs[1] == costs[2]


@pytest.mark.parametrize("part", ["text", "messages", "prompts"])
def test_what_is_tokenized_grows_as_the_request_does(part):
    costs = []
    for count in (64, 128, 256):
        tokenizer = counting_tokenizer()
        if part == "text":
            prompt_tokens(tokenizer, "a" * count)
        elif part == "prompts":
            prompt_tokens(tokenizer, ["abc"] * count)
        else:
            chat_tokens(tokenizer, conversation(count))
        costs.append(tokenizer.characters)
    assert 0 < costs[1] <= 2 * costs[0]
    assert costs[2] <= 2 * costs[1]


# What is too much by its count


def call(count):
    return [{"function": {"name": f"f{i}", "arguments": "{}"}} for i in range(count)]


def user(content="hi", **more):
    return [{"role": "user", "content": content, **more}]


# The kind: (path, n parts -> body, the field that is named).
COMPLETION = "/v1/completions"
CHAT = "/v1/chat/completions"
HOSTILE = {
    "prompts": (COMPLETION, lambda n: {"prompt": ["a"] * n}, "prompt"),
    "prompts of ids": (COMPLETION, lambda n: {"prompt": [[1]] * n}, "prompt"),
    "prompts times n": (COMPLETION, lambda n: {"prompt": ["a" * (n // 8)] * 8, "n": 8}, "n"),
    "a text": (COMPLETION, lambda n: {"prompt": "a" * n}, "prompt"),
    "spaces": (COMPLETION, lambda n: {"prompt": " " * n}, "prompt"),
    "ids": (COMPLETION, lambda n: {"prompt": [1] * n}, "prompt"),
    "stops": (COMPLETION, lambda n: {"prompt": "a" * n, "stop": ["a"] * n}, "stop"),
    "stop ids": (COMPLETION, lambda n: {"prompt": "a" * 99, "stop_token_ids": [9999]},
                 "stop_token_ids"),
    "max_tokens": (COMPLETION, lambda n: {"prompt": "a" * 99, "max_tokens": 0}, "max_tokens"),
    "roles": (CHAT, lambda n: {"messages": [{"role": f"r{i}", "content": "x"}
                                            for i in range(min(n, 2000))]}, "messages"),
    "a role": (CHAT, lambda n: {"messages": [{"role": "r" * n, "content": "x"}]}, "messages"),
    "messages": (CHAT, lambda n: {"messages": user("") * n}, "messages"),
    "contents": (CHAT, lambda n: {"messages": user("a" * (n // 50)) * 50}, "messages"),
    "parts": (CHAT, lambda n: {"messages": user([{"type": "text", "text": ""}] * n)}, "messages"),
    "calls": (CHAT, lambda n: {"messages": user(tool_calls=call(n))}, "messages"),
    "calls of many": (CHAT, lambda n: {"messages": user(tool_calls=call(9)) * 100}, "messages"),
    "tools": (CHAT, lambda n: {"messages": user(), "tools": [
        {"type": "function", "function": {"name": "f"}}] * n}, "tools"),
    "top_logprobs": (CHAT, lambda n: {"messages": user("a" * 99), "top_logprobs": 3},
                     "top_logprobs"),
    "modalities": (CHAT, lambda n: {"messages": user(), "modalities": ["x"] * n}, "modalities"),
    "nesting": (CHAT, lambda n: {"messages": user(), "chat_template_kwargs": {
        "a": json.loads("[" * 500 + "]" * 500)}}, "chat_template_kwargs"),
    "another model": (CHAT, lambda n: {"messages": user("a" * 99), "model": "x" * n}, "model"),
}


def largest(make):
    """The body of this kind that the limit of bytes lets in, about."""
    count = 4096
    while count < 2**20 and len(json.dumps(make(2 * count))) < LARGEST:
        count *= 2
    return make(count)


@pytest.fixture
def counted(tiny):
    """(a tokenizer that counts, the URL of a server with it)."""
    tokenizer = counting_tokenizer()
    decoder_of(tokenizer)  # looks at the vocabulary once, whoever asks first
    tokenizer.characters = 0
    with serving(ContinuousEngine(tiny[0], tokenizer, max_len=MAX_LEN)) as url:
        yield tokenizer, url


def test_what_can_be_refused_by_counting_is_refused_before_anything_is_tokenized(counted):
    tokenizer, url = counted
    for kind, (path, make, field) in HOSTILE.items():
        answer = httpx.post(url + path, json=largest(make), timeout=60)
        assert answer.status_code in (400, 404), kind
        assert answer.json()["error"]["param"] == field, (kind, answer.text[:300])
        assert tokenizer.characters == 0, kind
        assert tokenizer.renders == 0, kind


@pytest.mark.parametrize("path", [COMPLETION, CHAT])
def test_a_text_too_long_for_any_tokens_is_told_the_limit(counted, path):
    tokenizer, url = counted
    longest = MAX_LEN * longest_token(tokenizer)
    body = {"prompt": "a" * (longest + 1), "messages": user("a" * (longest + 1))}
    error = httpx.post(url + path, json=body).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert f"limit of {MAX_LEN} tokens" in error["message"]
    assert tokenizer.characters == 0


def test_the_longest_text_that_can_fit_is_served(counted):
    _, url = counted
    prompt = "<|end|>" * (MAX_LEN - 1)  # the longest token there is
    answer = httpx.post(url + COMPLETION, json={"prompt": prompt, "max_tokens": 1}, timeout=60)
    assert answer.status_code == 200
    assert answer.json()["usage"]["prompt_tokens"] == MAX_LEN - 1


def test_beside_hostile_bodies_a_stream_goes_on_and_little_is_rendered_or_tokenized(counted):
    tokenizer, url = counted
    hostile = [(path, largest(make)) for path, make, _ in HOSTILE.values()]
    # These are taken, and cost what they hold: all roles there may be, all calls there may be.
    messages = [{"role": ROLE_NAMES[i % ROLES], "content": ""} for i in range(2048)]
    hostile += [(CHAT, {"messages": messages}),
                (CHAT, {"messages": user(tool_calls=call(CALLS))})] * 4

    async def main():
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            waiting = [asyncio.create_task(client.post(path, json=body)) for path, body in hostile]
            ordinary = await client.post(COMPLETION, json={
                "prompt": "hello", "max_tokens": 20, "ignore_eos": True, "stream": True})
            return ordinary, [(await one).status_code for one in waiting]

    ordinary, statuses = asyncio.run(main())
    assert ordinary.status_code == 200
    assert '"length"' in ordinary.text and ordinary.text.endswith("data: [DONE]\n\n")
    assert set(statuses) <= {400, 404}, "none of them fits"
    # Four conversations of 2,048 messages, four of one, and what the template was judged by.
    assert tokenizer.messages < 4 * 2048 + 4 + 500
    assert tokenizer.characters <= len("hello") + 4 * MAX_LEN * longest_token(tokenizer)


# Control tokens


def test_a_control_token_in_a_message_is_text_and_the_templates_own_are_tokens():
    tokenizer = counting_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    end = tokenizer.eos_token_id
    clean = chat_tokens(tokenizer, [Message(role="user", content="a")])
    assert clean == [*tokenizer("a")["input_ids"], end]
    tokens = chat_tokens(tokenizer, [Message(role="user", content="a<|end|><|end|>b")])
    assert tokens.count(end) == 1 and tokens[-1] == end
    assert tokenizer.decode(tokens) == "a<|end|><|end|>b<|end|>"
    assert CUT not in tokenizer.decode(tokens)


def test_control_tokens_in_names_tools_and_variables_are_text_too():
    tokenizer = counting_tokenizer()
    tokenizer.chat_template = ("{{ shout }}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
                               "{% for m in messages %}{{ m.name }}{{ m.content }}{% endfor %}")
    tool = {"type": "function", "function": {"name": "f", "parameters": {"<|end|>": "<|end|>"}}}
    options = {"tools": [tool], "shout": "<|end|>"}
    tokens = chat_tokens(tokenizer, [Message(role="user", content="a", name="<|end|>")], options)
    assert tokenizer.eos_token_id not in tokens
    assert tokenizer.decode(tokens).count("<|end|>") == 4


# Whatever a request says

DEEP = "@deep@"  # stands for brackets in brackets, in the body as it is sent
depths = st.sampled_from([1, 90, 110, 300, 900, 1100, 3000])
names = st.text(min_size=1, max_size=9)
texts = st.text(st.characters(exclude_categories=[]), max_size=9)  # halves of surrogate pairs too
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.just(DEEP) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6)
arguments = st.sampled_from(["", '{"a": 1}', '{"a": [1', "[]", "null", "[" * 1100]) | names
arguments |= depths.map(lambda depth: f'{{"a": {nest(depth)}}}')
calls = st.lists(st.fixed_dictionaries({"function": st.fixed_dictionaries(
    {"name": names, "arguments": arguments})}), min_size=1, max_size=2)
messages = st.lists(st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system", "developer"]) | names,
     "content": names}, optional={"tool_calls": calls, "name": names}), min_size=1, max_size=3)
tools = st.lists(st.fixed_dictionaries({"type": st.just("function"), "function":
                 st.fixed_dictionaries({"name": names, "parameters": anything})}), max_size=2)
LIKELY = {"prompt": names | st.lists(st.integers(0, 511), min_size=1),
          "tools": tools, "chat_template_kwargs": st.dictionaries(names, anything, max_size=2)}
fields = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields} - {"max_tokens"})


def nest(depth):
    return "[" * depth + "]" * depth


@pytest.fixture(scope="module")
def client(tiny):
    tokenizer = byte_tokenizer(512)
    tokenizer.chat_template = "{{ tools | tojson if tools else '' }}" + CHATML
    engine = ContinuousEngine(tiny[0], tokenizer, max_len=MAX_LEN)
    with serving(engine) as url, httpx.Client(base_url=url, timeout=60) as client:
        client.headers["Content-Type"] = "application/json"
        yield client


@pytest.mark.parametrize("path", [COMPLETION, CHAT])
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(likely=st.fixed_dictionaries({}, optional=LIKELY), depth=depths, messages=messages,
       odd=st.dictionaries(st.sampled_from(fields), anything, max_size=1))
def test_whatever_a_request_says_it_is_no_500(client, path, likely, depth, messages, odd):
    body = {"prompt": "a", "messages": messages, **likely, **odd, "max_tokens": 2}
    answer = client.post(path, content=json.dumps(body).replace(f'"{DEEP}"', nest(depth)))
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
    if answer.status_code != 200:
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("depth", [101, 300, 900, 1100, 5000])
@pytest.mark.parametrize("field, text", [
    ("messages", '[{"role": "assistant", "tool_calls": [{"function": {"name": "f", '
                 '"arguments": "{\\"a\\": DEEP}"}}]}]'),
    ("tools", '[{"type": "function", "function": {"name": "f", "parameters": DEEP}}]'),
    ("chat_template_kwargs", '{"a": DEEP}'), ("tool_choice", '{"a": DEEP}'),
    ("response_format", '{"type": DEEP}'), ("stop", "DEEP"), ("prompt", "DEEP")])
def test_what_is_nested_too_deeply_is_a_400_by_name(client, depth, field, text):
    fields = {"messages": '[{"role": "user", "content": "a"}]', "prompt": '"a"',
              field: text.replace("DEEP", nest(depth))}
    sent = ", ".join(f'"{name}": {value}' for name, value in fields.items())
    path = COMPLETION if field == "prompt" else CHAT
    answer = client.post(path, content="{" + sent + "}")
    error = answer.json()["error"]
    assert answer.status_code == 400
    if depth < 900 or field == "messages":  # beyond it, json's own limit refuses the body
        assert error["param"] == field
    assert "nested" in error["message"] or field in ("stop", "prompt")

"""Tools: a template that takes them, calls in its own format, and what is refused with a reason."""
import json

import httpx
import pytest
from conftest import serving
from test_server import events

from cbserver.http.schema import Message
from cbserver.http.text import chat_tokens
from cbserver.http.tools import CallReader, call_format
from cbserver.model.random_llama import byte_tokenizer
from cbserver.scheduler import ContinuousEngine

TOOL = {"type": "function", "function": {"name": "weather", "description": "Says it.", "parameters":
        {"type": "object", "properties": {"city": {"type": "string"}}}}}
PLAIN = """{% for m in messages %}<{{ m.role }}>{{ m.content }}
{% for c in m.tool_calls or [] %}<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>
{% endfor %}{% endfor %}<assistant>"""
TAGGED = "{% if tools %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}" + PLAIN
BARE = TAGGED.replace("<tool_call>", "").replace("</tool_call>", "").replace(
    '"arguments"', '"parameters"')
NONE_OF_OURS = TAGGED.replace("<tool_call>", "[TOOL_CALLS]").replace("</tool_call>", "")
QUESTION = [{"role": "user", "content": "Is it warm in Oslo?"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def engine_that_says(tiny, text, template):
    """An engine that answers every request with this text, over a tokenizer with this template."""
    model, _ = tiny
    tokenizer = byte_tokenizer(512)
    tokenizer.chat_template = template
    answer = [*tokenizer(text)["input_ids"], 511]

    class Parrot:
        def __init__(self, model, slots, max_len):
            pass

        def prefill(self, sequence, end):
            sequence.position = end

        def decode(self, sequences):
            return [(s, answer[len(s.generated_tokens)]) for s in sequences]

    return ContinuousEngine(model, tokenizer, max_len=1024, runner=Parrot)


def chat(url, **body):
    return httpx.post(f"{url}/v1/chat/completions", timeout=60,
                      json={"messages": QUESTION, "tools": [TOOL], **body})


@pytest.mark.parametrize("text, template, content, calls", [
    (CALL, TAGGED, None, [("weather", {"city": "Oslo"})]),
    (f"Let me look.\n{CALL}\n{CALL}", TAGGED, "Let me look.\n",
     [("weather", {"city": "Oslo"})] * 2),
    (CALL.removesuffix("</tool_call>"), TAGGED, None, [("weather", {"city": "Oslo"})]),
    ('{"name": "weather", "parameters": {"city": "O;slo"}}', BARE, None,
     [("weather", {"city": "O;slo"})]),
    ("It is warm.", TAGGED, "It is warm.", None),
    ("It is warm.", BARE, "It is warm.", None),
    ("2 < 3, and <tool", TAGGED, "2 < 3, and <tool", None),
    ("<tool_call>\nnot JSON\n</tool_call>", TAGGED, "<tool_call>\nnot JSON\n</tool_call>", None),
    ('<tool_call>\n{"arguments": {}}', TAGGED, '<tool_call>\n{"arguments": {}}', None),
    ('{"a": 1}', BARE, '{"a": 1}', None),
])
def test_a_call_in_the_templates_format_becomes_tool_calls(tiny, text, template, content, calls):
    with serving(engine_that_says(tiny, text, template)) as url:
        choice = chat(url).json()["choices"][0]
        chunks = [event["choices"][0] for event in events(chat(url, stream=True).text)]
    message = choice["message"]
    found = [(call["function"]["name"], json.loads(call["function"]["arguments"]))
             for call in message.get("tool_calls", [])]
    assert (message["content"], found or None) == (content, calls)
    assert choice["finish_reason"] == ("tool_calls" if calls else "stop")
    # In a stream the calls come as one last delta, and nothing of them as text.
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == (content or "")
    assert all("tool_calls" not in chunk["delta"] for chunk in chunks[:-1])
    last = chunks[-1]["delta"].get("tool_calls", [])
    assert chunks[-1]["finish_reason"] == choice["finish_reason"]
    assert [call["index"] for call in last] == list(range(len(last)))
    assert [call["function"] for call in last] == [call["function"]
                                                   for call in message.get("tool_calls", [])]
    assert all(call["id"].startswith("call_") and call["type"] == "function" for call in last)


def test_with_tool_choice_none_or_without_tools_a_call_stays_text(tiny):
    with serving(engine_that_says(tiny, CALL, TAGGED)) as url:
        for body in ({"tool_choice": "none"}, {"tools": []}, {"tools": None}):
            choice = chat(url, **body).json()["choices"][0]
            assert choice["message"] == {"role": "assistant", "content": CALL}
            assert choice["finish_reason"] == "stop"


def test_the_template_gets_the_tools_and_a_history_of_calls(tiny):
    engine = engine_that_says(tiny, "Yes.", TAGGED)
    seen = []
    submit = engine.submit
    engine.submit = lambda tokens, params: seen.append(tokens) or submit(tokens, params)
    call = {"id": "call_1", "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    history = [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]},
               {"role": "tool", "tool_call_id": "call_1", "content": "21 degrees"}]
    with serving(engine) as url:
        assert chat(url, messages=history).status_code == 200
    text = engine.tokenizer.decode(seen[0])
    assert text.startswith(json.dumps(TOOL)) or '"name": "weather", "description"' in text
    assert CALL in text and "<tool>21 degrees" in text


JOINED = PLAIN.replace("{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}")
PRINTED = PLAIN.replace("{{ c.function.arguments | tojson }}", "{{ c.function.arguments }}")
ITEMS = PLAIN.replace("{{ c.function.arguments | tojson }}",
                      "{% for k, v in c.function.arguments | items %}{{ k }}={{ v }}{% endfor %}")
CUT_OFF = '{"city": "Os'


@pytest.mark.parametrize("template, sent, shown", [
    (PLAIN, '{"city": "Oslo"}', '{"city": "Oslo"}'), (PLAIN, "", "{}"),
    (JOINED, '{"city": "Oslo"}', '{"city": "Oslo"}'), (JOINED, "", "{}"),
    (PRINTED, '{"city": "Oslo"}', '{"city": "Oslo"}'), (ITEMS, '{"city": "Oslo"}', "city=Oslo"),
    # No object of JSON, as when max_tokens has cut it: the text where that can be shown.
    (PLAIN, CUT_OFF, json.dumps(CUT_OFF)), (JOINED, CUT_OFF, CUT_OFF), (PRINTED, CUT_OFF, CUT_OFF),
    (ITEMS, CUT_OFF, ""), (JOINED, "[1]", "[1]")])
def test_arguments_come_in_the_form_that_the_template_takes(template, sent, shown):
    tokenizer = byte_tokenizer(512)
    tokenizer.chat_template = template
    call = {"id": "call_1", "function": {"name": "weather", "arguments": sent}}
    tokens = chat_tokens(tokenizer, [Message(role="user", content="hi"),
                                     Message(role="assistant", tool_calls=[call]),
                                     Message(role="tool", content="21", tool_call_id="call_1")])
    text = tokenizer.decode(tokens)
    assert text.partition('"arguments": ')[2].partition("}\n</tool_call>")[0] == shown


def test_a_history_of_calls_that_a_template_drops_is_a_400(tiny):
    called = [{"function": {"name": "weather", "arguments": "{}"}}]
    with serving(engine_that_says(tiny, "Yes.", "{{ messages[0].content }}")) as url:
        answer = chat(url, tools=[], messages=[*QUESTION, {"role": "assistant",
                                                           "tool_calls": called}])
    assert answer.status_code == 400 and "leaves out tool_calls" in answer.text


@pytest.mark.parametrize("template, words", [
    (PLAIN, "no place for tools"), (NONE_OF_OURS, "a format that this server cannot read")])
def test_a_template_that_cannot_is_a_400(tiny, template, words):
    with serving(engine_that_says(tiny, "Yes.", template)) as url:
        error = chat(url).json()["error"]
    assert error["param"] == "tools" and words in error["message"]


def test_the_format_is_the_templates():
    tokenizer = byte_tokenizer(512)
    for template, found in ((TAGGED, "tagged"), (BARE, "bare"), (NONE_OF_OURS, None)):
        tokenizer.chat_template = template
        assert call_format(tokenizer, [TOOL]) == found


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_call_is_found_however_it_is_cut(cut):
    text = f"Well.\n{CALL}"
    reader = CallReader("tagged")
    shown = [reader.push(text[i:i + cut]) for i in range(0, len(text), cut)]
    rest, calls = reader.finish()
    assert ("".join(shown), rest) == ("Well.\n", "")
    assert calls == [("weather", '{"city": "Oslo"}')]

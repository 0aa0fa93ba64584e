"""Tools: a template that takes them, calls in its own format, and what is refused with a reason."""
import json
import re

import httpx
import pytest
from conftest import serving
from hypothesis import given, settings
from hypothesis import strategies as st
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
BARE_CALL = '{"name": "weather", "parameters": {"city": "Oslo"}}'
BROKEN = '<tool_call>\n{"name": "weather", "arguments": {"city": "Os\n</tool_call>'
OSLO = ("weather", {"city": "Oslo"})


def engine_that_says(tiny, said, template=None):
    """An engine that answers every request with this text, or with these tokens.

    template: of its tokenizer.
    """
    model, _ = tiny
    tokenizer = byte_tokenizer(512)
    tokenizer.chat_template = template
    answer = [*(tokenizer(said)["input_ids"] if isinstance(said, str) else said), 511]

    class Parrot:
        def __init__(self, model, slots, max_len):
            self.piece = 512

        def prefill(self, sequence, end):
            sequence.position = end

        def decode(self, sequences):
            return [(s, answer[len(s.generated_tokens)]) for s in sequences]

    return ContinuousEngine(model, tokenizer, max_len=2048, runner=Parrot, prefill_budget=512)


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
    # What is wrong with one of them costs no other.
    (f"{CALL}\n{BROKEN}", TAGGED, BROKEN, [OSLO]),
    (f"{BROKEN}\n{CALL}", TAGGED, f"{BROKEN}\n", [OSLO]),
    (f"I may write <tool_call> to use a tool.\n{CALL}", TAGGED,
     "I may write <tool_call> to use a tool.\n", [OSLO]),
    (f'{BARE_CALL}; {{"parameters": {{}}}}; {{oops}}\n{BARE_CALL}', BARE,
     '{"parameters": {}}; {oops}', [OSLO, OSLO]),
    # Text stays text wherever it stands.
    (f"{CALL}\nI called it.", TAGGED, "I called it.", [OSLO]),
    (f"One.\n{CALL}\nTwo.\n{CALL}\nThree.", TAGGED, "One.\nTwo.\nThree.", [OSLO, OSLO]),
    (f"{BARE_CALL}\nI called it.", BARE, "I called it.", [OSLO]),
    (f"Close it: </tool_call>.\n{CALL}</tool_", TAGGED, "Close it: </tool_call>.\n", [OSLO]),
    (CALL.replace("Oslo", "</tool_call> <tool_call>{"), TAGGED, None,
     [("weather", {"city": "</tool_call> <tool_call>{"})]),
    (CALL.replace("Oslo", "Os\nlo"), TAGGED, None, [("weather", {"city": "Os\nlo"})]),
    (f"{CALL.removesuffix('</tool_call>')}{BARE_CALL.replace('parameters', 'arguments')}", TAGGED,
     None, [OSLO, OSLO]),
    # Nothing is an object without members; only a name without more is a call.
    ('<tool_call>{"name": "run"}</tool_call>', TAGGED, None, [("run", {})]),
    ('<tool_call>{"name": "run", "arguments": null}</tool_call>', TAGGED, None, [("run", {})]),
    ('<tool_call>{"name": "run", "arguments": ""}</tool_call>', TAGGED, None, [("run", {})]),
    ('{"name": "run"}', BARE, None, [("run", {})]),
    ('{"name": "Bob", "age": 5}', BARE, '{"name": "Bob", "age": 5}', None),
    ('<tool_call>{"name": "run", "arguments": {"x": 1e999}}</tool_call>', TAGGED,
     '<tool_call>{"name": "run", "arguments": {"x": 1e999}}</tool_call>', None),
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


def test_arguments_come_back_as_they_were_written():
    for city in ("Zürich 🙂", "Z\\u00fcrich \\ud83d\\ude42"):
        _, calls = read("tagged", [CALL.replace("Oslo", city)])
        assert calls == [("weather", '{"city": "Zürich 🙂"}')]


@pytest.mark.parametrize("said, call", [
    ('{"name": "r\\ud83d", "arguments": {"a": "\\ude42\\ud83d"}}',
     {"name": "r\ufffd", "arguments": '{"a": "\ufffd\ufffd"}'}),
    ('{"name": "run", "arguments": "\\ud83d"}', {"name": "run", "arguments": "\ufffd"})])
@pytest.mark.parametrize("template", [TAGGED, BARE])
def test_half_a_surrogate_pair_in_a_call_is_a_replacement_sign(tiny, said, call, template):
    text = f"<tool_call>{said}</tool_call>" if template is TAGGED else said.replace(
        "arguments", "parameters")
    with serving(engine_that_says(tiny, text, template)) as url:
        whole = chat(url).json()["choices"][0]["message"]
        last = events(chat(url, stream=True).text)[-1]["choices"][0]["delta"]
    assert [one["function"] for one in whole["tool_calls"]] == [call]
    assert [one["function"] for one in last["tool_calls"]] == [call]


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("template, begin", [
    (TAGGED, '<tool_call>{"name": "run", "arguments": '), (BARE, '{"name": "run", "parameters": ')])
def test_brackets_without_end_are_text(tiny, template, begin, closed):
    text = begin + "[" * 800 + ("]" * 800 + "}" if closed else "")
    with serving(engine_that_says(tiny, text, template)) as url:
        assert chat(url).json()["choices"][0]["message"] == {"role": "assistant", "content": text}
        chunks = events(chat(url, stream=True).text)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == text


def read(kind, parts):
    """(text, calls) of an answer that comes in these parts."""
    reader = CallReader(kind)
    shown = [reader.push(part) for part in parts]
    rest, calls = reader.finish()
    return "".join([*shown, rest]), calls


def cut(text, size):
    return [text[i:i + size] for i in range(0, len(text), size)]


@pytest.mark.parametrize("size", range(1, 12))
def test_a_call_is_found_however_it_is_cut(size):
    reader = CallReader("tagged")
    shown = [reader.push(part) for part in cut(f"Well.\n{CALL}", size)]
    assert "".join(shown) == "Well.\n"
    assert reader.finish() == ("", [("weather", '{"city": "Oslo"}')])


def test_in_a_stream_text_waits_only_for_what_may_still_be_a_call():
    reader = CallReader("tagged")
    for text, shown in (("I use <tool", "I use "), ("_call>\n", ""), ("as", "<tool_call>\nas"),
                        (" it is. ", " it is. "), (CALL, ""), ("\nI", "I"), (" called", " called"),
                        (' it. <tool_call>{"a": ', " it. "), ("what", '<tool_call>{"a": what')):
        assert reader.push(text) == shown
    assert reader.finish() == ("", [("weather", '{"city": "Oslo"}')])


def slowly(text):
    """(text, calls) of a whole tagged answer, by JSON's own reader behind each tag."""
    shown = ""
    calls = []
    while "<tool_call>" in text:
        before, _, text = text.partition("<tool_call>")
        found, rest = objects_of(text)
        shown += before if found else before + "<tool_call>"
        calls += found
        if found and "</tool_call>".startswith(rest):
            rest = ""  # the end came in the middle of the closing tag
        text = rest
    return shown + text, calls


def objects_of(text):
    """([name and arguments of each call that the text begins with], what is behind)."""
    begin = text.lstrip()
    try:
        said, end = json.JSONDecoder(strict=False).raw_decode(begin)
        name = said["name"]
        arguments = {} if said.keys() == {"name"} else said["arguments"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return [], text
    if name == "" or not isinstance(name, str):
        return [], text
    arguments = {} if arguments in (None, "") else arguments
    said = json.dumps([name, arguments], ensure_ascii=False)
    name, arguments = json.loads(re.sub("[\ud800-\udfff]", "\ufffd", said))
    more, rest = objects_of(re.sub(r"^(\s|</tool_call>)*", "", begin[end:]))
    return [(name, arguments), *more], rest


def valued(calls):
    """Calls with their arguments as values, where they are JSON."""
    found = []
    for name, arguments in calls:
        try:
            found.append((name, json.loads(arguments)))
        except ValueError:
            found.append((name, arguments))
    return found


GOOD = [{"name": "f", "arguments": {"x": "a </tool_call> b <tool_call> {"}},
        {"name": "g", "arguments": {}},
        {"name": "é🙂", "arguments": {"deep": [[{"y": ["\\", '"', "}"]}]]}}]
BLOCKS = [f"<tool_call>{space}{json.dumps(good, ensure_ascii=False)}{end}" for good in GOOD
          for space, end in (("", ""), ("\n", "\n</tool_call>"), (" ", "</tool_call>\n"))]
FRAGMENTS = ["<tool_call>", "</tool_call>", "<tool_", "</tool_c", "<", "{", "}", "[", "]", '"',
             "\\", ",", ":", ";", " ", "\n", "name", '"name": "f"', '"arguments": ', '{"name": "',
             "\\ud83d", "é🙂", "null", "1", "Well. ", '{"a": "', '"}', "[" * 150, "{oops}",
             '{"a": 1}']
noise = st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(noise | st.sampled_from(BLOCKS), max_size=8).map("".join), st.integers(1, 40))
def test_whatever_a_model_writes_every_good_call_is_found_and_all_else_is_text(text, size):
    shown, calls = read("tagged", cut(text, size))
    want, found = slowly(text)
    assert (shown, valued(calls)) == (want, found)
    assert read("tagged", [text]) == (shown, calls)


BAD = ['{"a": 1}', "{oops}", '{"name": "f", "parameters": {bad}}', '{"name": 3, "parameters": {}}',
       '{"name": "Bob", "age": {}}', "{" * 99 + "}" * 99]
bare = st.sampled_from([json.dumps(good).replace("arguments", "parameters") for good in GOOD])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2)), max_size=8), st.data())
def test_in_a_bare_answer_a_bad_object_costs_no_good_one(goods, data):
    row = [data.draw(bare if good else st.sampled_from(BAD)) for good, _ in goods]
    spaces = [[" ", ";", "\n; "][space] for _, space in goods]
    tail = data.draw(st.sampled_from(["", "I called it.", "<tool_call>{", "a {b} c"]))
    text = "".join(one + space for one, space in zip(row, spaces)) + tail
    shown, calls = read("bare", cut(text, data.draw(st.integers(1, 40))))
    want = [json.loads(one) for one, (good, _) in zip(row, goods) if good]
    assert valued(calls) == [(one["name"], one["parameters"]) for one in want]
    others = "".join(one for one, (good, _) in zip(row, goods) if not good) + tail
    assert re.sub(r"[\s;]", "", shown) == re.sub(r"[\s;]", "", others)
    assert read("bare", [text]) == (shown, calls)


@settings(max_examples=300, deadline=None)
@given(noise, st.integers(1, 20))
def test_a_bare_answer_reads_the_same_however_it_is_cut(text, size):
    shown, calls = read("bare", cut(text, size))
    assert (shown, calls) == read("bare", [text])
    assert calls or shown == text


class Counting(CallReader):
    """Counts the letters that are looked at."""

    count = 0

    def in_text(self, letter):
        self.count += 1
        return super().in_text(letter)

    def before_object(self, letter):
        self.count += 1
        return super().before_object(letter)

    def in_object(self, letter):
        self.count += 1
        return super().in_object(letter)


@pytest.mark.parametrize("kind", ["tagged", "bare"])
@pytest.mark.parametrize("unit", [
    "<tool_call>", '<tool_call>{"', '<tool_call>{\\"', '<tool_call>{"a": "', "<tool_call>{[",
    "<tool_", '{"a": "', "{", "[", "{}", "; ", '<tool_call>{"name": "f"}', f"{CALL}\n",
    "<tool_call>\n\n"])
def test_no_letter_is_looked_at_more_than_a_few_times(kind, unit):
    text = '<tool_call>{"a": "' + unit * 2000 if kind == "tagged" else '{"a": ' + unit * 2000
    reader = Counting(kind)
    for part in cut(text, 4):
        reader.push(part)
    reader.finish()
    assert reader.count < 6 * len(text)

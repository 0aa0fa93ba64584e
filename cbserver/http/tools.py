"""Calls of tools: how models write them, and how to find them in what a model has written."""
import json
import re

from .text import overlap

OPEN = "<tool_call>"
BLOCK = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)


def call_format(tokenizer, tools):
    """In which format a model calls tools, by its chat template; None if it is none of ours.

    "tagged": JSON between <tool_call> and </tool_call>, as Qwen and SmolLM have it. "bare": the
    whole answer is JSON with a name and parameters, as Llama 3 has it.
    """
    template = tokenizer.get_chat_template(tools=tools)
    if OPEN in template:
        return "tagged"
    return "bare" if '"parameters"' in template else None


class CallReader:
    """Finds calls of tools in an answer, and holds back what may be one until the answer's end."""

    def __init__(self, call_format):
        self.tagged = call_format == "tagged"
        self.held = ""
        self.only_text = False  # it began with what is no call

    def push(self, text):
        """More of the answer; returns what of it is surely no call."""
        if self.only_text:
            return text
        self.held += text
        cut = self.first_doubt()
        text = self.held[:cut]
        self.held = self.held[cut:]
        return text

    def first_doubt(self):
        """Where in the text that is held a call may begin."""
        if self.tagged:
            found = self.held.find(OPEN)
            return len(self.held) - overlap(self.held, OPEN) if found < 0 else found
        begin = self.held.lstrip()
        self.only_text = begin != "" and not begin.startswith("{")
        return len(self.held) if self.only_text else 0

    def finish(self):
        """At the answer's end: (text that turned out to be no call, [(name, arguments)])."""
        try:
            calls = self.calls_of(self.held)
        except (ValueError, KeyError, TypeError):  # not JSON, or not as a call should be
            return self.held, []
        return ("", calls) if calls else (self.held, [])

    def calls_of(self, text):
        """All calls in a text; raises unless each of them is whole."""
        if self.tagged:
            return [call_of(json.loads(block), "arguments") for block in BLOCK.findall(text)]
        return [call_of(said, "parameters") for said in objects_in(text)]


def objects_in(text):
    """The JSON objects of a text, one after the other, with or without ; between them."""
    found = []
    while text := text.strip("; \n"):
        said, end = json.JSONDecoder().raw_decode(text)
        found.append(said)
        text = text[end:]
    return found


def call_of(said, key):
    """(name, arguments as JSON) of a call as a model writes it."""
    name = said["name"]
    arguments = said[key]
    if not isinstance(name, str):
        raise TypeError("a tool's name is a text")
    return name, arguments if isinstance(arguments, str) else json.dumps(arguments)

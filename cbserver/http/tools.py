"""Calls of tools: how models write them, and how to find them in what a model has written."""
import json

from .text import characters

OPEN = "<tool_call>"
CLOSE = "</tool_call>"
OUTSIDE = " \t\r\n:,.+-0123456789eEtruefalsn"  # of JSON's strings and brackets stands nothing else
DEEPEST = 100  # brackets in brackets; Python's JSON reader would fail at about a thousand


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
    """Finds calls of tools in an answer, and holds back what may still become one.

    It reads letter by letter, so it finds the same however the answer is cut. A tag that no call
    follows is text, and what comes behind it is read anew. In a bare answer calls stand in a row
    from its beginning on, with or without ; between them.

    state: the method that takes the next letter, which stands last in `held`; it returns whether
    what is held may still become a call, or belongs to one.
    """

    def __init__(self, call_format):
        self.tagged = call_format == "tagged"
        self.state = self.in_text if self.tagged else self.before_object
        self.held = []  # letters
        self.depth = 0  # open brackets
        self.quoted = False  # inside of a JSON string
        self.escaped = False  # behind a backslash there
        self.calls = []  # (name, arguments)

    def push(self, text):
        """More of the answer; returns what of it is surely no call."""
        if self.state == self.in_text and not self.held and "<" not in text:  # as nearly always
            return text
        shown = []
        coming = [*reversed(text)]
        while coming:
            self.held.append(coming.pop())
            if not self.state(self.held[-1]):
                no_call, rest = self.give_up()
                shown.append(no_call)
                coming += reversed(rest)
        return "".join(shown)

    def finish(self):
        """At the answer's end: (text that turned out to be no call, [(name, arguments)])."""
        shown = ""
        while self.held and self.state != self.behind_call:
            no_call, rest = self.give_up()
            shown += no_call + self.push(rest)
        return shown, self.calls

    def give_up(self):
        """What is held begins no call: (what of it is text, what to read anew)."""
        object_in_row = self.state == self.in_object and not self.tagged
        cut = len(self.held) if object_in_row else 1
        text = "".join(self.held[:cut])
        rest = "".join(self.held[cut:])
        self.held = []
        self.state = self.before_object if object_in_row else self.in_text
        return text, rest

    def in_text(self, letter):
        tag = "".join(self.held)
        if tag == OPEN:
            self.state = self.before_object
        return self.tagged and OPEN.startswith(tag)

    def before_object(self, letter):
        if letter == "{":
            self.state = self.in_object
            self.depth = 1
            self.quoted = False
            self.escaped = False
        return letter == "{" or letter.isspace() or (letter == ";" and not self.tagged)

    def in_object(self, letter):
        if self.escaped:
            self.escaped = False
        elif self.quoted:
            self.escaped = letter == "\\"
            self.quoted = letter != '"'
        elif letter == '"':
            self.quoted = True
        elif letter in "{[":
            self.depth += 1
        elif letter in "}]":
            self.depth -= 1
        elif self.tagged and letter not in OUTSIDE:
            return False
        return self.found() if self.depth == 0 else self.depth <= DEEPEST

    def found(self):
        """Whether the object that is whole now is a call."""
        text = "".join(self.held)
        call = call_of(text[text.index("{"):], "arguments" if self.tagged else "parameters")
        if call:
            self.calls.append(call)
            self.held = []
            self.state = self.behind_call
        return call is not None

    def behind_call(self, letter):
        """Space behind a call, a closing tag and a ; belong to it."""
        held = "".join(self.held)
        end = CLOSE if self.tagged else ";"
        if held.isspace() or held == end:
            self.held = []
            return True
        if end.startswith(held):
            return True
        self.state = self.before_object if held == "{" else self.in_text
        return self.state(letter)


def call_of(text, key):
    """(name, arguments as JSON) of a call as a model writes it; None if the text is no call.

    Without arguments there is nothing but the name: other objects have names, too.
    """
    try:
        said = json.loads(text, strict=False)  # models write line breaks into strings as they are
        name = said["name"]
        arguments = said[key] if len(said) > 1 else None
        if arguments in (None, ""):
            arguments = {}
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (ValueError, KeyError):
        return None
    known = isinstance(name, str) and name
    return (characters(name), characters(arguments)) if known else None

"""Text into tokens and tokens into text: prompts, chat templates, whole characters, stop strings."""
import codecs
import functools
import json
import math
import re
from itertools import chain, takewhile
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .errors import APIError

NESTING = 100  # levels of brackets in what a template takes: libraries go down by recursion
# No character, by Unicode: the place where a control token that a client has written is cut.
CUT = "\ufdd0"
# What a template is judged by, see `shows`.
MARK = "what-this-message-says"
TOOL = {"type": "function", "function": {
    "name": MARK, "description": "", "parameters": {"type": "object", "properties": {}}}}
CALL_ID = "a1b2c3d4e"  # nine letters and digits, as Mistral's templates demand
USER = {"role": "user", "content": "a"}
ASSISTANT = {"role": "assistant", "content": "b"}


def prompt_tokens(tokenizer, prompt, max_len=math.inf):
    """Token ids of each prompt: of a text or ids, or of a list of either.

    A text that must have more than max_len tokens is a 400, and nothing is tokenized.
    """
    decoder_of(tokenizer)
    prompts = each_prompt(prompt)
    for one in prompts:
        if isinstance(one, str):
            check_length(tokenizer, len(one), max_len, "prompt")
    return [tokenize(tokenizer, one, "prompt") if isinstance(one, str) else one
            for one in prompts]


def each_prompt(prompt):
    """A list of the prompts in a request's `prompt`, each a text or ids."""
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    return prompt


def check_length(tokenizer, characters, max_len, field):
    """Refuse a text of so many characters if it must have more than max_len tokens."""
    if characters > max_len * longest_token(tokenizer):
        raise APIError(400, f"{field}: {characters} characters are more than the limit of "
                       f"{max_len} tokens can hold; send less", field, "context_length_exceeded")


@functools.lru_cache(8)
def longest_token(tokenizer):
    """Characters of the longest token."""
    return max(map(len, tokenizer.get_vocab()))


class ChatTemplate(NamedTuple):
    """A tokenizer's chat template. tools: whether it is given some, which may choose another."""

    tokenizer: PreTrainedTokenizerFast
    text: str
    tools: bool


def chat_tokens(tokenizer, messages, template=None, max_len=math.inf):
    """Token ids of a conversation, by the tokenizer's own chat template.

    template: what it takes beside the messages; None: an answer begins after them. Only the
    template writes control tokens: one in what a client sends is read as the characters it has.
    """
    decoder_of(tokenizer)
    if not tokenizer.chat_template:
        raise APIError(400, "this model has no chat template; use /v1/completions", "messages")
    check_length(tokenizer, sum(len(text_of(m)) for m in messages), max_len, "messages")
    options = template or {"add_generation_prompt": True}
    judged = chat_template(tokenizer, options.get("tools"))
    if judged.tools and not shows_tools(judged):
        raise APIError(400, "the model's chat template has no place for tools", "tools")
    turns = [turn(judged, message) for message in messages]
    if "developer" in dropped_roles(judged, turns):
        for message in turns:
            if message["role"] == "developer":  # the newer name of the same role
                message["role"] = "system"
    control = control_tokens(tokenizer)
    prompt = render(judged, cut(turns, control), cut(options, control))
    for role in dropped_roles(judged, turns):
        raise APIError(400, "messages: the model's chat template leaves out what a message of "
                       f"role {role!r} says", "messages")
    check_length(tokenizer, len(prompt), max_len, "messages")
    pieces = [tokenize(tokenizer, piece, "messages", add_special_tokens=False)
              for piece in prompt.split(CUT)]
    return list(chain.from_iterable(pieces))


def chat_template(tokenizer, tools):
    """The tokenizer's ChatTemplate for a conversation with these tools, or with None."""
    try:
        return ChatTemplate(tokenizer, tokenizer.get_chat_template(tools=tools), bool(tools))
    except ValueError as error:  # there are several, and none for this
        raise APIError(400, f"the model's chat template: {error}"[:300], "messages")


def turn(template, message):
    """A message as templates take it: role, content, and what else it has."""
    more = {"name": message.name, "tool_call_id": message.tool_call_id,
            "tool_calls": [call_of_turn(template, call) for call in message.tool_calls]}
    return {"role": message.role, "content": text_of(message),
            **{name: value for name, value in more.items() if value}}


def dropped_roles(template, turns):
    """The roles of which the template leaves out what a message says."""
    places = {(message["role"], index == 0) for index, message in enumerate(turns)}
    return [role for role, first in sorted(places)
            if role not in ("user", "assistant") and not shows(template, role, first)]


def call_of_turn(template, call):
    """A call as this template takes it: its arguments an object, or the text that clients send.

    What is no object of JSON, as when max_tokens has cut it, stays text where that can be shown.
    """
    forms = argument_forms(template)
    if not forms:
        raise APIError(400, "messages: the model's chat template leaves out tool_calls", "messages")
    text = call.function.arguments or "{}"
    try:
        arguments = json.loads(text)
        deep = nested(arguments)
    except RecursionError:
        deep = True
    except ValueError:
        arguments = None
        deep = False
    if deep:
        raise APIError(400, "messages: the arguments of a tool call are nested deeper than "
                       f"{NESTING} levels", "messages")
    if "object" not in forms or not isinstance(arguments, dict):
        arguments = text if "text" in forms else {}
    return call_turn(call.function.name, arguments, call.id)


def call_turn(name, arguments, call_id):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def text_of(message):
    """A message's content as one text; it may come in parts, or lack beside tool calls."""
    if message.content is None:
        return ""
    if isinstance(message.content, str):
        return message.content
    return "".join(part.text for part in message.content)


def nested(value):
    """Whether a value of JSON has more than NESTING levels."""
    level = [value]
    for _ in range(NESTING + 1):
        inside = [one.values() if isinstance(one, dict) else one
                  for one in level if isinstance(one, (dict, list))]
        level = list(chain.from_iterable(inside))
    return bool(level)


def render(template, turns, options):
    """The conversation as one text."""
    try:
        return template.tokenizer.apply_chat_template(turns, tokenize=False,
                                                      chat_template=template.text, **options)
    except Exception as error:  # a template refuses roles and orders in its own words
        raise APIError(400, f"the model's chat template says: {error!r}"[:300], "messages")


# What a template shows is found out once, with small conversations, and remembered. There are
# several of them, because many templates demand an order: one in which it shows is enough.


def tried(template, turns):
    """A small conversation as one text; empty if the template refuses it."""
    options = {"add_generation_prompt": True, "tools": [TOOL] if template.tools else None}
    try:
        return render(template, turns, options)
    except APIError:
        return ""


@functools.lru_cache(64)
def shows_tools(template):
    """Whether the template has the tools in its text."""
    return MARK in tried(template, [USER])


@functools.lru_cache(64)
def argument_forms(template):
    """How the template takes a call's arguments: "object", "text", both; [] if it shows no calls."""
    forms = []
    for name, arguments in (("object", {"key": 1}), ("text", '{"key": 1}')):
        call = call_turn("called-" + MARK, arguments, CALL_ID)
        calling = {"role": "assistant", "content": "", "tool_calls": [call]}
        answer = {"role": "tool", "content": "c", "name": "f", "tool_call_id": CALL_ID}
        texts = [tried(template, [USER, calling]), tried(template, [USER, calling, answer]),
                 tried(template, [USER, calling, answer, ASSISTANT, USER])]
        # An object that is written as Python writes it was meant to be text.
        if any("called-" + MARK in text and "{'key': 1}" not in text for text in texts):
            forms.append(name)
    return forms


@functools.lru_cache(256)
def shows(template, role, first):
    """Whether the template has in its text what a message of this role says: first, or later."""
    call = call_turn("f", {} if "object" in argument_forms(template) else "{}", CALL_ID)
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    said = {"role": role, "content": "said-" + MARK, "name": "f", "tool_call_id": CALL_ID}
    before = [[USER], [USER, ASSISTANT], [USER, calling]]
    after = [[], [USER]]
    conversations = [[*some, said, *more] for some in ([[]] if first else before) for more in after]
    return any("said-" + MARK in tried(template, turns) for turns in conversations)


@functools.lru_cache(8)
def control_tokens(tokenizer):
    """A pattern that matches the first character of each special token; None if there are none."""
    names = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    names += tokenizer.all_special_tokens
    longer = [re.escape(name) for name in names if len(name) > 1]
    return re.compile(f"(?={'|'.join(longer)}).", re.DOTALL) if longer else None


def cut(value, control):
    """The same value of JSON, its texts cut behind each match of `control`."""
    if isinstance(value, str) and control is not None:
        return control.sub(rf"\g<0>{CUT}", value)
    if isinstance(value, dict):
        return {cut(name, control): cut(inner, control) for name, inner in value.items()}
    if isinstance(value, list):
        return [cut(inner, control) for inner in value]
    return value


def tokenize(tokenizer, text, field, **options):
    """Token ids of a text; half of a surrogate pair is a 400."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise APIError(400, f"{field}: there is half of a surrogate pair in it, which is no "
                       "character", field)
    return tokenizer(text, **options)["input_ids"]


class Decoder:
    """What a Detokenizer must know of a tokenizer; made once for each.

    special: the special tokens, which have no text: {what they are called: id}. bytes: ids that
    stand for one byte each, where a vocabulary of words and characters has these for the rest.
    first: ids that the tokenizer puts in front of every text.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.backend = None
        if type(tokenizer)._decode is PreTrainedTokenizerFast._decode:
            self.backend = tokenizer.backend_tokenizer  # the same text at a third of the cost
        added = tokenizer.added_tokens_decoder
        self.special = {its.content: token for token, its in added.items() if its.special}
        self.special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))
        self.skipped = set(self.special.values())
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        vocabulary = tokenizer.get_vocab()
        self.bytes = {vocabulary[name] for name in names if name in vocabulary}
        if self.text([vocabulary.get("<0x41>", 0)]) != "A":
            self.bytes = set()  # these names stand for themselves
        self.first = tokenizer("")["input_ids"]
        self.before = tokenizer("a", add_special_tokens=False)["input_ids"]
        self.names = {token: (name, list(name.encode())) for name, token in self.special.items()}

    def named(self, token):
        """What one token is called by itself, and its bytes; None where nobody knows them.

        A token that is no whole character has a name of its bytes, as OpenAI gives it.
        """
        if token not in self.names:
            # Behind another token: the first one of a text may lose a space in front.
            text = self.text([*self.before, token])[len(self.text(self.before)):]
            encoded = list(text.encode())
            if "\ufffd" in text:
                encoded = bytes_of(self.tokenizer.convert_ids_to_tokens(token))
            if "\ufffd" in text and encoded:
                text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in encoded)
            self.names[token] = text, encoded
        return self.names[token]

    def text(self, tokens):
        if self.backend is not None:
            return self.backend.decode(tokens, skip_special_tokens=True)
        return characters(self.tokenizer.decode(tokens, skip_special_tokens=True,
                                                clean_up_tokenization_spaces=False))

    def unfinished(self, tokens, text):
        """How many characters at the end of these tokens' text may still become another one."""
        if not text.endswith("\ufffd"):
            return 0
        row = [*takewhile(self.bytes.__contains__, reversed(tokens))]  # wrong as a whole, or right
        written = [self.named(token)[1] for token in row[::-1] or tokens]
        if None in written:
            return 1
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        read = utf8.decode(b"".join(map(bytes, written)))
        waiting, _ = utf8.getstate()
        if not waiting:
            return 0  # its bytes never become a character, or it is one that looks like this
        return len(row) - len(read) if row else 1


@functools.lru_cache(8)
def decoder_of(tokenizer):
    """Made with the first prompt, which has a thread: it looks at the whole vocabulary."""
    return Decoder(tokenizer)


def characters(text):
    """The text with \ufffd for halves of surrogate pairs, which neither JSON nor UTF-8 can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def bytes_of(name):
    """The bytes of a token by its name in the vocabulary; None if it is of no known kind."""
    if name.startswith("<0x"):
        return [int(name[3:5], 16)]
    table = byte_letters()
    known = all(letter in table for letter in name)
    return [table[letter] for letter in name] if known else None


@functools.cache
def byte_letters():
    """The letters by which byte-level vocabularies write bytes: {letter: byte}."""
    return {letter: byte for byte, letter in bytes_to_unicode().items()}


class Detokenizer:
    """Turns an answer's tokens into text as they come: what prompt and answer decode to as a whole.

    window: the last tokens, some of them in front whose text is out, since a decoder may treat the
    first one of a text in its own way; at the beginning those are the prompt's. given: characters
    of the window's text that are out. begun: how the prompt's last character reads while it is not
    whole: if the answer completes it, it is the answer's. held: text that may become a stop string.
    length: of all text so far, also of what is held.
    """

    FRONT = 8  # tokens: more than the bytes of a character

    def __init__(self, tokenizer, stop=(), prompt=()):
        self.decoder = decoder_of(tokenizer)
        self.watch(stop)
        self.window = [t for t in prompt[-4 * self.FRONT:] if t not in self.decoder.skipped]
        text = self.decoder.text(self.window)
        self.given = len(text) - self.decoder.unfinished(self.window, text)
        self.begun = text[self.given:]
        self.held = ""
        self.length = 0
        self.stopped = False

    def watch(self, stop, tokens=()):
        """From now on these texts and tokens end the answer."""
        special = self.decoder.special
        self.stop = [StopString(text) for text in stop]
        self.stop_tokens = {special[name] for name in stop if name in special}
        self.stop_tokens.update(tokens)

    def echo(self, prompt):
        """A prompt's text as it was sent, special tokens too, and where the text of each begins.

        For a Detokenizer that was made without a prompt. Of a last character that is not whole the
        text comes with the answer's.
        """
        texts = []
        begins = []
        first = len(self.decoder.first)
        added = first if prompt[:first] == self.decoder.first else 0  # nobody sent these
        for index, token in enumerate(prompt):
            begins.append(self.length)
            if token not in self.decoder.skipped:
                texts.append(self.push(token))
            elif index >= added:
                name, _ = self.decoder.named(token)
                texts.append(self.release(self.rest() + name))
        return "".join(texts), begins

    def push(self, token):
        """The text that this token completes; often a word, sometimes nothing."""
        if token in self.stop_tokens:
            text = self.finish()
            self.stopped = True
            return text
        if token in self.decoder.skipped:
            return ""
        self.window.append(token)
        # One wrong byte spoils the whole row of them, so what a byte is shows at the row's end.
        if token in self.decoder.bytes:
            return ""
        whole = self.decoder.text(self.window)
        end = len(whole) - self.decoder.unfinished(self.window, whole)
        new = whole[self.given:end]
        self.given = max(self.given, end)
        if len(self.window) > 4 * self.FRONT:
            self.window = self.window[-self.FRONT:]
            self.given = len(self.decoder.text(self.window)) - (len(whole) - self.given)
        return self.release(new)

    def rest(self):
        """The text of the window that is not out, whole characters or not."""
        text = self.decoder.text(self.window)[self.given:]
        self.given += len(text)
        return text

    def finish(self):
        """What is left when no more tokens come."""
        if self.stopped:
            return ""
        text = self.release(self.rest())
        return text + self.held

    def release(self, text):
        """Pass text on, up to a stop string or to what may be the beginning of one."""
        if text:
            text = text.removeprefix(self.begun)
            self.begun = ""
        self.length += len(text)
        if not self.stop:
            return text
        whole = self.held + text
        begins = []
        for stop in self.stop:
            end = stop.find(text)
            if end:
                begins.append(len(self.held) + end - len(stop.text))
        if begins:
            self.stopped = True
            self.held = ""
            return whole[:min(begins)]
        cut = len(whole) - max(stop.matched for stop in self.stop)
        self.held = whole[cut:]
        return whole[:cut]


class StopString:
    """Looks for a text in one that comes in parts, in the way of Knuth, Morris and Pratt.

    It never goes back, so the cost is linear. matched: how many of its letters the text so far ends
    with. shorter: at each such number the next smaller one that would be as true; it grows when
    it is needed.
    """

    def __init__(self, text):
        self.text = text
        self.matched = 0
        self.shorter = [0, 0]

    def find(self, part):
        """Where in the next part of the text it ends; 0 if it does not."""
        if self.matched == 0 and self.text[0] not in part:  # as nearly always
            return 0
        for index, letter in enumerate(part):
            self.matched = self.longer(self.matched, letter)
            if self.matched == len(self.shorter):
                self.shorter.append(self.longer(self.shorter[-1], letter))
            if self.matched == len(self.text):
                return index + 1
        return 0

    def longer(self, matched, letter):
        """How many letters match with one more, where `matched` did before."""
        while matched and self.text[matched] != letter:
            matched = self.shorter[matched]
        return matched + 1 if self.text[matched] == letter else 0

"""Text into tokens and tokens into text: prompts, chat templates, whole characters, stop strings."""
import codecs
import functools
import json
from itertools import takewhile

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .errors import APIError

MARK = "(what this message says)"


def prompt_tokens(tokenizer, prompt):
    """Token ids of each prompt: of a text or ids, or of a list of either."""
    prompts = [prompt]
    if isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int)):
        prompts = prompt
    return [tokenize(tokenizer, one) if isinstance(one, str) else one for one in prompts]


def chat_tokens(tokenizer, messages, template=None):
    """Token ids of a conversation, by the tokenizer's own chat template.

    template: what it takes beside the messages; None: an answer begins after them.
    """
    if not tokenizer.chat_template:
        raise APIError(400, "this model has no chat template; use /v1/completions", "messages")
    options = template or {"add_generation_prompt": True}
    turns = [turn(message) for message in messages]
    if not shows(tokenizer, turns, "developer", options):  # the newer name of the same role
        for message in turns:
            if message["role"] == "developer":
                message["role"] = "system"
    if options.get("tools") and MARK not in render(tokenizer, turns, marked_tools(options)):
        raise APIError(400, "the model's chat template has no place for tools", "tools")
    prompt = render(tokenizer, turns, options)
    called = [call["function"]["name"] for message in turns for call in message.get("tool_calls", [])]
    if any(name not in prompt for name in called):
        raise APIError(400, "messages: the model's chat template leaves out tool_calls", "messages")
    for role in {message["role"] for message in turns} - {"user", "assistant"}:
        if not shows(tokenizer, turns, role, options):
            raise APIError(400, "messages: the model's chat template leaves out what a message of "
                           f"role {role[:100]!r} says", "messages")
    return tokenize(tokenizer, prompt, add_special_tokens=False)


def turn(message):
    """A message as templates take it: role, content, and what else it has."""
    more = {"name": message.name, "tool_call_id": message.tool_call_id,
            "tool_calls": [call_of_turn(call) for call in message.tool_calls]}
    return {"role": message.role, "content": text_of(message),
            **{name: value for name, value in more.items() if value}}


def call_of_turn(call):
    """A call as templates take it: its arguments are an object, where clients send JSON's text."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except ValueError:
        raise APIError(400, "messages: the arguments of a tool call are not JSON", "messages")
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def text_of(message):
    """A message's content as one text; it may come in parts, or lack beside tool calls."""
    if message.content is None:
        return ""
    if isinstance(message.content, str):
        return message.content
    return "".join(part.text for part in message.content)


def render(tokenizer, turns, options):
    """The conversation as one text."""
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except Exception as error:  # a template refuses roles and orders in its own words
        raise APIError(400, f"the model's chat template says: {error!r}"[:300], "messages")


def marked_tools(options):
    """The same options with one tool, which is called MARK."""
    function = {"name": MARK, "description": "", "parameters": {"type": "object", "properties": {}}}
    return options | {"tools": [{"type": "function", "function": function}]}


def shows(tokenizer, turns, role, options):
    """Whether the template has the contents of messages of this role in its text, if any are."""
    marked = [message | {"content": MARK} if message["role"] == role else message
              for message in turns]
    if marked == turns:
        return True
    try:
        return MARK in render(tokenizer, marked, options)
    except APIError:
        return False


def tokenize(tokenizer, text, **options):
    """Token ids of a text; half of a surrogate pair is a 400."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise APIError(400, "the prompt has half of a surrogate pair in it, which is no character",
                       "prompt")
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

"""Text into tokens and tokens into text: prompts, chat templates, whole characters, stop strings."""
import functools
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from ..sequence import EngineStopped
from .errors import APIError

MARK = "(what this message says)"


def prompt_tokens(tokenizer, prompt):
    """Token ids of a prompt: text, ids, or a list with one of either."""
    if isinstance(prompt, list) and (not prompt or not isinstance(prompt[0], int)):
        if len(prompt) != 1:
            raise APIError(400, f"send one prompt a request, not {len(prompt)}", "prompt")
        prompt = prompt[0]
    return tokenize(tokenizer, prompt) if isinstance(prompt, str) else prompt


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
    prompt = render(tokenizer, turns, options)
    for role in {message["role"] for message in turns} - {"user", "assistant"}:
        if not shows(tokenizer, turns, role, options):
            raise APIError(400, "messages: the model's chat template leaves out what a message of "
                           f"role {role[:100]!r} says", "messages")
    return tokenize(tokenizer, prompt, add_special_tokens=False)


def turn(message):
    """A message as templates take it: role, content, and the name if it has one."""
    name = {"name": message.name} if message.name else {}
    return {"role": message.role, "content": text_of(message), **name}


def text_of(message):
    """A message's content as one text; it may come in parts."""
    if isinstance(message.content, str):
        return message.content
    return "".join(part.text for part in message.content)


def render(tokenizer, turns, options):
    """The conversation as one text."""
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except Exception as error:  # a template refuses roles and orders in its own words
        raise APIError(400, f"the model's chat template says: {error!r}"[:300], "messages")


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

    def text(self, tokens):
        if self.backend is not None:
            return self.backend.decode(tokens, skip_special_tokens=True)
        return self.tokenizer.decode(tokens, skip_special_tokens=True,
                                     clean_up_tokenization_spaces=False)


@functools.lru_cache(8)
def decoder_of(tokenizer):
    return Decoder(tokenizer)


class Detokenizer:
    """Turns an answer's tokens into text as they come: what prompt and answer decode to as a whole.

    window: the last tokens, some of them in front whose text is out, since a decoder may treat the
    first one of a text in its own way; at the beginning those are the prompt's. given: characters
    of the window's text that are out. held: text that may become a stop string.
    """

    FRONT = 8  # tokens: more than the bytes of a character

    def __init__(self, tokenizer, stop=(), prompt=()):
        self.decoder = decoder_of(tokenizer)
        self.stop = stop
        special = self.decoder.special
        self.stop_tokens = {special[name] for name in stop if name in special}
        self.window = [t for t in prompt[-4 * self.FRONT:] if t not in self.decoder.skipped]
        self.given = len(self.decoder.text(self.window))
        self.held = ""
        self.stopped = False

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
        text = settled(whole)
        new = text[self.given:]
        self.given = max(self.given, len(text))
        if len(self.window) > 4 * self.FRONT:
            self.window = self.window[-self.FRONT:]
            self.given = len(self.decoder.text(self.window)) - (len(whole) - self.given)
        return self.release(new)

    def finish(self):
        """What is left when no more tokens come."""
        if self.stopped:
            return ""
        text = self.release(self.decoder.text(self.window)[self.given:])
        return text + self.held

    def release(self, text):
        """Pass text on, up to a stop string or to what may be the beginning of one."""
        if not self.stop:
            return text
        text = self.held + text
        found = [text.find(stop) for stop in self.stop if stop in text]
        if found:
            self.stopped = True
            self.held = ""
            return text[:min(found)]
        cut = len(text) - max(overlap(text, stop) for stop in self.stop)
        self.held = text[cut:]
        return text[:cut]


def settled(text):
    """The text without a last character that is not whole yet."""
    return text.removesuffix("\ufffd")


def overlap(text, stop):
    """How many characters at the end of `text` may be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return max((n for n in range(1, longest + 1) if text.endswith(stop[:n])), default=0)


class Piece(NamedTuple):
    """Some text of an answer, with the number of tokens so far; the last has the reason."""

    text: str
    finish_reason: str | None
    tokens: int


async def pieces(engine, sequence):
    """Yield a Piece for each token of a sequence, as it comes.

    Tokens that came while the client was slow make one piece; the last one carries the reason.
    Raises APIError for an answer that ends before its end.
    """
    detokenizer = Detokenizer(engine.tokenizer, sequence.params.stop, sequence.prompt_tokens)
    text = ""
    count = 0
    try:
        async for token in sequence.stream():
            count += 1
            end = sequence.finish_reason  # looked at first: no token is added once it is set
            last = count == len(sequence.generated_tokens)
            if not (last and end == "stop"):  # the token that ends an answer is not of its text
                text += detokenizer.push(token)
            if detokenizer.stopped:
                engine.abort(sequence, "stop")
                yield Piece(text, "stop", count)
                return
            if not last:
                continue
            if end in ("stop", "length"):
                yield Piece(text + detokenizer.finish(), end, count)
                return
            yield Piece(text, None, count)
            text = ""
    except EngineStopped as error:
        raise APIError(500, str(error), code="engine_failed")
    if sequence.finish_reason == "timeout":
        raise APIError(408, "not done within the server's request timeout", code="timeout",
                       headers={"X-Should-Retry": "false"})  # openai's would, at the same cost
    raise APIError(503, "the server is shutting down", code="engine_stopped")

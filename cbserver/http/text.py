"""Text into tokens and tokens into text: prompts, chat templates, whole characters, stop strings."""
from typing import NamedTuple

from ..sequence import EngineStopped
from .errors import APIError


def prompt_tokens(tokenizer, prompt):
    """Token ids of a prompt: text, ids, or a list with one of either."""
    if isinstance(prompt, list) and (not prompt or not isinstance(prompt[0], int)):
        if len(prompt) != 1:
            raise APIError(400, f"send one prompt a request, not {len(prompt)}", "prompt")
        prompt = prompt[0]
    return tokenize(tokenizer, prompt) if isinstance(prompt, str) else prompt


def chat_tokens(tokenizer, messages):
    """Token ids of a conversation, by the tokenizer's own chat template."""
    if not tokenizer.chat_template:
        raise APIError(400, "this model has no chat template; use /v1/completions", "messages")
    turns = [{"role": message.role, "content": text_of(message)} for message in messages]
    try:
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template refuses roles and orders in its own words
        raise APIError(400, f"the model's chat template says: {error!r}"[:300], "messages")
    return tokenize(tokenizer, prompt, add_special_tokens=False)


def text_of(message):
    """A message's content as one text; it may come in parts."""
    if isinstance(message.content, str):
        return message.content
    return "".join(part.text for part in message.content)


def tokenize(tokenizer, text, **options):
    """Token ids of a text; half of a surrogate pair is a 400."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise APIError(400, "the prompt has half of a surrogate pair in it, which is no character",
                       "prompt")
    return tokenizer(text, **options)["input_ids"]


class Detokenizer:
    """Turns a sequence's tokens into text, piece by piece: whole characters only, no stop string.

    The text of `tokens[:given]` has gone out. To see what a new token adds, the tokens from
    `window` on are decoded with it and without it, since a decoder may treat a text's first token
    in its own way. `held` is text that may become a stop string.
    """

    def __init__(self, tokenizer, stop=()):
        self.tokenizer = tokenizer
        self.stop = stop
        self.tokens = []
        self.window = 0
        self.given = 0
        self.held = ""
        self.stopped = False

    def push(self, token):
        """The text that this token completes; often a word, sometimes nothing."""
        self.tokens.append(token)
        text = self.fresh()
        if text.endswith("\ufffd"):  # half a character
            return ""
        self.window = self.given
        self.given = len(self.tokens)
        return self.release(text)

    def finish(self):
        """What is left when no more tokens come."""
        if self.stopped:
            return ""
        text = self.release(self.fresh())
        return text + self.held

    def fresh(self):
        """The text of the tokens that have not gone out."""
        before = self.decode(self.tokens[self.window:self.given])
        return self.decode(self.tokens[self.window:])[len(before):]

    def decode(self, tokens):
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def release(self, text):
        """Pass text on, up to a stop string or to what may be the beginning of one."""
        text = self.held + text
        found = [text.find(stop) for stop in self.stop if stop in text]
        if found:
            self.stopped = True
            self.held = ""
            return text[:min(found)]
        cut = len(text) - max((overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[cut:]
        return text[:cut]


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
    detokenizer = Detokenizer(engine.tokenizer, sequence.params.stop)
    text = ""
    try:
        async for token in sequence.stream():
            text += detokenizer.push(token)
            count = len(detokenizer.tokens)
            if detokenizer.stopped:
                engine.abort(sequence, "stop")
                yield Piece(text, "stop", count)
                return
            end = sequence.finish_reason  # looked at first: no token is added once it is set
            if count < len(sequence.generated_tokens):
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

"""The answers of a request: a sequence for each, side by side, and what their client is told."""
import asyncio
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import NamedTuple

from ..sequence import EngineStopped
from .errors import APIError
from .text import Detokenizer
from .tools import CallReader

MOST = 16  # answers of a request


def fan_out(submit, request, prompts, params, n, field):
    """Submit all answers of a request, n to each prompt, or none of them: list of sequences.

    submit(request, tokens, params, field) takes one. Answer k of a prompt draws from seed + k.
    """
    sequences = []
    try:
        for tokens in prompts:
            for k in range(n):
                sequences.append(submit(request, tokens, with_seed(params, k), field))
    except APIError:
        for sequence in sequences:
            request.app.state.engine.abort(sequence)
            request.app.state.monitor.record(sequence, None)
        raise
    return sequences


def with_seed(params, k):
    """The same params for answer k of a prompt."""
    if params.seed is None or k == 0:
        return params
    return replace(params, seed=params.seed + k)


@contextmanager
def together(contexts):
    """Several context managers as one."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


class NamedLogprob(NamedTuple):
    """A token's text, bytes, log-probability, and [(text, bytes, log-probability)] of the likeliest.

    A prompt's first token has no log-probability: None. begin: where its text begins in the
    answer's; of a token that completes no character, where the next text does.
    """

    text: str
    bytes: list | None
    logprob: float | None
    top: list
    begin: int


class Piece(NamedTuple):
    """Some text of an answer, with the number of tokens so far; the last has the reason.

    index: which answer. logprobs: a NamedLogprob for each token since the piece before; None if
    nobody asked. calls: of tools, (name, arguments as JSON).
    """

    text: str
    finish_reason: str | None
    tokens: int
    index: int = 0
    logprobs: list | None = None
    calls: list = ()


class Answer:
    """What a client is told of one sequence: tokens go in, pieces come out."""

    def __init__(self, tokenizer, sequence, index):
        self.sequence = sequence
        self.params = sequence.params
        self.index = index
        self.reader = CallReader(self.params.call_format) if self.params.call_format else None
        self.plain = self.reader is None and self.params.logprobs is None
        self.text = ""  # since the piece before
        self.tokens = []  # all whose text belongs to the answer, and where that begins
        self.begins = []
        self.count = 0  # tokens so far
        self.told = 0  # log-probabilities that are out
        if self.params.echo:
            self.detokenizer = Detokenizer(tokenizer)
            self.tokens += sequence.prompt_tokens
            self.text, self.begins = self.detokenizer.echo(sequence.prompt_tokens)
        else:
            self.detokenizer = Detokenizer(tokenizer, prompt=sequence.prompt_tokens)

    def push(self, token, ends):
        """One more token. ends: it is the model's sign for the end, which is not of the text."""
        if self.params.prompt_only:
            return
        if self.count == self.params.min_tokens:
            self.detokenizer.watch(self.params.stop, self.params.stop_token_ids)
        self.count += 1
        self.tokens.append(token)
        self.begins.append(self.detokenizer.length)
        if not ends:
            self.text += self.detokenizer.push(token)

    def piece(self, finish_reason=None):
        """What came since the piece before, as a Piece."""
        text = self.text
        self.text = ""
        if self.plain and finish_reason is None:  # as for most tokens
            return Piece(text, None, self.count, self.index)
        calls = []
        if finish_reason:
            text += self.detokenizer.finish()
        if self.reader is not None:
            text = self.reader.push(text)
        if self.reader is not None and finish_reason:
            rest, calls = self.reader.finish()
            text += rest
        reason = "tool_calls" if calls else finish_reason
        return Piece(text, reason, self.count, self.index, self.logprobs(), calls)

    def logprobs(self):
        """NamedLogprobs of the tokens since the piece before; None if nobody asked."""
        if self.params.logprobs is None:
            return None
        news = slice(self.told, len(self.tokens))
        self.told = len(self.tokens)
        found = self.sequence.logprobs
        if self.params.echo:  # nothing foretells a prompt's first token
            found = [None, *found]
        return [self.named(*its) for its in zip(self.tokens[news], found[news],
                                                 self.begins[news])]

    def named(self, token, found, begin):
        """A token and its TokenLogprob, or None, as a NamedLogprob."""
        name = self.detokenizer.decoder.named
        if found is None:
            return NamedLogprob(*name(token), None, [], begin)
        top = [(*name(other), speakable(logprob)) for other, logprob in found.top]
        return NamedLogprob(*name(token), speakable(found.logprob), top, begin)


def speakable(logprob):
    """JSON has no infinity; OpenAI's lowest number stands for it."""
    return max(-9999.0, logprob)


def pieces(engine, sequences):
    """Yield a Piece for each token of each sequence, as they come.

    Tokens that came while the client was slow make one piece; the last one of an answer carries
    the reason. Raises APIError for an answer that ends before its end.
    """
    if len(sequences) == 1:
        return pieces_of(engine, sequences[0])
    return side_by_side([pieces_of(engine, sequence, index)
                         for index, sequence in enumerate(sequences)])


async def pieces_of(engine, sequence, index=0):
    """Yield the Pieces of one sequence."""
    arguments = engine.tokenizer, sequence, index
    if sequence.params.echo:  # looks at every token of the prompt
        answer = await asyncio.to_thread(Answer, *arguments)
    else:
        answer = Answer(*arguments)
    try:
        async for token in sequence.stream():
            end = sequence.finish_reason  # looked at first: no token is added once it is set
            last = answer.count + 1 == len(sequence.generated_tokens)
            answer.push(token, last and end == "stop")
            if answer.detokenizer.stopped:
                engine.abort(sequence, "stop")
                yield answer.piece("stop")
                return
            if not last:
                continue
            if end in ("stop", "length"):
                yield answer.piece(end)
                return
            yield answer.piece()
    except EngineStopped as error:
        raise APIError(500, str(error), code="engine_failed")
    if sequence.finish_reason == "timeout":
        raise APIError(408, "not done within the server's request timeout", code="timeout",
                       headers={"X-Should-Retry": "false"})  # openai's would, at the same cost
    raise APIError(503, "the server is shutting down", code="engine_stopped")


async def side_by_side(streams):
    """Yield what several async generators do, as it comes; the first error ends them all."""
    arrived = asyncio.Queue()

    async def pass_on(stream):
        try:
            async for piece in stream:
                arrived.put_nowait(piece)
            arrived.put_nowait(None)
        except Exception as error:
            arrived.put_nowait(error)

    tasks = [asyncio.create_task(pass_on(stream)) for stream in streams]
    try:
        left = len(tasks)
        while left:
            piece = await arrived.get()
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                left -= 1
            else:
                yield piece
    finally:
        for task in tasks:
            task.cancel()

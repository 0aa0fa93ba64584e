"""The JSON of an answer, whole or in chunks, and the response that streams it."""
import asyncio
import json
import math
import time
import uuid
from json.encoder import encode_basestring_ascii

from fastapi import Request, Response
from fastapi.responses import JSONResponse

DONE = "data: [DONE]\n\n"


def event(data):
    """One server-sent event; lines end in LF, since some clients lose events that end in CRLF."""
    return f"data: {json.dumps(data)}\n\n"


class Said:
    """What a client has been told of one answer."""

    def __init__(self):
        self.tokens = 0
        self.template = None  # a ChunkTemplate, in a stream
        # In a whole answer:
        self.text = ""
        self.logprobs = None  # as a Piece has them
        self.calls = []
        self.finish_reason = None


class Reply:
    """The JSON shapes of a request's answers: as text, or as chat messages.

    prompts: a sequence of each prompt.
    """

    def __init__(self, model_name, prompts, chat):
        self.chat = chat
        self.prompts = prompts
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.base = {"id": self.id, "created": int(time.time()), "model": model_name}
        self.answers = {}  # index: Said

    # As one JSON object

    def add(self, piece):
        """Remember a Piece for `whole`."""
        said = self.answers.setdefault(piece.index, Said())
        said.tokens = piece.tokens
        said.text += piece.text
        said.calls += piece.calls
        said.finish_reason = piece.finish_reason
        if piece.logprobs is not None:
            said.logprobs = said.logprobs or []
            said.logprobs += piece.logprobs

    def whole(self):
        """All answers."""
        kind = "chat.completion" if self.chat else "text_completion"
        choices = [self.whole_choice(index) for index in sorted(self.answers)]
        return {**self.base, "object": kind, "choices": choices, "usage": self.usage()}

    def whole_choice(self, index):
        said = self.answers[index]
        content = {"text": said.text}
        if self.chat:
            content = {"message": {"role": "assistant", "content": said.text}}
        if said.calls:
            content["message"]["content"] = said.text or None
            content["message"]["tool_calls"] = [call_json(call) for call in said.calls]
        return {"index": index, **content, "logprobs": self.logprobs(said.logprobs),
                "finish_reason": said.finish_reason}

    # As events

    def chunk(self, piece):
        """A Piece as an event. The role goes out with the first token: earlier, it fakes a TTFT."""
        said = self.answers.get(piece.index) or self.begin(piece.index)
        first = said.tokens == 0
        said.tokens = piece.tokens
        if first or piece.finish_reason or piece.logprobs is not None:
            return self.piece(piece, {"role": "assistant"} if first else {})
        return said.template.fill(piece.text)

    def begin(self, index):
        """The Said of an answer that begins."""
        said = Said()
        choice = {"index": index, **self.content({"content": "TEXT"}), "logprobs": None,
                  "finish_reason": None}
        said.template = ChunkTemplate(self.event([choice]))
        self.answers[index] = said
        return said

    def piece(self, piece, role):
        delta = {**role, "content": piece.text}
        if piece.calls:
            delta = {**role, **({"content": piece.text} if piece.text else {}),
                     "tool_calls": [{"index": i, **call_json(call)}
                                    for i, call in enumerate(piece.calls)]}
        choice = {"index": piece.index, **self.content(delta),
                  "logprobs": self.logprobs(piece.logprobs),
                  "finish_reason": piece.finish_reason}
        return self.event([choice])

    def content(self, delta):
        return {"delta": delta} if self.chat else {"text": delta["content"]}

    def usage_chunk(self):
        """The last event of a stream whose client asked for the token counts."""
        return self.event([], usage=self.usage())

    def event(self, choices, **more):
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return event({**self.base, "object": kind, "choices": choices, **more})

    # In both

    def usage(self):
        count = sum(said.tokens for said in self.answers.values())
        prompt_tokens = sum(len(sequence.prompt_tokens) for sequence in self.prompts)
        cached = sum(sequence.num_cached_tokens for sequence in self.prompts)
        return {"prompt_tokens": prompt_tokens, "completion_tokens": count,
                "total_tokens": prompt_tokens + count,
                "prompt_tokens_details": {"cached_tokens": cached}}

    def logprobs(self, named):
        """NamedLogprobs as OpenAI's two routes show them; None stays None."""
        if named is None:
            return None
        if self.chat:
            return {"content": [chat_logprob(token) for token in named], "refusal": None}
        return {"tokens": [token.text for token in named],
                "token_logprobs": [token.logprob for token in named],
                "top_logprobs": [by_text(token) for token in named],
                "text_offset": [token.begin for token in named]}


def chat_logprob(token):
    """A NamedLogprob as chats show it."""
    top = [{"token": text, "bytes": its_bytes, "logprob": logprob}
           for text, its_bytes, logprob in token.top]
    return {"token": token.text, "bytes": token.bytes, "logprob": token.logprob,
            "top_logprobs": top}


def by_text(token):
    """{text: log-probability} of the likeliest tokens and of the chosen one."""
    if token.logprob is None:
        return None
    likeliest = {text: logprob for text, _, logprob in reversed(token.top)}
    return {token.text: token.logprob, **likeliest}


def call_json(call):
    """A call of a tool, as OpenAI has it."""
    name, arguments = call
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
            "function": {"name": name, "arguments": arguments}}


class ChunkTemplate:
    """Most chunks of a stream differ in their text alone, so their JSON is written once."""

    def __init__(self, chunk):
        self.before, self.after = chunk.rsplit('"TEXT"', 1)  # a model may be called TEXT, too

    def fill(self, text):
        return self.before + encode_basestring_ascii(text) + self.after


class WholeAnswer(Response):
    """One JSON object, inside of `attended` while it is made. A client that leaves ends it.

    answer: a coroutine that returns it, or raises APIError.
    """

    def __init__(self, answer, headers, attended):
        self.background = None
        self.extra_headers = headers
        self.answer = answer
        self.attended = attended

    async def __call__(self, scope, receive, send):
        with self.attended:
            answering = asyncio.create_task(self.answer)
            leaving = asyncio.create_task(until_disconnect(Request(scope, receive)))
            try:
                await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
            finally:
                leaving.cancel()
                answering.cancel()  # harmless if it is done
                await asyncio.wait([answering])
        if not answering.cancelled():
            await JSONResponse(answering.result(), headers=self.extra_headers)(scope, receive, send)


class EventStream(Response):
    """Server-sent events, inside of `attended` even if the client leaves before the first.

    limit: seconds; a client that never reads is given up then, whatever is left to send. None:
    never. silence: seconds without an event after which a comment goes out, which clients skip:
    proxies cut off a connection that says nothing. None: never.
    """

    media_type = "text/event-stream"
    comment = {"type": "http.response.body", "body": b": still here\n\n", "more_body": True}

    def __init__(self, events, headers, attended, limit, silence=None):
        self.status_code = 200
        self.background = None
        self.init_headers(headers)
        self.events = events
        self.attended = attended
        self.limit = limit
        self.silence = silence
        self.last = math.inf  # when it fell silent, seconds of time.monotonic(); inf: it has not

    async def __call__(self, scope, receive, send):
        direct_send = scope.get("direct_send", send)
        with self.attended:
            sending = asyncio.create_task(self.send_all(direct_send, send))
            leaving = asyncio.create_task(until_disconnect(Request(scope, receive)))
            breaking = asyncio.create_task(self.break_silence(direct_send))
            try:
                await asyncio.wait([sending, leaving], timeout=self.limit,
                                   return_when=asyncio.FIRST_COMPLETED)
            finally:
                breaking.cancel()
                leaving.cancel()
                sending.cancel()  # harmless if it is done
                await asyncio.wait([sending])
            if not sending.cancelled():
                sending.result()

    async def break_silence(self, direct_send):
        """Send a comment whenever nothing has gone out for too long."""
        while self.silence:
            idle = max(0, time.monotonic() - self.last)
            if idle >= self.silence:
                await direct_send(self.comment)
                self.last = time.monotonic()
                idle = 0
            await asyncio.sleep(self.silence - idle)

    async def send_all(self, direct_send, send):
        """The start goes through all middleware, each event past it."""
        await send({"type": "http.response.start", "status": self.status_code,
                    "headers": self.raw_headers})
        self.last = time.monotonic()
        async for text in self.events:
            self.last = math.inf  # while it is being sent; a slow client needs no comment
            await direct_send({"type": "http.response.body", "body": text.encode(),
                               "more_body": True})
            self.last = time.monotonic()
        self.last = math.inf
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_disconnect(request):
    """Return when the client has gone. A handler of a whole reply is not told otherwise."""
    while (await request.receive())["type"] != "http.disconnect":
        pass

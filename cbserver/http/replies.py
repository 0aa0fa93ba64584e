"""The JSON of an answer, whole or in chunks, and the response that streams it."""
import asyncio
import json
import time
import uuid
from json.encoder import encode_basestring_ascii

from fastapi import Request, Response

DONE = "data: [DONE]\n\n"


def event(data):
    """One server-sent event; lines end in LF, since some clients lose events that end in CRLF."""
    return f"data: {json.dumps(data)}\n\n"


class Reply:
    """The JSON shapes of one answer: as text, or as a chat message."""

    def __init__(self, model_name, prompt_tokens, chat):
        self.chat = chat
        self.prompt_tokens = prompt_tokens  # how many
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.base = {"id": self.id, "created": int(time.time()), "model": model_name}
        self.template = ChunkTemplate(self.piece("TEXT"))
        self.count = 0  # completion tokens so far

    def whole(self, text, finish_reason, count):
        """The answer as one JSON object."""
        message = {"message": {"role": "assistant", "content": text}}
        content = message if self.chat else {"text": text}
        kind = "chat.completion" if self.chat else "text_completion"
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}
        return {**self.base, "object": kind, "choices": [choice], "usage": self.usage(count)}

    def chunk(self, piece):
        """A Piece as an event. The role goes out with the first token: earlier, it fakes a TTFT."""
        first = self.count == 0
        self.count = piece.tokens
        if piece.finish_reason is None and not first:
            return self.template.fill(piece.text)
        role = {"role": "assistant"} if first else {}
        return self.piece(piece.text, piece.finish_reason, **role)

    def usage_chunk(self):
        """The last event of a stream whose client asked for the token counts."""
        return self.event([], usage=self.usage(self.count))

    def piece(self, text, finish_reason=None, **role):
        content = {"delta": {**role, "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}
        return self.event([choice])

    def event(self, choices, **more):
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return event({**self.base, "object": kind, "choices": choices, **more})

    def usage(self, count):
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": count,
                "total_tokens": self.prompt_tokens + count}


class ChunkTemplate:
    """Most chunks of a stream differ in their text alone, so their JSON is written once."""

    def __init__(self, chunk):
        self.before, self.after = chunk.split('"TEXT"')

    def fill(self, text):
        return self.before + encode_basestring_ascii(text) + self.after


class EventStream(Response):
    """Server-sent events, inside of `attended` even if the client leaves before the first.

    limit: seconds; a client that never reads is given up then, whatever is left to send. None:
    never.
    """

    media_type = "text/event-stream"

    def __init__(self, events, headers, attended, limit):
        self.status_code = 200
        self.background = None
        self.init_headers(headers)
        self.events = events
        self.attended = attended
        self.limit = limit

    async def __call__(self, scope, receive, send):
        with self.attended:
            sending = asyncio.create_task(self.send_all(scope.get("direct_send", send), send))
            leaving = asyncio.create_task(until_disconnect(Request(scope, receive)))
            try:
                await asyncio.wait([sending, leaving], timeout=self.limit,
                                   return_when=asyncio.FIRST_COMPLETED)
            finally:
                leaving.cancel()
                sending.cancel()  # harmless if it is done
                await asyncio.wait([sending])
            if not sending.cancelled():
                sending.result()

    async def send_all(self, direct_send, send):
        """The start goes through all middleware, each event past it."""
        await send({"type": "http.response.start", "status": self.status_code,
                    "headers": self.raw_headers})
        async for text in self.events:
            await direct_send({"type": "http.response.body", "body": text.encode(),
                               "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_disconnect(request):
    """Return when the client has gone. A handler of a whole reply is not told otherwise."""
    while (await request.receive())["type"] != "http.disconnect":
        pass

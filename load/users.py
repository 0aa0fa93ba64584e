"""Many users of an OpenAI-compatible server in one process, at the least cost for the client.

Locust has tables and charts, and costs 140 µs an event; this reads ready lines from raw sockets,
where the cost of the server's own HTTP layer is the question.
"""
import asyncio
import json
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Outcome:
    """One request: HTTP status, when it was sent, when each event came, what the server counted."""

    status: int = 0
    start: float = 0.0  # seconds of time.perf_counter()
    event_times: list = field(default_factory=list)
    tokens: int = 0  # completion tokens, as the server reports them
    error: str | None = None


def run(url, requests, users=50, api_key=None):
    """Send all requests, `users` at a time, each user the next one when its last is done.

    requests: objects with prompt_tokens and max_tokens. Returns ([Outcome], seconds).
    """
    return asyncio.run(closed_loop(url, requests, users, api_key))


async def closed_loop(url, requests, users=50, api_key=None):
    outcomes, numbered = [None] * len(requests), iter(enumerate(requests))

    async def user():
        reader = writer = None
        try:
            for i, request in numbered:
                if writer is None or writer.is_closing():
                    where = urlsplit(url)
                    reader, writer = await asyncio.open_connection(where.hostname, where.port)
                outcomes[i] = await ask(reader, writer, request, api_key)
        finally:
            if writer is not None:
                writer.close()

    start = time.perf_counter()
    await asyncio.gather(*[user() for _ in range(min(users, len(requests)))])
    return outcomes, time.perf_counter() - start


async def ask(reader, writer, request, api_key=None):
    """One streamed completion over an open connection, which stays open: an Outcome."""
    body = json.dumps({"prompt": request.prompt_tokens, "max_tokens": request.max_tokens,
                       "temperature": 0, "ignore_eos": True, "stream": True,
                       "stream_options": {"include_usage": True}})
    key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
    writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{key}Content-Type: "
                 f"application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    outcome, last = Outcome(start=time.perf_counter()), b""
    outcome.status = int((await reader.readline()).split()[1])
    while (line := await reader.readline()).strip():  # headers
        if line.lower().startswith(b"content-length:") and outcome.status != 200:
            last = b"error"
            length = int(line.split(b":")[1])
    if outcome.status != 200:
        outcome.error = (await reader.readexactly(length)).decode() if last else "no body"
        return outcome
    while line := await reader.readline():
        if line.startswith(b"data: [DONE]"):
            break
        if line.startswith(b"data: "):
            outcome.event_times.append(time.perf_counter())
            last = line
    while (line := await reader.readline()) not in (b"0\r\n", b""):  # the end of the chunks
        pass
    await reader.readline()
    end = json.loads(last[6:]) if last else {"error": "cut off"}
    outcome.error = json.dumps(end["error"]) if "error" in end else None
    if not outcome.error:
        outcome.event_times.pop()  # the usage
        outcome.tokens = end["usage"]["completion_tokens"]
    return outcome

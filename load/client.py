"""Many users of an OpenAI-compatible server in one process, at the least cost for the client.

Locust has tables and charts, and costs 140 µs an event; this reads ready lines from raw sockets,
where the cost of the server's own HTTP layer is the question.
"""
import asyncio
import json
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from load.process import LoadFailed
from load.sse import DONE, StreamFailed, data_of, read_event


@dataclass
class Outcome:
    """One request: HTTP status, when it was sent, when each event came, what the server counted."""

    LEFT = "the client left"  # an error of its own making
    status: int = 0
    start: float = 0.0  # seconds of time.perf_counter()
    event_times: list = field(default_factory=list)
    tokens: int = 0  # completion tokens, as the server reports them
    error: str | None = None

    @property
    def ttft(self):
        """Seconds from sending the request to its first event."""
        return self.event_times[0] - self.start


def expect_success(outcomes):
    """Raise LoadFailed, with how many and why, unless every request was answered."""
    errors = [outcome.error for outcome in outcomes if outcome.error]
    if errors:
        raise LoadFailed(f"{len(errors)} of {len(outcomes)} requests failed, the first with: "
                         f"{errors[0]}")


def run(url, requests, users=50, thinks=None):
    """Send all requests, `users` at a time, each user the next one when its last is done.

    requests: objects with prompt_tokens and max_tokens. thinks(i): seconds before request i; none
    unless given. Returns ([Outcome], seconds).
    """
    return asyncio.run(closed_loop(url, requests, users, thinks))


async def closed_loop(url, requests, users, thinks=None):
    """The same in an event loop that is already there."""
    outcomes = [None] * len(requests)
    numbered = iter(enumerate(requests))  # one for all users: whoever is free takes the next

    async def user():
        connection = await connect(url)
        for i, request in numbered:
            if thinks:  # a server hangs up on those who think longer than its keep-alive
                connection.close()
                await asyncio.sleep(thinks(i))
                connection = await connect(url)
            outcomes[i] = await connection.ask(request)
            if outcomes[i].error:
                connection.close()
                connection = await connect(url)
        connection.close()

    start = time.perf_counter()
    await asyncio.gather(*[user() for _ in range(min(users, len(requests)))])
    return outcomes, time.perf_counter() - start


async def connect(url, api_key=None):
    where = urlsplit(url)
    return Connection(*await asyncio.open_connection(where.hostname, where.port), api_key)


class Connection:
    """A connection that stays open from one request to the next; after an error it is spent."""

    def __init__(self, reader, writer, api_key=None):
        self.reader = reader
        self.writer = writer
        self.authorization = f"Authorization: Bearer {api_key}\r\n" if api_key else ""

    def close(self):
        self.writer.close()

    async def ask(self, request, leave_after=None):
        """One streamed completion, or its first `leave_after` events: an Outcome."""
        body = json.dumps({"prompt": request.prompt_tokens, "max_tokens": request.max_tokens,
                           "temperature": 0, "ignore_eos": True, "stream": True,
                           "stream_options": {"include_usage": True}})
        head = (f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{self.authorization}"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n")
        outcome = Outcome(start=time.perf_counter())
        self.writer.write(f"{head}{body}".encode())
        try:
            await self.read(outcome, leave_after)
        except StreamFailed as error:
            outcome.error = str(error)
        except (OSError, ValueError, IndexError, asyncio.IncompleteReadError) as error:
            outcome.error = f"cut off: {error!r}"
        return outcome

    async def read(self, outcome, leave_after):
        """Fill in the outcome; raises what `ask` takes for a failure."""
        status_line = await self.reader.readline()
        outcome.status = int(status_line.split()[1])
        while (await self.reader.readline()).strip():  # headers
            pass
        if outcome.status != 200:
            outcome.error = f"HTTP {outcome.status}"
            return
        last = await self.read_events(outcome, leave_after)
        if outcome.error:
            return
        while await self.reader.readline() not in (b"0\r\n", b""):  # the last of the chunks
            pass
        await self.reader.readline()
        if not last:
            raise StreamFailed("the stream brought no event")
        outcome.event_times.pop()  # the last event is no token: it brings the usage, or an error
        counted = read_event(last).completion_tokens
        if counted is None:
            raise StreamFailed("the last event brings no usage")
        outcome.tokens = counted

    async def read_events(self, outcome, leave_after):
        """Time the events up to [DONE]; returns the data of the last one before it."""
        last = b""
        while line := await self.reader.readline():
            data = data_of(line)
            if data == DONE:
                return last
            if not data:
                continue
            outcome.event_times.append(time.perf_counter())
            last = data
            if len(outcome.event_times) == leave_after:
                outcome.error = Outcome.LEFT
                return last
        raise asyncio.IncompleteReadError(last, None)

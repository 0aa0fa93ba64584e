"""A client's connection before there is a request: how many, how large a head, how long it may take."""
import contextlib
import functools
import http
import json
import socket

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .errors import APIError

MAX_HEAD = 64 * 1024  # bytes of a request's first line and headers
TURNED_AWAY_S = 1  # seconds that a connection over the limit has to ask and be told


def bounded(max_connections, receive_timeout):
    """What uvicorn's `Config(http=…)` takes, with an end to what uvicorn alone would wait for.

    max_connections: open at once; one more is told 503. receive_timeout: seconds in which the head
    of a request must be whole; one of more than MAX_HEAD bytes is told 431.
    """
    return functools.partial(BoundedConnection, max_connections, receive_timeout)


class BoundedConnection(HttpToolsProtocol):
    """See `bounded`."""

    def __init__(self, max_connections, receive_timeout, *arguments, **named):
        super().__init__(*arguments, **named)
        self.max_connections = max_connections
        self.receive_timeout = receive_timeout
        self.turned_away = False
        self.in_head = True
        self.head_bytes = 0  # of the head that is arriving
        self.head_timer = None
        self.cycles = []  # requests whose answers are not done: one, or more where a client pipelines

    def connection_made(self, transport):
        super().connection_made(transport)
        client = transport.get_extra_info("socket")
        with contextlib.suppress(OSError):  # a token must not wait for the next to fill a packet
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.turned_away = len(self.connections) > self.max_connections
        self.await_head(TURNED_AWAY_S if self.turned_away else self.receive_timeout)

    def connection_lost(self, error):
        self.head_timer.cancel()
        for cycle in self.cycles:  # uvicorn tells the last one only that its client has gone
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(error)

    def await_head(self, seconds):
        """The connection ends unless a head is whole by then."""
        self.in_head = True
        self.head_bytes = 0
        self.head_timer = self.loop.call_later(seconds, self.transport.close)

    def data_received(self, data):
        if self.turned_away:
            self.refuse(503, f"{self.max_connections} connections are open; try again later")
            return
        room = MAX_HEAD - self.head_bytes
        if self.in_head and len(data) > room:
            super().data_received(data[:room])  # the head may end in there, and a body follow
            data = data[room:]
            if self.in_head:
                self.refuse(431, f"the headers are larger than the limit of {MAX_HEAD} bytes")
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.in_head:
            self.head_bytes += len(data)

    def on_message_begin(self):
        super().on_message_begin()
        if not self.in_head:  # a further request on the same connection
            self.await_head(self.receive_timeout)

    def on_headers_complete(self):
        self.in_head = False
        self.head_timer.cancel()
        super().on_headers_complete()
        self.cycles = [cycle for cycle in self.cycles if not cycle.response_complete]
        self.cycles.append(self.cycle)
        if self.scope["http_version"] == "1.0":  # knows no chunks: a body ends with its connection
            self.cycle.chunked_encoding = False
            self.cycle.expected_content_length = AnyLength()

    def refuse(self, status, message):
        """Answer without asking the app, and end the connection."""
        body = json.dumps(APIError(status, message).detail).encode()
        head = (f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n"
                "Content-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n")
        self.transport.write(head.encode() + body)
        self.transport.close()


class AnyLength:
    """Stands for the length of a body that nobody knows, where uvicorn counts bytes."""

    def __lt__(self, length):
        return False

    def __sub__(self, length):
        return self

    def __ne__(self, length):
        return False

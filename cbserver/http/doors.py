"""What stands before the app: the key, a body that is too large or too slow, HEAD, origins."""
import asyncio
import time

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request

from .errors import APIError, refused


def guard(app, authorize, max_body, timeout, cors=()):
    """Put all of them before a FastAPI app.

    authorize(request) raises APIError for who may not come in. max_body: bytes of a request.
    timeout: seconds until all of it must be here. cors: origins that browsers may call from.
    """
    app.add_middleware(BodyLimit, limit=max_body, timeout=timeout)
    app.add_middleware(HeadAsGet)
    app.add_middleware(Door, authorize=authorize)
    if cors:
        app.add_middleware(CORSMiddleware, allow_origins=cors, allow_methods=["*"],
                           allow_headers=["*"], expose_headers=["X-Request-Id", "X-Request-Number"])


def with_direct_send(app):
    """ASGI: an app that also finds the server's own `send` in its scope, as "direct_send".

    Each middleware wraps `send` once more, and a stream calls it for every token.
    """
    async def outermost(scope, receive, send):
        scope["direct_send"] = send
        await app(scope, receive, send)

    return outermost


class Door:
    """ASGI middleware: who may not come in is told so before any of the body is read."""

    def __init__(self, app, authorize):
        self.app = app
        self.authorize = authorize

    async def __call__(self, scope, receive, send):
        answer = self.app
        if scope["type"] == "http":
            request = Request(scope)
            try:
                self.authorize(request)
            except APIError as error:
                answer = await refused(request, error)
        await answer(scope, receive, send)


class BodyLimit:
    """ASGI middleware: a body of more than `limit` bytes is refused before all of it is read.

    One that is not whole after `timeout` seconds is given up.
    """

    def __init__(self, app, limit, timeout):
        self.app = app
        self.limit = limit
        self.timeout = timeout

    async def __call__(self, scope, receive, send):
        left = self.limit
        whole = False
        deadline = time.monotonic() + self.timeout

        async def counted():
            nonlocal left, whole
            if whole:  # what comes now is that the client has gone
                return await receive()
            try:
                wait = deadline - time.monotonic()
                message = await asyncio.wait_for(receive(), max(wait, 0))
            except TimeoutError:
                raise APIError(408, f"the body did not arrive within {self.timeout:g} seconds",
                               code="timeout", headers={"Connection": "close"})
            left -= len(message.get("body", b""))
            whole = not message.get("more_body")
            if left < 0:
                raise APIError(413, f"the body is larger than the limit of {self.limit} bytes")
            return message

        await self.app(scope, counted if scope["type"] == "http" else receive, send)


class HeadAsGet:
    """ASGI middleware: HEAD is answered as GET would be; the server leaves the body out."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and scope["method"] == "HEAD" and scope["path"] != "/events":
            scope = scope | {"method": "GET"}
        await self.app(scope, receive, send)

"""Rude clients for a soak: bodies that cost, heads that never end, connections that say nothing.

Each is tried again and again beside ordinary clients (`python -m bench.soak --abuse`). What is
measured is not these, but what the ordinary ones notice.
"""
import asyncio
import collections
import contextlib
import itertools
import json
import signal
import time
from urllib.parse import urlsplit

import psutil

MEBIBYTE = 2**20
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def user(content="hi", role="user", **more):
    return {"role": role, "content": content, **more}


def nested(depth, opening="[", closing="]"):
    return opening * depth + closing * depth


def bodies():
    """{what is hostile about it: (path, body as text)}, each at most 1 MiB."""
    chat, text = "/v1/chat/completions", "/v1/completions"
    calls = [CALL | {"function": {"name": f"f{i}", "arguments": "{}"}} for i in range(8000)]
    deep_call = CALL | {"function": {"name": "f", "arguments": nested(3000)}}
    broken_call = CALL | {"function": {"name": "f", "arguments": '{"a": '}}
    nearly = "ab" * 490
    sent = {
        "many roles": (chat, {"messages": [user(role=f"r{i}") for i in range(25_000)]}),
        "many messages": (chat, {"messages": [user("x") for _ in range(25_000)]}),
        "many calls": (chat, {"messages": [user(), user(None, "assistant", tool_calls=calls)]}),
        "many parts": (chat, {"messages": [user([{"type": "text", "text": "x"}] * 30_000)]}),
        "deep arguments": (chat, {"messages": [user(), user("", "assistant",
                                                            tool_calls=[deep_call])]}),
        "many tools": (chat, {"messages": [user()], "tools": [
            {"type": "function", "function": {"name": f"f{i}"}} for i in range(12_000)]}),
        "a broken call": (chat, {"max_tokens": 2, "messages": [user(), user("", "assistant",
            tool_calls=[broken_call]), user()]}),
        "many prompts": (text, {"prompt": ["a"] * 130_000}),
        "a long text": (text, {"prompt": "a " * 500_000}),
        "one long word": (text, {"prompt": "a" * 1_000_000}),
        "many digits": (text, {"prompt": "7" * 1_000_000}),
        "many ids": (text, {"prompt": [5] * 300_000}),
        "64 long stops": (text, {"prompt": nearly, "max_tokens": 4,
                                 "stop": [nearly + chr(200 + i) for i in range(64)]}),
        "half a pair": (text, {"prompt": "\ud83d", "max_tokens": 2})}
    found = {name: (path, json.dumps(body)) for name, (path, body) in sent.items()}
    found["deep JSON"] = (text, '{"prompt": ' + nested(500_000) + "}")
    found["deep tools"] = (chat, '{"messages": [{"role": "user", "content": "hi"}], "tools": ['
                           '{"type": "function", "function": {"name": "f", "parameters": '
                           + nested(400, '{"a":', "}").replace(":}", ":1}", 1) + "}}]}")
    return found


async def post(url, path, body, length=None, key=None):
    """One request over a connection of its own: its status, or what went wrong."""
    where = urlsplit(url)
    data = body.encode()
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    authorization = f"Authorization: Bearer {key}\r\n" if key else ""
    try:
        writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                     f"{authorization}Connection: close\r\n"
                     f"Content-Length: {length or len(data)}\r\n\r\n".encode())
        for begin in range(0, len(data), 65536):
            writer.write(data[begin:begin + 65536])
            await writer.drain()
        line = await reader.readline()
        return int(line.split()[1]) if line else "closed"
    finally:
        writer.close()


async def raw(url, data, seconds):
    """A connection that sends this and then nothing: what the server did within so many seconds."""
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        writer.write(data)
        answer = await asyncio.wait_for(reader.read(64), seconds)
        return int(answer.split()[1]) if answer.startswith(b"HTTP") else "closed"
    except TimeoutError:
        return "we hung up"
    finally:
        writer.close()


def acts(url, key):
    """{name: a function that does it once, a coroutine with the server's answer}."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
    found = {name: lambda path=path, body=body: post(url, path, body, key=key)
             for name, (path, body) in bodies().items()}
    found |= {
        "a body without end": lambda: post(url, "/v1/completions", '{"prompt": "a',
                                           length=MEBIBYTE, key=key),
        "no key": lambda: post(url, "/v1/completions", "x" * MEBIBYTE),
        "no key, no body": lambda: post(url, "/v1/completions", "", length=MEBIBYTE),
        "a body over the limit": lambda: post(url, "/v1/completions",
                                              "x" * (MEBIBYTE + 1), key=key),
        "a huge header": lambda: raw(url, head + b"X-A: " + b"a" * MEBIBYTE, 60),
        "a silent connection": lambda: raw(url, b"", 60),
        "half a head": lambda: raw(url, head, 60),
        "two requests and gone": lambda: raw(url, 2 * (
            b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"), 0.01)}
    return found


async def abuse(url, key, end, clients=4):
    """Do all of it in turns until `end` (time.monotonic()): {name: Counter of answers}."""
    every = acts(url, key)
    counts = {name: collections.Counter() for name in every}
    turn = itertools.cycle(every.items())

    async def rude():
        while time.monotonic() < end:
            name, act = next(turn)
            try:
                counts[name][str(await asyncio.wait_for(act(), 120))] += 1
            except TimeoutError:
                counts[name]["nothing within 120 s"] += 1
            except OSError as error:
                counts[name][type(error).__name__] += 1

    await asyncio.gather(*[rude() for _ in range(clients)])
    return counts


async def freeze(server, port, end, seconds=3, every=30):
    """Now and then one of the processes for HTTP stands still for some seconds.

    Returns [(begin, end, ports of the clients that it holds)], times of time.perf_counter().
    """
    stops = []
    for number in itertools.count():
        await asyncio.sleep(every)
        if time.monotonic() + seconds > end:
            return stops
        children = [child for child in server.children(recursive=True)
                    if any(c.laddr and c.laddr.port == port for c in child.net_connections())]
        if not children:
            return stops
        child = children[number % len(children)]
        held = {c.raddr.port for c in child.net_connections() if c.raddr}
        begin = time.perf_counter()
        child.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            with contextlib.suppress(psutil.Error):
                child.send_signal(signal.SIGCONT)
        stops.append((begin, time.perf_counter() + seconds, held))

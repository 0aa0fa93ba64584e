"""What the tests share: the tiny model, its reference outputs, and an engine stepped by hand."""
import asyncio
import contextlib
import functools
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest

import cbserver  # noqa: F401  before torch, whose threads it tells not to spin

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
LONGEST = 48  # tokens that a reference holds


def by_hand(engine, after=lambda: None):
    """An engine that runs only when the test calls `step()`; `after` runs after each delivery."""
    from cbserver.sequence import put_all

    def outbox(news):
        put_all(news)
        after()

    engine.open(outbox)
    return engine


def received(sequence):
    """What a reader of the stream gets at the end; fails if it would wait for ever."""
    async def read():
        return [token async for token in sequence.stream()]

    return finished(asyncio.wait_for(read(), 10))


def finished(coroutine):
    """What a coroutine returns. Not asyncio.run: a lesson that ran here may have changed it."""
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        return loop.run_until_complete(coroutine)


def plant(monkeypatch, owner, name, right, wrong):
    """Put a bug into a function of a class or module: its source, with one piece replaced."""
    import inspect
    import textwrap

    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(right) == 1, f"{right!r} is not once in {name}"
    names = {}
    exec(source.replace(right, wrong), inspect.unwrap(function).__globals__, names)
    monkeypatch.setattr(owner, name, names[name])


@contextlib.contextmanager
def serving(engine, **options):
    """A server of this engine on a free port, for the length of a `with`."""
    import lesson

    from cbserver.server import create_app

    server = lesson.Server(create_app(engine, **options))
    try:
        yield server.url
    finally:
        server.stop()


@contextlib.contextmanager
def serving_in_processes(engine, **options):
    """The same with HTTP in two processes of its own, and the engine here."""
    from cbserver.cli import take_port
    from cbserver.processes import HttpProcesses

    servers = HttpProcesses(engine, take_port("127.0.0.1", 0, 2), **options)
    servers.start()
    try:
        yield servers.url
    finally:
        servers.stop()


@pytest.fixture(params=[serving, serving_in_processes], ids=["a thread", "processes"])
def served(request):
    """Both ways of serving; each is a `serving`."""
    if request.param is serving_in_processes and sys.platform == "win32":
        pytest.skip("HTTP in processes of its own needs Linux or macOS")
    return request.param


def until(condition, seconds=30):
    """Wait until it is true; fails if it never is."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it never came true"
        time.sleep(0.01)


def metrics_say(url, *lines):
    """Wait until /metrics has all of these lines: a process for HTTP may be a moment late."""
    import httpx

    def missing():
        return set(lines) - set(httpx.get(f"{url}/metrics").text.splitlines())

    until(lambda: not missing())


@contextlib.contextmanager
def held(engine, after=0):
    """The engine's steps stand still after so many, until the event that is given here is set."""
    go_on = threading.Event()
    step = engine.step
    count = 0

    def hold():
        nonlocal count
        count += 1
        if count > after:
            go_on.wait(30)
        step()

    engine.step = hold
    try:
        yield go_on
    finally:
        go_on.set()


def by_asgi(app, engine, receive_more, send):
    """One streaming request straight into the app, over a `send` and `receive` of the test's."""
    body = json.dumps({"prompt": "a", "max_tokens": 1900, "ignore_eos": True, "stream": True})
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"",
             "headers": [(b"content-type", b"application/json")], "asgi": {"spec_version": "2.3"}}
    messages = [{"type": "http.request", "body": body.encode()}]

    async def receive():
        return messages.pop(0) if messages else await receive_more()

    async def main():
        async with app.router.lifespan_context(app):
            await asyncio.wait_for(app(scope, receive, send), 30)
            for _ in range(1000):
                if engine.stats().running == 0:
                    return
                await asyncio.sleep(0.01)

    asyncio.run(main())


@pytest.fixture(autouse=True)
def one_import():
    """A lesson drops the package to import it anew; the next test has the classes it began with."""
    loaded = {name: module for name, module in sys.modules.items()
              if name.split(".")[0] == "cbserver"}
    yield
    sys.modules.update(loaded)


def added_text(tokenizer, prompt_tokens, tokens):
    """What these tokens add to the text of the prompt; they may complete its last character."""
    before = tokenizer.decode(prompt_tokens, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt_tokens, *tokens], skip_special_tokens=True)
    return whole[len(os.path.commonprefix([before, whole])):]


def prompt(seed, length):
    import random

    rng = random.Random(seed)
    return [rng.randrange(511) for _ in range(length)]


@pytest.fixture(scope="session")
def tiny():
    import torch

    from cbserver.model.load import load_model

    device = os.environ.get("CB_TEST_DEVICE", "cpu")  # cuda: the same claims on a GPU
    return load_model("random:tiny", device=device, dtype=torch.float32)


@pytest.fixture(scope="session")
def reference(tiny):
    """reference(prompt_tokens, count): what `model.generate` makes of it alone, EOS ignored."""
    import torch

    model, _ = tiny

    @functools.cache
    def whole(tokens):
        ids = torch.tensor([tokens], device=model.device)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=LONGEST,
                                do_sample=False, eos_token_id=None)
        return output[0, len(tokens):].tolist()

    return lambda tokens, count: whole(tuple(tokens))[:count]


@pytest.fixture
def qwen3(tiny):
    """A random Qwen3: Llama's layers, but with norms on queries and keys; no end of sequence."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)).eval()
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            weight.data.normal_(0, 0.3 if "embed" in name else 2 / weight.shape[1] ** 0.5)
    model.generation_config.eos_token_id = None
    return model.to(tiny[0].device)


@pytest.fixture
def course(tmp_path):
    """A copy of the course that a test may write to."""
    for name in ("notebooks", "cbserver", "load", "bench"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path

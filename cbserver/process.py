"""The life of a server's process: prepare it, load the engine, serve, and end in two phases."""
import asyncio
import contextlib
import errno
import faulthandler
import functools
import gc
import logging
import math
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import uvicorn

from .batch import BatchRunner, StaticEngine
from .fast import FastStep
from .http.connection import bounded
from .http.doors import with_direct_send
from .model.load import check_context, default_model, fit_slots, load_model
from .model.trial import check_served
from .prefix import PrefixEngine, PrefixStep
from .scheduler import ContinuousEngine
from .sequence import SequentialEngine

try:
    import resource
except ImportError:  # Windows
    resource = None

log = logging.getLogger("cbserver")
MANY_FILES = 10_000
ENGINES = {"continuous": ContinuousEngine, "static": StaticEngine, "sequential": SequentialEngine}


def prepare():
    """Settings of a process that serves. Returns the list of the engine's failures, empty yet."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us; uvicorn's logs want it
            setattr(sys, name, open(os.devnull, "w"))
    sys.setswitchinterval(5e-4)  # the engine's thread need not wait 5 ms for the event loop's
    allow_many_files()
    failures = []

    def note(failure):
        threading.__excepthook__(failure)
        if failure.thread is not None and failure.thread.name == "engine":
            explain(failure)
            failures.append(failure)

    threading.excepthook = note
    return failures


def allow_many_files():
    """Raise the limit of open files, and so of connections, as far as this user may."""
    if resource:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):  # a Mac says "unlimited", and means less
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def event_loop():
    """The name of the event loop for uvicorn: the fastest, unless files are scarce.

    Where none is left for one more connection, uvloop closes that without a word; asyncio's own
    loop lets it wait until another one ends.
    """
    if not resource:
        return "auto"
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    plenty = soft == resource.RLIM_INFINITY or soft >= MANY_FILES
    return "auto" if plenty else "asyncio"


def explain(failure):
    """The engine's thread has ended: which knob helps, if one does."""
    if isinstance(failure.exc_value, torch.OutOfMemoryError):
        print("The GPU's memory ran out: lower --max-batch or --max-len.", file=sys.stderr)


def load_engine(args, engine_class=None):
    """The engine that the arguments ask for; raises ModelUnavailable."""
    # In a thread that ends: OpenMP keeps a team of workers for every thread that ran a parallel
    # loop, and a second team in the process slowed the engine's own by a quarter on two cores.
    with ThreadPoolExecutor(1) as thread:
        engine = thread.submit(build_engine, args, engine_class).result()
    # A full collection of garbage looks at every object of torch and transformers, and no stream
    # moves for a third of a second; they stay to the end, so it need not.
    gc.collect()
    gc.freeze()
    return engine


def served_name(args, engine):
    """What clients call the model: the name by which it was loaded, whatever chose it."""
    return args.model or default_model(engine.model.device.type == "cuda")


def build_engine(args, engine_class=None):
    """The model and the engine that the arguments ask for, its keys and values sized to fit."""
    dtype = getattr(torch, args.dtype) if args.dtype else None
    model, tokenizer = load_model(args.model, dtype=dtype)
    engine_class = engine_class or ENGINES[args.engine]
    if engine_class is SequentialEngine:
        check_context(model, args.max_len)
        return SequentialEngine(model, tokenizer, 1, args.max_len, args.max_waiting)
    check_served(model, BatchRunner)  # or its sizes may not be what they seem
    slots, max_len = fit_slots(model, args.max_batch, args.max_len)
    exact = model.dtype == torch.float32
    reuse = exact if args.prefix_reuse is None else args.prefix_reuse
    if reuse and engine_class is ContinuousEngine:
        engine_class = PrefixEngine
    fast = model.device.type == "cuda" if args.fast is None else args.fast
    step = PrefixStep if engine_class is PrefixEngine else FastStep
    runner = functools.partial(step, invariant=args.invariant) if fast else BatchRunner
    if issubclass(engine_class, ContinuousEngine):
        engine_class = functools.partial(engine_class, prefill_budget=args.prefill_budget)
    engine = engine_class(model, tokenizer, slots, max_len, args.max_waiting, runner)
    if isinstance(engine, ContinuousEngine):
        print(f"While answers stream, a step reads {engine.prefill_budget} prompt tokens at most.",
              flush=True)
    if not exact and (reuse or not getattr(engine.runner, "invariant", False)):
        print("In half precision an answer may depend on who else is served: the rounding changes "
              "with the batch, and with what is reused.", flush=True)
    return engine


# Seconds. Longer than clients and proxies keep an idle connection (httpx 5, aiohttp 15, nginx 60):
# where the server gives up first, a request that is just on its way is lost.
KEEP_ALIVE = 75


class Drain:
    """The end of an engine: closed to new requests (503), it has some seconds for those it has."""

    def __init__(self, engine, seconds):
        self.engine = engine
        self.seconds = seconds
        self.deadline = math.inf
        self.told = False  # that answers are being finished
        self.cut_off = 0  # answers

    @property
    def begun(self):
        return self.deadline < math.inf

    @property
    def problem(self):
        """What went wrong, as a sentence, or None."""
        if self.cut_off:
            return f"Answers cut off at the end of --drain-timeout: {self.cut_off}."

    def begin(self):
        """Harmless if it has begun."""
        if not self.begun:
            self.deadline = time.monotonic() + self.seconds
            self.engine.close(None)

    def is_late(self):
        """Asked a few times a second: whether the time is over. Then what is left is cut off."""
        if not self.begun:
            return False
        stats = self.engine.stats()
        left = stats.running + stats.waiting
        if left and not self.told:
            self.told = True
            log.info("Answers to finish: %d, for %g seconds at most; a second signal ends at once",
                     left, self.seconds)
        late = time.monotonic() > self.deadline
        if late:
            self.cut_off += left
            self.engine.close("abort")
        return late


class DrainingServer(uvicorn.Server):
    """uvicorn that ends with its engine: a first signal drains it, a second one ends at once.

    drain_timeout: seconds.
    """

    def __init__(self, app, host, port, drain_timeout=30, max_connections=4096,
                 receive_timeout=30):
        super().__init__(uvicorn.Config(with_direct_send(app), host=host, port=port,
                                        log_level="warning", timeout_graceful_shutdown=5,
                                        loop=event_loop(), timeout_keep_alive=KEEP_ALIVE,
                                        http=bounded(max_connections, receive_timeout),
                                        ws="none"))
        self.engine = app.state.engine
        self.drain = Drain(self.engine, drain_timeout)
        self.quiet_until = 0.0

    async def startup(self, sockets=None):
        asyncio.get_running_loop().set_exception_handler(self.note_trouble)
        await super().startup(sockets)
        if self.drain.begun:  # the signal came first, and then the app has opened the engine
            self.engine.close(None)

    def note_trouble(self, loop, context):
        """What asyncio reports. Where files are scarce it does so for every try, thousands a second."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif time.monotonic() > self.quiet_until:
            self.quiet_until = time.monotonic() + 60
            log.warning("No file is left for another connection (ulimit -n), so new ones wait")

    @property
    def problem(self):
        """What went wrong, as a sentence, or None."""
        return self.drain.problem

    def handle_exit(self, signal, frame):
        if self.drain.begun:
            end_at_once()
        self.drain.begin()

    async def serve(self, sockets=None):
        try:
            await super().serve(sockets)
        finally:
            faulthandler.cancel_dump_traceback_later()

    async def on_tick(self, counter):
        """uvicorn asks ten times a second whether to end."""
        late = self.drain.is_late()
        ended = not self.engine.thread.is_alive()
        if late:
            faulthandler.dump_traceback_later(15, exit=True)  # for a step that never returns
        elif ended and self.drain.begun:  # slow readers have what is left of the time
            left = self.drain.deadline - time.monotonic()
            self.config.timeout_graceful_shutdown = max(5, left)
        return await super().on_tick(counter) or late or ended


def end_at_once():
    ngrok = sys.modules.get("pyngrok.ngrok")
    if ngrok:
        ngrok.kill()  # or the tunnel would outlive the server
    os._exit(1)

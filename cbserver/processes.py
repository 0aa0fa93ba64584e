"""HTTP in processes of its own: the same app in each of them, over an engine that lives elsewhere."""
# Python runs one thread of a process at a time. At tens of thousands of tokens a second an event
# loop takes all of that time, and the engine's thread waits for it. Here the engine has a process
# without HTTP. Each process for HTTP has an unmodified `create_app` over a `RemoteEngine`. Between
# them go batches of messages, [(name, *arguments), ...]; the other side calls its method `name`.
import asyncio
import contextlib
import faulthandler
import gc
import itertools
import logging
import multiprocessing
import queue
import signal
import tempfile
import threading
import time
from multiprocessing import connection, forkserver

from prometheus_client import generate_latest

from . import process
from .http.errors import APIError
from .http.monitor import Feed, Monitor
from .sequence import EngineStats, EngineStopped, QueueFull, Sequence, Status, check_request
from .server import create_app

log = logging.getLogger("cbserver")
TICK = 0.5  # seconds; so often each process is asked for a sign of life
STARTING = 120  # seconds that a process may take until its first one
GRACE = 5  # seconds for what must end at once
ENDED = ("ended",)  # the last message each way


class Channel:
    """One end of a pipe. Who sends never waits: a thread writes, however slow the other side is."""

    def __init__(self, pipe):
        self.pipe = pipe
        self.outbox = queue.SimpleQueue()  # a signal's handler may put into it, whenever it runs
        self.writer = threading.Thread(target=self.write, daemon=True)
        self.writer.start()

    def send(self, *message):
        self.outbox.put(message)

    def write(self):
        """Send all that there is as one batch, again and again."""
        batch = []
        with contextlib.suppress(OSError):  # the other process has ended
            while ENDED not in batch:
                batch = [self.outbox.get()]
                while not self.outbox.empty():
                    batch.append(self.outbox.get())
                self.pipe.send(batch)

    def batches(self):
        """Yield what arrives, until the other side has ended."""
        batch = []
        with contextlib.suppress(EOFError, OSError):
            while ENDED not in batch:
                batch = self.pipe.recv()
                yield batch


# In the engine's process


class Hub:
    """The engine's outbox: it sends a step's tokens to the processes that wait for them.

    places: a semaphore of all processes, a place for each request that may wait. drain: the
    engine's.
    """

    def __init__(self, engine, model_name, places, drain):
        self.engine = engine
        self.places = places
        self.drain = drain
        self.monitor = Monitor(engine)
        self.feed = Feed(engine, self.monitor, model_name, max_viewers=0)
        self.ticks = 0  # how often all were asked for a sign of life
        self.heard = {}  # channel: the tick at which its process was heard of last
        self.listeners = []
        self.sequences = {}  # number: a request that no process has recorded yet
        self.take = engine.take
        self.close_engine = engine.close
        engine.take = self.take_and_count
        engine.close = self.close_and_tell

    def start(self):
        """Open the engine, and run it in a thread as its own `start` does."""
        self.engine.open(self.post)
        self.engine.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.engine.thread.start()
        for channel in self.heard:
            listener = threading.Thread(target=self.listen, args=[channel], daemon=True)
            listener.start()
            self.listeners.append(listener)

    def run(self):
        """The engine's thread; at its end, however it comes, every process is told."""
        try:
            self.engine.run()
        finally:
            self.send_to_all(*ENDED)

    def send_to_all(self, *message):
        for channel in self.heard:
            channel.send(*message)

    # Called by the engine

    def take_and_count(self, slot=None):
        sequence = self.take(slot)
        if sequence is not None:
            self.places.release()
        return sequence

    def close_and_tell(self, reason=None):
        self.send_to_all("closing", reason)
        self.close_engine(reason)

    def post(self, news):
        """Send each (sequence, token) to its process; in place of None goes why it ended."""
        parcels = {}
        for sequence, token in news:
            said = sequence.finish_reason if token is None else token
            parcel = parcels.setdefault(sequence.channel, [])
            parcel.append((sequence.number, said, *beside(sequence, token)))
        for channel, parcel in parcels.items():
            channel.send("deliver", parcel)

    # Called by the processes for HTTP

    def listen(self, channel):
        """Do what a process asks for, in the order in which it asked."""
        for batch in channel.batches():
            self.heard[channel] = self.ticks
            for name, *arguments in batch:
                getattr(self, name)(channel, *arguments)

    def submit(self, channel, number, prompt_tokens, params):
        with self.engine.lock:  # or its first token could come before we know whose it is
            try:
                sequence = self.engine.submit(prompt_tokens, params)
            except EngineStopped:
                self.places.release()
                return channel.send("deliver", [(number, "abort")])
            sequence.channel = channel
            sequence.number = number
            self.sequences[number] = sequence
            self.feed.numbers[sequence] = number

    def abort(self, channel, number, reason):
        with self.engine.lock:
            sequence = self.sequences.get(number)
            if sequence is None:  # the engine had refused it
                return
            if sequence.status is Status.WAITING:
                self.places.release()
            self.engine.abort(sequence, reason)

    def record(self, channel, number, request_id):
        sequence = self.sequences.pop(number, None)
        if sequence is not None:
            self.monitor.record(sequence, request_id)

    def refuse(self, channel, status):
        self.monitor.refuse(status)

    def close(self, channel):
        self.drain.begin()

    def tick(self, channel):
        """A sign of life, as every message is one."""

    def ask_metrics(self, channel, question):
        channel.send("answer", question, generate_latest(self.monitor.registry))

    def ask_snapshot(self, channel, question):
        channel.send("answer", question, self.feed.snapshot())

    def ended(self, channel):
        """No more will come from there."""


def beside(sequence, token):
    """What goes with a token: usually nothing, else (log-probabilities, cached tokens).

    With the first token come its prompt's log-probabilities too.
    """
    first = len(sequence.generated_tokens) == 1
    if token is None or not (sequence.logprobs or first and sequence.num_cached_tokens):
        return ()
    new = sequence.logprobs[:] if first else sequence.logprobs[-1:]  # copies: they are sent later
    return new, sequence.num_cached_tokens


# In each process for HTTP


class RemoteEngine:
    """An engine as `create_app` knows it. All of it runs in the event loop, but for `receive`.

    facts: tokenizer, slots, max_len, max_waiting and vocab_size of the real one. places: as
    Hub's. numbers: the last number of a request, of all processes together. stall_timeout: seconds
    after which the engine's process stands still.
    """

    def __init__(self, pipe, facts, places, numbers, stall_timeout):
        vars(self).update(facts)
        self.channel = Channel(pipe)
        self.places = places
        self.numbers = numbers
        self.stall_timeout = stall_timeout
        self.loop = None
        self.thread = threading.Thread(target=self.receive, daemon=True)
        self.heard = time.monotonic()  # when the engine's process was, last
        self.stopping = True
        self.draining = False
        self.sequences = {}  # number: sequence, until it ends
        self.questions = {}  # number: a future, until it is answered or given up
        self.counter = itertools.count()

    async def start(self):
        self.loop = asyncio.get_running_loop()
        self.stopping = False
        self.thread.start()

    async def stop(self):
        self.close()
        await asyncio.to_thread(self.thread.join)

    def close(self, reason=None):
        """As Engine.close, of all processes; with a reason, the requests of this one end."""
        self.stopping = True
        self.channel.send("close")
        if reason:
            for sequence in list(self.sequences.values()):
                self.abort(sequence, reason)

    def submit(self, prompt_tokens, params):
        """As Engine.submit."""
        check_request(prompt_tokens, params, self.vocab_size, self.max_len)
        if self.stopping:
            raise EngineStopped("the engine is not running")
        if not self.places.acquire(block=False):
            raise QueueFull(f"{self.max_waiting} requests are waiting already; try again later")
        sequence = Sequence(list(prompt_tokens), params)
        with self.numbers.get_lock():
            self.numbers.value += 1
            sequence.number = self.numbers.value
        self.sequences[sequence.number] = sequence
        self.channel.send("submit", sequence.number, sequence.prompt_tokens, params)
        return sequence

    def abort(self, sequence, reason="abort"):
        """As Engine.abort."""
        if sequence.status is not Status.FINISHED:
            self.deliver([(sequence.number, reason)])
            self.channel.send("abort", sequence.number, reason)

    def stats(self):
        """Of this process's requests; whether they run or wait is not known here."""
        return EngineStats(len(self.sequences), 0, self.slots, 0, 0, 0)

    def is_alive(self):
        """Whether the engine's process was heard of lately, and the engine has not ended."""
        silence = time.monotonic() - self.heard
        return self.thread.is_alive() and silence < self.stall_timeout

    async def ask(self, name):
        """The answer of the engine's process; APIError if none comes in time."""
        question = next(self.counter)
        answer = self.loop.create_future()
        self.questions[question] = answer
        self.channel.send(f"ask_{name}", question)
        try:
            if not self.thread.is_alive():
                raise EngineStopped
            return await asyncio.wait_for(answer, self.stall_timeout)
        except (TimeoutError, EngineStopped):
            raise APIError(503, "the engine's process does not answer; try again later",
                           code="engine_stopped")
        finally:
            del self.questions[question]

    def receive(self):
        """The thread that reads; it is alive as long as the engine is."""
        for batch in self.channel.batches():
            self.heard = time.monotonic()
            self.loop.call_soon_threadsafe(self.obey, batch)
        self.stopping = True
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.ended)

    # Called by the engine's process

    def obey(self, batch):
        for name, *arguments in batch:
            getattr(self, name)(*arguments)

    def tick(self):
        """Give a sign of life."""
        self.channel.send("tick")

    def answer(self, question, answer):
        """Whoever asked may have given up meanwhile."""
        waiting = self.questions.get(question)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    def closing(self, reason):
        self.stopping = True
        if reason is None:
            self.draining = True

    def ended(self):
        self.deliver([(number, "error") for number in self.sequences])
        for waiting in self.questions.values():
            if not waiting.done():
                waiting.set_exception(EngineStopped())

    def deliver(self, news):
        """Put each token on its sequence's queue; a text in its place is why it has ended."""
        for number, said, *more in news:
            sequence = self.sequences.get(number)
            if sequence is None:  # it was aborted meanwhile
                continue
            if isinstance(said, int):
                if more:
                    logprobs, sequence.num_cached_tokens = more
                    sequence.logprobs += logprobs
                sequence.generated_tokens.append(said)
                sequence.queue.put_nowait(said)
            else:
                del self.sequences[number]
                sequence.finish(said)
                sequence.queue.put_nowait(None)


class RemoteMonitor:
    """Sends what is counted to the engine's process, which counts for all."""

    def __init__(self, engine):
        self.engine = engine

    def refuse(self, status):
        self.engine.channel.send("refuse", status)

    def record(self, sequence, request_id):
        self.engine.channel.send("record", sequence.number, request_id)

    def is_alive(self):
        return self.engine.is_alive()

    async def text(self):
        return await self.engine.ask("metrics")


class RemoteFeed(Feed):
    """The feed of the engine's process, for this process's viewers."""

    def number(self, sequence):
        return sequence.number

    async def latest(self):
        return await self.engine.ask("snapshot")


class RemoteServer(process.DrainingServer):
    """It drains with the engine; a second signal is for the engine's process to judge."""

    def handle_exit(self, signal, frame):
        self.drain.begin()

    async def on_tick(self, counter):
        if self.engine.draining:
            self.drain.begin()
        return await super().on_tick(counter)


def serve(pipe, listener, facts, places, numbers, options, drain_timeout, stall_timeout,
          max_connections):
    """A process for HTTP, from its start to its end."""
    process.prepare()
    engine = RemoteEngine(pipe, facts, places, numbers, stall_timeout)
    app = create_app(engine, **options)
    app.state.monitor = RemoteMonitor(engine)
    app.state.feed = RemoteFeed(engine, app.state.monitor, "", app.state.feed.max_viewers)
    gc.collect()
    gc.freeze()
    # The engine's process ends what is late; only if it cannot, this one does it.
    server = RemoteServer(app, "", 0, drain_timeout + GRACE, max_connections,
                          options["receive_timeout"])
    server.run([listener])
    engine.channel.send(*ENDED)
    engine.channel.writer.join(GRACE)


# All of them


def preload():
    """Begin to import what each process needs, once for all of them."""
    multiprocessing.set_forkserver_preload([__name__, "uvicorn.protocols.http.auto"])
    folder = tempfile.gettempdir()
    if len(folder) > 60:  # with what is added, longer than the path of a socket may be
        tempfile.tempdir = "/tmp"
    # Inherited, so that no signal meets a process before it is ready: its server has handlers.
    handlers = {number: signal.signal(number, signal.SIG_IGN)
                for number in (signal.SIGINT, signal.SIGTERM)}
    forkserver.ensure_running()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    tempfile.tempdir = folder


class HttpProcesses:
    """A server for each of the listening sockets, in a process of its own, over an engine of this.

    drain_timeout: seconds that answers have to finish. stall_timeout: seconds that a process may
    stand still. max_connections, max_viewers: of all together. options: of create_app.
    """

    def __init__(self, engine, listeners, drain_timeout=30, stall_timeout=20,
                 max_connections=4096, max_viewers=64, receive_timeout=30, **options):
        preload()
        self.context = multiprocessing.get_context("forkserver")
        self.engine = engine
        self.listeners = listeners
        self.stall_timeout = stall_timeout
        self.drain = process.Drain(engine, drain_timeout)
        self.signalled = False
        self.failed = False
        self.children = {}  # process: its channel
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        places = self.context.Semaphore(engine.max_waiting)
        self.hub = Hub(engine, options.get("model_name", "cbserver"), places, self.drain)
        facts = {name: getattr(engine, name)
                 for name in ("tokenizer", "slots", "max_len", "max_waiting", "gives_logprobs")}
        facts["vocab_size"] = engine.model.config.vocab_size
        options["max_viewers"] = max(1, max_viewers // len(listeners))
        options["receive_timeout"] = receive_timeout
        self.shared = (facts, places, self.context.Value("l", 0), options, drain_timeout,
                       stall_timeout, max(1, max_connections // len(listeners)))
        host, port, *_ = listeners[0].getsockname()
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def start(self):
        """Start all. Who connects before a process is ready waits for it."""
        for listener in self.listeners:
            ours, theirs = self.context.Pipe()
            child = self.context.Process(target=serve, args=(theirs, listener, *self.shared))
            child.start()
            theirs.close()
            channel = Channel(ours)
            self.children[child] = channel
            self.hub.heard[channel] = STARTING / TICK
        for listener in self.listeners:
            listener.close()  # the processes have it
        self.hub.start()
        if self.drain.begun:  # a signal came first
            self.engine.close(None)
        self.watcher.start()

    def handle_exit(self, number, frame):
        """A first signal drains, a second one ends all at once."""
        if self.signalled:
            for child in self.children:
                child.kill()
            process.end_at_once()
        self.signalled = True
        self.drain.begin()

    def watch(self):
        """Until the last process has ended: one that fails or stands still ends the server."""
        left = {child.sentinel: child for child in self.children}
        while left:
            for sentinel in connection.wait(left, TICK):
                child = left.pop(sentinel)
                child.join()
                if child.exitcode:  # its clients are cut off: end with the others
                    self.failed = True
                    self.drain.deadline = time.monotonic()
                    self.engine.close("error")
            self.drain.is_late()
            self.hub.ticks += 1
            self.hub.send_to_all("tick")
            for child in left.values():
                self.look_at(child)

    def look_at(self, child):
        """End a process that stands still, or does not end when it should."""
        # In ticks and not by the clock: if this process stands still, none of those does.
        silence = self.hub.ticks - self.hub.heard[self.children[child]]
        if silence * TICK > self.stall_timeout:
            log.error("A process for HTTP (%d) stands still, and is ended", child.pid)
            child.kill()
        elif time.monotonic() > self.drain.deadline + 2 * GRACE:
            log.error("A process for HTTP (%d) does not end, and is ended", child.pid)
            child.kill()

    @property
    def problem(self):
        """What went wrong, as a sentence, or None."""
        if self.failed:
            return "A process for HTTP has failed; see above. The server has ended."
        return self.drain.problem

    def run(self):
        """Serve until the end."""
        signal.signal(signal.SIGTERM, self.handle_exit)
        signal.signal(signal.SIGINT, self.handle_exit)
        self.start()
        self.join()

    def join(self):
        """Wait until all has ended, the engine too."""
        self.watcher.join()
        for thread in (self.engine.thread, *self.hub.listeners):
            thread.join(GRACE)
        if self.engine.thread.is_alive():  # a step that never returns
            faulthandler.dump_traceback()
            process.end_at_once()

    def stop(self):
        self.drain.begin()
        self.join()

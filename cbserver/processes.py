"""HTTP in processes of its own: the same app in each of them, over an engine that lives elsewhere."""
# Python runs one thread of a process at a time. At tens of thousands of tokens a second an event
# loop takes all of that time, and the engine's thread waits for it. Here the engine has a process
# without HTTP. Each process for HTTP has an unmodified `create_app` over a `RemoteEngine`. It sends
# what its clients ask for in one message a turn of its event loop, and gets a step's tokens in one.
import asyncio
import contextlib
import gc
import multiprocessing
import os
import queue
import signal
import socket
import threading
from multiprocessing import connection, forkserver

from . import process
from .http.monitor import Feed, Monitor
from .sequence import EngineStopped, QueueFull, Sequence, Status, check_request
from .server import create_app


def messages(pipe):
    """Yield what arrives, until the other end is closed."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            yield pipe.recv()


# In the engine's process


class Hub:
    """What the engine takes for an event loop: it sends a step's tokens to those who wait for them.

    places: a semaphore of all processes, a place for each request that may wait.
    """

    def __init__(self, engine, model_name, places):
        self.engine = engine
        self.places = places
        self.monitor = Monitor(engine)
        self.feed = Feed(engine, self.monitor, model_name, max_viewers=0)
        self.pipes = []
        self.sequences = {}  # number: a request that no process has recorded yet
        self.take = engine.take
        self.close_engine = engine.close
        engine.take = self.take_and_count
        engine.close = self.close_and_tell

    def start(self):
        """Open the engine, and run it in a thread as its own `start` does."""
        self.engine.open(self)
        self.engine.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.engine.thread.start()
        for pipe in self.pipes:
            threading.Thread(target=self.listen, args=[pipe], daemon=True).start()

    def run(self):
        """The engine's thread; at its end, however it comes, every process is told."""
        try:
            self.engine.run()
        finally:
            self.send_to_all("ended")

    def send(self, pipe, message):
        with self.engine.lock, contextlib.suppress(OSError):  # that process may have ended
            pipe.send(message)

    def send_to_all(self, message):
        for pipe in self.pipes:
            self.send(pipe, message)

    # Called by the engine

    def take_and_count(self, slot=None):
        sequence = self.take(slot)
        if sequence is not None:
            self.places.release()
        return sequence

    def close_and_tell(self, reason=None):
        self.send_to_all("closing")
        self.close_engine(reason)

    def is_closed(self):
        return False

    def call_soon_threadsafe(self, put_all, news):
        """Send each (sequence, token) to its process; in place of None goes why it ended."""
        parcels = {}
        for sequence, token in news:
            said = sequence.finish_reason if token is None else token
            parcel = parcels.setdefault(sequence.pipe, [])
            parcel.append((sequence.number, said, *beside(sequence, token)))
        for pipe, parcel in parcels.items():
            self.send(pipe, parcel)

    # Called by the processes for HTTP

    def listen(self, pipe):
        """Do what a process asks for, in the order in which it asked."""
        for wishes in messages(pipe):
            for name, *arguments in wishes:
                getattr(self, name)(pipe, *arguments)

    def submit(self, pipe, number, prompt_tokens, params):
        with self.engine.lock:  # or its first token could come before we know whose it is
            try:
                sequence = self.engine.submit(prompt_tokens, params)
            except EngineStopped:
                self.places.release()
                return self.send(pipe, [(number, "abort")])
            sequence.pipe = pipe
            sequence.number = number
            self.sequences[number] = sequence
            self.feed.numbers[sequence] = number

    def abort(self, pipe, number, reason):
        with self.engine.lock:
            sequence = self.sequences.get(number)
            if sequence is None:  # the engine had refused it
                return
            if sequence.status is Status.WAITING:
                self.places.release()
            self.engine.abort(sequence, reason)

    def record(self, pipe, number, request_id):
        sequence = self.sequences.pop(number, None)
        if sequence is not None:
            self.monitor.record(sequence, request_id)

    def refuse(self, pipe, status):
        self.monitor.refuse(status)

    def close(self, pipe, reason):
        self.engine.close(reason)

    def ask(self, pipe, name):
        """Answer a question about the requests of all processes."""
        answers = {"stats": self.engine.stats, "snapshot": self.feed.snapshot,
                   "metrics": lambda: list(self.monitor.registry.collect())}
        self.send(pipe, {"answer": answers[name]()})


def beside(sequence, token):
    """What goes with a token: usually nothing, else (log-probabilities, cached tokens).

    With the first token come its prompt's log-probabilities too.
    """
    first = len(sequence.generated_tokens) == 1
    if token is None or not (sequence.logprobs or first and sequence.cached_tokens):
        return ()
    return (sequence.logprobs if first else sequence.logprobs[-1:]), sequence.cached_tokens


# In each process for HTTP


class RemoteEngine:
    """An engine as `create_app` knows it. All of it runs in the event loop, but for `receive`.

    facts: tokenizer, max_batch, max_len, max_waiting and vocab_size of the real one. places: as
    Hub's. numbers: the last number of a request, of all processes together.
    """

    def __init__(self, pipe, facts, places, numbers):
        vars(self).update(facts)
        self.pipe = pipe
        self.places = places
        self.numbers = numbers
        self.loop = None
        self.stopping = True
        self.sequences = {}  # number: sequence, until it ends
        self.wishes = []
        self.answers = queue.SimpleQueue()

    async def start(self):
        self.loop = asyncio.get_running_loop()
        self.stopping = False
        self.thread = threading.Thread(target=self.receive, daemon=True)
        self.thread.start()

    async def stop(self):
        self.close()
        await asyncio.to_thread(self.thread.join)

    def close(self, reason=None):
        self.stopping = True
        self.tell("close", reason)

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
        self.tell("submit", sequence.number, sequence.prompt_tokens, params)
        return sequence

    def abort(self, sequence, reason="abort"):
        """As Engine.abort."""
        if sequence.status is not Status.FINISHED:
            self.deliver([(sequence.number, reason)])
            self.tell("abort", sequence.number, reason)

    def stats(self):
        return self.ask("stats")

    def tell(self, *wish):
        """Send a wish, with the others of this turn of the event loop."""
        self.wishes.append(wish)
        if self.loop is None:
            self.flush()
        elif len(self.wishes) == 1:
            self.loop.call_soon(self.flush)

    def flush(self):
        wishes, self.wishes = self.wishes, []
        if wishes:
            with contextlib.suppress(OSError):  # `receive` says that the engine has ended
                self.pipe.send(wishes)

    def ask(self, name):
        """Wait for an answer: a millisecond or more, in which no stream moves."""
        self.wishes.append(("ask", name))
        self.flush()
        return self.answers.get(timeout=10)

    def receive(self):
        """The thread that reads; it is alive as long as the engine is."""
        for message in messages(self.pipe):
            if message == "closing":
                self.stopping = True
            elif message == "ended":
                break
            elif isinstance(message, dict):
                self.answers.put(message["answer"])
            else:
                self.loop.call_soon_threadsafe(self.deliver, message)
        self.stopping = True
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.end_all)

    def end_all(self):
        self.deliver([(number, "error") for number in self.sequences])

    def deliver(self, news):
        """Put each token on its sequence's queue; a text in its place is why it has ended."""
        for number, said, *more in news:
            sequence = self.sequences.get(number)
            if sequence is None:  # it was aborted meanwhile
                continue
            if isinstance(said, int):
                if more:
                    logprobs, sequence.cached_tokens = more
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
        self.registry = self

    def refuse(self, status):
        self.engine.tell("refuse", status)

    def record(self, sequence, request_id):
        self.engine.tell("record", sequence.number, request_id)

    def collect(self):
        """What Prometheus' text is made of."""
        return self.engine.ask("metrics")


class RemoteFeed(Feed):
    """The feed of the engine's process, for this process's viewers."""

    def number(self, sequence):
        return sequence.number

    def snapshot(self):
        return self.engine.ask("snapshot")


def serve(pipe, listener, facts, places, numbers, options, drain_timeout):
    """A process for HTTP, from its start to its end."""
    os.setpgrp()  # the terminal's Ctrl-C goes to the engine's process, which passes it on
    process.prepare()
    engine = RemoteEngine(pipe, facts, places, numbers)
    app = create_app(engine, **options)
    app.state.monitor = RemoteMonitor(engine)
    app.state.feed = RemoteFeed(engine, app.state.monitor, "", app.state.feed.max_viewers)
    gc.collect()
    gc.freeze()
    pipe.send("ready")
    pipe.recv()  # the others are, too
    listener.listen(2048)
    pipe.send("listening")
    process.DrainingServer(app, "", 0, drain_timeout).run([listener])


# All of them


def preload():
    """Begin to import what each process needs, once for all of them."""
    multiprocessing.set_forkserver_preload([__name__, "uvicorn.protocols.http.auto"])
    forkserver.ensure_running()


class HttpProcesses:
    """So many servers on one port, over an engine of this process; options: of create_app."""

    def __init__(self, engine, processes, host="127.0.0.1", port=0, drain_timeout=30,
                 max_viewers=64, **options):
        preload()
        context = multiprocessing.get_context("forkserver")
        self.engine = engine
        self.places = context.Semaphore(engine.max_waiting)
        self.numbers = context.Value("l", 0)
        self.hub = Hub(engine, options.get("model_name", "cbserver"), self.places)
        facts = {name: getattr(engine, name)
                 for name in ("tokenizer", "max_batch", "max_len", "max_waiting", "gives_logprobs")}
        facts["vocab_size"] = engine.model.config.vocab_size
        options["max_viewers"] = max(1, max_viewers // processes)
        self.children = []
        for _ in range(processes):
            listener = bound(host, port)
            port = listener.getsockname()[1]  # where it was 0, the others take the same
            ours, theirs = context.Pipe()
            child = context.Process(target=serve, args=(
                theirs, listener, facts, self.places, self.numbers, options, drain_timeout))
            child.start()
            theirs.close()
            self.children.append(child)
            self.hub.pipes.append(ours)
        self.url = f"http://{host}:{port}"

    def start(self):
        """All begin to listen when the last one is ready, so that none gets all connections."""
        for pipe in self.hub.pipes:
            pipe.recv()
        for pipe in self.hub.pipes:
            pipe.send("go")
        for pipe in self.hub.pipes:
            pipe.recv()
        self.hub.start()

    def terminate(self, number=None, frame=None):
        """Pass a signal on: the first one drains, the second one ends."""
        for child in self.children:
            child.terminate()

    def run(self):
        """Serve until the end; True if all processes ended well."""
        signal.signal(signal.SIGTERM, self.terminate)
        signal.signal(signal.SIGINT, self.terminate)
        try:
            self.start()
        except EOFError:
            self.terminate()
            return False
        well = True
        alive = {child.sentinel: child for child in self.children}
        while alive:
            for sentinel in connection.wait(alive):
                child = alive.pop(sentinel)
                child.join()
                if child.exitcode:  # its clients are cut off: end with the others
                    well = False
                    self.engine.close("error")
        return well

    def stop(self):
        self.terminate()
        for child in self.children:
            child.join(40)
            child.kill()


def bound(host, port):
    """A socket at this address. The kernel shares connections out among all that listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((host, port))
    return listener

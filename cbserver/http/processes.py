"""HTTP in processes of its own: the same app in each of them, over an engine that lives elsewhere.

Python runs one thread of a process at a time. At tens of thousands of tokens a second an event loop
takes all of that time, and the engine's thread waits for it. Here the engine has a process without
HTTP. Each process of HTTP has an unmodified `create_app` over a `RemoteEngine`; it sends what its
clients ask for in one message a turn of its event loop, and gets a step's tokens in one message.
"""
import asyncio
import gc
import multiprocessing
import os
import pickle
import queue
import signal
import socket

import threading
from multiprocessing import connection, forkserver


from ..sequence import EngineStopped, QueueFull, Sequence, Status, check_request
from .monitor import Feed, Monitor

class Link:
    """One end of a pipe; what is sent arrives whole and in order."""

    def __init__(self, pipe):
        self.pipe = pipe
        self.lock = threading.Lock()

    def send(self, message):
        with self.lock:
            try:
                self.pipe.send_bytes(pickle.dumps(message, -1))
            except OSError:  # the other process has ended
                pass

    def messages(self):
        """Yield what arrives, until the other end is closed."""
        while True:
            try:
                yield pickle.loads(self.pipe.recv_bytes())
            except (EOFError, OSError):
                return


# In the engine's process


class Hub:
    """What the engine takes for an event loop: it sends a step's tokens to those who wait for them.

    places: a semaphore of all processes, a place for each request that may wait.
    """

    def __init__(self, engine, model_name, places):
        self.engine = engine
        self.places = places
        self.monitor = Monitor(engine)
        self.feed = Feed(engine, self.monitor, model_name, 0)
        self.links = []
        self.owners = {}  # sequence: (the link of its client's process, its number there)
        self.sequences = {}  # (link, number): sequence
        self.take = engine.take
        engine.take = self.take_and_count

    def start(self):
        """Open the engine, and run it in a thread as its own `start` does."""
        self.engine.open(self)
        self.engine.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.engine.thread.start()
        for link in self.links:
            threading.Thread(target=self.listen, args=[link], daemon=True).start()

    def run(self):
        """The engine's thread; at its end, however it comes, every process is told."""
        try:
            self.engine.run()
        finally:
            for link in self.links:
                link.send(None)

    def take_and_count(self, slot=None):
        sequence = self.take(slot)
        if sequence is not None:
            self.places.release()
        return sequence

    def is_closed(self):
        return False

    def call_soon_threadsafe(self, put_all, news):
        """Send each (sequence, token) to its process; None as a token becomes the reason."""
        parcels = {}
        for sequence, token in news:
            link, number = self.owners[sequence]
            said = sequence.finish_reason if token is None else token
            parcels.setdefault(link, []).append((number, said))
        for link, parcel in parcels.items():
            link.send(parcel)

    def listen(self, link):
        """Do what a process asks for, in the order in which it asked."""
        for wishes in link.messages():
            for name, *arguments in wishes:
                getattr(self, name)(link, *arguments)

    def submit(self, link, number, prompt_tokens, params):
        with self.engine.lock:  # or its first token could come before it has an owner
            try:
                sequence = self.engine.submit(prompt_tokens, params)
            except EngineStopped:
                self.places.release()
                return link.send([(number, "abort")])
            self.owners[sequence] = link, number
            self.sequences[link, number] = sequence
            self.feed.numbers[sequence] = number

    def abort(self, link, number, reason):
        sequence = self.sequences.get((link, number))
        if sequence is None:
            return
        with self.engine.lock:
            if sequence.status is Status.WAITING:
                self.places.release()
            self.engine.abort(sequence, reason)

    def record(self, link, number, request_id):
        """A request is over: nobody asks for it any more."""
        sequence = self.sequences.pop((link, number), None)
        if sequence is not None:
            self.monitor.record(sequence, request_id)
            self.owners.pop(sequence)

    def refuse(self, link, status):
        self.monitor.refuse(status)

    def close(self, link, reason):
        self.engine.close(reason)

    def ask(self, link, name):
        """Answer a question about all processes' requests together."""
        questions = {"stats": self.engine.stats, "snapshot": self.feed.snapshot,
                     "metrics": lambda: list(self.monitor.registry.collect())}
        link.send({"answer": questions[name]()})


# In each process of HTTP


class RemoteEngine:
    """An engine as `create_app` knows it. All of it runs in the event loop, but for `receive`.

    facts: {"tokenizer", "max_batch", "max_len", "max_waiting", "vocab_size"} of the real one.
    places: see Hub. numbers: the last number of a request, of all processes together.
    """

    def __init__(self, link, facts, places, numbers):
        self.__dict__.update(facts)
        self.link = link
        self.places = places
        self.numbers = numbers
        self.loop = None
        self.stopping = True
        self.sequences = {}  # number: sequence
        self.number_of = {}  # sequence: number, until it is recorded
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
        with self.numbers.get_lock():
            self.numbers.value += 1
            number = self.numbers.value
        sequence = Sequence(list(prompt_tokens), params)
        self.sequences[number] = sequence
        self.number_of[sequence] = number
        self.tell("submit", number, sequence.prompt_tokens, params)
        return sequence

    def abort(self, sequence, reason="abort"):
        """As Engine.abort."""
        if sequence.status is not Status.FINISHED:
            number = self.number_of[sequence]
            self.end(number, reason)
            self.tell("abort", number, reason)

    def end(self, number, reason):
        sequence = self.sequences.pop(number)
        sequence.finish(reason)
        sequence.queue.put_nowait(None)

    def stats(self):
        return self.ask("stats")

    def tell(self, *wish):
        """Send a wish with the others of this turn of the event loop."""
        self.wishes.append(wish)
        if self.loop is None:
            self.flush()
        elif len(self.wishes) == 1:
            self.loop.call_soon(self.flush)

    def flush(self):
        if self.wishes:
            self.link.send(self.wishes)
            self.wishes = []

    def ask(self, name):
        """Wait for an answer: some milliseconds, in which no stream moves."""
        self.wishes.append(("ask", name))
        self.flush()
        return self.answers.get(timeout=10)

    def receive(self):
        """The thread that reads; it is alive as long as the engine is."""
        for message in self.link.messages():
            if message is None:
                break
            if isinstance(message, dict):
                self.answers.put(message["answer"])
            else:
                self.loop.call_soon_threadsafe(self.deliver, message)
        self.stopping = True
        with_reason = [(number, "error") for number in list(self.sequences)]
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.deliver, with_reason)

    def deliver(self, news):
        """Put each token on its sequence's queue; a text in its place is why it has ended."""
        for number, said in news:
            sequence = self.sequences.get(number)
            if sequence is None:  # it was aborted meanwhile
                continue
            if isinstance(said, str):
                self.end(number, said)
            else:
                sequence.generated_tokens.append(said)
                sequence.queue.put_nowait(said)


class RemoteMonitor:
    """Sends what is counted to the engine's process, which counts for all."""

    def __init__(self, engine):
        self.engine = engine
        self.registry = self

    def refuse(self, status):
        self.engine.tell("refuse", status)

    def record(self, sequence, request_id):
        self.engine.tell("record", self.engine.number_of.pop(sequence), request_id)

    def collect(self):
        """Prometheus' text is made of this."""
        return self.engine.ask("metrics")


class RemoteFeed(Feed):
    """The feed of the engine's process, for this process's viewers."""

    def number(self, sequence):
        return self.engine.number_of[sequence]

    def snapshot(self):
        return self.engine.ask("snapshot")


def serve(pipe, listener, facts, places, numbers, options, drain_timeout):
    """A process of HTTP, from its start to its end."""
    os.setpgrp()  # the terminal's Ctrl-C goes to the engine's process, which passes it on
    from .. import process
    from ..server import create_app

    process.prepare()
    engine = RemoteEngine(Link(pipe), facts, places, numbers)
    app = create_app(engine, **options)
    app.state.monitor = RemoteMonitor(engine)
    app.state.feed = RemoteFeed(engine, app.state.monitor, "", app.state.feed.max_viewers)
    gc.collect()
    gc.freeze()
    pipe.send_bytes(b"ready")
    pipe.recv_bytes()  # the others are ready, too
    process.DrainingServer(app, "", 0, drain_timeout).run([listener])


# All of them


def preload():
    """Begin to import what each process needs, once for all of them."""
    multiprocessing.set_forkserver_preload(
        ["cbserver.server", "cbserver.process", "uvicorn.protocols.http.auto"])
    forkserver.ensure_running()


class HttpProcesses:
    """`processes` servers on one port, over an engine of this process; options: of create_app."""

    def __init__(self, engine, processes, host="127.0.0.1", port=0, drain_timeout=30, **options):
        preload()
        context = multiprocessing.get_context("forkserver")
        places = context.Semaphore(engine.max_waiting)
        self.engine = engine
        self.hub = Hub(engine, options.get("model_name", "cbserver"), places)
        facts = {name: getattr(engine, name)
                 for name in ("tokenizer", "max_batch", "max_len", "max_waiting")}
        facts["vocab_size"] = engine.model.config.vocab_size
        viewers = max(1, options.pop("max_viewers", 64) // processes)
        options["max_viewers"] = viewers
        self.numbers = context.Value("l", 0)
        self.children = []
        listeners = []
        for _ in range(processes):
            listeners.append(listen(host, port))
            port = listeners[0].getsockname()[1]
        self.url = f"http://{host}:{port}"
        for listener in listeners:
            ours, theirs = context.Pipe()
            child = context.Process(target=serve, args=(theirs, listener, facts, places,
                                                        self.numbers, options, drain_timeout))
            child.start()
            theirs.close()
            listener.close()
            self.children.append(child)
            self.hub.links.append(Link(ours))

    def start(self):
        """All begin to listen when the last one is ready, so that none gets all connections."""
        for link in self.hub.links:
            link.pipe.recv_bytes()
        self.hub.start()
        for link in self.hub.links:
            link.pipe.send_bytes(b"go")

    def signal(self, number=signal.SIGTERM, frame=None):
        """Pass a signal on: the first one drains, the second one ends."""
        for child in self.children:
            if child.is_alive():
                os.kill(child.pid, signal.SIGTERM)

    def run(self):
        """Serve until the end; True if all processes ended well."""
        self.start()
        signal.signal(signal.SIGTERM, self.signal)
        signal.signal(signal.SIGINT, self.signal)
        alive = {child.sentinel: child for child in self.children}
        well = True
        while alive:
            for sentinel in connection.wait(list(alive)):
                child = alive.pop(sentinel)
                child.join()
                if child.exitcode:
                    well = False
                    self.engine.close("error")  # its clients are cut off: end with the others
        return well

    def stop(self):
        self.signal()
        for child in self.children:
            child.join(40)
            if child.is_alive():
                child.kill()


def listen(host, port):
    """A bound socket; the kernel shares connections out among all that listen on its port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((host, port))
    return listener

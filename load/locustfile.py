"""An SSE-aware Locust user: it times every token, because Locust alone stops at the headers."""
import contextlib
import itertools
import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import gevent
import locust.stats
from locust import FastHttpUser, constant, events, task
from locust.exception import StopUser
from locust.runners import MasterRunner, WorkerRunner

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the `locust` script lacks it

from cbserver.metrics import RequestRecord  # noqa: E402
from load.process import SKIP_WARNING, base_url, first_model  # noqa: E402
from load.sse import DONE, StreamFailed, data_of, error_message, read_event  # noqa: E402
from load.workload import NAMES, arrivals, conversations, stream  # noqa: E402

# Locust rounds to two digits to keep its histogram small; whole milliseconds are small enough here.
locust.stats.bucket_response_time = round
locust.stats.PERCENTILES_TO_CHART = [0.5, 0.99]


@events.init_command_line_parser.add_listener
def add_options(parser):
    add = parser.add_argument
    add("--workload", default="mixed", help=f"which requests to send: {', '.join(NAMES)}")
    add("--requests", type=int, default=0,
        help="send this many and quit; 0: go on until Locust is stopped")
    add("--seed", type=int, default=0, help="of the workload")
    add("--rate", type=float, default=0,
        help="open loop: so many requests a second, whatever is in flight (Poisson arrivals)")
    add("--steady-seconds", type=float, default=0,
        help="for fast devices: go on this long after the last user was spawned, then quit")
    add("--min-requests", type=int, default=100, help="with --steady-seconds: at least so many")
    add("--out", default="", help="write one JSON line a request to this file")
    add("--model", default="", help="model name to ask for; default: the first the server lists")
    add("--chat", action="store_true", help="use /v1/chat/completions, for servers of chats only")
    add("--body", type=json.loads, default={}, metavar="JSON",
        help="fields for every request's body; null takes one of ours out, as in "
             '{"ignore_eos": null} for a server that refuses it')
    add("--api-key", default="", env_var="CBSERVER_API_KEY", is_secret=True,
        help="sent as a bearer token; may come from CBSERVER_API_KEY")


@events.init.add_listener
def wait_for_requests_in_flight(environment, **_):
    """Without a stop timeout, Locust drops what is in flight, and slow servers look faster."""
    environment.stop_timeout = environment.stop_timeout or 120


@events.init.add_listener
def count_workers(environment, runner, **_):
    """Locust's distributed mode: the master ends the test when every worker is done."""
    if isinstance(runner, MasterRunner):
        left = set(range(environment.parsed_options.expect_workers))

        def done(environment, msg, **_):
            left.discard(msg.data)
            if not left:
                gevent.spawn(runner.quit)  # not from the greenlet that listens to the workers

        runner.register_message("share done", done)


@events.test_start.add_listener
def begin(environment, **_):
    out = environment.parsed_options.out
    if out and not isinstance(environment.runner, WorkerRunner):  # the master is before them all
        Path(out).write_bytes(b"")
    CompletionUser.load = Load(environment)
    if out and not isinstance(environment.runner, MasterRunner):
        gevent.spawn(CompletionUser.load.show_progress)


@events.spawning_complete.add_listener
def note_all_spawned(user_count, **_):
    CompletionUser.load.begin_steady_time()


@events.test_stop.add_listener
def finish(environment, **_):
    CompletionUser.load.close()


class Load:
    """What all users share: one stream of requests, one file of records, and when to stop.

    Of `workers` processes each takes every `workers`-th conversation of the one stream (a request
    alone is one, too), and all write into the one file. Times are seconds of `time.perf_counter`.
    """

    def __init__(self, environment):
        self.environment = environment
        self.options = environment.parsed_options
        distributed = isinstance(environment.runner, WorkerRunner)
        self.workers = self.options.expect_workers if distributed else 1
        self.worker = environment.runner.worker_index if distributed else 0
        requests = itertools.islice(stream(self.options.workload, self.options.seed),
                                    self.options.requests or None)
        self.conversations = itertools.islice(conversations(requests), self.worker, None,
                                              self.workers)
        host = base_url(environment.host or CompletionUser.host)
        key = self.options.api_key
        self.model = self.options.model or first_model(host, key)
        # Compression would hold tokens back.
        self.headers = SKIP_WARNING | {"Accept-Encoding": "identity"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        # Unbuffered, to append: a line is one write, and writes of several processes never mix.
        self.file = open(self.options.out, "ab", buffering=0) if self.options.out else None
        rate = (self.options.rate or 1) / self.workers  # Poisson streams add up to one
        seed = f"{self.options.seed}.{self.worker}" if self.worker else self.options.seed
        self.arrivals = arrivals(rate, seed)
        self.began = None  # when the first request of an open loop was taken
        self.in_flight = 0
        self.live = {}  # {index: record} of the requests that were sent and have not ended
        self.tokens = 0  # of those that have ended
        self.finished = 0
        self.all_spawned = None  # when all users were
        self.closed = None  # when the steady time was over
        self.ended = False

    def take(self, user):
        """(request, its start): the next turn of a user's conversation, or a new conversation's.

        The user that finds none left ends.

        In an open loop the start is when the request was due, also if no user was free then: who
        counts from the sending hides the queue that a slow server makes.
        """
        if not user.turns:
            user.said = []
            user.turns = next(self.conversations, [])
        if self.closed or not user.turns:
            if self.in_flight == 0:
                self.end_test()
            raise StopUser
        request = user.turns.pop(0)
        self.in_flight += 1
        if not self.options.rate:
            return request, time.perf_counter()
        self.began = self.began or time.perf_counter()
        due = self.began + next(self.arrivals)
        gevent.sleep(max(0, due - time.perf_counter()))
        return request, due

    def give_back(self, record):
        """A request that was taken is over, however it ended."""
        self.in_flight -= 1
        self.tokens += len(record.token_times)
        del self.live[record.index]

    def asked(self, request, said):
        """(path, body) of the HTTP request for one request of the workload.

        said: the messages of the conversation so far.
        """
        body = {"model": self.model, "temperature": 0, "ignore_eos": True,
                "max_tokens": request.max_tokens, "stream": True,
                "stream_options": {"include_usage": True}}
        if self.options.chat or request.system:
            path = "/v1/chat/completions"
            system = [{"role": "system", "content": request.system}] if request.system else []
            body["messages"] = [*system, *said, {"role": "user", "content": request.prompt}]
        else:
            path = "/v1/completions"
            body["prompt"] = request.prompt
        body.update(self.options.body)
        return path, {name: value for name, value in body.items() if value is not None}

    def save(self, record):
        """Write a record at once, so that an onlooker can count and a crash loses nothing."""
        self.finished += 1
        if self.file:
            self.append(json.dumps(asdict(record)).encode() + b"\n")
        if self.steady_enough():
            self.close_window()

    def append(self, line):
        """Write a whole line; where the disk is full the test ends, for its report would lie."""
        try:
            if self.file.write(line) < len(line):
                raise OSError("only a part of a record could be written")
        except OSError:
            self.environment.process_exit_code = 1
            self.end_test()
            raise

    def show_progress(self):
        """Write down twice a second what is in flight: on a slow server nothing ends for long."""
        path = Path(f"{self.options.out}.progress{self.worker}")
        while not self.file.closed:
            tokens = self.tokens + sum(len(record.token_times) for record in self.live.values())
            with contextlib.suppress(OSError):  # a full disk ends the test elsewhere
                path.write_text(json.dumps([len(self.live), tokens]), encoding="utf-8")
            gevent.sleep(0.5)

    def begin_steady_time(self):
        """All users are there from now on."""
        self.all_spawned = time.perf_counter()

    def steady_enough(self):
        """Whether all users have been in flight for long enough, and enough requests are done."""
        wanted = self.options.steady_seconds
        if not wanted or not self.all_spawned or self.closed:
            return False
        enough = math.ceil(self.options.min_requests / self.workers)
        steady = time.perf_counter() - self.all_spawned
        return self.finished >= enough and steady >= wanted

    def close_window(self):
        """All users were in flight until now; from here they finish what they have, and end."""
        self.closed = time.perf_counter()
        if self.options.out:
            window = json.dumps({"window": [self.all_spawned, self.closed]})
            path = Path(f"{self.options.out}.window{self.worker}")
            path.write_text(window + "\n", encoding="utf-8")

    def end_test(self):
        """From a greenlet of its own: the user that calls this is one of those to be stopped."""
        if not self.ended:
            self.ended = True
            runner = self.environment.runner
            if isinstance(runner, WorkerRunner):
                runner.send_message("share done", self.worker)
            else:
                gevent.spawn(runner.stop if self.environment.web_ui else runner.quit)

    def close(self):
        if self.file:
            self.file.close()


class CompletionUser(FastHttpUser):
    """Sends one request after the other.

    FastHttpUser and not HttpUser: its `stream.readline` returns as soon as a line is there;
    requests' `iter_lines` does so for chunked answers only. CPU time an event is about the same.
    """

    host = "http://127.0.0.1:8000"
    wait_time = constant(0)
    network_timeout = 3600.0  # seconds between two reads; behind a slow server the queue is long
    connection_timeout = 30.0  # seconds
    load: Load  # set when a test starts, one for all users

    def __init__(self, environment):
        self.host = base_url(self.host)  # Locust has put --host there
        super().__init__(environment)
        self.turns = []  # of its conversation, still to send
        self.said = []  # messages of its conversation so far

    @task
    def completion(self):
        request, start = self.load.take(self)
        record = RequestRecord(start=start, index=request.index)
        self.load.live[request.index] = record
        try:
            self.send(request, record)
            self.load.save(record)
        finally:
            self.load.give_back(record)
        if record.error:
            gevent.sleep(0.5)  # a server that refuses is not hammered
        else:
            self.said += [{"role": "user", "content": request.prompt},
                          {"role": "assistant", "content": record.text}]
            self.add_rows(record)

    def send(self, request, record):
        """Send one request and fill its record, as a success or a failure in Locust's table too."""
        path, body = self.load.asked(request, self.said)
        try:
            answer = self.client.post(path, json=body, headers=self.load.headers, stream=True,
                                      catch_response=True)
        except Exception as error:  # Locust raises where what came back is no HTTP
            record.error = one_line(f"no answer: {type(error).__name__}: {error}")
            self.environment.events.request.fire(
                request_type="POST", name=path, response_time=elapsed_ms(record),
                response_length=0, context={}, exception=StreamFailed(record.error))
            return
        with answer as response:
            try:
                if response.status_code != 200:
                    raise StreamFailed(refusal(response))
                read_stream(response.stream, record)
                response.success()
            except Exception as error:  # a stranger's bytes cost their own request, not the run
                record.error = describe(error, record)
                response.failure(record.error)
            # Locust's own stops at the headers, before the first token.
            response.request_meta["response_time"] = elapsed_ms(record)
            response.request_meta["response_length"] = len(record.text)

    def add_rows(self, record):
        """TTFT and TPOT, in ms, as rows of their own: request events would count as requests."""
        rows = {"TTFT": record.ttft, "TPOT": record.tpot}
        for name, seconds in rows.items():
            if seconds is not None:
                self.environment.stats.get(name, "SSE").log(seconds * 1e3, 0)


def read_stream(lines, record):
    """Read a response to its end (or its connection is lost to the next request), timing tokens.

    `readline` returns as soon as a line is there; this client's `iter_lines` waits for 1,024 bytes.
    """
    done = False
    while line := lines.readline(b"\n"):
        now = time.perf_counter()
        data = data_of(line)
        if data == DONE:
            done = True
        elif data:
            note(read_event(data), now, record)
    if not done:
        raise StreamFailed("the stream ended without [DONE]")
    if not record.token_times:
        raise StreamFailed("the stream brought no token")
    if not record.completion_tokens:  # no usage from this server: an event is a token
        record.completion_tokens = len(record.token_times)
    # Some servers end with an empty event that only tells the finish reason: not a token.
    del record.token_times[record.completion_tokens:]


def note(event, now, record):
    """Write down what an event brought, at the time when its line was there."""
    for text in event.texts:
        record.token_times.append(now)
        record.text += text
    if event.completion_tokens is not None:
        record.prompt_tokens = event.prompt_tokens
        record.completion_tokens = event.completion_tokens


def refusal(response):
    """Why there was no stream: `HTTP 429: queue full`, or that nobody answered."""
    if not response.status_code:
        return f"no answer: {response.error}"
    text = (response.content or b"").decode("utf-8", "replace")
    with contextlib.suppress(ValueError, RecursionError):
        text = error_message(json.loads(text))
    return f"HTTP {response.status_code}: {text}"


def describe(error, record):
    """One sentence; the same for like failures, so that Locust counts them as one."""
    if isinstance(error, StreamFailed):
        return one_line(str(error))
    name = "token" if record.token_times else "headers"
    return one_line(f"the connection broke after the {name}: {type(error).__name__}: {error}")


def one_line(text):
    """At most 200 characters in one line, such as every file and terminal can hold."""
    return " ".join(text.split())[:200].encode("utf-8", "replace").decode("utf-8")


def elapsed_ms(record):
    """From the request to its last token, or to its failure, which is now."""
    end = time.perf_counter() if record.error else record.token_times[-1]
    return (end - record.start) * 1e3

"""What the server tells about itself: /metrics for Prometheus, and the live page with its feed."""
import asyncio
import logging
import math
import time
from collections import deque
from contextlib import contextmanager
from importlib.resources import files
from itertools import count
from weakref import WeakKeyDictionary

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, PlainTextResponse
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from ..metrics import spread_ms
from ..sequence import Status
from .errors import APIError
from .replies import EventStream, event

log = logging.getLogger("cbserver")
SECONDS = (.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 25, 60, 150,
           300, 600, 1200)
routes = APIRouter()
OTHER_NAMES = {"prefix": "continuous"}  # of engines, as --engine calls them


class Monitor:
    """What /metrics shows: the engine's stats whenever it is asked, and each request at its end.

    The names are vLLM's, without its prefix.
    """

    def __init__(self, engine):
        self.engine = engine
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.ended = Counter("request_success", "requests that ended, by reason",
                             ["finished_reason"], registry=self.registry)
        self.refused = Counter("requests_refused", "requests refused, by status", ["status"],
                               registry=self.registry)
        self.queue_time = self.histogram("request_queue_time")
        self.ttft = self.histogram("time_to_first_token")
        self.itl = self.histogram("inter_token_latency")
        self.e2e = self.histogram("e2e_request_latency")
        self.recent_ttft = deque(maxlen=200)  # seconds, for the page

    def histogram(self, name):
        return Histogram(f"{name}_seconds", name, buckets=SECONDS, registry=self.registry)

    def collect(self):
        """Called by Prometheus' registry: the engine's counters as they are now."""
        stats = self.engine.stats()
        for name, value in (("num_requests_running", stats.running), ("num_slots", stats.slots),
                            ("num_requests_waiting", stats.waiting),
                            ("kv_cache_usage_perc", stats.running / stats.slots)):
            yield GaugeMetricFamily(name, "now", value)
        budget = getattr(self.engine, "prefill_budget", None)  # ContinuousEngine's
        if budget:
            yield GaugeMetricFamily("prefill_budget_tokens", "prompt tokens of a step", budget)
        yield CounterMetricFamily("engine_steps", "steps of the engine", stats.steps)
        yield CounterMetricFamily("prompt_tokens", "prompt tokens admitted",
                                  stats.num_prompt_tokens)
        yield CounterMetricFamily("generation_tokens", "tokens generated",
                                  stats.num_generated_tokens)
        yield CounterMetricFamily("prefix_cache_queries", "prompt tokens, with prefix reuse or not",
                                  stats.num_prompt_tokens)
        yield CounterMetricFamily("prefix_cache_hits", "those of them that a slot held already",
                                  stats.num_cached_tokens)

    async def text(self):
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)

    def is_alive(self):
        return self.engine.thread.is_alive()

    def refuse(self, status):
        """Count an answer other than 200."""
        self.refused.labels(status).inc()

    def record(self, sequence, request_id):
        """Count a request that has ended, and log it in one line; never what it said.

        request_id: None for an answer of a request that was refused as a whole: it counts nowhere.
        """
        if request_id is None:
            return
        start = sequence.arrival_time
        times = sequence.token_times
        end = time.perf_counter()
        admitted = sequence.admission_time or end
        first = times[0] if times else end
        self.ended.labels(sequence.finish_reason).inc()
        self.e2e.observe(end - start)
        if sequence.admission_time:
            self.queue_time.observe(admitted - start)
        if times:
            self.ttft.observe(first - start)
            self.recent_ttft.append(first - start)
        for before, after in zip(times, times[1:]):
            self.itl.observe(after - before)
        log.info("%s %s: %d + %d tokens, waited %.3f s, first token %.3f s, all %.3f s",
                 request_id, sequence.finish_reason, len(sequence.prompt_tokens), len(times),
                 admitted - start, first - start, end - start)


@routes.get("/metrics")
async def metrics(request: Request):
    """Gauges, totals and latencies for Prometheus."""
    return PlainTextResponse(await request.app.state.monitor.text())


class Feed:
    """The live batch for the page at / and for others who watch; nothing of what requests say.

    Viewers share a snapshot, at most one in `interval` seconds.
    """

    def __init__(self, engine, monitor, model_name, max_viewers, interval=0.1):
        self.engine = engine
        self.monitor = monitor
        self.model_name = model_name
        self.max_viewers = max_viewers
        self.interval = interval
        self.viewers = 0
        self.numbers = WeakKeyDictionary()  # sequence: its number
        self.counter = count(1)
        self.made = -math.inf  # when the shared snapshot was made
        self.text = ""

    def number(self, sequence):
        """1, 2, 3 …: a request's name for viewers."""
        if sequence not in self.numbers:
            self.numbers[sequence] = next(self.counter)
        return self.numbers[sequence]

    def slot(self, sequence):
        """[number, phase, prompt tokens read, prompt tokens, tokens generated, tokens wanted].

        Phases: 0 prefill, 1 decode, 2 done, its slot not free before the batch's end.
        """
        prompt = len(sequence.prompt_tokens)
        generated = len(sequence.generated_tokens)
        decodes = generated or sequence.position >= sequence.prefill_end
        read = prompt if decodes else sequence.position
        phase = 1 if decodes else 0
        if sequence.status is Status.FINISHED:
            phase = 2
        return [self.number(sequence), phase, read, prompt, generated, sequence.params.max_tokens]

    def snapshot(self):
        """The batch now, as a dict ready for JSON."""
        engine = self.engine
        kind = type(engine).__name__.removesuffix("Engine").lower()
        slots = [None] * engine.slots
        with engine.lock:
            for sequence in engine.running:
                slots[sequence.slot or 0] = self.slot(sequence)
            stats = engine.stats()
        kept = sum(slot[2] + slot[4] for slot in slots if slot)
        ttft = spread_ms(self.monitor.recent_ttft)
        return {"time": round(time.monotonic(), 3), "model": self.model_name,
                "engine": OTHER_NAMES.get(kind, kind), "slots": slots,
                "waiting": stats.waiting, "steps": stats.steps,
                "generated": stats.num_generated_tokens, "ttft_ms": [ttft["p50"], ttft["p99"]],
                "kv": round(kept / (engine.slots * engine.max_len), 4)}

    async def latest(self):
        return self.snapshot()

    async def stream(self):
        """Snapshots as events, until the engine ends or the viewer leaves."""
        while self.engine.thread.is_alive():
            if time.monotonic() - self.made >= self.interval:
                try:
                    self.text = event(await self.latest())
                except APIError:  # too late for another status than 200
                    return
                self.made = time.monotonic()
            yield self.text
            await asyncio.sleep(self.interval)

    @contextmanager
    def watched(self):
        """Gives back, at its end, the place that a viewer has."""
        try:
            yield
        finally:
            self.viewers -= 1


@routes.get("/events", include_in_schema=False)
async def events(request: Request):
    """What the page reads: a snapshot of the batch ten times a second, as server-sent events."""
    feed = request.app.state.feed
    if feed.viewers >= feed.max_viewers:
        raise APIError(503, f"{feed.max_viewers} viewers watch already; try again later",
                       headers={"Retry-After": "10"})
    feed.viewers += 1  # here, or a burst of viewers would all find a place
    return EventStream(feed.stream(), {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
                       feed.watched(), None, request.app.state.silence)


@routes.get("/", include_in_schema=False)
async def page(request: Request):
    """The live batch as a page; the engine and the key decide what it offers."""
    state = request.app.state
    key = "yes" if state.api_key else "no"
    chat = "yes" if state.engine.tokenizer.chat_template else "no"
    html = files(__package__).joinpath("live.html").read_text(encoding="utf-8")
    html = html.replace("<html", f'<html data-key="{key}" data-chat="{chat}"', 1)
    return HTMLResponse(html, headers={"Content-Security-Policy": "default-src 'none'; "
                        "connect-src 'self'; img-src data:; style-src 'unsafe-inline'; "
                        "script-src 'unsafe-inline'", "Cache-Control": "no-cache"})

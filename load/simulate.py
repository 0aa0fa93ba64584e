"""A discrete-event simulation of the continuous engine on many replicas.

A replica does what `cbserver.scheduler.ContinuousEngine` does, with a formula in place of the
model: admit into the lowest free slots, read prompts within the budget, one token for each that
runs, evict. Steps in which nothing changes are summed up, so a request costs a few events however
long its answer is.
"""
import heapq
import math
import random
from array import array
from collections import deque
from dataclasses import dataclass

ROUTES = ("in turn", "two choices", "least loaded")


@dataclass(frozen=True)
class StepModel:
    """How long a step takes, in seconds; `load.capacity` fits it to measured steps.

    decode: ((rows, seconds), ...), by rows, at span 0; between two of them it is linear.
    per_key: for each row and position that a step looks back. per_pass, per_token: for prompts,
    the padding included. lag: so many steps later a token is seen (1 on a GPU, where the next step
    is launched first). overhead: ((requests in flight, seconds), ...) that HTTP takes of a request
    on its way; it grows as the server's event loop has more streams to write.
    """

    decode: tuple
    per_key: float
    per_pass: float
    per_token: float
    lag: int = 0
    overhead: tuple = ((1, 0.0),)

    def by_rows(self, slots):
        """Seconds of a step at span 0 for 0, 1, … `slots` rows: list[float]."""
        known = list(self.decode)
        return [0.0, *(between(known, rows) for rows in range(1, slots + 1))]

    def on_the_way(self, most):
        """Seconds of HTTP for 0, 1, … `most` requests in flight; level beyond what was measured."""
        (first, _), (last, _) = self.overhead[0], self.overhead[-1]
        return [between(self.overhead, min(max(n, first), last)) for n in range(most + 1)]


def between(points, x):
    """The line through sorted (x, y) points; beyond the ends, the last two go on."""
    if len(points) == 1:
        return points[0][1]
    i = next((i for i, (right, _) in enumerate(points) if right >= x), len(points) - 1)
    (x0, y0), (x1, y1) = points[max(i, 1) - 1], points[max(i, 1)]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def passes_of(pieces):
    """(passes, tokens with padding) in which `BatchRunner.prefill` reads pieces [(start, end)]."""
    groups = {}
    for start, end in pieces:
        key = start, max(end - start - 1, 63).bit_length()
        count, longest = groups.get(key, (0, 0))
        groups[key] = count + 1, max(longest, end - start)
    return len(groups), sum(count * longest for count, longest in groups.values())


class Replica:
    """One server's engine: `comes(request, t)` when one arrives, `step_ends()` when it is `due`.

    `due`: when its next step, or run of like steps, ends; None while it has nothing to do.
    """

    def __init__(self, model, slots, budget, lengths):
        self.model, self.budget, self.lengths = model, budget, lengths
        self.base, self.all_slots = model.by_rows(slots), (1 << slots) - 1
        self.used = self.decoding = 0  # bit i: slot i is taken; its prompt is read
        self.step = self.rows = self.span = 0
        self.waiting, self.unread, self.first = deque(), deque(), []
        self.ends, self.reach = [], {}  # heap of (step, slot, request); slot: position - step
        self.begin, self.due, self.planned, self.busy = 0.0, None, 0, 0.0

    def comes(self, request, now):
        """A request arrives; if there is a slot for it, the present run of steps ends sooner."""
        self.waiting.append(request)
        if self.due is None:
            self.plan(now)
        elif self.planned > 1 and self.used != self.all_slots:
            steps = min(self.planned, max(1, self.steps_until(now)))
            self.planned, self.due = steps, self.begin + self.duration(steps)

    def step_ends(self):
        """Now is `due`: ([requests with their first token], [requests that are done])."""
        now, first, done = self.due, self.first, []
        self.busy += now - self.begin
        self.step += self.planned
        self.first = []
        while self.ends and self.ends[0][0] <= self.step:
            _, slot, request = heapq.heappop(self.ends)
            self.used &= ~(1 << slot)
            self.decoding &= ~(1 << slot)
            del self.reach[slot]
            done.append(request)
        self.plan(now)
        return first, done

    def plan(self, now):
        """What begins now: a step that reads prompts, or steps up to the next end of a request."""
        while self.waiting and self.used != self.all_slots:
            slot = (~self.used & (self.used + 1)).bit_length() - 1  # the lowest free one
            self.used |= 1 << slot
            self.unread.append([slot, 0, self.waiting.popleft()])
        reads = bool(self.unread)
        self.begin, reading = now, self.read() if reads else 0.0
        self.rows = self.decoding.bit_length()
        self.span = self.step + max(self.reach.values()) if self.reach else 0
        if not self.used:
            self.due = None
            return
        self.planned = 1 if reads else self.ends[0][0] - self.step
        self.due = now + reading + self.duration(self.planned)

    def read(self):
        """Prompts within the budget, the first ones first; seconds. Whole ones decode at once."""
        left, pieces, rest = self.budget, [], deque()
        for entry in self.unread:
            slot, start, request = entry
            prompt, wanted = self.lengths[request % len(self.lengths)]
            end = min(start + self.budget, prompt)
            if end <= start + left:
                pieces.append((start, end))
                left -= end - start
                entry[1] = end
            if entry[1] < prompt:
                rest.append(entry)
                continue
            self.decoding |= 1 << slot
            self.reach[slot] = prompt - self.step
            heapq.heappush(self.ends, (self.step + wanted + self.model.lag, slot, request))
            self.first.append(request)
        self.unread = rest
        passes, tokens = passes_of(pieces)
        return passes * self.model.per_pass + tokens * self.model.per_token

    def duration(self, steps):
        """Seconds of so many steps from here; each looks back one position further."""
        slope = self.model.per_key * self.rows
        return steps * (self.base[self.rows] + slope * (self.span + (steps - 1) / 2))

    def steps_until(self, now):
        """After how many steps the first boundary at or after `now` comes."""
        slope, past = self.model.per_key * self.rows, now - self.begin
        b = self.base[self.rows] + slope * (self.span - 0.5)
        if slope <= 0:
            return math.ceil(past / b - 1e-9)
        return math.ceil((math.sqrt(b * b + 2 * slope * past) - b) / slope - 1e-9)


class Router:
    """Which replica gets the next request. route: one of ROUTES."""

    def __init__(self, route, count, draw):
        if route not in ROUTES:
            raise ValueError(f"There is no route {route!r}; there are {', '.join(ROUTES)}.")
        self.pick = {"in turn": self.in_turn, "two choices": self.two_choices,
                     "least loaded": self.least_loaded}[route]
        self.load, self.draw, self.last = [0] * count, draw, -1
        self.by_load = [dict.fromkeys(range(count))]  # [load] -> replicas, the longest there first

    def in_turn(self):
        self.last = (self.last + 1) % len(self.load)
        return self.last

    def two_choices(self):
        count = len(self.load)
        a = int(self.draw.random() * count)
        b = (a + 1 + int(self.draw.random() * (count - 1))) % count  # another, if there is one
        return a if self.load[a] <= self.load[b] else b

    def least_loaded(self):
        return next(iter(next(filter(None, self.by_load))))

    def add(self, replica, change):
        """A request more or less in flight there."""
        load = self.load[replica]
        del self.by_load[load][replica]
        self.load[replica] = load + change
        while len(self.by_load) <= load + change:
            self.by_load.append({})
        self.by_load[load + change][replica] = None


@dataclass
class Run:
    """What users saw, in seconds, by request.

    supplied: when the last request was handed out; from then on fewer and fewer users ask. busy:
    the share of time in which a replica computes.
    """

    start: array
    first: array
    end: array
    supplied: float
    busy: float


def think_time(mean, seed, index):
    """Seconds of thought before request `index`; exponential, the same for every caller."""
    return random.Random(f"think {seed} {index}").expovariate(1 / mean) if mean else 0.0


def simulate(model, lengths, users, requests, replicas=1, slots=16, budget=512,
             route="least loaded", think=0.0, thinks=None, seed=0):
    """`users` users who think, ask, read the answer and think again, until all is answered: a Run.

    lengths: [(prompt tokens, answer tokens)], request i has lengths[i % len]. think: mean seconds,
    exponential; thinks(i) says instead how long before request i. budget: prompt tokens a step.
    """
    draw = random.Random(seed)
    if thinks is None:
        def thinks(_):
            return draw.expovariate(1 / think) if think else 0.0
    servers = [Replica(model, slots, budget, lengths) for _ in range(replicas)]
    router, steps = Router(route, replicas, random.Random(f"route {seed}")), []
    start, first, end = (array("d", [math.nan]) * requests for _ in range(3))
    at, number, inside = array("i", [0]) * requests, min(users, requests), 0
    overhead = model.on_the_way(max(n for n, _ in model.overhead))
    # A heap of (when it is sent, request); once it is, of (when it reaches a replica, request).
    arrivals = [(thinks(i), i) for i in range(number)]
    heapq.heapify(arrivals)
    now = supplied = 0.0
    while arrivals or steps:
        if not steps or arrivals and arrivals[0][0] <= steps[0][0]:
            now, request = heapq.heappop(arrivals)
            if start[request] != start[request]:  # not sent before
                start[request], inside = now, inside + 1
                wait = overhead[min(inside // replicas, len(overhead) - 1)]
                if wait:
                    heapq.heappush(arrivals, (now + wait, request))
                    continue
            at[request] = place = router.pick()
            router.add(place, 1)
            server, before = servers[place], servers[place].due
            server.comes(request, now)
            if server.due != before:
                heapq.heappush(steps, (server.due, place))
            continue
        now, place = heapq.heappop(steps)
        server = servers[place]
        if server.due != now:
            continue  # a request came meanwhile, and the run of steps was cut shorter
        begun, done = server.step_ends()
        for request in begun:
            first[request] = now + model.lag * server.duration(1)
        for request in done:
            end[request] = now
            inside -= 1
            router.add(place, -1)
            if number < requests:
                heapq.heappush(arrivals, (now + thinks(number), number))
                number, supplied = number + 1, now
        if server.due is not None:
            heapq.heappush(steps, (server.due, place))
    return Run(start, first, end, supplied, sum(s.busy for s in servers) / (replicas * now))

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
    """How long a step takes, in seconds; `bench.steps.fit` fits it to measured steps.

    decode: ((rows, seconds), ...), by rows, at span 0; between two of them it is linear.
    per_key: for each row and position that a step looks back. per_pass, per_token: for prompts.
    lag: so many steps later a token is seen (1 with FastStep, which launches the next step
    first). overhead: ((requests in flight, seconds), ...) that HTTP takes of a request
    on its way; it grows as the server's event loop has more streams to write. budget, piece:
    prompt tokens of a step and of a pass.
    """

    decode: tuple
    per_key: float
    per_pass: float
    per_token: float
    lag: int = 0
    overhead: tuple = ((1, 0.0),)
    budget: int = 512
    piece: int = 512

    def by_rows(self, slots):
        """Seconds of a step at span 0 for 0, 1, … `slots` rows: list[float]."""
        known = list(self.decode)
        return [0.0, *(between(known, rows) for rows in range(1, slots + 1))]

    def on_the_way(self, most):
        """Seconds of HTTP for 0, 1, … `most` requests in flight; level beyond what was measured."""
        counts = [n for n, _ in self.overhead]
        measured = [min(max(n, counts[0]), counts[-1]) for n in range(most + 1)]
        return [between(self.overhead, n) for n in measured]


def between(points, x):
    """The line through sorted (x, y) points; beyond the ends, the last two go on."""
    if len(points) == 1:
        return points[0][1]
    i = 1
    while i < len(points) - 1 and points[i][0] < x:
        i += 1
    x0, y0 = points[i - 1]
    x1, y1 = points[i]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


class Replica:
    """One server's engine: `comes(request, t)` when one arrives, `step_ends()` when it is `due`.

    `due`: when its next step, or run of like steps, ends; None while it has nothing to do.
    """

    def __init__(self, model, slots, lengths):
        self.model = model
        self.slots = slots
        self.lengths = lengths
        self.base = model.by_rows(slots)
        self.all_slots = (1 << slots) - 1
        self.used = 0  # bit i: slot i is taken
        self.decoding = 0  # bit i: the prompt in slot i is read
        self.waiting = deque()  # requests
        self.unread = deque()  # (slot, prompt tokens read, request)
        self.first = []  # requests that get their first token when this step ends
        self.ends = []  # heap of (step, slot, request)
        self.reach = {}  # slot: its sequence's position, less the number of the step
        self.step = 0  # steps so far
        self.rows = 0  # of this step
        self.span = 0  # how far back its farthest row looks
        self.planned = 0  # like steps in a row, from `begin` to `due`
        self.begin = 0.0
        self.due = None
        self.busy = 0.0  # seconds so far

    def comes(self, request, now):
        """A request arrives; if there is a slot for it, the present run of steps ends sooner."""
        self.waiting.append(request)
        if self.due is None:
            self.plan(now)
        elif self.planned > 1 and self.used != self.all_slots:
            self.planned = min(self.planned, max(1, self.steps_until(now)))
            self.due = self.begin + self.duration(self.planned)

    def step_ends(self):
        """Now is `due`: ([requests with their first token], [requests that are done])."""
        now = self.due
        first = self.first
        done = []
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
        self.admit()
        if not self.used:
            self.due = None
            return
        self.begin = now
        reads = bool(self.unread)
        reading = self.prefill() if reads else 0.0
        self.rows = self.decoding.bit_length()
        self.span = self.step + max(self.reach.values()) if self.reach else 0
        self.planned = 1 if reads else self.ends[0][0] - self.step
        self.due = now + reading + self.duration(self.planned)

    def admit(self):
        """Those who wait take the free slots, the lowest first."""
        while self.waiting and self.used != self.all_slots:
            lowest = ~self.used & (self.used + 1)  # the one bit of the lowest free slot
            self.used |= lowest
            self.unread.append((lowest.bit_length() - 1, 0, self.waiting.popleft()))

    def prefill(self):
        """Read prompts piece by piece within the budget, the first ones first; seconds."""
        budget = self.model.budget
        whole = min(self.model.piece, budget)
        prompts = [self.lengths[request % len(self.lengths)][0] for _, _, request in self.unread]
        if not self.decoding and min(prompts) > 1:  # no stream waits
            budget = max(budget, self.slots * whole)
        left = budget
        passes = 0
        rest = deque()
        for slot, position, request in self.unread:
            prompt, wanted = self.lengths[request % len(self.lengths)]
            piece = min(prompt - 1 - position, whole)  # decode reads the last token
            while 0 < piece <= left:
                passes += 1
                left -= piece
                position += piece
                piece = min(prompt - 1 - position, whole)
            if position < prompt - 1:
                rest.append((slot, position, request))
                continue
            self.decoding |= 1 << slot  # a prompt that is read decodes at once
            self.reach[slot] = prompt - self.step
            heapq.heappush(self.ends, (self.step + wanted + self.model.lag, slot, request))
            self.first.append(request)
        self.unread = rest
        return passes * self.model.per_pass + (budget - left) * self.model.per_token

    def duration(self, steps):
        """Seconds of so many steps from here; each looks back one position further."""
        slope = self.model.per_key * self.rows
        return steps * (self.base[self.rows] + slope * (self.span + (steps - 1) / 2))

    def steps_until(self, now):
        """After how many steps the first boundary at or after `now` comes."""
        slope = self.model.per_key * self.rows
        past = now - self.begin
        b = self.base[self.rows] + slope * (self.span - 0.5)
        if slope <= 0:
            return math.ceil(past / b - 1e-9)
        return math.ceil((math.sqrt(b * b + 2 * slope * past) - b) / slope - 1e-9)


class Router:
    """Which replica gets the next request. route: one of ROUTES."""

    def __init__(self, route, count, draw):
        routes = {"in turn": self.in_turn, "two choices": self.two_choices,
                  "least loaded": self.least_loaded}
        if route not in routes:
            raise ValueError(f"There is no route {route!r}; there are {', '.join(ROUTES)}.")
        self.pick = routes[route]
        self.draw = draw
        self.last = -1
        self.load = [0] * count  # requests in flight at each replica
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
        for replicas in self.by_load:
            if replicas:
                return next(iter(replicas))

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


def simulate(model, lengths, users, requests, replicas=1, slots=16,
             route="least loaded", think=0.0, thinks=None, seed=0):
    """`users` users who think, ask, read the answer and think again, until all is answered: a Run.

    lengths: [(prompt tokens, answer tokens)], request i has lengths[i % len]. think: mean seconds,
    exponential; thinks(i) says instead how long before request i.
    """
    draw = random.Random(seed)
    if thinks is None:
        def thinks(_):
            return draw.expovariate(1 / think) if think else 0.0
    servers = [Replica(model, slots, lengths) for _ in range(replicas)]
    router = Router(route, replicas, random.Random(f"route {seed}"))
    crowd = Crowd(model, servers, router, requests, thinks)
    return crowd.play(users)


class Crowd:
    """The users of many replicas, and the two heaps of what happens next.

    arrivals: (when it is sent, request); once it is sent, (when it reaches a replica, request).
    steps: (when a step ends, replica).
    """

    def __init__(self, model, servers, router, requests, thinks):
        self.lag = model.lag
        self.overhead = model.on_the_way(max(n for n, _ in model.overhead))
        self.servers = servers
        self.router = router
        self.thinks = thinks
        self.requests = requests
        self.handed_out = 0
        self.in_flight = 0
        self.supplied = 0.0
        self.arrivals = []
        self.steps = []
        self.start = array("d", [math.nan]) * requests
        self.first = array("d", [math.nan]) * requests
        self.end = array("d", [math.nan]) * requests

    def play(self, users):
        """From the first thought to the last answer: a Run."""
        for _ in range(min(users, self.requests)):
            self.hand_out(0.0)
        now = 0.0
        while self.arrivals or self.steps:
            if not self.steps or self.arrivals and self.arrivals[0][0] <= self.steps[0][0]:
                now, request = heapq.heappop(self.arrivals)
                if math.isnan(self.start[request]):
                    self.send(request, now)
                else:
                    self.reach(request, now)
            else:
                now, place = heapq.heappop(self.steps)
                if self.servers[place].due == now:  # else a request came and cut the run shorter
                    self.step_ends(place, now)
        busy = sum(server.busy for server in self.servers)
        return Run(self.start, self.first, self.end, self.supplied,
                   busy / (len(self.servers) * now))

    def hand_out(self, now):
        """A user takes the next request, if there is one, and thinks before sending it."""
        if self.handed_out < self.requests:
            request = self.handed_out
            self.handed_out += 1
            self.supplied = now
            heapq.heappush(self.arrivals, (now + self.thinks(request), request))

    def send(self, request, now):
        """A request leaves its user; HTTP takes its time."""
        self.start[request] = now
        self.in_flight += 1
        each = self.in_flight // len(self.servers)
        wait = self.overhead[min(each, len(self.overhead) - 1)]
        if wait:
            heapq.heappush(self.arrivals, (now + wait, request))
        else:
            self.reach(request, now)

    def reach(self, request, now):
        """A request is at the router, which finds a replica for it."""
        place = self.router.pick()
        self.router.add(place, 1)
        server = self.servers[place]
        before = server.due
        server.comes(request, now)
        if server.due != before:
            heapq.heappush(self.steps, (server.due, place))

    def step_ends(self, place, now):
        """Tokens go out; whoever has an answer takes the next request."""
        server = self.servers[place]
        begun, done = server.step_ends()
        for request in begun:
            self.first[request] = now + self.lag * server.duration(1)
        for request in done:
            self.end[request] = now
            self.in_flight -= 1
            self.router.add(place, -1)
            self.hand_out(now)
        if server.due is not None:
            heapq.heappush(self.steps, (server.due, place))

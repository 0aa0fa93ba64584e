"""How many replicas keep a promise to how many users: a search, a table and a figure."""
import json
import math
import statistics
import time
from dataclasses import dataclass
from typing import NamedTuple

from bench.results import write_json
from bench.simulate import ROUTES, StepModel, simulate
from bench.steps import from_json
from cbserver.metrics import percentile
from load.process import LoadFailed
from load.workload import TokenRequest, token_workload, vocabulary

COLORS = dict(zip(ROUTES, ("#D55E00", "#CC79A7", "#0072B2")))


def prompts(setting, count, seed):
    """Requests of the chosen lengths, as token ids: list[TokenRequest].

    setting: {"workload", "longest", "model", "max_len"}; a prompt has half of max_len at most.
    """
    requests = token_workload(setting["workload"], count, seed, setting["longest"],
                              vocabulary(setting["model"]))
    most = setting["max_len"] // 2
    return [TokenRequest(r.prompt_tokens[:most], r.max_tokens) for r in requests]


def lengths_of(requests):
    """[(prompt tokens, answer tokens), ...], as a simulation takes them."""
    return [(len(r.prompt_tokens), r.max_tokens) for r in requests]


class Fare(NamedTuple):
    """How a settled crowd fares. Seconds; busy: the share of all the time in which a replica
    computes; tokens_per_s: of one replica."""

    ttft_p99: float
    answer_p50: float
    busy: float
    tokens_per_s: float


@dataclass(frozen=True)
class Planner:
    """How a crowd fares on many replicas. lengths: of the requests; think, target: seconds."""

    model: StepModel
    slots: int
    lengths: list
    think: float
    target: float  # of p99 TTFT
    least: int = 20_000  # requests of a simulation
    most: float = math.inf  # tokens/s of a replica: beyond it nobody has checked the simulation

    def enough(self, users):
        """Requests of a simulation that show how so many users fare."""
        return max(self.least, 4 * users)

    def try_out(self, users, replicas, route):
        """How so many users fare, once the crowd has settled: a `Fare`."""
        run = simulate(self.model, self.lengths, users, self.enough(users), replicas, self.slots,
                       route=route, think=self.think)
        begin = (self.think + run.supplied) / 2  # everybody began with a thought
        ttft = []
        took = []
        for start, first, end in zip(run.start, run.first, run.end):
            if begin < start < run.supplied:
                ttft.append(first - start)
                took.append(end - start)
        tokens = len(ttft) * statistics.fmean(wanted for _, wanted in self.lengths)
        speed = tokens / (run.supplied - begin) / replicas
        return Fare(percentile(ttft, 99), percentile(took, 50), run.busy, speed)

    def fewest(self, users, route, guess):
        """The smallest number of replicas that keeps the target, to 2 %: a dict for the table."""
        tried = {}

        def good(replicas):
            fare = tried[replicas] = self.try_out(users, replicas, route)
            print(f"{users:,} users, {route}, {replicas:,} replicas: p99 TTFT "
                  f"{1e3 * fare.ttft_p99:,.0f} ms, {fare.tokens_per_s:,.0f} tokens/s a replica",
                  flush=True)
            if fare.ttft_p99 > self.target and replicas > users:
                raise LoadFailed(f"A replica for each user gives a p99 TTFT of "
                                 f"{1e3 * fare.ttft_p99:,.0f} ms: raise --target above that.")
            if fare.tokens_per_s > self.most and replicas > users:
                raise LoadFailed(f"One user alone takes {fare.tokens_per_s:,.0f} tokens/s, and the "
                                 f"simulation was checked up to {self.most:,.0f}: measure more "
                                 "users.")
            return fare.ttft_p99 <= self.target and fare.tokens_per_s <= self.most

        factor = 1.25 if users < 100_000 else 1.02  # the guess comes from a smaller crowd
        replicas = smallest(good, max(1, guess), factor)
        fare = tried[replicas]
        return {"users": users, "route": route, "replicas": replicas,
                "requests": self.enough(users), "users_per_replica": round(users / replicas, 1),
                "ttft_p99_ms": round(1e3 * fare.ttft_p99, 1),
                "answer_p50_s": round(fare.answer_p50, 3), "busy": round(fare.busy, 3),
                "tokens_per_s": round(fare.tokens_per_s, 1)}

    def curve(self, route, replicas, most):
        """[[users a replica, p99 TTFT in ms], ...] up to `most`."""
        loads = sorted({max(1, round(most * part / 12)) for part in range(3, 15)})
        points = []
        for load in loads:
            fare = self.try_out(load * replicas, replicas, route)
            points.append([load, round(1e3 * fare.ttft_p99, 1)])
        return points


def smallest(good, guess, factor):
    """The smallest number that is good, to 2 %, if all above a good one are: few tries near guess.

    factor: how much more or less to try while nothing is known on that side.
    """
    low = guess  # not good, or not known to be
    high = guess
    while not good(high):
        low = high
        high = math.ceil(high * factor)
    while low == high > 1:  # the guess was good: how much less would do?
        low = min(high - 1, int(high / factor))
        if good(low):
            high = low
    while high - low > max(1, high // 50):
        middle = (low + high) // 2
        if good(middle):
            high = middle
        else:
            low = middle
    return high


def make_plan(options):
    """Add the table and the curves to what `measure` wrote."""
    result = json.loads(options.data.read_text(encoding="utf-8"))
    model = from_json(result["step_model"])
    lengths = lengths_of(prompts(result["options"], 4096, seed=7))
    checked = most_checked(result["verdict"])
    planner = Planner(model, result["slots"], lengths, options.think, options.target / 1e3,
                      options.least, checked)
    rows = plan_rows(planner, options.users)
    most = max(row["users_per_replica"] for row in rows)
    result["plan"] = {"command": options.command, "target_ms": options.target,
                      "think_s": options.think, "checked_tokens_per_s": checked, "rows": rows,
                      "timed": [options.speed, time_simulation(planner, options.speed, most)],
                      "replicas": 16, "curves": {route: planner.curve(route, 16, most)
                                                 for route in ROUTES}}
    write_json(result, options.data)
    print(plan_table(result))


def most_checked(verdict):
    """Tokens/s of the heaviest load at which the simulation was right: a plan goes no further.

    Right: tokens/s within 10 % of the real server's, TTFT p99 within 20 %.
    """
    held = [load["tokens_per_s"][0] for load in verdict
            if abs(load["tokens_per_s"][2]) <= 10 and abs(load["ttft_p99_ms"][2]) <= 20]
    if not held:
        raise LoadFailed("The simulation was wrong at every load that was measured: there is "
                         "nothing to plan with. Measure again, on a quiet machine.")
    return max(held)


def plan_rows(planner, crowds):
    """The fewest replicas for each crowd, from small to large, and each route: list[dict]."""
    answer = statistics.fmean(wanted for _, wanted in planner.lengths)
    step = planner.model.by_rows(planner.slots)[planner.slots]
    rate = 0.8 * planner.slots / (answer * step)  # answers a second, most slots at work
    rate = min(rate, planner.most / answer)
    rows = []
    for route in ROUTES:
        per_replica = rate * planner.think
        for users in crowds:
            row = planner.fewest(users, route, round(users / per_replica))
            rows.append(row)
            if row["replicas"] > 1:  # one that has nothing to do says nothing of the next
                per_replica = row["users_per_replica"]
    return rows


def time_simulation(planner, requests, users_per_replica):
    """Seconds that so many requests of a tenth as many users take to simulate."""
    users = requests // 10
    replicas = max(1, round(requests / 10 / users_per_replica))
    begin = time.perf_counter()
    simulate(planner.model, planner.lengths, users, requests, replicas, planner.slots,
             think=planner.think)
    return round(time.perf_counter() - begin, 1)


def plan_table(result):
    """Replicas for each crowd and route, as Markdown."""
    rows = {(row["users"], row["route"]): row for row in result["plan"]["rows"]}
    heads = [f"{route}: replicas (users each)" for route in ROUTES]
    lines = [f"| users | {' | '.join(heads)} |", "|---:|" + "---:|" * len(ROUTES)]
    for users in sorted({users for users, _ in rows}):
        found = [rows[users, route] for route in ROUTES]
        cells = [f"{row['replicas']:,} ({row['users_per_replica']:,.0f})" for row in found]
        lines.append(f"| {users:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


# The figure


def capacity_figure(result):
    """Left: the real server's p99 TTFT beside the simulated; right: what routing does to it."""
    import matplotlib.pyplot as plt

    from bench.report import STYLE

    planned = "plan" in result
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2 if planned else 1, layout="constrained", squeeze=False,
                                    figsize=(10 if planned else 5.5, 3.8))
        draw_check(axes[0, 0], result)
        if planned:
            draw_plan(axes[0, 1], result["plan"])
        figure.suptitle(f"{result['model']} on {result['hardware']}", fontsize=10)
        return figure


def draw_check(axes, result):
    """p99 TTFT of each load and repeat, measured and simulated side by side."""
    users = sorted({row["users"] for row in result["loads"]})
    drawn = []
    for kind, mark, color, aside in (("measured", "o", "#000000", -0.08),
                                     ("simulated", "x", "#0072B2", 0.08)):
        x = [users.index(row["users"]) + aside for row in result["loads"]]
        y = [row[kind]["ttft_p99_ms"] for row in result["loads"]]
        axes.plot(x, y, mark, ms=8, mfc="none", color=color, label=kind)
        drawn += y
    axes.set(xlabel=f"users of one server with {result['slots']} slots",
             xticks=range(len(users)), xticklabels=users, xlim=(-0.5, len(users) - 0.5),
             ylabel="TTFT p99, ms", title="One server, real and simulated")
    scale(axes, drawn)
    axes.legend(loc="upper left")


def draw_plan(axes, plan):
    """p99 TTFT against users a replica, a line for each route; and how far that was checked."""
    drawn = [plan["target_ms"]]
    for route, points in plan["curves"].items():
        loads = [load for load, _ in points]
        ms = [p99 for _, p99 in points]
        axes.plot(loads, ms, "o-", ms=4, color=COLORS[route], label=route)
        drawn += ms
    axes.axhline(plan["target_ms"], color="black", ls="--", lw=1,
                 label=f"target, {plan['target_ms']:,.0f} ms")
    fullest = max(plan["rows"], key=lambda row: row["users_per_replica"])
    tokens_a_user = fullest["tokens_per_s"] / fullest["users_per_replica"]
    axes.axvline(plan["checked_tokens_per_s"] / tokens_a_user, color="black", ls=":", lw=1,
                 label="the check went so far")
    axes.set(xlabel=f"users a replica ({plan['replicas']} replicas)",
             ylabel="TTFT p99, ms", title="Simulated: which replica gets a request")
    scale(axes, drawn)
    axes.legend()


def scale(axes, values):
    """From 0 if the values are of one size, else with whole powers of ten."""
    top = max(values)
    if top < 5 * min(values):
        axes.set_ylim(0, 1.3 * top)  # room for the legend
        return
    low = 10 ** math.floor(math.log10(min(values)))
    axes.set(yscale="log", ylim=(low, 10 ** math.ceil(math.log10(1.5 * top))))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
    axes.yaxis.set_minor_formatter(lambda y, _: "")

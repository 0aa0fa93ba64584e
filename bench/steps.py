"""The steps of a real engine: one that notes them, and the model of a step fitted to them."""
import time

import numpy as np

from bench.simulate import StepModel
from cbserver.scheduler import ContinuousEngine

# Noting


class NotedRunner:
    """Another runner's passes, and what those of the present step read and decode."""

    def __init__(self, runner):
        self.runner = runner
        self.passes = 0  # that read prompts
        self.tokens = 0  # of prompts
        self.rows = 0
        self.span = 0

    def begin_step(self):
        self.passes = 0
        self.tokens = 0

    def prefill(self, sequence, end):
        self.passes += 1
        self.tokens += end - sequence.position
        self.runner.prefill(sequence, end)

    def decode(self, sequences):
        self.rows = max((sequence.slot + 1 for sequence in sequences), default=0)
        self.span = max((sequence.position + 1 for sequence in sequences), default=0)
        return self.runner.decode(sequences)


class NotedEngine(ContinuousEngine):
    """Adds [rows, span, passes, prompt tokens, seconds] of every step to `log["steps"]`.

    log: a dict; the engine's budget and piece are noted there, too. A step's time runs from the end
    of the one before, if there was work: the engine's thread also waits for the lock, and for
    Python's while the event loop writes to the clients.
    """

    def __init__(self, *arguments, log, **named):
        super().__init__(*arguments, **named)
        self.runner = NotedRunner(self.runner)
        self.log = log
        self.log |= {"budget": self.prefill_budget, "piece": self.piece, "steps": []}
        self.ended = None  # when the step before did; None if there was no work after it

    def step(self):
        begin = time.perf_counter() if self.ended is None else self.ended
        noted = self.runner
        noted.begin_step()
        super().step()
        now = time.perf_counter()
        self.log["steps"].append([noted.rows, noted.span, noted.passes, noted.tokens, now - begin])
        self.ended = now if self.running or self.waiting else None


# Fitting


def fit(steps, slots, lag=0):
    """(StepModel, how well it fits) by least squares over measured steps.

    steps: what NotedEngine writes. lag: on a GPU a step's time is that of the work launched in the
    one before, so what was in it is looked up there.
    """
    rows = np.array(with_their_times(steps, lag))  # [steps, 5]
    seconds = rows[:, 4]
    knots = knots_of(rows[:, 0], slots)
    columns = columns_of(rows, knots)
    found, *_ = np.linalg.lstsq(columns, seconds, rcond=None)
    # Nothing takes less than no time, whatever noise fits best.
    *decode, per_key, per_pass, per_token = np.maximum(found, 0.0).tolist()
    model = StepModel(tuple(zip(knots, decode)), per_key, per_pass, per_token, lag)
    return model, quality(rows, columns @ found - seconds)


def with_their_times(steps, lag):
    """Each step that did something, with the time that its work took: a list like `steps`."""
    rows = []
    for content, timed in zip(steps, steps[lag:]):
        decoded, span, passes, tokens, _ = content
        if decoded or passes:
            rows.append([decoded, span, passes, tokens, timed[4]])
    return rows


def knots_of(counts, slots):
    """The numbers of rows between which a step's time is linear: those that were seen often."""
    wanted = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k < slots] + [slots]
    return [k for k in wanted if (counts >= k).sum() >= 10]


def columns_of(rows, knots):
    """What a step's time is a sum of: a hat for each knot, keys looked at, passes, tokens."""
    count, span, passes, tokens, _ = rows.T
    unit = np.eye(len(knots))
    # A knot's hat: the weight of its value on the line from knot to knot.
    hats = [np.interp(count, knots, unit[i]) * (count > 0) for i in range(len(knots))]
    return np.stack([*hats, count * span, passes, tokens], 1)


def quality(rows, off):
    """How well a model fits; off: by how many seconds it misses each step."""
    seconds = rows[:, 4]
    around = seconds - seconds.mean()
    slowest = rows[np.argsort(seconds)[:-9:-1]].tolist()
    return {"steps": len(rows), "r2": round(float(1 - (off @ off) / (around @ around)), 4),
            "mean_error_ms": round(float(1e3 * np.abs(off).mean()), 3),
            "mean_step_ms": round(float(1e3 * seconds.mean()), 3),
            "slowest": [[*map(int, content), round(1e3 * took, 1)] for *content, took in slowest]}


# On disk, in milliseconds


def to_json(model):
    """A StepModel as a dict."""
    return {"decode_ms": [[rows, round(1e3 * seconds, 4)] for rows, seconds in model.decode],
            "per_key_us": round(1e6 * model.per_key, 5),
            "per_pass_ms": round(1e3 * model.per_pass, 4),
            "per_token_ms": round(1e3 * model.per_token, 5), "lag": model.lag,
            "overhead_ms": [[n, round(1e3 * seconds, 3)] for n, seconds in model.overhead],
            "budget": model.budget, "piece": model.piece}


def from_json(found):
    """The StepModel that `to_json` wrote."""
    return StepModel(
        decode=tuple((rows, ms / 1e3) for rows, ms in found["decode_ms"]),
        per_key=found["per_key_us"] / 1e6, per_pass=found["per_pass_ms"] / 1e3,
        per_token=found["per_token_ms"] / 1e3, lag=found["lag"],
        overhead=tuple((n, ms / 1e3) for n, ms in found["overhead_ms"]),
        budget=found.get("budget", 512), piece=found.get("piece", 512))

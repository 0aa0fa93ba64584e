"""What a request looked like from the client's side, and the numbers a serving report is made of."""
import math
import statistics
from dataclasses import dataclass, field


@dataclass
class RequestRecord:
    """One request as its client saw it. Times are seconds on the client's clock."""

    start: float  # the request was sent
    token_times: list[float] = field(default_factory=list)  # one entry a token, when it arrived
    prompt_tokens: int = 0  # as the server reported them
    completion_tokens: int = 0  # as the server reported them
    error: str | None = None  # None, or one sentence
    index: int = 0  # which request of the workload
    text: str = ""  # what was answered

    @property
    def ttft(self):
        """Time to first token, seconds: request sent -> first token."""
        return self.token_times[0] - self.start

    @property
    def e2e(self):
        """End-to-end latency, seconds: request sent -> last token."""
        return self.token_times[-1] - self.start

    @property
    def itl(self):
        """Inter-token latencies, seconds: every gap between two tokens."""
        return [b - a for a, b in zip(self.token_times, self.token_times[1:])]

    @property
    def tpot(self):
        """Time per output token, seconds: (E2E - TTFT) / (N - 1); None for a single token."""
        gaps = len(self.token_times) - 1
        return (self.e2e - self.ttft) / gaps if gaps > 0 else None


def percentile(values, q):
    """The smallest value that at least q percent of the values do not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(q / 100 * len(values)) - 1)]


def spread_ms(seconds):
    """p50, p90, p99 and mean of times in seconds, in milliseconds; None where there is no value."""
    if not seconds:
        return {"p50": None, "p90": None, "p99": None, "mean": None}
    ms = {f"p{q}": round(percentile(seconds, q) * 1e3, 2) for q in (50, 90, 99)}
    return ms | {"mean": round(statistics.fmean(seconds) * 1e3, 2)}


def summarize(records, window=None):
    """Throughput and latencies of many requests, as a dict ready for JSON.

    window: (start, end) in seconds on the records' clock. Without it throughput is all completion tokens over
    the time from the first request sent to the last token; with it only tokens that arrived inside count.
    """
    done = [r for r in records if r.error is None and r.token_times]
    if not done:
        return {"requests": 0, "failures": len(records), "wall_s": 0.0, "completion_tokens": 0, "tokens_per_s": 0.0, "requests_per_s": 0.0} | {f"{n}_ms": spread_ms([]) for n in ("ttft", "itl", "tpot", "e2e")}
    first, last = window or (min(r.start for r in done), max(r.token_times[-1] for r in done))
    tokens = sum(first <= t <= last for r in done for t in r.token_times) if window else sum(r.completion_tokens for r in done)
    finished = [r for r in done if first <= r.token_times[-1] <= last]
    wall = last - first
    return {"requests": len(done), "failures": len(records) - len(done), "wall_s": round(wall, 3),
            "completion_tokens": tokens, "tokens_per_s": round(tokens / wall, 2), "requests_per_s": round(len(finished) / wall, 3),
            "ttft_ms": spread_ms([r.ttft for r in done]), "itl_ms": spread_ms([g for r in done for g in r.itl]),
            "tpot_ms": spread_ms([r.tpot for r in done if r.tpot is not None]), "e2e_ms": spread_ms([r.e2e for r in done])}

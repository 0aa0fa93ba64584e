"""Two replicas behind a real `serve run`: balanced, exact, and a killed one loses only its own.

`make test-ray` installs Ray and runs these; without Ray they are skipped.
"""
import contextlib
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import ROOT, added_text, prompt

from load.process import free_port, spawn, stop, tail

pytest.importorskip("ray", reason="Ray is not installed: make test-ray")
pytestmark = pytest.mark.timeout(300)
SLOTS, WAITING = 4, 8


class Cluster:
    """`serve run` with two replicas of random:tiny, for the length of a `with`."""

    def __init__(self, folder):
        self.log, self.port = folder / "ray.log", free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        # One for all: to make a client takes longer than an answer of the tiny model.
        self.client = httpx.Client(timeout=120, limits=httpx.Limits(max_connections=None))

    def __enter__(self):
        command = [Path(sys.executable).with_name("serve"), "run", "cbserver.on_ray:app",
                   "replicas=2", "model=random:tiny", f"port={self.port}", f"max_batch={SLOTS}",
                   f"max_waiting={WAITING}"]
        os.chdir(ROOT)
        self.process = spawn(command, self.log, RAY_USAGE_STATS_ENABLED="0", RAY_DEDUP_LOGS="0")
        try:
            self.until(lambda: "is ready at" in self.log.read_text())  # both replicas are
            self.until(lambda: self.healthy() and len(self.replicas()) == 2)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        family = psutil.Process(self.process.pid).children(recursive=True)
        stop(self.process)
        _, left = psutil.wait_procs(family, 20)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def until(self, condition, seconds=150):
        limit = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < limit, f"it never came true:\n{tail(self.log, 30)}"
            assert self.process.poll() is None, tail(self.log, 30)
            time.sleep(0.2)

    def healthy(self):
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200

    def replicas(self):
        """{pid}: the processes that hold a model; one that still starts has another name."""
        found = set()
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "".join(process.cmdline()).strip() == "ray::ServeReplica:default:cbserver":
                    found.add(process.pid)
        return found

    def ask(self, tokens, count, seen):
        """One streamed completion: (status, text, whole, its number there).

        seen: called at each event.
        """
        body = {"prompt": tokens, "max_tokens": count, "temperature": 0,
                "ignore_eos": True, "stream": True}
        text, whole, number = "", False, None
        try:
            with self.client.stream("POST", f"{self.url}/v1/completions",
                                    json=body) as response:
                if response.status_code != 200:
                    return response.status_code, response.read().decode(), False, None
                number = int(response.headers["X-Request-Number"])
                for line in response.iter_lines():
                    whole = whole or line == "data: [DONE]"
                    if line.startswith("data: {"):
                        data = json.loads(line[6:])
                        text += data["choices"][0]["text"] if "choices" in data else ""
                        seen()
        except httpx.HTTPError:
            pass
        return 200, text, whole, number

    def ask_all(self, requests, seen=lambda i: None):
        """All at once; seen(i) is called at each event of request i."""
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(lambda i: self.ask(*requests[i], seen=lambda: seen(i)),
                                 range(len(requests))))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("ray")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def text_of(tiny):
    """(prompt, count) -> the text that `model.generate` alone would give."""
    from cbserver.baseline import generate_tokens
    from cbserver.model.sampling import SamplingParams

    model, tokenizer = tiny

    def text(tokens, count):
        made = generate_tokens(model, tokens, SamplingParams(count, ignore_eos=True))
        return added_text(tokenizer, tokens, list(made))

    return text


def test_thirty_streams_are_exact_and_spread_over_both_replicas(cluster, text_of):
    requests = [(prompt(i, 3 + i), 8 + i % 20) for i in range(30)]
    answers = cluster.ask_all(requests)
    assert [a[:3] for a in answers] == [(200, text_of(*r), True) for r in requests]
    # Each replica numbers its own 1, 2, 3 …: the higher of the two counts is the largest number.
    assert 15 <= max(number for *_, number in answers) <= 21


def test_a_crowd_that_fits_is_served_whole_however_often_it_comes(cluster):
    crowd = 2 * (2 * SLOTS) + WAITING  # slots, places beside them, the queue
    for _ in range(5):
        answers = cluster.ask_all([(prompt(i, 4), 6) for i in range(crowd)])
        assert [status for status, *_ in answers] == [200] * crowd


def test_a_client_that_leaves_frees_its_slot_there(cluster):
    body = {"prompt": [5], "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body) as response:
        next(response.iter_lines())

    def aborted():
        text = httpx.get(f"{cluster.url}/metrics", timeout=10).text
        return 'request_success_total{finished_reason="abort"} 1.0' in text

    cluster.until(aborted, 60)


def test_a_queue_that_is_full_refuses(cluster):
    answers = cluster.ask_all([(prompt(i, 8), 400) for i in range(120)])
    codes = [status for status, *_ in answers]
    assert set(codes) == {200, 503}
    assert all(whole for status, _, whole, _ in answers if status == 200)


def test_a_setting_that_there_is_not_is_refused_by_name():
    from cbserver.on_ray import app

    with pytest.raises(ValueError, match="max_bach"):
        app({"max_bach": "4"})


def test_a_killed_replica_loses_only_its_own_streams_and_comes_back(cluster, text_of):
    before = cluster.replicas()
    victim, begun, lock = min(before), set(), threading.Lock()
    requests = [(prompt(i, 5), 400) for i in range(6)]  # of 8 slots: all run, however they spread

    def kill_when_all_have_begun(i):
        with lock:
            if i not in begun and not begun.add(i) and len(begun) == len(requests):
                psutil.Process(victim).kill()

    answers = cluster.ask_all(requests, kill_when_all_have_begun)
    whole = [text == text_of(*request)
             for request, (_, text, done, _) in zip(requests, answers) if done]
    assert all(whole) and 0 < len(whole) < len(requests), f"{len(whole)} of {len(requests)}"
    cluster.until(lambda: len(cluster.replicas() - {victim}) == 2)
    assert len(before & cluster.replicas()) == 1, "the other one went on"
    again = [(prompt(i, 5), 20) for i in range(8)]
    assert [a[:3] for a in cluster.ask_all(again)] == [(200, text_of(*r), True) for r in again]

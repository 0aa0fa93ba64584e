"""200 clients that leave, dawdle and crowd: afterwards nothing is held, and every sum is exact."""
import asyncio
import gc
import json
import random
import weakref

import httpx
import pytest
from conftest import added_text, held, metrics_say, prompt

from cbserver.scheduler import ContinuousEngine

CLIENTS = 200
ROUNDS = 2


async def client(i, port, seed):
    """One raw connection: (request, status, events or None if it left early)."""
    rng = random.Random(f"{seed} {i}")
    await asyncio.sleep(rng.choice([0, 0, 0.2 * rng.random()]))  # bursts, and some latecomers
    request = {"prompt": prompt(i % 12, 3 + i % 20), "max_tokens": 5 + i % 40, "temperature": 0,
               "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    body = json.dumps(request)
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4096)
    try:
        writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                     f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
                     .encode())
        leaves_after = rng.randrange(12) if i % 3 == 0 else None  # lines it reads
        status = None
        events = []
        if leaves_after == 0:
            return request, None, None
        while line := await reader.readline():
            status = status or int(line.split()[1])
            if line.startswith(b"data: "):
                events.append(line[6:].strip())
                if leaves_after is not None and len(events) >= leaves_after:
                    return request, status, None
            if i % 3 == 1:
                await asyncio.sleep(rng.random() * 0.01)  # a slow reader
        return request, status, events
    finally:
        writer.close()


def whole(events):
    """(text, usage) of a stream that came to its end."""
    assert events[-1] == b"[DONE]"
    *chunks, usage = [json.loads(e) for e in events[:-1]]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    return "".join(c["choices"][0]["text"] for c in chunks), usage["usage"]


def values(text):
    return {name: float(value) for name, value in
            (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))}


@pytest.mark.slow
def test_chaos_leaves_nothing_behind_and_every_total_exact(tiny, reference, served):
    engine = ContinuousEngine(*tiny, slots=8, max_waiting=60, max_len=128)
    submit, accepted = engine.submit, []

    def remember(*args):
        accepted.append(sequence := submit(*args))
        return sequence

    engine.submit = remember
    with held(engine) as go_on, served(engine) as url:
        port = int(url.rsplit(":")[-1])

        async def main(seed):
            clients = asyncio.gather(*[client(i, port, seed) for i in range(CLIENTS)])
            while seed == 0 and engine.stats().waiting < 60 and not clients.done():
                await asyncio.sleep(0.01)  # the first burst meets a standing engine
            go_on.set()
            outcomes = await asyncio.wait_for(clients, 120)
            for _ in range(1000):
                if not (engine.running or engine.waiting):
                    break
                await asyncio.sleep(0.01)
            return outcomes

        for seed in range(ROUNDS):
            outcomes = asyncio.run(main(seed))
            finished = [(r, e) for r, status, e in outcomes if status == 200 and e is not None]
            refused = [status for _, status, _ in outcomes if status == 429]
            assert len(finished) >= 30 and (refused or seed), (len(finished), len(refused))
            assert {status for _, status, _ in outcomes} <= {200, 429, None}
            for request, events in finished:
                text, usage = whole(events)
                want = reference(request["prompt"], request["max_tokens"])
                assert text == added_text(tiny[1], request["prompt"], want)
                assert usage["completion_tokens"] == request["max_tokens"]
        assert httpx.get(f"{url}/health").status_code == 200
        metrics_say(url, f"e2e_request_latency_seconds_count {float(len(accepted))}")
        metrics = values(httpx.get(f"{url}/metrics").text)
    assert not engine.running and not engine.waiting, "all slots are free"
    assert metrics["num_requests_running"] == metrics["num_requests_waiting"] == 0
    ended = {name: v for name, v in metrics.items() if name.startswith("request_success_total")}
    assert sum(ended.values()) == metrics["e2e_request_latency_seconds_count"] == len(accepted)
    assert ended['request_success_total{finished_reason="length"}'] >= len(finished)
    admitted = [s for s in accepted if s.admission_time]
    assert metrics["request_queue_time_seconds_count"] == len(admitted)
    assert metrics["prompt_tokens_total"] == sum(len(s.prompt_tokens) for s in admitted)
    assert metrics["generation_tokens_total"] == sum(len(s.generated_tokens) for s in accepted)
    last = [weakref.ref(s) for s in accepted]
    accepted.clear(), admitted.clear()
    gc.collect()
    assert not any(ref() for ref in last), "no request is kept once it has ended"

"""The live page: its feed tells what the slots do and nothing of what is said; a browser agrees."""
import asyncio
import contextlib
import json
import threading
import time

import httpx
import pytest
from conftest import by_hand, held, prompt, serving, until

from bench import browser
from cbserver.batch import StaticEngine
from cbserver.model.sampling import SamplingParams
from cbserver.scheduler import ContinuousEngine
from cbserver.sequence import SequentialEngine
from cbserver.server import create_app

chromium = pytest.mark.skipif(browser.program() is None, reason="there is no Chromium here")


def first_event(url, **headers):
    with httpx.stream("GET", f"{url}/events", headers=headers, timeout=30) as response:
        response.raise_for_status()
        return json.loads(next(response.iter_lines()).removeprefix("data: "))


def snapshots(engine, wanted):
    """What the feed says before each of the steps of an engine that gets these requests."""
    feed = create_app(by_hand(engine)).state.feed
    for length, tokens in wanted:
        engine.submit(prompt(length, length), SamplingParams(tokens, ignore_eos=True))
    seen = [feed.snapshot()]
    while engine.waiting or engine.running:
        engine.step()
        seen.append(feed.snapshot())
    return seen


def test_a_snapshot_tells_prefill_and_decode_apart_and_counts(tiny):
    seen = snapshots(ContinuousEngine(*tiny, slots=2, max_len=64, prefill_budget=8),
                     [(20, 3), (4, 2), (6, 1)])
    assert seen[0]["slots"] == [None, None] and seen[0]["waiting"] == 3 and seen[0]["kv"] == 0
    assert seen[1]["slots"][0] == [1, 0, 16, 20, 0, 3], "16 of 20 prompt tokens are read"
    assert seen[1]["waiting"] == 1
    phases = [snapshot["slots"][0][1] for snapshot in seen if snapshot["slots"][0]
              and snapshot["slots"][0][0] == 1]
    assert phases == sorted(phases) and set(phases) >= {0, 1}
    numbers = {slot[0] for snapshot in seen for slot in snapshot["slots"] if slot}
    assert numbers == {1, 2, 3}
    assert seen[-1]["generated"] == 6 and seen[-1]["waiting"] == 0
    assert 0 < seen[1]["kv"] <= 1


def test_a_static_batch_shows_who_is_done_and_waits_for_the_others(tiny):
    seen = snapshots(StaticEngine(*tiny, slots=2, max_len=64), [(4, 1), (4, 8)])
    assert [2 in (slot[1] for slot in s["slots"] if slot) for s in seen].count(True) >= 6


def test_the_baseline_has_one_slot_and_no_position_and_is_shown_all_the_same(tiny):
    engine = SequentialEngine(*tiny, max_len=64)
    feed = create_app(by_hand(engine)).state.feed
    engine.submit(prompt(1, 5), SamplingParams(4))
    sequence = engine.take()
    assert feed.snapshot()["slots"] == [[1, 0, 0, 5, 0, 4]]
    engine.deliver([(sequence, 7)])
    assert feed.snapshot()["slots"] == [[1, 1, 5, 5, 1, 4]]


def test_viewers_share_a_snapshot_and_it_is_made_at_most_once_an_interval(tiny):
    async def watch(stream, events):
        return [await anext(stream) for _ in range(events)]

    async def main():
        engine = ContinuousEngine(*tiny, max_len=64)
        app = create_app(engine)
        async with app.router.lifespan_context(app):
            feed, made = app.state.feed, []
            snapshot = feed.snapshot
            feed.snapshot = lambda: made.append(time.monotonic()) or snapshot()
            streams = [feed.stream() for _ in range(20)]
            seen = await asyncio.gather(*(watch(stream, 6) for stream in streams))
            for stream in streams:
                await stream.aclose()
            return made, seen

    made, seen = asyncio.run(main())
    assert all(b - a >= 0.1 for a, b in zip(made, made[1:]))
    assert all(events == seen[0][:1] + events[1:] for events in seen), "the same for all"
    assert len({event for events in seen for event in events}) <= len(made)


def test_the_feed_says_nothing_of_what_is_asked_and_answered(tiny):
    engine = ContinuousEngine(*tiny, slots=2, max_len=256)
    with serving(engine) as url, held(engine, after=3):
        body = {"prompt": "my secret is a parrot", "max_tokens": 50, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
            until(lambda: engine.running)
            event = first_event(url)
            assert response.headers["X-Request-Number"] == "1"
    assert set(event) == {"time", "model", "engine", "slots", "waiting", "steps", "generated",
                          "ttft_ms", "kv"}
    assert all(isinstance(n, int) for slot in event["slots"] if slot for n in slot)
    assert event["slots"][0][0] == 1


def test_the_page_is_open_and_the_feed_wants_the_key(tiny):
    with serving(ContinuousEngine(*tiny, max_len=64), api_key="sesame") as url:
        page = httpx.get(url)
        assert page.status_code == 200 and 'data-key="yes"' in page.text
        assert "sesame" not in page.text
        assert "default-src 'none'" in page.headers["Content-Security-Policy"]
        assert httpx.get(f"{url}/events").status_code == 401
        assert first_event(url, Authorization="Bearer sesame")["waiting"] == 0


def test_one_viewer_too_many_is_told_so_and_a_place_falls_free(tiny):
    engine = ContinuousEngine(*tiny, max_len=64)
    app = create_app(engine, max_viewers=1)
    import lesson

    server = lesson.Server(app)
    try:
        with httpx.stream("GET", f"{server.url}/events") as response:
            next(lines := response.iter_lines())
            refused = httpx.get(f"{server.url}/events")
            assert refused.status_code == 503 and "try again" in refused.text
            next(lines)
        until(lambda: app.state.feed.viewers == 0)
        assert first_event(server.url)
    finally:
        server.stop()


def test_the_feed_ends_with_the_engine(tiny):
    engine = ContinuousEngine(*tiny, max_len=64)
    with serving(engine) as url, httpx.stream("GET", f"{url}/events", timeout=30) as response:
        lines = response.iter_lines()
        next(lines)
        engine.close(None)
        assert list(lines)[-1:] == [""], "the stream ends; it is not cut off"


@contextlib.contextmanager
def users(url, count, length=400):
    """So many clients that ask again and again, until the block is left."""
    ended = threading.Event()

    def user(number):
        body = {"prompt": "x" * (100 * number + 20), "max_tokens": length, "ignore_eos": True}
        with httpx.Client(base_url=url, timeout=60) as client:
            while not ended.is_set():
                client.post("/v1/completions", json=body)

    threads = [threading.Thread(target=user, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join(60)


AT_WORK = "parseInt(document.querySelector('#busy').textContent)"


GREEDY = """(() => { const plain = fetch; window.fetch = (where, how) => {
    if (how?.body) window.asked = [where, how.body = JSON.stringify(
        {...JSON.parse(how.body), temperature: 0})];
    return plain(where, how); }; })()"""  # the page samples; a test wants the same answer twice


@chromium
@pytest.mark.timeout(180)
def test_in_a_browser_slots_fill_and_empty_and_the_answer_arrives(tiny):
    engine = ContinuousEngine(*tiny, slots=4, max_len=2000)
    with serving(engine, model_name="tiny") as url, browser.Browser() as tab:
        tab.open(url)
        tab.until("document.querySelector('#about').textContent.includes('4 slots')")
        assert tab.run(AT_WORK) == 0
        with users(url, 6):
            tab.until(f"{AT_WORK} === 4 && parseInt(waiting.textContent) > 0")
            assert tab.run("document.querySelectorAll('#rows tr').length") == 4
            assert tab.run("document.querySelectorAll('#queue i').length") > 0
            tab.run(GREEDY)
            tab.run("document.querySelector('#send').click()")
            tab.until("document.querySelector('#mine').textContent.includes(' done')")
            path, body = tab.run("asked")
            same = httpx.post(f"{url}/{path}", json={**json.loads(body), "stream": False},
                              timeout=60).json()["choices"][0]
            assert tab.text("#answer") == (same["message"]["content"] if "message" in same
                                           else same["text"]) != ""
            assert tab.until("/^[0-9]/.test(document.querySelector('#speed').textContent)")
            assert tab.run("document.querySelector('#p50').textContent") != "–"
        tab.until(f"{AT_WORK} === 0")
        tab.until("document.querySelector('#rows').textContent.match(/free/g).length === 4")
        painted = tab.run("""(() => { const c = document.querySelector('#strip');
            const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data, seen = {};
            for (let i = 0; i < d.length; i += 4) seen[d[i] + ',' + d[i+1] + ',' + d[i+2]] = 1;
            return Object.keys(seen).length; })()""")
        assert painted > 4, "the strip has the colours of several requests"
        assert tab.problems == []


@chromium
@pytest.mark.timeout(180)
def test_in_a_browser_the_key_is_asked_for_and_a_link_can_carry_it(tiny):
    engine = ContinuousEngine(*tiny, slots=2, max_len=256)
    with serving(engine, api_key="sesame") as url, browser.Browser() as tab:
        tab.open(url)
        tab.until("document.activeElement.id === 'key'")
        for letter in "sesame":
            tab.press(letter)
        tab.press("Enter")
        tab.until("document.querySelector('#about').textContent.includes('2 slots')")
        assert tab.run("document.querySelector('#key-form').hidden")
        assert tab.problems == []
        tab.run("sessionStorage.clear()")
        tab.open("about:blank")
        tab.open(f"{url}/#key=sesame")
        tab.until("document.querySelector('#about').textContent.includes('2 slots')")
        assert tab.run("location.href") == f"{url}/", "the key is out of the address bar"
        tab.run("sessionStorage.clear()")
        tab.open("about:blank")
        tab.open(f"{url}/#key=wrong")
        tab.until("document.querySelector('#problem').textContent.includes('not the server')")


@chromium
@pytest.mark.timeout(180)
def test_in_a_browser_it_fits_a_phone_has_two_palettes_and_works_by_keyboard(tiny):
    engine = ContinuousEngine(*tiny, slots=16, max_len=256)
    with serving(engine, model_name="tiny") as url, browser.Browser(360, 740) as tab:
        tab.open(url)
        tab.until("document.querySelectorAll('#rows tr').length === 16")
        assert tab.run("document.documentElement.scrollWidth") <= 360
        ground = "getComputedStyle(document.body).backgroundColor"
        light = tab.run(ground)
        tab.resize(360, 740, dark=True)
        assert tab.run(ground) != light
        reached = []
        for _ in range(8):
            tab.press("Tab")
            reached.append(tab.run("document.activeElement.id"))
        for control in ("prompt", "length", "send", "answer", "pause"):
            assert control in reached
        tab.run("document.querySelector('#send').focus()")
        tab.press("Enter")
        tab.until("document.querySelector('#mine').textContent.includes(' done')")
        tree = tab.call("Accessibility.getFullAXTree")["nodes"]
        named = {(n["role"]["value"], n["name"]["value"]) for n in tree
                 if "role" in n and n.get("name", {}).get("value")}
        for role, name in (("textbox", "Prompt"), ("button", "Send"), ("button", "Pause"),
                           ("status", "Answer"), ("table", "What each slot does now"),
                           ("rowheader", "15"), ("heading", "The batch")):
            assert (role, name) in named
        controls = [n for n in tree if n.get("role", {}).get("value") in
                    ("textbox", "button", "spinbutton", "image")]
        assert all(n["name"]["value"] for n in controls if not n.get("ignored"))
        assert tab.problems == []

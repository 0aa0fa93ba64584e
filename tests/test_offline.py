"""The benchmark without HTTP: all arms count the same tokens, runs resume, floors are floors."""
import json
import re
import subprocess
import sys

import pytest
from conftest import serving

from bench import arms, ladder, offline, soak
from bench.results import order
from cbserver.scheduler import ContinuousEngine
from load import client
from load.process import LoadFailed
from load.workload import token_workload


def options(out, *more):
    wanted = "generate,continuous,transformers-cb,http"
    return offline.parse(["--model", "random:tiny", "--arms", wanted, "--requests", "5",
                          "--longest", "24", "--repeats", "1", "--out", str(out), *more])


@pytest.mark.slow
def test_arms_are_measured_compared_and_resumed(tmp_path, capsys):
    out = tmp_path / "offline.json"
    result = offline.measure(options(out))
    assert json.loads(out.read_text()) == result
    rows = {row["arm"]: row for row in result["rows"]}
    wanted = sum(r.max_tokens for r in token_workload("uniform", 5, longest=24, vocab=511))
    assert {row["tokens"] for row in rows.values()} == {wanted}
    assert all(row["tokens_per_s"] > 0 for row in rows.values())
    step = rows["continuous"]
    assert 0 < step["step_floor_ms"] < step["step_ms"] and step["repeats"][0]["steps"] > 0
    for same in result["same_tokens"]:
        assert same["whole"] == same["first 16 tokens"] == same["compared"] == 5, same
    capsys.readouterr()
    again = offline.measure(options(out))
    assert again["rows"] == result["rows"] and capsys.readouterr().out == "", "nothing is run twice"
    assert offline.table(result).count("\n") == 5
    ladder.ladder_figure(result).savefig(tmp_path / "ladder.png")


def test_results_of_another_setting_are_not_mixed(tmp_path):
    out = tmp_path / "offline.json"
    result = offline.begin(options(out))
    out.write_text(json.dumps(result))
    assert offline.begin(options(out))["rows"] == []
    with pytest.raises(LoadFailed, match="--fresh"):
        offline.begin(options(out, "--seed", "1"))


def test_an_arm_that_fails_is_said_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def child(case, say):
        if case["arm"] == "generate":
            raise LoadFailed("no memory")
        return {"tokens_per_s": 5.0, "requests": 1, "tokens": 9, "seconds": 1, "warmup_s": 0,
                "digests": {"whole": ["a"], "first 16 tokens": ["a"]}}

    monkeypatch.setattr(offline, "run_child", child)
    result = offline.measure(options(tmp_path / "offline.json"))
    assert result["failed"] == {"generate, 1 slots": "no memory"}
    assert "no memory" in capsys.readouterr().out
    measured = [row["arm"] for row in result["rows"] if row["repeats"]]
    assert measured == ["continuous", "transformers-cb", "http"]


def child_that(code):
    return subprocess.Popen([sys.executable, "-c", f"import time\n{code}"],
                            stdout=subprocess.PIPE, text=True)


def test_a_child_at_work_is_not_silent_and_one_without_end_is_given_up():
    said = []
    with child_that("time.sleep(2)\nprint('done')") as child:
        assert arms.wait(child, limit=60, say=said.append, every=0.1) == "done\n"
    assert len(said) > 1 and all(re.fullmatch(r"at work, \d+ s", line) for line in said)
    with child_that("time.sleep(60)") as child:
        with pytest.raises(LoadFailed, match="took more than 0.3 s"):
            arms.wait(child, limit=0.3, say=None, every=0.1)
        child.kill()


def test_a_report_of_a_machine_says_what_it_is_doing_all_the_time(tmp_path, monkeypatch, capsys):
    def child(case, say):
        say("at work, 10 s")
        return {"tokens_per_s": 5.0, "requests": 1, "tokens": 9, "seconds": 1, "warmup_s": 0,
                "digests": {"whole": ["a"], "first 16 tokens": ["a"]}}

    monkeypatch.setattr(offline, "run_child", child)
    assert offline.main(["--report", "--model", "random:tiny", "--arms", "generate", "--out",
                         str(tmp_path / "report.json")]) == 0
    told, _, report = capsys.readouterr().out.partition("Please paste these lines back")
    assert "[1/1] generate, 1 slots, repeat 1: at work, 10 s" in told
    assert "report: is an answer the same in company?" in told
    assert "report: 8 of 8 answers beside 0 others" in told
    assert "report: 8 of 8 answers beside 15 others" in told
    assert "same answer alone and beside 15: 8 of 8" in report


def test_repeats_are_in_balanced_order():
    assert order("ab", 3) == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]


def test_the_uniform_workload_is_the_published_one():
    requests = token_workload("uniform", 256)
    assert sum(r.max_tokens for r in requests) == 36_312
    assert requests[:5] == token_workload("uniform", 5)
    chat = token_workload("chat", 64)
    assert sum(len(r.prompt_tokens) >= 2000 for r in chat) == 2
    with pytest.raises(ValueError, match="uniform, chat"):
        token_workload("other", 1)


def test_unknown_arms_and_a_missing_vllm_are_said(capsys):
    with pytest.raises(SystemExit):
        offline.parse(["--arms", "magic"])
    assert "generate" in capsys.readouterr().err
    assert "vllm" not in offline.parse(["--with-vllm"]).arms
    assert "pip install vllm" in capsys.readouterr().out


@pytest.mark.slow
def test_a_soak_counts_who_left_who_failed_and_what_memory_did(tmp_path, capsys):
    out = tmp_path / "soak.json"
    assert soak.main(["--model", "random:tiny", "--minutes", "0.06", "--interval", "1", "--users",
                      "20", "--longest", "24", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    rows = result["rows"]
    assert sum(row["requests"] for row in rows) >= 16  # 20 users, of whose first requests 4 leave
    assert sum(row["left"] for row in rows) >= 4
    assert all(row["failures"] == 0 and row["rss_mb"] > 50 for row in rows)
    assert result["at_rest"] == {"running": 0, "waiting": 0}, "every slot is free again"
    assert "requests" in result["verdict"] and "verdict" not in capsys.readouterr().err
    soak.soak_figure(result).savefig(tmp_path / "soak.png")


def test_the_lean_users_see_refusals_cuts_and_every_token(tiny):
    requests = token_workload("uniform", 30, longest=24, vocab=511)
    with serving(ContinuousEngine(*tiny)) as url:
        outcomes, seconds = client.run(url, requests, users=7)
        assert [o.tokens for o in outcomes] == [r.max_tokens for r in requests] and seconds > 0
        assert all(o.error is None and o.start < o.event_times[0] for o in outcomes)
    with serving(ContinuousEngine(*tiny, max_len=20)) as url:
        outcomes, _ = client.run(url, requests[:4], users=2)
    assert [(o.status, o.error) for o in outcomes] == [(400, "HTTP 400")] * 4

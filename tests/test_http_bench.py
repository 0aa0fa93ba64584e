"""bench.http: what it measures with a model that costs nothing, and what it says of it."""
import json
import subprocess
import sys

import pytest
from conftest import ROOT

from bench.http import event_text, http_table


def row(name, streams, speed, **more):
    return {"name": name, "repeat": 0, "streams": streams, "tokens_per_s": speed,
            "ttft_p50_ms": 5, "ttft_p99_ms": 50, "tokens_per_event": 1.0} | more


def test_the_table_compares_with_the_engine_alone_where_that_was_measured():
    rows = [row("one process", 16, 50), row("one process", 16, 90), row("one process", 16, 80),
            row("one process", 64, 70), row("alone", 16, 100)]
    lines = http_table({"rows": rows}).splitlines()
    assert lines[2:] == ["| 16 | one process | 80 | 80% | 5 ms | 50 ms | 1.00 |",
                         "| 64 | one process | 70 | – | 5 ms | 50 ms | 1.00 |"]


@pytest.mark.slow
def test_it_measures_the_floor_the_server_and_whose_lines_the_loop_is_at(tmp_path):
    out = tmp_path / "http.json"
    done = subprocess.run([sys.executable, "-m", "bench.http", "--streams", "4", "--requests", "8",
                           "--tokens", "5", "--repeats", "1", "--profile", "--name", "after",
                           "--out", str(out)], cwd=ROOT, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    floor, server = result["rows"]
    assert (floor["name"], server["name"], server["requests"]) == ("floor", "after", 8)
    assert floor["events_per_s"] > 0 and "cpu_us_per_token" in floor  # less than the clock's tick
    assert server["cpu_us_per_token"] > 0
    assert server["tokens_per_event"] >= 1
    text = event_text(result | {"rows": [floor, server, server | {"name": "before"}],
                                "profiles": {"before": {}, "after": result["profiles"]["after"]}})
    assert "µs" in text and result["commands"]["after"] in text

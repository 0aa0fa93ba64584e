"""Every lesson runs top to bottom, in order, in a real kernel, with the small settings."""
import json
import shutil

import pytest
from conftest import ROOT
from test_export import LESSONS, tool


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course")
    left_out = shutil.ignore_patterns("__pycache__", "latest")
    for name in ("notebooks", "cbserver", "load", "bench", "figures"):
        shutil.copytree(ROOT / name, folder / name, ignore=left_out)
    for path in ROOT.glob("requirements*.txt"):
        shutil.copy(path, folder)
    return folder


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", [p.name for p in LESSONS])
def test_the_lesson_runs_from_top_to_bottom(copy, name, monkeypatch):
    monkeypatch.setenv("CB_SMOKE", "1")
    monkeypatch.setenv("CBSERVER_MODEL", "random:tiny")
    monkeypatch.delenv("NGROK_AUTHTOKEN", raising=False)
    notebook = tool().execute(copy / "notebooks" / name, timeout=120)
    printed = json.dumps([c.get("outputs") for c in notebook["cells"]], ensure_ascii=False)
    assert "✓" in printed, "the lesson's checks print what they verified"
    assert "image/png" in printed, "the lesson shows a figure"

"""Colab: what the set-up installs, what the first cell does outside a clone, publishing."""
import json
import os
import re
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import httpx
import lesson
import pytest
from conftest import serving

from cbserver.scheduler import ContinuousEngine
from tools import notebooks

ROOT = Path(__file__).resolve().parent.parent
# An environment with Colab's pins and nothing of the course: `make test-colab` makes it.
PINNED = os.environ.get("CB_COLAB_PINS")
COMMAND = """
import subprocess, sys, tempfile
from pathlib import Path
import lesson
with tempfile.TemporaryDirectory() as folder:
    command = lesson.pip_command(lesson.missing(), Path(folder))
    sys.exit(subprocess.run([*command, "--dry-run", "--report", sys.argv[1]]).returncode)
"""


def installed(python):
    listed = subprocess.run([python, "-m", "pip", "list", "--format", "json"], check=True,
                            capture_output=True, text=True).stdout
    return {plain(found["name"]): found["version"] for found in json.loads(listed)}


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.skipif(PINNED is None, reason="needs Colab's pins: make test-colab")
def test_the_set_up_replaces_nothing_that_colab_has(tmp_path):
    report = tmp_path / "report.json"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "notebooks")}
    subprocess.run([PINNED, "-c", COMMAND, report], check=True, env=environment)
    new = {plain(found["metadata"]["name"])
           for found in json.loads(report.read_text(encoding="utf-8"))["install"]}
    have = installed(PINNED)
    assert "locust" in new and "requests" in have
    assert not new & set(have), "these would be replaced"


def test_the_set_up_holds_pip_to_every_version_that_is_here(tmp_path):
    command = lesson.pip_command(["locust>=2.43.4"], tmp_path)
    held = Path(command[command.index("-c") + 1]).read_text(encoding="utf-8").splitlines()
    names = {plain(line.split("==")[0]): line.split("==")[1] for line in held}
    assert command[-1] == "locust>=2.43.4"
    for name in ("requests", "torch", "numpy"):
        assert names[name] == installed(sys.executable)[name]


@pytest.mark.parametrize("before", [{}, {"no_proxy": ""}, {"no_proxy": "corp.example"},
                                    {"NO_PROXY": "corp.example", "no_proxy": ""},
                                    {"NO_PROXY": "corp.example"}], ids=str)
def test_a_lessons_own_server_is_never_asked_through_a_proxy(tiny, monkeypatch, before):
    for name in ("NO_PROXY", "no_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody is there
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    for _ in range(2):  # a first cell is run again
        lesson.bypass_proxy()
    with serving(ContinuousEngine(*tiny)) as url:
        assert httpx.get(f"{url}/health").status_code == 200
        with urllib.request.urlopen(f"{url}/health", timeout=60) as answer:
            assert answer.status == 200
    names = "corp.example,localhost,127.0.0.1" if any(before.values()) else "localhost,127.0.0.1"
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == names


def first_cell(path=ROOT / "notebooks" / "01_single_stream_baseline.ipynb"):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    found = next(source for source in sources if "REPOSITORY =" in source)
    return found.replace("lesson.setup(1)", "print(lesson.ROOT)")


def with_address(address):
    return re.sub(r'REPOSITORY = ".*"', f'REPOSITORY = "{address}"', first_cell())


def run_outside(folder, cell):
    # A git that says what it was asked for, and makes the clone without a network.
    tools = folder.parent / "tools"
    tools.mkdir(exist_ok=True)
    git = tools / "git"
    git.write_text(f'#!/bin/sh\necho "git $4" >&2\ncp -r "{ROOT}/notebooks" "$5-tmp"\n'
                   'mkdir -p "$5"\nmv "$5-tmp" "$5/notebooks"\n', encoding="utf-8")
    git.chmod(0o755)
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run([sys.executable, "-c", cell], cwd=folder, env=environment,
                          capture_output=True, text=True)


def test_the_first_cell_with_a_placeholder_clones_nothing(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    done = run_outside(folder, with_address("https://github.com/OWNER/cbserver"))
    assert done.returncode == 1 and not list(folder.iterdir())
    assert "upload cbserver.zip" in done.stderr and "git" not in done.stderr
    assert "Traceback" not in done.stderr


def test_the_first_cell_unpacks_an_uploaded_archive(tmp_path):
    folder = tmp_path / "uploaded"
    folder.mkdir()
    with zipfile.ZipFile(folder / "cbserver.zip", "w") as archive:
        for name in ("lesson.py", "live.py"):
            archive.write(ROOT / "notebooks" / name, f"cbserver/notebooks/{name}")
    for _ in range(2):  # the second time it is there
        done = run_outside(folder, first_cell())
        assert done.returncode == 0, done.stderr
        assert Path(done.stdout.strip()) == folder / "cbserver-course" / "cbserver"
        assert "git" not in done.stderr


def test_the_first_cell_of_a_published_course_clones_it(tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    done = run_outside(folder, with_address("https://github.com/me/course"))
    assert done.returncode == 0, done.stderr
    assert "git https://github.com/me/course" in done.stderr
    assert Path(done.stdout.strip()) == folder / "cbserver-course"


def test_every_lesson_has_the_same_first_cell():
    cells = {first_cell(path).rsplit("\n", 1)[0] for path in notebooks.LESSONS}
    assert len(cells) == 1


@pytest.mark.parametrize("remote", ["git@github.com:me/my-course.git",
                                    "https://github.com/me/my-course", "https://token@github.com/me/my-course.git/",
                                    "ssh://git@github.com/me/my-course.git\n"])
def test_an_origin_on_github_has_an_address_for_browsers(remote):
    assert notebooks.address_of(remote) == "https://github.com/me/my-course"


@pytest.mark.parametrize("remote", ["", "https://gitlab.com/me/course.git", "/srv/course.git"])
def test_another_origin_has_none(remote):
    assert notebooks.address_of(remote) is None


def test_publishing_stamps_every_file_and_can_be_done_again(tmp_path):
    files = [*notebooks.named_in(), ROOT / "tools" / "notebooks.py"]
    for path in files:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    for address in ("https://github.com/me/a", "git@github.com:you/b.git"):
        subprocess.run([sys.executable, "tools/notebooks.py", "publish", address], cwd=tmp_path,
                       check=True)
    for path in files[:-1]:
        text = (tmp_path / path.relative_to(ROOT)).read_text(encoding="utf-8")
        assert not re.search(r"github(\.com)?/(OWNER|me)/", text), path.name
    cell = first_cell(tmp_path / "notebooks" / "06_serve_and_benchmark.ipynb")
    assert 'REPOSITORY = "https://github.com/you/b"' in cell and '"/OWNER/" in REPOSITORY' in cell


def test_a_course_on_github_is_published():
    origin = notebooks.origin()
    if origin is None:
        pytest.skip("no origin on GitHub")
    assert "/OWNER/" not in notebooks.repository(), f"say make publish REPO={origin}"

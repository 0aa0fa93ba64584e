"""What README and docs tell a reader to type: it runs, or at least it names what there is."""
import importlib.util
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from load.process import ServerProcess, python_module

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# What a reader fills in, and what a test has no time for.
FILLED_IN = {"https://…": "http://127.0.0.1:8000", "--host …": "--host http://127.0.0.1:8000",
             "--model …": "--model random:tiny", "--api-key …": "--api-key none",
             "--steady-seconds 60": "--steady-seconds 2", "--requests 200": "--requests 60",
             "--rate 4 --users 200": "--rate 40 --users 200"}


def blocks(language):
    """(page, text) of each fenced block in this language; "": the ones that name none."""
    for page in PAGES:
        for found, text in BLOCK.findall(page.read_text(encoding="utf-8")):
            if found == language:
                yield page.name, text


def commands():
    """(page, command) of every line of a block that a shell would run."""
    for page, text in blocks(""):
        for line in text.replace("\\\n", " ").splitlines():
            if re.match(r"(git|make|pip|python3?|curl|serve) ", line):
                yield page, line.partition("  #")[0].strip()


def mentions():
    """(page, command) of every `python -m …` in README and docs, in a block or in a sentence."""
    for page in PAGES:
        for words in re.findall(r"`(python -m [^`]+)`", page.read_text(encoding="utf-8")):
            yield page.name, words
    yield from ((page, words) for page, words in commands() if words.startswith("python -m "))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("words") / "server.log"
    with ServerProcess(python_module("cbserver", "--model", "random:tiny"), log) as running:
        yield running


def at(server, text):
    """The same words for this server."""
    for told, meant in FILLED_IN.items():
        text = text.replace(told, meant)
    return text.replace("http://127.0.0.1:8000", server.url)


@pytest.mark.parametrize("page, code", blocks("python"))
def test_each_python_example_runs_and_prints_an_answer(server, page, code):
    done = subprocess.run([sys.executable, "-c", at(server, code)], capture_output=True, text=True,
                          timeout=120, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("page, command", [c for c in commands() if c[1].startswith("curl ")])
def test_each_curl_example_is_answered(server, page, command):
    done = subprocess.run(at(server, command) + " -sS", shell=True, capture_output=True, text=True,
                          timeout=120, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("data: {") and done.stdout.endswith("data: [DONE]\n\n")


@pytest.mark.slow
@pytest.mark.parametrize("page, command", [c for c in commands() if "load.run" in c[1]])
def test_each_load_test_of_the_docs_runs(server, page, command, tmp_path):
    words = at(server, command).replace("python ", f"{sys.executable} ", 1)
    if "--out" not in words:
        words += f" --out {tmp_path}"
    done = subprocess.run(words.replace("--out results", f"--out {tmp_path}"), shell=True, cwd=ROOT,
                          capture_output=True, text=True, timeout=280, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_make_target_and_requirements_file_exists():
    told = [words for _, words in commands()]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        told += re.findall(r"`(make [^`]+)`", page.read_text(encoding="utf-8"))
    targets = {words.split()[1] for words in told if words.startswith("make ")}
    files = {name for words in told for name in re.findall(r"requirements[\w-]*\.txt", words)}
    assert {"demo", "test"} <= targets and files
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target} is no target"
    for name in files:
        assert (ROOT / name).exists(), name


def programs():
    """{"bench.capacity measure": {(page, flag), …}} of all commands that are told."""
    found = {}
    for page, words in mentions():
        program = re.match(r"python -m ([a-z_.]+( [a-z]+)?)", words).group(1)
        flags = re.findall(r"(?<=\s)--[a-z][a-z-]+", words)
        found.setdefault(program, set()).update((page, flag) for flag in flags)
    return found


# All in one process, which imports torch once.
SHOW_HELP = """
import contextlib, runpy, sys
for program in sys.argv[1:]:
    module, *more = program.split()
    sys.argv = [module, *more, "--help"]
    print("#", program)
    with contextlib.suppress(SystemExit):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def test_each_command_that_is_told_is_there_and_has_the_flags_that_are_named():
    wanted = programs()
    for program in wanted:
        assert importlib.util.find_spec(program.split()[0]), f"there is no {program}"
    with_flags = [program for program, flags in wanted.items() if flags]
    done = subprocess.run([sys.executable, "-c", SHOW_HELP, *with_flags], cwd=ROOT, timeout=200,
                          capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    helps = {part.partition("\n")[0]: part for part in done.stdout.split("# ")}
    for program in with_flags:
        for page, flag in wanted[program]:
            assert flag in helps[program], f"{page}: {program} has no {flag}"

"""A learner's live edits: what the hook notes and writes is what nbdev would, or it is refused."""
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import live
import pytest
from test_export import LESSONS, cells


def ran(source, success=True, cell_id=None):
    """What IPython hands to a post_run_cell hook; only some front ends send the cell's id."""
    return SimpleNamespace(info=SimpleNamespace(raw_cell=source, cell_id=cell_id), success=success)


def lesson(course, number):
    return next(p for p in (course / "notebooks").glob("*.ipynb") if p.name[:2] == number)


def recorder(course, path, edit=lambda source: source, ids=False):
    """A recorder that has seen every cell of a lesson run, edited by `edit`."""
    seen = live.Recorder(course / "cbserver")
    for cell in cells(path, "code"):
        seen.note(ran(edit("".join(cell["source"])), cell_id=cell["id"] if ids else None))
    return seen


def module(course, seen):
    return (course / "cbserver" / f"{seen.module}.py").read_text()


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_without_an_edit_the_hook_writes_what_nbdev_wrote(course, path, capsys):
    seen = recorder(course, path)
    before = module(course, seen)
    assert live.merge(before, seen.cells) == before
    seen.export_module()
    assert "nothing to write" in capsys.readouterr().out and module(course, seen) == before


EDITS = [
    ("05", "return sorted(values)[max(0", "return 0 * sorted(values)[max(0"),
    ("05", 'LATENCIES = ("ttft"', 'NEW = 5\nLATENCIES = ("ttft"'),
    ("05", "def percentile(", "def worst(values):\n    return max(values)\n\n\ndef percentile("),
    ("04", "left = self.prefill_budget", "left = 100"),
    ("02", "from collections import", "import json\nfrom collections import")]


@pytest.mark.slow
@pytest.mark.parametrize("number, old, new", EDITS)
def test_an_edit_gives_what_nbdev_makes_of_the_edited_notebook(course, number, old, new):
    path = lesson(course, number)
    seen = recorder(course, path, lambda source: source.replace(old, new))
    seen.export_module()
    mine = module(course, seen)
    assert new.split("\n")[0] in mine
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if source.startswith("#| export"):
            cell["source"] = source.replace(old, new)
    path.write_text(json.dumps(notebook))
    assert mine == by_nbdev(course, seen, path)


def by_nbdev(course, seen, path):
    """The module as nbdev makes it of the notebook on disk."""
    (course / "cbserver" / f"{seen.module}.py").unlink()
    export = f"from nbdev.export import nb_export; nb_export({str(path)!r}, lib_path='cbserver')"
    subprocess.run([sys.executable, "-c", export], cwd=course, check=True)
    return module(course, seen)


HEADS = ["#| export", "#|export", "# | export", "#| exports", "#| hide\n#| export",
         "#| export\n#| eval: false", "\n#| export", "#| echo: false\n\n#| export",
         "#| exporti", "#| exportd", "#@title\n#| export", "# a remark\n#| export",
         "%%time\n#| export", "#| export other", "#| hide"]
OLD, NEW = "left = self.prefill_budget", "left = 100"


@pytest.mark.parametrize("head", [HEADS[0], *(pytest.param(head, marks=pytest.mark.slow)
                                              for head in HEADS[1:])])
def test_every_directive_is_as_nbdev_has_it_or_refused_with_the_reason(course, capsys, head):
    path = lesson(course, "04")

    def change(source):
        if OLD not in source or not source.startswith("#| export"):
            return source
        return source.replace("#| export", head, 1).replace(OLD, NEW)

    before = (course / "cbserver" / "scheduler.py").read_text()
    seen = live.Recorder(course / "cbserver")
    for cell in cells(path, "code"):
        seen.note(ran(change("".join(cell["source"]))))
    said = capsys.readouterr().out
    try:
        seen.export_module()
    except live.ExportRefused as refusal:
        said += f"Not noted: {refusal}"
    mine = module(course, seen)
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["source"] = change("".join(cell["source"]))
    path.write_text(json.dumps(notebook))
    if mine == before:
        assert head == "#| hide" or "Not noted" in said
    else:
        assert NEW in mine
        assert mine == by_nbdev(course, seen, path)


def test_a_cell_that_ran_twice_counts_as_it_ran_last_and_a_failure_not_at_all(course, capsys):
    seen = recorder(course, lesson(course, "04"))
    source = "#| export\nclass ContinuousEngine(Engine):\n    may_change = {}\n"
    seen.note(ran(source.format("first")))
    seen.note(ran(source.format("second")))
    seen.note(ran(source.format("third"), success=False))
    assert "this cell failed" in capsys.readouterr().out
    text = live.merge(module(course, seen), seen.cells)
    assert re.findall("may_change = .*", text) == ["may_change = second"]


@pytest.mark.parametrize("edit, reason", [
    (lambda source: source.replace("ContinuousEngine(", "Mine("), "lack ContinuousEngine"),
    (lambda source: source + "\n\n\nnot_there.at_all",
     "name 'not_there' is not defined"),
    (lambda source: source + "\n\n\n%timeit 1", "no Python")])
def test_a_module_that_would_not_work_is_refused_with_the_reason(course, edit, reason):
    def change(source):
        return edit(source) if "class ContinuousEngine" in source else source

    seen = recorder(course, lesson(course, "04"), change, ids=True)
    before = module(course, seen)
    with pytest.raises(live.ExportRefused, match=reason):
        seen.export_module()
    assert module(course, seen) == before


def test_without_ids_a_renamed_class_is_new_beside_the_old_one_and_said_to_be(course, capsys):
    seen = recorder(course, lesson(course, "04"),
                    lambda source: source.replace("class ContinuousEngine", "class Mine"))
    seen.export_module()
    assert "new: Mine" in capsys.readouterr().out
    assert {"Mine", "ContinuousEngine"} <= live.exports(module(course, seen))


def test_one_line_restores_the_courses_version(course):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "course"]):
        subprocess.run([*git, *command], cwd=course, check=True)
    seen = recorder(course, lesson(course, "04"),
                    lambda source: source.replace("left = self", "left = 2 * self"))
    before = module(course, seen)
    seen.export_module()
    assert "left = 2 * self" in module(course, seen)
    seen.restore()
    assert module(course, seen) == before


LEARNER = """
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
def cell(source):
    result = shell.run_cell(source)
    result.raise_error()
    return result.result
cell("import lesson; lesson.note_exports()")
cell("#| default_exp scheduler")
cell("from cbserver.sequence import Engine")
cell('''#| export
class ContinuousEngine(Engine):
    def __init__(self, model, tokenizer, *limits, prefill_budget=None):
        super().__init__(model, tokenizer, *limits[:3])
        self.prefill_budget = prefill_budget

    def submit(self, *request):
        from cbserver.sequence import QueueFull
        raise QueueFull("closed by a learner")
''')
cell("lesson.export_module()")
url = cell("lesson.start(engine='continuous', model='random:tiny', max_batch=2)")
from load.process import http
print(http(f"{url}/v1/completions", {"prompt": "a"}))
cell("lesson.stop()")
import socket
try:
    socket.create_connection(("127.0.0.1", int(url.rsplit(":")[-1])))
except ConnectionRefusedError:
    print("port free")
"""


def test_an_edit_in_a_notebook_reaches_a_running_server(course):
    done = subprocess.run([sys.executable, "-c", LEARNER], cwd=course / "notebooks", text=True,
                          capture_output=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(course)})
    assert "(429, " in done.stdout, done.stdout + done.stderr
    assert "closed by a learner" in done.stdout and "port free" in done.stdout


def test_a_server_that_cannot_start_shows_its_log(course):
    code = "import lesson; lesson.start(engine='continuous', model='random:none')"
    done = subprocess.run([sys.executable, "-c", code], cwd=course / "notebooks", text=True,
                          capture_output=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(course)})
    assert done.returncode and "No shape 'random:none'" in done.stderr

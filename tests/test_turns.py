"""A turn that passes is what runs and what is exported; the course's version otherwise."""
import ast
import importlib.util
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

# Runs a lesson's cells in an IPython shell, as a kernel does, and exports its module at the end.
SHELL = """
import json, sys
from IPython.core.interactiveshell import InteractiveShell
import lesson
shell = InteractiveShell.instance()
lesson.note_exports()
shell.user_ns["lesson"] = lesson
for source in json.load(open(sys.argv[1])):
    result = shell.run_cell(source)
    if not result.success and "allowed to fail" not in source:
        raise SystemExit(f"failed: {source}")
"""
STUBS = {"t1a": "Sequence.append", "t2a": "Sequence.stream", "t3a": "Engine.submit"}
LAST = "c13"
COURSE = (ROOT / "notebooks" / "02_sequence_queue.ipynb")


def code_cells(path=COURSE):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return {c["id"]: "".join(c["source"]) for c in cells if c["cell_type"] == "code"}


def written(name, text=None):
    """A turn's course version, with a remark that makes it the learner's own."""
    import live

    text = text or (ROOT / "cbserver" / "sequence.py").read_text(encoding="utf-8")
    node = live.find(ast.parse(text), name)
    lines = text.splitlines(keepends=True)[node.lineno - 1:node.end_lineno]
    own = [line.removeprefix(" " * node.col_offset) for line in lines]
    own.insert(-1, own[-1][:len(own[-1]) - len(own[-1].lstrip())] + "# mine\n")
    return "".join(own)


def play(course, edits, more=()):
    """Run lesson 2 up to its engine with these stubs, then more cells: (module's text, output)."""
    cells = code_cells()
    sources = []
    for name, source in cells.items():
        if name not in ("c01", "c05", "l1", "c25c", "c11"):
            sources.append(edits.get(name, source))
        if name == LAST:
            break
    script = course / "cells.json"
    script.write_text(json.dumps([*sources, *more, "lesson.export_module()"]), encoding="utf-8")
    here = os.environ | {"PYTHONPATH": os.pathsep.join([str(course / "notebooks"), str(course)])}
    done = subprocess.run([sys.executable, "-c", SHELL, script.name], cwd=course, text=True,
                          capture_output=True, timeout=120, env=here)
    assert done.returncode == 0, done.stdout + done.stderr
    return (course / "cbserver" / "sequence.py").read_text(encoding="utf-8"), done.stdout


def module_with(names):
    """cbserver/sequence.py with the learner's versions of these turns."""
    import live

    text = (ROOT / "cbserver" / "sequence.py").read_text(encoding="utf-8")
    for name in names:
        text = live.replace(text, name, written(name))
    return text


def test_without_a_line_written_the_course_is_exported(course):
    module, said = play(course, {})
    assert module == module_with([])
    assert "in use: Sequence.append the course's, Sequence.stream the course's" in said


def test_turns_that_pass_are_what_runs_and_what_is_exported(course):
    edits = {stub: written(name) for stub, name in STUBS.items()}
    look = "import inspect; print('runs:', '# mine' in inspect.getsource(Sequence.append))"
    module, said = play(course, edits, [look])
    assert module == module_with(STUBS.values()) and module.count("# mine") == 3
    assert "runs: True" in said
    assert "in use: Sequence.append yours, Sequence.stream yours" in said


@pytest.mark.skipif(importlib.util.find_spec("nbdev") is None, reason="nbdev is the judge")
def test_the_module_is_what_nbdev_makes_of_the_notebook_with_the_learners_lines_in_it(course):
    module, _ = play(course, {stub: written(name) for stub, name in STUBS.items()})
    path = course / "notebooks" / COURSE.name
    notebook = json.loads(path.read_text(encoding="utf-8"))
    import live

    for cell in notebook["cells"]:
        if cell["id"] in ("c09", "c13"):
            source = "".join(cell["source"])
            for name in STUBS.values():
                source = live.replace(source, name, written(name))
            cell["source"] = source.splitlines(keepends=True)
    path.write_text(json.dumps(notebook), encoding="utf-8")
    export = f"from nbdev.export import nb_export; nb_export({str(path)!r}, lib_path='cbserver')"
    subprocess.run([sys.executable, "-c", export], cwd=course, check=True)
    assert module == (course / "cbserver" / "sequence.py").read_text(encoding="utf-8")


# A learner's lines with a text of several lines, and as they stand in a class, written by hand.
TEXT = '''    mine = """one
  two

    three"""
    more = ["a", """
b"""]
'''
TEXT_IN_CLASS = '''        mine = """one
  two

    three"""
        more = ["a", """
b"""]
'''


@pytest.mark.skipif(importlib.util.find_spec("nbdev") is None, reason="nbdev is the judge")
def test_a_text_of_several_lines_reaches_the_module_as_it_was_written(course):
    first, *rest = written("Sequence.append").splitlines(keepends=True)
    module, said = play(course, {"t1a": "".join([first, TEXT, *rest])})
    assert "✓ Sequence.append: yours passes" in said and TEXT_IN_CLASS in module
    path = course / "notebooks" / COURSE.name
    notebook = json.loads(path.read_text(encoding="utf-8"))
    import live

    for cell in notebook["cells"]:
        if cell["id"] == "c09":
            source = live.replace("".join(cell["source"]), "Sequence.append",
                                  written("Sequence.append"))
            head = f"    {first}"
            assert source.count(head) == 1
            source = source.replace(head, head + TEXT_IN_CLASS)
            cell["source"] = source.splitlines(keepends=True)
    path.write_text(json.dumps(notebook), encoding="utf-8")
    export = f"from nbdev.export import nb_export; nb_export({str(path)!r}, lib_path='cbserver')"
    subprocess.run([sys.executable, "-c", export], cwd=course, check=True)
    assert module == (course / "cbserver" / "sequence.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", [
    '"""a\n  b\n\nc"""', '("""a\nb""" +\n    "c")', 'f"""a\n{1 +\n1}\n  b"""', '"a\\\n  b"',
    'f"""{f"x"}\n y"""', 'r"""\n   \n"""', '("one"\n     "two")', 'b"""a\n b"""'])
def test_what_a_turn_returns_is_the_same_in_a_class_as_alone(text):
    import live

    written = f"def f(self):\n    return {text}\n"
    alone = {}
    exec(written, alone)
    inside = {}
    exec(live.replace("class A:\n    def f(self):\n        pass\n", "A.f", written), inside)
    assert inside["A"]().f() == alone["f"](None)


def test_blanks_alone_on_a_line_of_a_text_are_kept(tmp_path):
    import live

    (tmp_path / "mine.py").write_text('def f(self):\n    return """a\n   \nb"""\n')
    names = {}
    exec(compile((tmp_path / "mine.py").read_text(), str(tmp_path / "mine.py"), "exec"), names)
    assert '"""a\n   \nb"""' in live.source_of(names["f"])


def test_a_learner_may_write_the_decorators_too(course):
    edits = {"t1a": "import functools\n\n\n@functools.cache\n" + written("Sequence.append")}
    assert play(course, edits)[0] == module_with(["Sequence.append"])


def test_a_wrong_turn_is_not_used_and_the_others_are(course):
    wrong = written("Sequence.append").replace("== self.params", "> self.params")
    module, said = play(course, {"t1a": wrong, "t3a": written("Engine.submit")})
    assert module == module_with(["Engine.submit"])
    assert "not yet: max_tokens=3: the third token ends it" in said


def test_a_turn_that_was_right_and_is_wrong_now_goes_back_to_the_course(course):
    cells = code_cells()
    right, wrong = written("Sequence.append"), "def append(self, token, eos):\n    pass"
    again = [wrong, cells["t1b"], cells["c09"]]
    module, said = play(course, {"t1a": right}, again)
    assert module == module_with([])
    assert said.rindex("Sequence.append the course's") > said.rindex("Sequence.append yours")


def test_a_half_edited_stub_changes_nothing_that_passed(course):
    half = "def append(self, token, eos):\n    if (  # allowed to fail"
    module, _ = play(course, {"t1a": written("Sequence.append")}, [half, code_cells()["c09"]])
    assert module == module_with(["Sequence.append"])


def test_one_line_goes_back_to_the_course(course):
    back = ['lesson.undo("Sequence.append")', code_cells()["c09"]]
    module, said = play(course, {"t1a": written("Sequence.append")}, back)
    assert module == module_with([])
    assert "Sequence.append: the course's version is in use once its cell below has run" in said

"""Every check of the lessons notices the usual mistakes and names them; every exercise is solvable.

A mistake is planted by replacing text in one cell; the cells up to the check then run here, in
order, in one namespace, on the tiny model. tests/mistakes/lesson_XX.py lists them.
"""
import ast
import asyncio
import importlib
import inspect
import linecache
import re
import textwrap
from types import SimpleNamespace

import lesson
import live
import pytest
from conftest import ROOT
from test_export import LESSONS, cells

TABLES = sorted(p.stem for p in (ROOT / "tests" / "mistakes").glob("lesson_*.py"))
SOLUTION = re.compile(r"<summary>Solution</summary>\s*```python\n(.*?)```", re.S)
NAMED = re.compile(r"# Exercise (\w+\.\d)\b")


def mistakes():
    """All planted mistakes; but for the first of each table they are marked slow."""
    for table in TABLES:
        planted = importlib.import_module(f"mistakes.{table}").MISTAKES
        for mistake in planted:
            marks = [] if mistake is planted[0] else pytest.mark.slow
            name = f"{mistake[0]}-{mistake[1]}-{mistake[4][:24]}"
            yield pytest.param(*mistake, id=name, marks=marks)


@pytest.fixture
def classroom(monkeypatch):
    """The folder and the settings in which a lesson's cells run."""
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    monkeypatch.setenv("CB_SMOKE", "1")
    monkeypatch.setenv("CBSERVER_MODEL", "random:tiny")
    monkeypatch.delenv("NGROK_AUTHTOKEN", raising=False)
    monkeypatch.chdir(ROOT / "notebooks")
    monkeypatch.setattr(lesson, "SMOKE", True)
    monkeypatch.setattr(lesson.recorder, "turns", live.Turns())
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    yield
    lesson.stop()


def path_of(number):
    return next(p for p in LESSONS if p.name.startswith(number))


def run(number, until, edits=(), skip=(), after=lambda cell, execute: None):
    """Run a lesson's code cells up to the cell `until`, inclusive; edits: {id: source}.

    after: called when a cell has run, with it and with what runs a source in the same namespace.
    """
    names = {"__name__": "__lesson__", "display": lambda *figures: None}
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)

    def execute(source):
        name = f"{number}-{len(linecache.cache)}"  # a turn's source is looked up by its file
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        code = compile(source, name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        result = eval(code, names)
        if inspect.iscoroutine(result):
            loop.run_until_complete(result)

    try:
        for cell in cells(path_of(number), "code"):
            if cell["id"] not in skip:
                source = dict(edits).get(cell["id"], "".join(cell["source"]))
                execute("".join(lesson.recorder.before_run(source.splitlines(keepends=True))))
                lesson.recorder.note(SimpleNamespace(
                    info=SimpleNamespace(raw_cell=source, cell_id=cell["id"]), success=True))
                after(cell, execute)
            if cell["id"] == until:
                return
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
    raise LookupError(f"lesson {number} has no cell {until}")


def source_of(number, cell_id):
    return next("".join(c["source"]) for c in cells(path_of(number)) if c["id"] == cell_id)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number, check, cell, change, hint, skip", mistakes())
def test_a_planted_mistake_makes_the_check_say_what_is_wrong(classroom, number, check, cell, change,
                                                            hint, skip):
    old, new = change
    source = source_of(number, cell)
    assert source.count(old) == 1, f"{old!r} is not once in cell {cell} of lesson {number}"
    with pytest.raises(AssertionError) as caught:
        run(number, check, {cell: source.replace(old, new)}, skip)
    assert hint in str(caught.value)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("number", [p.stem for p in LESSONS])
def test_an_exercise_says_not_yet_until_it_is_solved(classroom, capsys, number):
    found, said = cells(path_of(number)), {}

    def after(cell, execute):
        """After an exercise's check ran with the stub: once more with the folded solution."""
        source = "".join(cell["source"])
        if "lesson.attempt(" in source:
            said["not solved"] = capsys.readouterr().out.splitlines()[-1]
            assert said["not solved"].startswith("not yet: "), source
            text = "".join(found[found.index(cell) + 1]["source"])
            solution = SOLUTION.search(text)
            assert solution and NAMED.match(solution[1]), "the folded solution follows the check"
            execute(solution[1])
            capsys.readouterr()
            execute(source)
            assert capsys.readouterr().out.splitlines()[-1].startswith("✓"), source

    last = [c["id"] for c in found if "lesson.attempt(" in "".join(c["source"])][-1]
    run(number, last, after=after)
    assert said


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_a_lesson_has_two_to_four_exercises_and_predictions_before_its_measurements(path):
    text = ["".join(c["source"]) for c in cells(path)]
    stubs = [s for s in text if NAMED.match(s)]
    assert 2 <= len(stubs) <= 4
    heads = re.findall(r"### Exercise \w+\.\d · .+ \((?:★|☆)+, \d+ minutes\)", "\n".join(text))
    assert len(heads) == len(stubs), "### Exercise 4.1 · Its name (★★☆, 20 minutes)"
    turns = re.findall(r"### Your turn \w\.\d · .+ \((?:★|☆)+, \d+ minutes\)", "\n".join(text))
    assert len(turns) == sum("lesson.turn(" in s for s in text)
    assert "\n".join(text).count("<summary>Hint</summary>") == len(stubs) + len(turns)
    assert sum("**Predict**" in s for s in text) >= 3
    assert "The same in vLLM" in "\n".join(text) and "**Takeaways**" in "\n".join(text)


def turns():
    """Every turn of every lesson with the planted mistakes in it; slow, but for lesson 4's."""
    for table in TABLES:
        found = getattr(importlib.import_module(f"mistakes.{table}"), "TURNS", [])
        for name in dict.fromkeys(name for name, *_ in found):
            planted = [mistake for mistake in found if mistake[0] == name]
            marks = [] if table == "lesson_04" else pytest.mark.slow
            yield pytest.param(table.removeprefix("lesson_"), name, planted, id=f"{table}-{name}",
                               marks=marks)


def solution_of(number, name):
    """The course's version of a turn, as a learner would write it in the stub."""
    for cell in cells(path_of(number), "code"):
        source = "".join(cell["source"])
        if source.startswith(("#| export", live.COURSE)):
            node = live.find(ast.parse(source), name)
            if node:
                return textwrap.dedent("".join(source.splitlines(keepends=True)
                                               [node.lineno - 1:node.end_lineno]))


@pytest.mark.timeout(240)
@pytest.mark.parametrize("number, name, planted", turns())
def test_a_turn_is_graded_with_a_hint_for_each_usual_mistake(classroom, capsys, monkeypatch, number,
                                                            name, planted):
    solution = solution_of(number, name)
    _, stub, check, *_ = planted[0]

    def said(source):
        monkeypatch.setattr(lesson.recorder, "turns", live.Turns())
        run(number, check, {stub: source}, skip=costly(number))
        return capsys.readouterr().out

    assert f"{name}: not written yet" in said(source_of(number, stub))
    assert f"✓ {name}: yours passes" in said(solution)
    for *_, (old, new), hint in planted:
        written = textwrap.indent(solution, "    " * name.count("."))  # as in the lesson
        assert written.count(old) == 1, f"{old!r} is not once in {name}"
        out = said(textwrap.dedent(written.replace(old, new)))
        assert "not yet: " in out and hint in out, out
        assert f"{name}: the course's version is in use" in out


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_no_stub_takes_the_name_of_something_else_in_its_lesson(path):
    trees = []
    for cell in cells(path, "code"):
        source = "".join(cell["source"])
        if not source.startswith(("#|", "!", "%")) and "\n    !" not in source:
            trees.append((source, ast.parse(source)))
    stubs = {name for source, tree in trees if live.unwritten(source)
             for name in live.defined(tree.body)}
    others = {name for source, tree in trees if not live.unwritten(source)
              and not source.startswith(live.COURSE) for name in live.bound(source)}
    assert stubs & others == set()


def costly(number):
    table = importlib.import_module(f"mistakes.lesson_{number}")
    return getattr(table, "COSTLY", getattr(table, "SLOW", ()))


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_the_answer_to_a_prediction_is_folded(path):
    every = cells(path)
    for place, cell in enumerate(every):
        asked = cell["cell_type"] == "markdown" and "**Predict**" in "".join(cell["source"])
        if not asked or cell["id"] in ("c00", "s3"):  # how to use it; answered by lesson 4's turns
            continue
        following = every[place + 1:]
        answer = next(i for i, c in enumerate(following) if c["cell_type"] == "markdown")
        assert "".join(following[answer]["source"]).startswith("<details><summary>Answer")
        assert all(c["metadata"]["jupyter"]["outputs_hidden"] for c in following[:answer])

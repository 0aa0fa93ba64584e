"""A learner's edits become the module that the server runs, and so do the turns that pass.

A turn is a function or method that the learner writes. Once it has passed its check, its source
takes the place of the course's in the `#| export` cell below, before that cell runs.

On Colab the open notebook is no file, so nothing on disk has the edits. A hook notes every
`#| export` cell that ran without an error; `export_module` puts these cells into the module, in
place of the ones they replace, the way nbdev would lay them out.
"""
import ast
import asyncio
import inspect
import io
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import tokenize
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Where nbdev looks for directives: in the lines above all code and other comments.
LEAD = re.compile(r"(?:[ \t]*(?:#[ \t]*\|.*|%%\w+.*)?(?:\n|$))*")
DIRECTIVE = re.compile(r"^[ \t]*#[ \t]*\|[ \t]*(default_exp|export[sid]?)\b[ \t:]*(\S*)", re.M)
KINDS = {"exports": "export"}  # what else nbdev calls it
MARK = re.compile(r"^# %% (.*)\n", re.M)  # nbdev's, above each cell of a module


COURSE = "# The course's version"  # above a cell with turns that no module gets


class ExportRefused(Exception):
    """The cells would make a module that cannot be used; the message says why."""


class Recorder:
    """Keeps each `#| export` cell as it last ran without an error."""

    def __init__(self, package=ROOT / "cbserver"):
        self.package, self.module, self.cells = package, None, {}
        self.turns = Turns()

    def note(self, result):
        """IPython's `post_run_cell` hook."""
        source = result.info.raw_cell or ""
        if source.startswith(COURSE):
            self.turns.say_whose(source)
        lead = LEAD.match(source)[0]
        found = DIRECTIVE.search(lead)
        if found is None:
            if DIRECTIVE.search(source):
                print("Not noted for export_module(): nbdev looks for `#| export` above all code "
                      "and other comments. Make it the cell's first line.")
            return
        kind, name = found[1], found[2]
        if "%%" in lead:
            print("Not noted for export_module(): a module has no %% magic. Take it out.")
            return
        if kind == "exportd":
            print("Not noted for export_module(): `#| exportd` is for nbdev's pages. "
                  "Use `#| export`.")
            return
        if kind != "default_exp" and name:
            print(f"Not noted for export_module(): it goes to another module, {name}. "
                  "`make export` writes that.")
            return
        code = self.turns.splice(source[len(lead):].rstrip())
        kind = KINDS.get(kind, kind)
        if kind == "default_exp":
            self.module, self.cells = name, {}
        elif result.success:  # Jupyter tells the cell's id; without one its names tell which it is
            key = getattr(result.info, "cell_id", None) or bound(code)
            self.cells.pop(key, None)
            self.cells[key] = (kind, code)
            self.turns.say_whose(code)
        else:
            print("Not noted for export_module(): this cell failed, the version before it counts.")

    def before_run(self, lines):
        """IPython's input transformer: a cell's lines, with the turns that passed in place."""
        source = "".join(lines)
        found = DIRECTIVE.search(LEAD.match(source)[0])
        exported = found is not None and found[1] != "default_exp"
        if not exported and not source.startswith(COURSE):
            return lines
        return self.turns.splice(source).splitlines(keepends=True)

    def turn(self, name, function, check):
        """Grade the learner's version of `Class.method` or `function`; if it passes, it is used.

        check: called with the module that would be exported, the learner's version in it; it
        raises AssertionError with a hint, or passes. It may be a coroutine function. A function
        that no module has is checked by itself, as the attribute `name`.
        """
        path = self.package / self.file_name()
        self.turns.grade(name, function, check, path.read_text(encoding="utf-8"))

    def undo(self, name):
        """Use the course's version of this turn again."""
        self.turns.passed.pop(name, None)
        print(f"{name}: the course's version is in use once its cell below has run again")

    def file_name(self):
        if self.module is None:
            raise ExportRefused("Run the cell with `#| default_exp` first: it names the module.")
        return f"{self.module}.py"

    def export_module(self):
        """Write the module with the cells as they last ran; ExportRefused: nothing is written."""
        path = self.package / self.file_name()
        before = path.read_text(encoding="utf-8")
        after = merge(before, self.cells)
        if after == before:
            print(f"✓ cbserver/{self.module}.py is what this notebook says; nothing to write")
            return
        check(self.package, self.module, before, after)
        path.write_text(after, encoding="utf-8")
        forget()
        new = ", ".join(sorted(exports(after) - exports(before)))
        print(f"✓ cbserver/{self.module}.py written with your cells{new and '; new: '}{new}. "
              "Import from cbserver again to use it here; lesson.restore() undoes it.")

    def restore(self):
        """The module as the course has it."""
        name = f"cbserver/{self.file_name()}"
        done = subprocess.run(["git", "checkout", "HEAD", "--", name], cwd=self.package.parent,
                              capture_output=True, text=True)
        if done.returncode:
            raise ExportRefused(f"git could not restore {name}: {done.stderr.strip()}. In a clone, "
                                "`make export` writes it from the notebook on disk; "
                                "without git, download the module again.")
        forget()
        print(f"✓ {name} is the course's again; import from cbserver again to use it here")


class Turns:
    """The turns that were tried, and the source of those that passed."""

    limit = 20  # seconds for a check: a loop without an end must not stop the notebook

    def __init__(self):
        self.tried = []
        self.passed = {}

    def grade(self, name, function, check, module):
        """Check a turn in the text of the module it belongs to, and say what came out."""
        if name not in self.tried:
            self.tried.append(name)
        self.passed.pop(name, None)
        written = source_of(function)
        if unwritten(written):
            print(f"{name}: not written yet, so the course's version is in use")
            return
        alone = types.SimpleNamespace(**{function.__name__: function})
        reason = self.mistake(name, written, check, module, alone)
        if reason is None:
            self.passed[name] = written
            print(f"✓ {name}: yours passes, and is in use once its cell below has run. "
                  f'lesson.undo("{name}") goes back to the course\'s.')
        else:
            print(f"not yet: {reason}\n{name}: the course's version is in use")

    def mistake(self, name, written, check, module, alone):
        """What is wrong with a turn, in a sentence; None if it passes."""
        course = find(ast.parse(module), name)
        if course is None:
            return within(self.limit, lambda: run_check(check, alone))
        wanted = ast.unparse(course.args)
        mine = ast.parse(written).body[0]
        if ast.unparse(mine.args) != wanted:
            return f"keep the parameters as they are: ({wanted})"
        if type(mine) is not type(course):
            return f"keep it `{'async def' if isinstance(course, ast.AsyncFunctionDef) else 'def'}`"
        made = types.ModuleType("cbserver.yours")
        made.__package__ = "cbserver"
        text = replace(self.splice(module), name, written)
        exec(compile(text, "<yours>", "exec"), vars(made))
        return within(self.limit, lambda: run_check(check, made))

    def splice(self, source):
        """A cell or a module with the turns that passed in place of the course's versions."""
        for name, written in self.passed.items():
            source = replace(source, name, written)
        return source

    def say_whose(self, code):
        """Print which version of its turns a cell has just defined."""
        try:
            tree = ast.parse(code)
        except SyntaxError:
            return
        here = [name for name in self.tried if find(tree, name)]
        whose = {name: "yours" if name in self.passed else "the course's" for name in here}
        if whose:
            print("in use: " + ", ".join(f"{name} {owner}" for name, owner in whose.items()))


def find(tree, name):
    """The definition of `function` or `Class.method` in a parsed text, or None."""
    found = tree
    for part in name.split("."):
        inside = [node for node in found.body if getattr(node, "name", None) == part]
        if not inside:
            return None
        found = inside[-1]
    return found


def replace(source, name, written):
    """`source` with another definition of `function` or `Class.method`; its decorators stay."""
    try:
        course = find(ast.parse(source), name)
    except SyntaxError:  # a %magic: no cell of the course that is exported
        return source
    if course is None:
        return source
    lines = source.splitlines(keepends=True)
    mine = indented(written.strip("\n"), " " * course.col_offset) + "\n"
    new = "".join([*lines[:course.lineno - 1], mine, *lines[course.end_lineno:]])
    return new if source.endswith("\n") else new.rstrip("\n")


def indented(code, blanks):
    """Code moved to the right; a line that begins inside a string is text, and stays as it is."""
    lines = code.splitlines(keepends=True)
    inside = lines_of_text(code)
    return "".join(line if number in inside or not line.strip() else blanks + line
                   for number, line in enumerate(lines, 1))


def lines_of_text(code):
    """Numbers of the lines that begin inside a string: set of int."""
    inside = set()
    opened = []  # where f-strings began, which Python 3.12 and later give out in parts
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        kind = tokenize.tok_name[token.type]
        first = token.start[0]
        if kind.endswith("STRING_START"):
            opened.append(first)
        elif kind.endswith("STRING_END"):
            first = opened.pop()
        elif kind != "STRING":
            continue
        inside.update(range(first + 1, token.end[0] + 1))
    return inside


def source_of(function):
    """A function's source from its `def` on: decorators are the course's, and stay."""
    function = inspect.unwrap(getattr(function, "fget", function))  # a property's own function
    source = inspect.getsource(function)
    if source[0] in " \t":
        source = textwrap.dedent(source)
    first = ast.parse(source).body[0].lineno
    return "".join(source.splitlines(keepends=True)[first - 1:])


def unwritten(source):
    """Whether a stub is as the course has it: it raises NotImplementedError."""
    raised = [node.exc for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Raise)]
    return any("NotImplementedError" in ast.unparse(what) for what in raised if what)


def run_check(check, module):
    found = check(module)
    if inspect.iscoroutine(found):
        asyncio.run(found)


def within(seconds, check):
    """Run a check in a thread of its own: what it says is wrong, or None."""
    said = []

    def run():
        try:
            check()
            said.append(None)
        except AssertionError as error:
            said.append(str(error) or "the result is not the expected one")
        except Exception as error:
            said.append(f"it raised {error!r}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not said:
        return (f"it did not come to an end within {seconds} seconds: does a loop wait for "
                "something that never happens? If the notebook is slow now, restart it.")
    return said[0]


def bound(code):
    """The names that a cell binds at its top level, imports included: frozenset of str."""
    try:
        body = ast.parse(code).body
    except SyntaxError:  # a %magic or !command: `merge` says so
        return frozenset([code])
    names = set(defined(body))
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return frozenset(names)


def defined(body):
    """What nbdev puts into `__all__`: names that are assigned, then functions and classes."""
    targets = [t for node in body if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign))
               for t in (node.targets if isinstance(node, ast.Assign) else [node.target])]
    names = [name.id for t in targets for name in getattr(t, "elts", [t])
             if isinstance(name, ast.Name)]
    return names + [node.name for node in body if hasattr(node, "decorator_list")]


def merge(module, cells):
    """The module's text with cells in place of the blocks of their id, or that bind their names.

    cells: {id or names: ("export" or "exporti", code)}, in the order in which they ran. One that
    replaces nothing is added at the end.
    """
    head, *rest = MARK.split(module)
    blocks = [[mark, code.strip("\n")] for mark, code in zip(rest[::2], rest[1::2])]
    public = exports(module)
    for key, (kind, code) in cells.items():
        names = bound(code)
        try:
            ast.parse(code)
        except SyntaxError:
            raise ExportRefused("A cell to export has a % or ! line, which is no Python:\n" + code)
        alike = [(mark.split("#")[-1] == key, len(bound(block) & names)) for mark, block in blocks]
        place = alike.index(max(alike)) if any(max(alike)) else len(blocks)
        if place == len(blocks):
            blocks.append([f"{blocks[-1][0].split(' #')[0]} #new", ""])
        blocks[place][1] = relative(code)
        names = set(defined(ast.parse(code).body))
        public = public | names if kind == "export" else public - names
    bodies = [ast.parse(code).body for mark, code in blocks if mark != "auto #0"]
    flat = [node for body in bodies for node in body]
    everything = list(dict.fromkeys(name for name in defined(flat)
                                    if name in public and name[0] != "_"))
    wrap = textwrap.TextWrapper(width=120, subsequent_indent=" " * 11, break_long_words=False)
    for block in blocks:
        if block[0] == "auto #0":
            block[1] = "__all__ = " + "\n".join(wrap.wrap(str(everything)))
    return head + "\n\n".join(f"# %% {mark}\n{code}" for mark, code in blocks) + "\n"


def relative(code):
    """`from cbserver.x import …` as a module of the package says it, one level each."""
    return re.sub(r"^(from +)cbserver(\.\w+)", r"\1\2", code, flags=re.M)


def exports(module):
    """`__all__` of a module's text: set of str."""
    for node in ast.parse(module).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def check(package, name, before, after):
    """Would the server still run? Raises ExportRefused with the reason."""
    if missing := sorted(exports(before) - exports(after)):
        raise ExportRefused(f"cbserver/{name}.py would lack {', '.join(missing)}, which others "
                            "use. Did a cell lose or rename it? Nothing was written.")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(package, Path(folder) / "cbserver",
                        ignore=shutil.ignore_patterns("__pycache__"))
        (Path(folder) / "cbserver" / f"{name}.py").write_text(after, encoding="utf-8")
        everything = "import cbserver.server, cbserver.process"
        done = subprocess.run([sys.executable, "-c", everything], cwd=folder,
                              capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1]
        raise ExportRefused(f"cbserver/{name}.py would not import ({reason}). Run the cells it "
                            "needs, or mark them `#| export`. Nothing was written.")


def forget():
    """Drop imported modules of the package, so that the next import reads them anew."""
    for name in [n for n in sys.modules if n.split(".")[0] == "cbserver"]:
        del sys.modules[name]

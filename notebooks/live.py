"""A learner's edits become the module that the server runs.

On Colab the open notebook is no file, so nothing on disk has the edits. A hook notes every
`#| export` cell that ran without an error; `export_module` puts these cells into the module, in
place of the ones they replace, the way nbdev would lay them out.
"""
import ast
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Where nbdev looks for directives: in the lines above all code and other comments.
LEAD = re.compile(r"(?:[ \t]*(?:#[ \t]*\|.*|%%\w+.*)?(?:\n|$))*")
DIRECTIVE = re.compile(r"^[ \t]*#[ \t]*\|[ \t]*(default_exp|export[sid]?)\b[ \t:]*(\S*)", re.M)
KINDS = {"exports": "export"}  # what else nbdev calls it
MARK = re.compile(r"^# %% (.*)\n", re.M)  # nbdev's, above each cell of a module


class ExportRefused(Exception):
    """The cells would make a module that cannot be used; the message says why."""


class Recorder:
    """Keeps each `#| export` cell as it last ran without an error."""

    def __init__(self, package=ROOT / "cbserver"):
        self.package, self.module, self.cells = package, None, {}

    def note(self, result):
        """IPython's `post_run_cell` hook."""
        source = result.info.raw_cell or ""
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
        code = source[len(lead):].rstrip()
        kind = KINDS.get(kind, kind)
        if kind == "default_exp":
            self.module, self.cells = name, {}
        elif result.success:  # Jupyter tells the cell's id; without one its names tell which it is
            key = getattr(result.info, "cell_id", None) or bound(code)
            self.cells.pop(key, None)
            self.cells[key] = (kind, code)
        else:
            print("Not noted for export_module(): this cell failed, the version before it counts.")

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

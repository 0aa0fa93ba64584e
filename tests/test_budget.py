"""The promises about size: an engine in 200 lines, a server of 587 around it, short cells."""
import ast
import io
import json
import tokenize

import pytest
from conftest import ROOT

LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENDMARKER)


def code_lines(source):
    """Lines that hold code: no blank lines, comments or docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    skip = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            skip.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    used = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            used.update(range(token.start[0], token.end[0] + 1))
    return len(used - skip)


def lines_of(*names):
    return sum(code_lines((ROOT / "cbserver" / name).read_text()) for name in names)


def test_the_counter_counts_code_and_nothing_else():
    source = '"""doc"""\n# comment\n\ndef f(a,\n      b):\n    "doc"\n    return """x\ny"""\n'
    assert code_lines(source) == 4


def test_the_engine_fits_in_200_lines():
    assert lines_of("sequence.py", "batch.py", "scheduler.py") <= 200


def test_the_fast_step_fits_in_150_lines():
    assert lines_of("fast.py") <= 150


def test_the_http_layer_fits_in_585_lines():
    assert lines_of("server.py") <= 587


def test_the_modules_of_the_six_lessons_fit_in_1111_lines():
    names = {p.name for p in (ROOT / "cbserver").glob("*.py")} - {"_modidx.py", "fast.py"}
    assert lines_of(*names) <= 1112


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_cells_are_short(path):
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    sources = ["".join(c["source"]) for c in cells]
    lengths = [len(s.splitlines()) for s in sources if not s.startswith("#| export")]
    assert max(lengths) <= 25
    assert sum(n < 15 for n in lengths) > len(lengths) / 2, "most cells are under 15 lines"

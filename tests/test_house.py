"""The promises about the house: how large what is taught is, who may import whom, how it reads."""
import ast
import json
import subprocess
import sys

import pytest
from conftest import ROOT

from bench.lines import (
    class_lines,
    code_lines,
    engine_lines,
    imports,
    is_taught,
    layer,
    modules,
)

LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def lines_of(*names):
    return sum(code_lines(modules("cbserver")[f"cbserver.{name}"].read_text()) for name in names)


def test_the_counter_counts_code_and_nothing_else():
    source = '"""doc"""\n# comment\n\ndef f(a,\n      b):\n    "doc"\n    return """x\ny"""\n'
    assert code_lines(source) == 4
    assert class_lines("import x\n\nclass A:\n    'doc'\n    y = 1  # one\n") == {"A": 2}


def test_the_engine_is_five_classes_in_242_plain_lines_and_three_files_of_353():
    assert sum(engine_lines().values()) <= 242
    assert lines_of("sequence", "batch", "scheduler") <= 353


def test_what_each_lesson_teaches_is_small():
    for name, most in (("baseline", 60), ("metrics", 80), ("server", 150), ("fast", 290),
                       ("prefix", 90)):
        assert lines_of(name) <= most, f"{name}: {lines_of(name)} lines"


def test_what_is_given_is_small():
    given = [path for name, path in modules("cbserver").items() if not is_taught(name)]
    assert sum(code_lines(path.read_text(encoding="utf-8")) for path in given) <= 2820


def test_imports_go_one_way():
    for name, path in modules("cbserver").items():
        if name in ("cbserver", "cbserver.__main__", "cbserver.model", "cbserver.http"):
            continue
        for other in imports(name, path):
            assert layer(other) <= layer(name), f"{name} imports {other}, which stands above it"


def test_http_knows_of_the_engine_no_more_than_a_request_and_its_errors():
    for name, path in modules("cbserver").items():
        if name.startswith("cbserver.http."):
            engine = {other for other in imports(name, path) if is_taught(other)}
            assert engine <= {"cbserver.sequence", "cbserver.metrics"}, f"{name}: {engine}"


def test_the_server_knows_of_the_engine_only_its_errors():
    tree = ast.parse((ROOT / "cbserver" / "server.py").read_text())
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
             and node.module == "sequence" for alias in node.names}
    assert found == {"EngineStopped", "PromptTooLong", "QueueFull"}
    assert "batch" not in ast.unparse(tree).replace("batching", "")


def test_load_measures_anybodys_server_and_no_package_imports_bench():
    for name, path in modules("load").items():
        ours = {other for other in imports(name, path) if not other.startswith("load")}
        assert ours <= {"cbserver.metrics"}, f"{name} imports {ours}"
    for name, path in modules("cbserver").items():
        others = {other for other in imports(name, path) if not other.startswith("cbserver")}
        assert not others, f"{name} imports {others}"


def test_nobody_edits_the_path_but_the_lessons_and_the_locust_file():
    found = {str(path.relative_to(ROOT)) for path in ROOT.glob("*/**/*.py")
             if path.parts[len(ROOT.parts)] in ("cbserver", "load", "bench", "tools", "notebooks",
                                                "tests")
             and "sys.path" in path.read_text() and path.name != "test_house.py"}
    assert found == {"load/locustfile.py", "notebooks/lesson.py"}


def fresh(code):
    """What this code prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("code", ["import cbserver", "import cbserver.metrics", "import load.run",
                                  "import cbserver.cli; cbserver.cli.parse([])"])
def test_torch_is_not_loaded_by_what_does_not_need_it(code):
    assert fresh(f"import sys\n{code}\nprint('torch' in sys.modules)") == ["False"]


def test_four_names_are_all_one_needs_to_begin():
    import cbserver

    assert fresh("from cbserver import load_model, SamplingParams, ContinuousEngine, create_app\n"
                 "print(create_app.__module__)") == ["cbserver.server"]
    with pytest.raises(AttributeError, match="it has load_model"):
        getattr(cbserver, "no_such_name")  # noqa: B009


def test_one_version_in_one_place():
    import importlib.metadata

    import cbserver

    assert importlib.metadata.version("cbserver") == cbserver.__version__
    assert "version = {" in (ROOT / "pyproject.toml").read_text()


# Plainness: one idea a statement


def folded(tree):
    """The statements that hold several ideas: [(line, what)]."""
    allowed = {id(walrus) for node in ast.walk(tree) if isinstance(node, (ast.If, ast.While))
               for walrus in ast.walk(node.test) if isinstance(walrus, ast.NamedExpr)}
    effects = (ast.BoolOp, ast.IfExp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp,
               ast.Lambda, ast.Tuple)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) > 1:
            found.append((node.lineno, "two targets, one value"))
        elif (isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
                and isinstance(node.targets[0], ast.Tuple) and not is_swap(node)):
            found.append((node.lineno, "a tuple assigned to a tuple"))
        elif isinstance(node, ast.Expr) and isinstance(node.value, effects):
            found.append((node.lineno, "an expression for its effect"))
        elif isinstance(node, ast.Lambda) and isinstance(node.body, (ast.BoolOp, ast.ListComp,
                                                                     ast.Tuple)):
            if any(isinstance(inner, ast.Call) for inner in ast.walk(node.body)):
                found.append((node.lineno, "a lambda that calls for effect"))
        elif isinstance(node, ast.NamedExpr) and id(node) not in allowed:
            found.append((node.lineno, "a walrus outside of if and while"))
    return found


def is_swap(node):
    left = [ast.unparse(target) for target in node.targets[0].elts]
    right = [ast.unparse(value) for value in node.value.elts]
    return sorted(left) == sorted(right)


@pytest.mark.parametrize("source, count", [
    ("a, b = 1, 2", 1), ("a, b = b, a", 0), ("a = b = 0", 1), ("a or b()", 1), ("f(x := 1)", 1),
    ("if (x := f()):\n    pass", 0), ("while (x := f()):\n    pass", 0), ("a, b = f()", 0),
    ("[f(x) for x in y]", 1), ("g(lambda: f() or h())", 1), ("g(lambda x: x + 1)", 0)])
def test_the_plain_rule_sees_what_it_should(source, count):
    assert len(folded(ast.parse(source))) == count


def test_code_is_plain():
    """nano-vllm has 4 folded statements in 1,450 lines; at most 3 in 1,000 here."""
    found = []
    lines = 0
    for name, path in modules("cbserver", "load", "bench", "tools").items():
        source = path.read_text(encoding="utf-8")
        lines += code_lines(source)
        found += [f"{name}:{line}: {what}" for line, what in folded(ast.parse(source))]
    assert len(found) <= 3 * lines / 1000, found


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_cells_are_short(path):
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    sources = ["".join(c["source"]) for c in cells]
    lengths = [len(s.splitlines()) for s in sources if not s.startswith("#| export")]
    assert max(lengths) <= 25
    assert sum(n < 15 for n in lengths) > len(lengths) / 2, "most cells are under 15 lines"

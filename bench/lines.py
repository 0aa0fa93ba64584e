"""How large each module is and who imports whom: `make lines`. Tests hold both."""
import argparse
import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TAUGHT = ("baseline", "sequence", "batch", "scheduler", "metrics", "server", "fast", "prefix")
ENGINE = ("Sequence", "Engine", "SlotCache", "BatchRunner", "ContinuousEngine")
LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENDMARKER)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def lines_with_code(source):
    """Numbers of the lines that hold code, a set: no blank lines, comments or docstrings."""
    used = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            used.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            used.difference_update(range(docstring.lineno, docstring.end_lineno + 1))
    return used


def code_lines(source):
    """How many lines hold code."""
    return len(lines_with_code(source))


def class_lines(source):
    """{class: lines of code} for the classes at a module's top level."""
    used = lines_with_code(source)
    return {node.name: len(used & set(range(node.lineno, node.end_lineno + 1)))
            for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}


def modules(*packages):
    """{dotted name: path} of the packages' modules, without the index that nbdev writes."""
    found = {}
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name != "_modidx.py":
                parts = path.relative_to(ROOT).with_suffix("").parts
                found[".".join(parts).removesuffix(".__init__")] = path
    return found


def is_taught(name):
    return name.startswith("cbserver.") and name.split(".")[1] in TAUGHT


def imports(name, path):
    """The modules of ours that this one imports, wherever in it: set of dotted names."""
    known = modules("cbserver", "load", "bench", "tools")
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{start}.{alias.name}"
                found.add(inner if inner in known else start)
    return {module for module in found if module in known} - {name}


def table():
    """A line for each module: its lines of code, and whether it is taught."""
    rows = []
    for name, path in modules("cbserver", "load", "bench", "tools").items():
        kind = "taught" if is_taught(name) else ""
        if name.startswith("cbserver") and not kind:
            kind = "given"
        rows.append((name, code_lines(path.read_text(encoding="utf-8")), kind))
    lines = [f"{name:28}{count:6}  {kind}" for name, count, kind in rows]
    for kind in ("taught", "given"):
        total = sum(count for _, count, what in rows if what == kind)
        lines.append(f"{'all that is ' + kind:28}{total:6}")
    lines.append(f"{'the engine, five classes':28}{sum(engine_lines().values()):6}")
    return "\n".join(lines)


def engine_lines():
    """{class: lines of code} of the five classes that are the engine."""
    found = {}
    for name in ("sequence", "batch", "scheduler"):
        found |= class_lines((ROOT / "cbserver" / f"{name}.py").read_text(encoding="utf-8"))
    return {name: found[name] for name in ENGINE}


# Imports go down: a module may use those of the layers above its own in this list.
LAYERS = [["model.sampling", "model.attention", "model.linear", "model.random_llama", "metrics"],
          ["model.load", "model.logprobs"], ["baseline", "model.trial"], ["sequence"],
          ["batch", "http.errors", "http.replies", "http.text", "http.tools", "http.tunnel",
           "http.keys"],
          ["scheduler", "fast", "http.answers", "http.schema", "http.monitor", "http.doors",
           "http.connection"],
          ["prefix", "server", "process", "processes", "cli"],
          ["on_ray"]]


def layer(name):
    """The number of a module's layer."""
    short = name.removeprefix("cbserver.")
    return next(i for i, names in enumerate(LAYERS) if short in names)


def picture():
    """cbserver's modules by layer, with an arrow from each to those it imports: a figure."""
    import matplotlib.pyplot as plt

    place = {}
    for y, names in enumerate(LAYERS):
        for x, name in enumerate(names):
            place[f"cbserver.{name}"] = (x - (len(names) - 1) / 2, y)
    figure, axes = plt.subplots(figsize=(11, 8), layout="constrained")
    for name, path in modules("cbserver").items():
        if name not in place:
            continue
        for other in imports(name, path) & place.keys():
            up = place[other][1] > place[name][1]
            axes.annotate("", place[other], place[name], arrowprops={
                "arrowstyle": "->", "color": "#D55E00" if up else "#888888", "shrinkA": 14,
                "shrinkB": 14, "connectionstyle": "arc3,rad=0.06"})
    for name, (x, y) in place.items():
        color = "#0072B2" if is_taught(name) else "#888888"
        axes.text(x, y, name.removeprefix("cbserver."), ha="center", va="center", color="white",
                  bbox={"boxstyle": "round", "fc": color, "ec": "none"})
    axes.set(xlim=(-2.7, 2.7), ylim=(len(LAYERS) - 0.5, -0.5))
    axes.axis("off")
    axes.set_title("cbserver: who imports whom. Blue: taught. Grey: given. Arrows point at what "
                   "is imported; an orange one would go the wrong way.", fontsize=10)
    return figure


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.lines",
                                     description=__doc__.split("\n")[0])
    parser.add_argument("--picture", type=Path, help="also draw who imports whom, as a PNG")
    options = parser.parse_args(arguments)
    print(table())
    if options.picture:
        picture().savefig(options.picture, dpi=90)
        print(options.picture)


if __name__ == "__main__":
    main()

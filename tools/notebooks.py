"""Keep the lessons in order: put the repository's address into them, run them, keep outputs."""
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def repository():
    """[project.urls] Repository of pyproject.toml: the one place that names it."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'^Repository = "(.+?)"', text, re.M)[1]


def origin():
    """The address of git's remote `origin`, as a browser has it, or None."""
    asked = subprocess.run(["git", "remote", "get-url", "origin"], cwd=ROOT, capture_output=True,
                           text=True)
    return address_of(asked.stdout) if asked.returncode == 0 else None


def address_of(remote):
    """`git@github.com:me/course.git` -> `https://github.com/me/course`; None if not GitHub's."""
    found = re.search(r"github\.com[:/]([\w.-]+/[\w.-]+?)(\.git)?/?$", remote.strip())
    return f"https://github.com/{found[1]}" if found else None


def publish(address):
    """Put the repository's address into every badge, clone command and link.

    address: `https://github.com/me/course` in any form that git takes; without one, `origin`.
    """
    new = address_of(address) if address else origin()
    if new is None:
        sys.exit(f"{address or 'The remote origin'} is no repository on GitHub, and Colab opens "
                 "notebooks from there: say make publish REPO=https://github.com/you/course.")
    old_name = repository().removeprefix("https://github.com/")
    new_name = new.removeprefix("https://github.com/")
    for path in named_in():
        text = path.read_text(encoding="utf-8")
        stamped = text.replace(f"github.com/{old_name}", f"github.com/{new_name}")
        stamped = stamped.replace(f"/github/{old_name}/", f"/github/{new_name}/")
        if stamped != text:
            path.write_text(stamped, encoding="utf-8")
            print("stamped", path.relative_to(ROOT))
    print("Links and badges point to", new)


def named_in():
    """The files that may name the repository."""
    return [*LESSONS, *sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md",
            ROOT / "pyproject.toml", ROOT / "cbserver" / "_modidx.py"]


def learning_minutes(path):
    """How long a lesson takes, roughly, to the next five minutes.

    200 words and 10 lines of code a minute, the minutes of the turns, half of the exercises'. Not
    counted is code that nobody has to read: the set-up, the checks, the folded versions of turns.
    """
    words = 0
    lines = 0
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            help_only = r"<details><summary>(?!Answer).*?</details>"
            words += len(re.sub(help_only, "", source, flags=re.S).split())
        elif not (folded(cell) or re.search(r"def check_|REPOSITORY", source)):
            lines += sum(bool(line.strip()) for line in source.splitlines())
    text = path.read_text(encoding="utf-8")
    turns = sum(map(int, re.findall(r"### Your turn .+?, (\d+) minutes\)", text)))
    exercises = sum(map(int, re.findall(r"### Exercise .+?, (\d+) minutes\)", text)))
    return 5 * round((words / 200 + lines / 10 + turns + exercises / 2) / 5)


def folded(cell):
    """Whether a cell's source is hidden until somebody opens it."""
    return cell["metadata"].get("jupyter", {}).get("source_hidden", False)


def execute(path, timeout=900, env=None):
    """Run a notebook in its own folder; returns it with outputs. Raises on an error."""
    import nbformat
    from nbclient import NotebookClient

    os.environ.update(env or {})
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3",
                            resources={"metadata": {"path": str(Path(path).parent)}})
    return client.execute()


def tidy(notebook):
    """Drop what changes from run to run and says nothing: counts, timings, ids of streams."""
    for cell in notebook["cells"]:
        cell["metadata"].pop("execution", None)
        if cell["cell_type"] == "code":
            cell["execution_count"] = None
            cell["outputs"] = merge(cell["outputs"])
            for output in cell["outputs"]:
                output.pop("execution_count", None)
                if output["output_type"] == "execute_result":
                    output["execution_count"] = None
    notebook["metadata"]["language_info"] = {"name": "python"}
    return notebook


def merge(outputs):
    """Consecutive prints of one stream as one output."""
    merged = []
    for output in outputs:
        last = merged[-1] if merged else {}
        if output.get("name") and output.get("name") == last.get("name"):
            last["text"] += output["text"]
        else:
            merged.append(output)
    return merged


def run(names):
    """Execute lessons in place, outputs kept. names: parts of file names; none means all."""
    from nbdev.clean import nbdev_clean

    for path in LESSONS:
        if names and not any(name in path.name for name in names):
            continue
        began = time.perf_counter()
        print(path.name, end=" ", flush=True)
        notebook = tidy(execute(path))
        temporary = path.with_suffix(".tmp")
        text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
        nbdev_clean(str(path))  # one layout, whoever wrote the file: small diffs
        print(f"{time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    command, *rest = sys.argv[1:] or ["help"]
    if command == "publish":
        publish(*rest[:1] or [""])
    elif command == "run":
        run(rest)
    else:
        sys.exit("usage: python tools/notebooks.py publish [ADDRESS] | run [part of a name ...]")

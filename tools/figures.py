"""Draw the committed figures and write the README's numbers, all from figures/data/*.json."""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402

matplotlib.use("Agg")
from load import report  # noqa: E402


def numbers(result):
    """The README's paragraph and table for one comparison."""
    load = result["workload"]
    spread = "; ".join(f"{name} {min(speeds):.1f}–{max(speeds):.1f}"
                       for name, arm in report.arms_of(result)
                       if (speeds := [run["tokens_per_s"] for run in arm["repeats"]]))
    ratios = ", ".join(report.ratios(result).splitlines())
    return "\n".join([
        report.table(result), "",
        f"{ratios}. {report.setting(result)}, {load['requests']} requests, median of "
        f"{load['repeats']} runs (tokens/s: {spread}), `{result['command']}`, raw data in "
        f"`figures/data/`. Greedy: {'; '.join(report.notes(result).splitlines())}."])


def write_readme(text, readme):
    """`readme` with the text between its two markers replaced."""
    marked = re.compile(r"(<!-- numbers -->\n).*?(<!-- /numbers -->)", re.S)
    return marked.sub(lambda found: f"{found[1]}{text}\n{found[2]}", readme)


def main():
    for path in sorted((ROOT / "figures" / "data").glob("compare-*.json")):
        result = json.loads(path.read_text())
        for figure in report.save_figures(result, ROOT / "figures", path.stem):
            print(Path(figure).relative_to(ROOT))
    readme = ROOT / "README.md"
    result = json.loads((ROOT / "figures" / "data" / "compare-cpu.json").read_text())
    readme.write_text(write_readme(numbers(result), readme.read_text()))
    print("README.md")


if __name__ == "__main__":
    main()

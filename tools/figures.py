"""Draw the committed figures and write the README's numbers, all from figures/data/*.json."""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402

matplotlib.use("Agg")
from load import capacity, ladder, report, soak  # noqa: E402
from load.offline import table  # noqa: E402

DATA = ROOT / "figures" / "data"


def numbers():
    """The README's part on load.compare: a table, the ratios and the setting for each device."""
    results = [json.loads(path.read_text()) for device in ("cpu", "h100")
               if (path := DATA / f"compare-{device}.json").exists()]
    tables = [comparison(result) for result in results]
    if len(tables) > 1:  # the first one's figure stands at the head of the README
        tables[1] = f"![The same on an H100](figures/compare-h100.png)\n\n{tables[1]}"
    return "\n\n".join(tables)


def comparison(result):
    """Table, ratios, setting, spread, knee and cross-checks of one comparison."""
    load = result["workload"]
    spread = "; ".join(f"{name} {min(speeds):.1f}–{max(speeds):.1f}"
                       for name, arm in report.arms_of(result)
                       if (speeds := [run["tokens_per_s"] for run in arm["repeats"]]))
    ratios = ", ".join(report.ratios(result).splitlines())
    held = report.checks(result)
    lines = [f"{ratios}. {report.setting(result)}, {load['protocol']}, median of "
             f"{load['repeats']} runs (tokens/s: {spread}), `{result['command']}`, raw data in "
             f"`figures/data/`. Greedy: {'; '.join(report.notes(result).splitlines())}."]
    if held:
        lines.append(f"Cross-checks (Little's law, roofline): {sum(ok for _, ok in held)} of "
                     f"{len(held)} hold.")
    if result.get("sweep"):
        lines.append(f"The knee of continuous batching is at {report.knee(result['sweep'])} users.")
    return "\n".join([report.table(result), "", " ".join(lines)])


def ladder_text():
    """The README's part on load.offline: a figure, a table and the setting for each device."""
    parts = []
    for device in ("h100", "cpu"):
        path = DATA / f"offline-{device}.json"
        if path.exists():
            result = json.loads(path.read_text())
            parts += [f"![Tokens per second of each rung](figures/{path.stem}.png)", "",
                      table(result), "", setting(result), *more_text(device), ""]
    result = json.loads((DATA / "offline-h100.json").read_text())
    guesses = ", ".join(f"{arm} {speed:,.0f}" for arm, speed in ladder.predict(result).items())
    return "\n".join([*parts, f"A prediction, not a measurement: on a T4 (320 GB/s) the same model "
                      f"of a step gives, in tokens/s at 16 slots, {guesses}; check it there with "
                      f"`{ladder.COMMAND}`."])


def http_text():
    """What HTTP costs and how a long load went, for the README."""
    parts = []
    for device, engine in (("cpu", "continuous"), ("h100", "continuous+graphs+compile")):
        path = DATA / f"offline-{device}.json"
        rows = {(row["arm"], row["slots"]): row for row in json.loads(path.read_text())["rows"]}
        for (arm, slots), row in rows.items():
            if arm == "http" and row["repeats"]:
                alone, run = rows[engine, slots]["tokens_per_s"], row["repeats"][0]
                parts.append(
                    f"{row['tokens_per_s']:,.0f} tokens/s over HTTP with {run['users']} users "
                    f"against {alone:,.0f} without on {device.upper()} at {slots} slots: "
                    f"{row['tokens_per_s'] / alone:.0%} ({repeats(row)}, "
                    f"{run['tokens_per_event']:.2f} tokens an event, client at "
                    f"{run['client_cpu_percent']:.0f} % of a core)")
    text = [f"What HTTP costs (`python -m load.offline`): {'; '.join(parts)}."] if parts else []
    if (DATA / "soak-cpu.json").exists():
        result = json.loads((DATA / "soak-cpu.json").read_text())
        v = result["verdict"]
        text += ["", f"A soak (`{result['command']}`), first against last third: memory "
                 f"{v['rss_mb'][0]:,.0f} and {v['rss_mb'][1]:,.0f} MB, gap between tokens "
                 f"{v['itl_p50_ms'][0]:.0f} and {v['itl_p50_ms'][1]:.0f} ms, "
                 f"{v['requests']:,} requests, {v['failures']} failures, every fifth client "
                 f"gone before its end. {result.get('note', '')}".rstrip(), "",
                 "![Memory and latency over time](figures/soak-cpu.png)"]
    return "\n".join(text)


def guidellm_text():
    """How far load.run and guidellm are apart, for the README."""
    found = json.loads((DATA / "clients.json").read_text())["clients"]["agreement"]
    parts = []
    for server in ("planted delays", "cbserver"):
        off = found[server]["load.run against guidellm, %"]
        cpu = [found[server][who]["client_cpu_s"] for who in ("load.run", "guidellm")]
        names = ", ".join(f"{name.removesuffix('_ms').replace('_per_s', '/s')} {percent:+.1f} %"
                          for name, percent in off.items())
        parts.append(f"{server}: {names} (CPU seconds {cpu[0]:.0f} and {cpu[1]:.0f})")
    return (f"load.run against guidellm, {found['load']} (`make test-clients`): "
            f"{'; '.join(parts)}. {found['why they differ']}")


def feed_text():
    """What the live page costs, for the README."""
    if not (DATA / "overhead-cpu.json").exists():
        return ""
    found = json.loads((DATA / "overhead-cpu.json").read_text())
    if not (feed := found.get("feed")):
        return ""
    speed = feed["tokens_per_s"]
    low, high = (edge - 1 for edge in speed["interval"])
    return (f"{found['viewers']} open pages take {feed['share_of_a_core']:.1%} of a core of a "
            f"server whose {found['slots']} slots are full and held still (its CPU time, "
            f"{len(feed['held']) // 2} stretches of 10 s with and without, {found['hardware']}). "
            f"With {feed['model']} at work on a core of its own they change tokens/s by "
            f"{speed['median'] - 1:+.1%} (median of {speed['pairs']} pairs of neighbouring "
            f"stretches, 95% interval {low:+.1%} to {high:+.1%}). "
            f"{feed.get('note', '')} `{found['command']} feed`.")


def ray_text():
    """What a Ray replica costs, for the README."""
    if not (DATA / "overhead-cpu.json").exists():
        return ""
    found = json.loads((DATA / "overhead-cpu.json").read_text())
    parts = []
    for model, models in found["models"].items():
        speed, ttft = ({kind: sorted(row[name] for row in models["ray_runs"]
                                     if row["server"] == kind)[1] for kind in ("uvicorn", "ray")}
                       for name in ("tokens_per_s", "ttft_p50_ms"))
        parts.append(f"{model}: {speed['ray']:,.0f} tokens/s against {speed['uvicorn']:,.0f} "
                     f"({models['ray']['median']:.0%}; {models['ray']['spread'][0]:.0%} to "
                     f"{models['ray']['spread'][1]:.0%}), TTFT p50 {ttft['ray']:,.0f} ms against "
                     f"{ttft['uvicorn']:,.0f} ms")
    return (f"One replica on Ray {found['versions']['ray']} against bare uvicorn, {found['users']} "
            f"users, {found['slots']} slots, {found['hardware']}, fresh processes, 3 runs each: "
            f"{'; '.join(parts)}. Ray's own processes share the cores here, and random:tiny, a "
            "step of a few milliseconds, shows the worst case.")


def capacity_text():
    """The check of the simulation and the plan, for the README."""
    parts, timed = [], []
    for device in ("cpu", "h100"):
        path = DATA / f"capacity-{device}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        parts += [f"{result['model']} on {result['hardware']}, {result['slots']} slots, users who "
                  f"think {result['think_s']:g} s on average, medians of "
                  f"{1 + max(row['repeat'] for row in result['loads'])} fresh servers "
                  f"(`{result['command']}`). Off is the median of the "
                  "runs' own ratios, since each run has requests of its own:", "",
                  capacity.validation_table(result), ""]
        parts += [result["note"], ""] if "note" in result else []
        if plan := result.get("plan"):
            count, seconds = plan["timed"]
            timed.append(f"{count:,} requests of {result['model']} in {seconds:.0f} s")
            parts += [f"![TTFT measured, simulated and planned](figures/{path.stem}.png)", "",
                      "Replicas of this server that keep TTFT p99 under "
                      f"{plan['target_ms']:,.0f} ms for users who think {plan['think_s']:g} s "
                      f"(`{plan['command']}`):", "", capacity.plan_table(result), ""]
    if timed:
        parts += ["*In turn*: first come, next replica. *Two choices*: the emptier of two drawn at "
                  "random, as Ray Serve does. *Least loaded*: the fewest requests in flight of "
                  f"all. Simulated were {' and '.join(timed)}."]
    return "\n".join(parts).rstrip()


def more_text(device):
    """Sentences on two more runs: lengths as in chats, and all arms in float32."""
    for kind, words in (("chat", "With lengths as in chats, and every 32nd prompt of 2,000 to "
                         "4,000 tokens"), ("float32", "In float32")):
        path = DATA / f"offline-{device}-{kind}.json"
        if path.exists():
            result = json.loads(path.read_text())
            rows = [f"{row['arm']} at {row['slots']} slots {row['tokens_per_s']:,.0f} tokens/s "
                    f"({repeats(row)})" for row in result["rows"]]
            same = {f"{same['whole']} of {same['compared']}" for same in result["same_tokens"]}
            yield (f"{words}: {', '.join(rows)}." if kind == "chat" else
                   f"{words}, answers of {result['workload']['short']} tokens that equal "
                   f"generate()'s: {' or '.join(sorted(same))} in each of the "
                   f"{len(result['same_tokens'])} other arms measured.")


def repeats(row):
    return f"{len(row['repeats'])} repeat{'s' if len(row['repeats']) > 1 else ''}"


def setting(result):
    """Hardware, versions, commands, what is missing, and what a long prompt does."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [f"{ladder.setting(result)}; {versions}; medians of fresh processes.",
             result.get("note", "")]
    if len(stall := result.get("stall", {})) == 2:
        pieces, whole = stall["in pieces"], stall["whole"]
        lines.append(f"A prompt of {whole['prompt_tokens']:,} tokens that arrives among 15 running "
                     f"streams makes their longest pause {whole['worst_gap_ms']:,.0f} ms when "
                     f"it is read whole, {pieces['worst_gap_ms']:,.0f} ms in pieces of "
                     f"{pieces['prefill_budget']} (usually {pieces['usual_gap_ms']:,.1f} ms).")
    lines.append("Commands: " + "; ".join(f"`{c}`" for c in result["commands"]) + ".")
    return " ".join(filter(None, lines))


def write_readme(text, readme, name="numbers"):
    """`readme` with the text between the two markers of that name replaced."""
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    return marked.sub(lambda found: f"{found[1]}{text}\n{found[2]}", readme)


def main():
    for path in sorted(DATA.glob("compare-*.json")):
        result = json.loads(path.read_text())
        for figure in report.save_figures(result, ROOT / "figures", path.stem):
            print(Path(figure).relative_to(ROOT))
    for path in sorted(DATA.glob("offline-*.json")):
        if path.stem.count("-") > 1:  # told in a sentence
            continue
        figure = ROOT / "figures" / f"{path.stem}.png"
        ladder.ladder_figure(json.loads(path.read_text())).savefig(figure)
        print(figure.relative_to(ROOT))
    if (DATA / "soak-cpu.json").exists():
        soak.figure(json.loads((DATA / "soak-cpu.json").read_text())).savefig(
            ROOT / "figures" / "soak-cpu.png")
        print("figures/soak-cpu.png")
    for path in sorted(DATA.glob("capacity-*.json")):
        figure = ROOT / "figures" / f"{path.stem}.png"
        capacity.figure(json.loads(path.read_text())).savefig(figure)
        print(figure.relative_to(ROOT))
    readme = ROOT / "README.md"
    text = write_readme(numbers(), readme.read_text())
    for name, part in (("feed", feed_text), ("ray", ray_text), ("capacity", capacity_text)):
        text = write_readme(part(), text, name)
    text = write_readme(http_text(), text, "http")
    text = write_readme(guidellm_text(), text, "guidellm")
    readme.write_text(write_readme(ladder_text(), text, "ladder"))
    print("README.md")


if __name__ == "__main__":
    main()

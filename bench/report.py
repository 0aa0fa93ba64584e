"""Figures and tables out of the JSON of a comparison; one style for every picture of the course.

    python -m bench.report figures/data/compare-cpu.json --out figures
"""
import argparse
import base64
import collections
import html
import io
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from load.run import EDGES, FEW

# Okabe and Ito's colours: told apart with any kind of colour vision.
COLORS = {"sequential": "#E69F00", "one-slot": "#CC79A7", "static": "#56B4E9",
          "continuous": "#0072B2"}
STYLE = {"font.size": 11, "axes.titlesize": 12, "axes.titlelocation": "left", "axes.grid": True,
         "grid.alpha": 0.3, "axes.axisbelow": True, "axes.spines.top": False,
         "axes.spines.right": False, "figure.dpi": 100, "savefig.dpi": 150,
         "legend.frameon": False, "figure.titlesize": 12}
MOST_FAILED = 0.01  # of an arm's requests; with more it is compared with no other


def style():
    """Make every figure of this session look like the report's."""
    plt.rcParams.update(STYLE)


def arms_of(result):
    """The arms in the order of the story: [(name, its numbers), ...]."""
    return [(name, result["arms"][name]) for name in COLORS if name in result["arms"]]


def tail_name(result):
    """What the p99 column is called: a p99 of few requests is one request."""
    few = any(numbers["requests"] < FEW for _, numbers in arms_of(result))
    return "slowest" if few else "p99"


def device(result):
    """`CPU` or `GPU`."""
    _, numbers = arms_of(result)[0]
    return numbers["utilization"]["kind"].upper()


def setting(result):
    """One line that says what was measured on what."""
    load = result["workload"]
    return f"{result['model']} on {result['hardware']}, {load['users']} users"


# Figures


def throughput_figure(result):
    """Tokens/s of each arm, as bars."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        draw_throughput(axes, result)
        return titled(figure, "Output throughput", result)


def latency_figure(result):
    """TTFT and E2E of each arm: a dot at p50, a ring at p99 (the slowest, when they are few)."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
        draw_latencies(axes, result)
        return titled(figure, "Latency", result)


def utilization_figure(result):
    """How busy the device was over time, a row for each arm on one time axis."""
    arms = arms_of(result)
    with plt.rc_context(STYLE):
        size = (8, 1.2 + 1.35 * len(arms))
        figure, rows = plt.subplots(len(arms), 1, figsize=size, layout="constrained",
                                    sharex=True, squeeze=False)
        for axes, (name, numbers) in zip(rows[:, 0], arms):
            draw_utilization(axes, name, numbers["utilization"])
        rows[-1, 0].set_xlabel("seconds since the first request")
        return titled(figure, f"{device(result)} utilisation over time", result)


def concurrency_figure(result):
    """Throughput, TTFT and goodput against users, with the knee; without data: how to get it."""
    levels = result.get("sweep") or []
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
        speeds, waits, goodputs = panels
        draw_level(speeds, levels, "tokens/s", [level["tokens_per_s"] for level in levels])
        draw_level(waits, levels, "TTFT p50, seconds",
                   [(level["ttft_ms"]["p50"] or 0) / 1e3 for level in levels])
        draw_goodput(goodputs, [level for level in levels if "goodput" in level])
        for axes in panels:
            axes.set_ylim(0, None)
            if levels:
                axes.axvline(knee(levels), color="#555555", ls="--", lw=1)
        if levels:
            speeds.annotate(f" the knee: {knee(levels)} users", (knee(levels), 0), (4, 6),
                            textcoords="offset points", fontsize=9, color="#555555")
        else:
            missing([speeds, waits], "--sweep 1,2,4,8,16,32,50")
        workload = result["workload"] | {"users": "more and more"}
        return titled(figure, "More users: more tokens, until the slots are full",
                      result | {"workload": workload})


def draw_level(axes, levels, label, values):
    """One value of a sweep against its users."""
    users = [level["users"] for level in levels]
    axes.plot(users, values, "o-", color=COLORS["continuous"], label="all")
    axes.set(xlabel="users at once", ylabel=label, xlim=(0, None))


def draw_goodput(axes, levels):
    """Requests/s of a sweep, and those of them that met every target."""
    draw_level(axes, levels, "requests/s", [level["requests_per_s"] for level in levels])
    if not levels:
        missing([axes], "--goodput ttft:500 tpot:100\n--sweep 1,2,4,8,16,32,50")
        return
    targets = levels[0]["goodput"]["targets_ms"]
    met = ", ".join(f"{name.upper()} ≤ {limit:g} ms" for name, limit in targets.items())
    axes.plot([level["users"] for level in levels],
              [level["goodput"]["requests_per_s"] for level in levels], "s--", color="#D55E00",
              label=f"goodput: {met}")
    axes.legend(fontsize=8)


def knee(levels):
    """The fewest users that reach 90 % of the best throughput: more of them only wait longer."""
    best = max(level["tokens_per_s"] for level in levels)
    return min(level["users"] for level in levels if level["tokens_per_s"] >= 0.9 * best)


def missing(panels, option):
    """A panel without data names what makes it."""
    for axes in panels:
        axes.text(0.5, 0.5, f"no data yet:\npython -m bench.compare\n{option}", fontsize=8,
                  ha="center", va="center", transform=axes.transAxes, color="#555555")


def itl_figure(result):
    """How the gaps between tokens are distributed, a line for each arm."""
    histograms = {name: numbers["itl_histogram"] for name, numbers in arms_of(result)
                  if sum(numbers.get("itl_histogram", []))}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
        for name, counts in histograms.items():
            share = [100 * count / sum(counts) for count in counts]
            axes.stairs(share, EDGES, color=COLORS[name], lw=1.8, label=name)
        axes.set(xscale="log", xlabel="ms between two tokens of a stream",
                 ylabel="% of all gaps, in bins 25 % wide")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        plain_numbers(axes.xaxis)
        if histograms:
            seen = [i for counts in histograms.values() for i, count in enumerate(counts) if count]
            axes.set_xlim(EDGES[min(seen)] / 1.2, EDGES[max(seen) + 1] * 1.2)
            axes.legend()
        else:
            missing([axes], f"--arms {','.join(result['arms'])}")
        return titled(figure, "Gaps between tokens", result)


def plain_numbers(axis):
    """On a log axis 0.5 and 200, not powers of ten."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def overview_figure(result):
    """Throughput on the left, latencies on the right: the picture of the README."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(10, 3.9), layout="constrained",
                                    width_ratios=[1.45, 1, 1])
        draw_throughput(axes[0], result)
        axes[0].set_title("Output throughput: more is better")
        draw_latencies(axes[1:], result)
        return titled(figure, "One model, one app, one load: only the engine differs", result)


def titled(figure, title, result):
    """Title, and below it in small what was measured; closed, so that a notebook shows it once."""
    height = figure.get_figheight()  # inches; the two lines are as tall on every figure
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.5 / height))
    figure.text(0.01, 1 - 0.06 / height, title, fontsize=12, fontweight="bold", va="top")
    figure.text(0.01, 1 - 0.3 / height, setting(result), fontsize=9, color="#555555", va="top")
    plt.close(figure)
    return figure


def draw_throughput(axes, result):
    arms = arms_of(result)
    base = base_speed(result)
    for x, (name, numbers) in enumerate(arms):
        value = numbers["tokens_per_s"]
        repeats = [repeat["tokens_per_s"] for repeat in numbers["repeats"]]
        # Whiskers from the slowest to the fastest repeat, where there is more than one.
        spread = [[value - min(repeats)], [max(repeats) - value]] if len(repeats) > 1 else None
        axes.bar(x, value, 0.65, color=COLORS[name], yerr=spread, capsize=4)
        label = f"{value:.0f}" if value >= 100 else f"{value:.1f}"
        if failed_too_often(numbers):
            label += f"\n{failures_of(numbers)}\nfailed"
        elif base and name != "sequential":
            label += f"\n{value / base:.1f}×"
        axes.annotate(label, (x, max(value, *repeats)), (0, 4), textcoords="offset points",
                      ha="center", va="bottom",
                      fontweight="bold" if name == "continuous" else None)
    axes.set_xticks(range(len(arms)), [name for name, _ in arms])
    axes.set(ylabel="tokens/s, all users together")
    if base and len(arms) > 1:
        axes.set_xlabel("×: against sequential")
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.22)


def base_speed(result):
    """Tokens/s of the arm that others are compared with; None where there is no fair one."""
    numbers = result["arms"].get("sequential")
    if numbers is None or failed_too_often(numbers):
        return None
    return numbers["tokens_per_s"]


def draw_latencies(pair, result):
    """TTFT on the first axes and E2E on the second, arms from top to bottom."""
    first_token, whole = pair
    ranges = {key: latency_range(result, key) for key in ("ttft_ms", "e2e_ms")}
    wide = any(high > 60 * low for low, high in ranges.values())  # one kind of axis for both
    for axes, key, title in ((first_token, "ttft_ms", "Time to first token"),
                             (whole, "e2e_ms", "End-to-end latency")):
        draw_latency(axes, result, key)
        axes.set_title(title)
        low, high = ranges[key]
        if wide:
            axes.set(xscale="log", xlim=(low / 1.5, high * 1.5))
            plain_numbers(axes.xaxis)
        else:
            axes.set_xlim(0, 1.1 * high)
        label_latency(axes, result, key)
    whole.tick_params(labelleft=False)


def latency_range(result, key):
    """(smallest, largest) of what is drawn of one latency, in seconds."""
    ms = [numbers[key][q] for _, numbers in arms_of(result) for q in ("p50", "p99")]
    found = [value / 1e3 for value in ms if value]
    return min(found, default=1), max(found, default=1)


def draw_latency(axes, result, key):
    """A dot at p50, a bar at p90, a ring at p99 for each arm: bars have no foot on a log axis."""
    arms = [(name, numbers) for name, numbers in arms_of(result) if numbers[key]["p50"] is not None]
    for y, (name, numbers) in enumerate(arms):
        p50, p90, p99 = (numbers[key][q] / 1e3 for q in ("p50", "p90", "p99"))
        color = COLORS[name]
        axes.plot([p50, p99], [y, y], color=color, lw=3, alpha=0.4, zorder=2)
        axes.plot(p50, y, "o", color=color, ms=9, zorder=3)
        axes.plot(p90, y, "|", color=color, ms=12, mew=2, zorder=3)
        axes.plot(p99, y, "o", mec=color, mfc="white", mew=2, ms=8, zorder=3)
    axes.set_yticks(range(len(arms)), [name for name, _ in arms])
    axes.set_ylim(len(arms) - 0.5, -0.7)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"seconds (● p50  | p90  ○ {tail_name(result)})", fontsize=9)


def label_latency(axes, result, key):
    """Write p50 and p99 above each arm, on that side of its dots where there is room."""
    arms = [numbers[key] for _, numbers in arms_of(result) if numbers[key]["p50"] is not None]
    to_axes = axes.transData + axes.transAxes.inverted()
    for y, numbers in enumerate(arms):
        p50, p99 = numbers["p50"] / 1e3, numbers["p99"] / 1e3
        right = to_axes.transform((p50, y))[0] > 0.5
        axes.annotate(f"{seconds(p50)} – {seconds(p99)} s", (p99 if right else p50, y), (0, 9),
                      fontsize=9, textcoords="offset points", ha="right" if right else "left",
                      annotation_clip=False)


def seconds(value):
    """Three digits are enough: `0.213`, `4.21`, `231`."""
    if value >= 100:
        return f"{value:.0f}"
    if value >= 10:
        return f"{value:.1f}"
    if value >= 1:
        return f"{value:.2f}"
    return f"{value:.3f}"


def draw_utilization(axes, name, usage):
    x = [second for second, _ in usage["series"]]
    y = [percent for _, percent in usage["series"]]
    what = "GPU, % of the time" if usage["kind"] == "gpu" else "server, % of all cores"
    axes.fill_between(x, y, color=COLORS[name], alpha=0.35, lw=0)
    axes.plot(x, y, color=COLORS[name], lw=1.2, label=what)
    top = 105
    for whose, line in (("server", ":"), ("client", "--")):
        if usage.get(whose):
            top = max(top, *(1.05 * percent for _, percent in usage[whose]))
            axes.plot(*zip(*usage[whose]), line, color="#333333", lw=1.2,
                      label=f"{whose}, % of a core")
    axes.set(ylim=(0, top), yticks=[0, 50, 100], ylabel="%")
    mean = "" if usage["mean"] is None else f": {usage['mean']:.0f} % on average"
    axes.set_title(f"{name}{mean}", fontsize=11)
    axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0)
    axes.set_xlim(left=0)


# Tables


def rows(result):
    """Header and one row an arm, all strings: list[list[str]]."""
    last = tail_name(result)
    header = ["arm", "tokens/s", "requests/s", "TTFT p50", f"TTFT {last}", "E2E p50",
              f"E2E {last}", f"{device(result)} use", "failures"]
    return [header, *(row(name, numbers) for name, numbers in arms_of(result))]


def row(name, numbers):
    usage = numbers["utilization"]["mean"]
    latencies = [numbers[key][q] for key in ("ttft_ms", "e2e_ms") for q in ("p50", "p99")]
    return [name, f"{numbers['tokens_per_s']:.1f}", f"{numbers['requests_per_s']:.2f}",
            *("–" if ms is None else f"{seconds(ms / 1e3)} s" for ms in latencies),
            "–" if usage is None else f"{usage:.0f} %", failures_of(numbers)]


def table(result):
    """The table as Markdown."""
    header, *body = rows(result)
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *body))


def text_table(result):
    """The table for a terminal, in columns: the first one's words to the left."""
    lines = rows(result)
    first, *others = [max(len(cell) for cell in column) for column in zip(*lines)]
    aligned = []
    for name, *cells in lines:
        right = [cell.rjust(width) for cell, width in zip(cells, others)]
        aligned.append("  ".join([name.ljust(first), *right]))
    return "\n".join(aligned)


def ratios(result):
    """How many times the tokens/s of every other arm continuous batching has, a line each.

    No ratio with an arm in which too many requests failed, but what failed, and why.
    """
    lines = []
    mine = result["arms"].get("continuous")
    others = [(name, numbers) for name, numbers in arms_of(result) if name != "continuous"]
    for name, numbers in others if mine else []:
        failing = [arm for arm in ("continuous", name) if failed_too_often(result["arms"][arm])]
        if failing:
            lines.append(f"continuous ÷ {name}: no ratio, since requests failed in "
                         f"{' and '.join(failing)}")
        elif numbers["tokens_per_s"]:
            ratio = mine["tokens_per_s"] / numbers["tokens_per_s"]
            lines.append(f"continuous ÷ {name}: {ratio:.2f}×")
    return "\n".join(lines + failures(result))


def failures(result):
    """What failed in the arms where it was too much, why, and how busy the machine was: lines."""
    lines = [f"✗ {name}: {failures_of(numbers)} requests failed{commonest_error(numbers)}"
             for name, numbers in arms_of(result) if failed_too_often(numbers)]
    before = result.get("before")
    if lines and before:
        load = f"{before['load_average']:.1f} on {before['cores']} cores"
        if before["load_average"] > before["cores"]:
            lines.append(f"The machine was busy before the first run (load average {load}), and "
                         "requests fail where others take its cores: run this again when it is "
                         "quiet.")
        else:
            lines.append(f"Before the first run the load average was {load}. If the machine got "
                         "busy with something else, run this again when it is quiet; if not, the "
                         "servers' logs beside the results say more.")
    return lines


def failed_too_often(numbers):
    """Whether an arm's speed is that of a lucky part of its requests only."""
    return numbers["failures"] > MOST_FAILED * sent(numbers)


def sent(numbers):
    """How many requests an arm's repeats sent, answered or not."""
    return sum(run["requests"] + run["failures"] for run in numbers["repeats"])


def failures_of(numbers):
    """`0`, or `37 of 50`."""
    if numbers["failures"]:
        return f"{numbers['failures']} of {sent(numbers)}"
    return "0"


def commonest_error(numbers):
    errors = collections.Counter()
    for run in numbers["repeats"]:
        errors.update(run.get("errors", {}))
    return f", most of them with: {errors.most_common(1)[0][0]}" if errors else ""


def notes(result):
    """What else a reader should know: were the answers the same, was the client the limit."""
    same = dict(result.get("same_text", {}))
    reference = same.pop("reference", None)
    lines = [f"{arm} gave the same text as {reference} for {n['equal']} of {n['compared']} requests"
             for arm, n in same.items()]
    dtype = (result.get("roofline") or {}).get("dtype", "float32")
    if dtype != "float32" and any(n["equal"] < n["compared"] for n in same.values()):
        lines.append(f"{dtype} rounds a sum by its order, which another way to compute it changes, "
                     "and one token that flips changes the rest: arms must agree in float32 only. "
                     "What holds here: with CUDA graphs and up to 64 slots an arm gives the same "
                     "answer alone and in company, bit for bit (`python -m bench.invariance`)")
    for name, numbers in arms_of(result):
        if (numbers["client_cpu"] or 0) > 70:
            lines.append(f"✗ flagged: {name}: Locust used {numbers['client_cpu']:.0f} % of a core "
                         "(above 70), so the client may have been the limit: use --processes")
        if (numbers["tokens_per_event"] or 1) > 1.05:
            lines.append(f"{name}: {numbers['tokens_per_event']} tokens an event, so ITL is the "
                         "gap between events")
    return "\n".join(lines)


def checks(result):
    """Cross-checks of each arm: [(sentence, whether it holds)].

    Little's law: requests in flight, as the server counted them, are the rate of arrivals times the
    mean time in the system, by the client's log. The roofline: no step is faster than its weights
    can be read.
    """
    roof = result.get("roofline")
    found = []
    for name, numbers in arms_of(result):
        counted = [run for run in numbers["repeats"] if run.get("in_flight")]
        if counted:
            found.append(littles_law(name, counted))
        if roof:
            found.append(roofline(name, numbers["repeats"], roof))
    return found


def littles_law(name, runs):
    """(sentence, whether it holds), of the repeat in which the two counts differ most."""
    run = max(runs, key=lambda run: abs(run["client_in_flight"] - run["in_flight"]))
    law = run["client_in_flight"]
    sentence = (f"{name}: {run['in_flight']:.1f} requests in flight by the server's count; "
                f"arrival rate × mean latency, by the client's log: {law:.1f}")
    return sentence, abs(law - run["in_flight"]) <= 0.15 * law + 0.5


def roofline(name, runs, roof):
    """(sentence, whether it holds), of the fastest repeat."""
    rows = 1 if name in ("sequential", "one-slot") else roof["slots"]
    limit = rows * roof["bandwidth_gb_s"] / roof["weights_gb"]
    speed = max(run["tokens_per_s"] for run in runs)
    sentence = (f"{name}: {speed:,.1f} tokens/s of at most {limit:,.0f} ({rows} rows × "
                f"{roof['bandwidth_gb_s']:.0f} GB/s ÷ {roof['weights_gb']:.2f} GB of weights)")
    return sentence, speed <= limit


FORMULAS = [
    ("tokens/s", "completion tokens of all requests, as the server reports them ÷ seconds from the "
                 "first request sent to the last token (with a steady window: inside it)"),
    ("TTFT", "request sent (open loop: due) → first token"),
    ("E2E", "request sent → last token"), ("ITL", "each gap between two tokens, all pooled"),
    ("TPOT", "(E2E − TTFT) ÷ (tokens − 1) of a request"),
    ("p50, p90, p99", "nearest rank, of the requests that ended within the time that counts; under "
                      "100 of them the last is called slowest"),
    ("goodput", "requests ÷ second that met every target"),
    ("spread", "slowest and fastest repeat; the number itself is the median"),
    ("use", "GPU: % of time that any kernel ran. CPU: % of all cores, of the server's process"),
    ("client", "CPU time of a process of Locust, % of one core; above 70 the run is flagged"),
    ("knee", "the fewest users with 90 % of the best throughput"),
    ("Little's law", "mean requests in flight = arrivals ÷ second × mean latency, both within the "
                     "time that counts"),
    ("roofline", "tokens/s ≤ rows of a step × memory bandwidth ÷ bytes of weights")]


def page(result, folder):
    """The report as one self-contained HTML page; Locust's own reports are linked from it."""
    smaller = (latency_figure, itl_figure, concurrency_figure, utilization_figure)
    return PAGE.format(
        title=html.escape(setting(result)),
        ratios=html.escape(ratios(result)).replace("\n", "<br>"),
        overview=picture(overview_figure, result), table=grid(rows(result)),
        spread=grid(every_repeat(result)),
        figures="".join(picture(draw, result) for draw in smaller),
        checks=verdicts(result),
        notes="".join(f"<li>{html.escape(line)}</li>" for line in notes(result).splitlines()),
        formulas=grid([("number", "how it is computed"), *FORMULAS]),
        links=" · ".join(links(result, folder)), facts=html.escape(" · ".join(facts(result))),
        command=html.escape(result["command"]), date=html.escape(result["date"]))


def picture(draw, result):
    """A figure as an <img> that holds its own data."""
    data = io.BytesIO()
    draw(result).savefig(data, format="png", dpi=110)
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="{draw.__doc__.splitlines()[0]}" src="data:image/png;base64,{encoded}">'


def grid(lines):
    """Lines of cells as a <table>, the first one its head."""
    head, *body = lines
    written = [grid_line(head, "th"), *(grid_line(line, "td") for line in body)]
    return f"<table>{''.join(written)}</table>"


def grid_line(cells, tag):
    inside = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
    return f"<tr>{inside}</tr>"


def every_repeat(result):
    """Header and one row an arm: each repeat's speed, and more of its latencies."""
    lines = [["arm", "repeats", "tokens/s, each", "TTFT p50 / p90 / p99", "E2E p50 / p90 / p99",
              "server, % of a core", "client, % of a core", "goodput, requests/s"]]
    for name, numbers in arms_of(result):
        runs = numbers["repeats"]
        speeds = [f"{run['tokens_per_s']:.1f}" for run in runs]
        goodputs = [str(run["goodput"]["requests_per_s"]) for run in runs if "goodput" in run]
        line = [name, str(len(runs)), ", ".join(speeds)]
        for key in ("ttft_ms", "e2e_ms"):
            quantiles = [numbers[key][q] for q in ("p50", "p90", "p99")]
            written = ["–" if ms is None else seconds(ms / 1e3) for ms in quantiles]
            line.append(" / ".join(written) + " s")
        for key in ("server_cpu", "client_cpu"):
            line.append("–" if numbers[key] is None else f"{numbers[key]:.0f}")
        line.append(", ".join(goodputs) or "–")
        lines.append(line)
    return lines


def verdicts(result):
    """The cross-checks as <li>; one that does not hold is flagged."""
    items = []
    for sentence, holds in checks(result):
        mark = "✓" if holds else "<b>✗ flagged:</b>"
        items.append(f"<li>{mark} {html.escape(sentence)}</li>")
    return "".join(items) or "<li>no data for them in this run</li>"


def links(result, folder):
    """Links to Locust's reports that lie in the folder."""
    return [f'<a href="{name}-1.html">{name}</a>' for name, _ in arms_of(result)
            if (folder / f"{name}-1.html").exists()]


def facts(result):
    """Workload and versions, a phrase each."""
    return [*(f"{key}: {value}" for key, value in result["workload"].items()),
            *(f"{key} {value}" for key, value in result["versions"].items())]


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem}}
img{{max-width:100%;display:block;margin:1rem 0}} table{{border-collapse:collapse;margin:1rem 0}}
td,th{{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:left}}
small{{color:#555}} code{{background:#f3f3f3;padding:0 .3em}}</style>
<h1>Load test</h1><p>{title}</p><p><b>{ratios}</b></p>{overview}{table}
<h2>Every repeat</h2>{spread}<h2>Latency, gaps, users, use of the device</h2>{figures}
<h2>Cross-checks</h2><ul>{checks}{notes}</ul><h2>How each number is computed</h2>{formulas}
<h2>Locust's own reports, side by side</h2><p>{links}</p>
<h2>What was measured</h2><p><small>{facts}</small></p><p><code>{command}</code> {date}</p></html>
"""


FIGURES = {"-throughput": throughput_figure, "-latency": latency_figure,
           "-utilization": utilization_figure, "-concurrency": concurrency_figure,
           "-itl": itl_figure, "": overview_figure}


def save_figures(result, out, stem):
    """Write every picture that there is data for as `out`/`stem`….png: list[Path]."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    without = set()
    if not result.get("sweep"):
        without.add("-concurrency")
    if not all("itl_histogram" in numbers for _, numbers in arms_of(result)):
        without.add("-itl")
    paths = []
    for end, draw in FIGURES.items():
        if end not in without:
            path = out / f"{stem}{end}.png"
            draw(result).savefig(path)
            paths.append(path)
    return paths


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.report",
                                     description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of bench.compare")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="folder for the PNGs")
    options = parser.parse_args(arguments)
    for path in options.results:
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            print(f"error: cannot read {path}: {error}", file=sys.stderr)
            return 1
        for picture in save_figures(result, options.out, path.stem):
            print(picture)
        (options.out / f"{path.stem}.html").write_text(page(result, path.parent), encoding="utf-8")
        print(options.out / f"{path.stem}.html")
        print(table(result))
    return 0


if __name__ == "__main__":
    plt.switch_backend("Agg")
    sys.exit(main())

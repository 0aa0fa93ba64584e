"""Draw the committed figures and write the pages' numbers, all from figures/data/*.json."""
import json
import re
import statistics

import matplotlib

from bench import busy, ladder, linear, llama_cpp, pairs, prefix, report, soak
from bench.capacity import validation_table
from bench.http import event_text, http_figure, http_table
from bench.invariance import invariance_table
from bench.lines import code_lines, engine_lines, modules
from bench.offline import table
from bench.plan import capacity_figure, plan_table
from bench.results import DATA, ROOT

GPU = "h200"  # whose data is drawn beside the CPU's: its name in figures/data/


def load(name):
    """The committed data of that name as a dict; None if there is none."""
    path = DATA / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def numbers():
    """bench.compare's results: a table, the ratios and the setting for each device."""
    tables = []
    for device in ("cpu", GPU):
        result = load(f"compare-{device}")
        if result:
            tables.append(comparison(result))
    if len(tables) > 1:  # the first one's figure stands above the block
        tables[1] = f"![The same on a GPU](figures/compare-{GPU}.png)\n\n{tables[1]}"
    return "\n\n".join(tables)


def beside_text():
    """On what kind of machine the GPU's numbers were measured."""
    found = load(f"beside-{GPU}")
    return (f"The GPU's numbers are of one {found['hardware']} of a machine with two or four, and "
            "of 16 of its cores. The others were at work on other measurements of this page, each "
            f"with cores of its own. That changed nothing we could see: {found['alone']:,.0f} "
            f"tokens/s at 64 slots alone on a machine with four, {min(found['beside']):,.0f} to "
            f"{max(found['beside']):,.0f} in {len(found['beside'])} runs beside the three others "
            f"(`{found['command']}`).")


def headline_text():
    """The arms on a CPU in a short table, and one line on the GPU."""
    cpu = load("compare-cpu")
    gpu = load(f"compare-{GPU}")
    lines = ["| 50 users | tokens/s | first token, median | whole answer, median |",
             "|---|---:|---:|---:|"]
    for name, arm in report.arms_of(cpu):
        lines.append(f"| {name} | {arm['tokens_per_s']:.0f} | {arm['ttft_ms']['p50'] / 1000:.1f} s "
                     f"| {arm['e2e_ms']['p50'] / 1000:.1f} s |")
    speeds = {name: arm["tokens_per_s"] for name, arm in report.arms_of(gpu)}
    best = speeds["continuous"]
    on_gpu = f"{gpu['model']} on {gpu['hardware']}"
    lines += ["", f"{cpu['model']} on {cpu['hardware']}. And {on_gpu}: {best:,.0f} tokens/s, "
              f"{best / speeds['one-slot']:.1f} times the same engine with one slot, "
              f"{best / speeds['sequential']:.0f} times `generate()`."]
    return "\n".join(lines)


def comparison(result):
    """Table, ratios, setting, spread, knee and cross-checks of one comparison."""
    protocol = result["workload"]["protocol"]
    repeats = result["workload"]["repeats"]
    spreads = []
    for name, arm in report.arms_of(result):
        speeds = [run["tokens_per_s"] for run in arm["repeats"]]
        if speeds:
            spreads.append(f"{name} {min(speeds):.1f}–{max(speeds):.1f}")
    ratios = ", ".join(report.ratios(result).splitlines())
    notes = "; ".join(report.notes(result).splitlines())
    lines = [f"{ratios}. {report.setting(result)}, {protocol}, median of {repeats} runs "
             f"(tokens/s: {'; '.join(spreads)}), `{result['command']}`, raw data in "
             f"`figures/data/`. Greedy: {notes}."]
    held = report.checks(result)
    if held:
        lines.append(f"Cross-checks (Little's law, roofline): {sum(ok for _, ok in held)} of "
                     f"{len(held)} hold.")
    if result.get("sweep"):
        lines.append(f"The knee of continuous batching is at {report.knee(result['sweep'])} users.")
    return "\n".join([report.table(result), "", " ".join(lines)])


ENGINE_FILES = {
    "sequence": "a request with its own queue of tokens; the loop that every engine shares",
    "batch": "KV slots, one forward pass for many sequences; static batching",
    "scheduler": "evict, admit, prefill, decode, deliver: continuous batching"}


def engine_text():
    """The three files that are the engine, with their lines of code."""
    lines = ["| file | what is inside | lines of code |", "|---|---|---:|"]
    for name, what in ENGINE_FILES.items():
        count = code_lines(modules("cbserver")[f"cbserver.{name}"].read_text(encoding="utf-8"))
        lines.append(f"| [`cbserver/{name}.py`](cbserver/{name}.py) | {what} | {count} |")
    classes = engine_lines()
    names = ", ".join(f"`{name}` {count}" for name, count in classes.items())
    lines += ["", f"Its five classes have {sum(classes.values())} lines: {names}. The rest of the "
              "files are imports, errors, and the two engines that exist to be compared."]
    return "\n".join(lines)


def invariance_text():
    """How many answers are the same at any load."""
    result = load(f"invariance-{GPU}")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n".join([invariance_table(result), "", f"{result['model']} on {result['hardware']}, "
                      f"{versions}, `{result['command']}`. *Fixed*: all {result['slots']} slots in "
                      "every pass, as the server does it. *Padded*: only the rows in use, padded "
                      "to the next of a few sizes."])


def cpu_text():
    """What a CPU's passes cost, before and after weights were packed, and beside a peer."""
    ways, compared, paused, peer = (load(name) for name in (
        "linear-cpu", "pairs-packed-cpu", "pairs-stall-cpu", "llama-cpp-cpu"))
    said = [linear.table(ways), "",
            f"All Linear layers of {ways['model']} ({ways['megabytes']} MB in float32) on "
            f"{ways['hardware']}, {versions_of(ways)}, `{ways['command']}`.", "",
            pairs.table(compared), "",
            f"smollm2 on {compared['hardware']}, {versions_of(compared)}, pairs of fresh processes "
            f"in turn; before is commit {compared['old'][:7]}: `{compared['command']}`.", "",
            pairs.table(paused), "", f"The same, `{paused['command']}`.", "",
            llama_cpp.table(peer), "",
            f"The same weights on {peer['hardware']}, {versions_of(peer)}, llama.cpp "
            f"{peer['llama.cpp']}; prompts and outputs of "
            f"{' and '.join(f'{a} and {b}' for a, b in peer['lengths'])} tokens: "
            f"`{peer['command']}`."]
    return "\n".join(said)


def versions_of(result):
    return ", ".join(f"{name} {version}" for name, version in result["versions"].items())


def busy_text():
    """What other work on the machine costs the CPU engine."""
    result = load("busy-cpu")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n".join([busy.table(result), "", f"Median (slowest to quickest run) of the engine "
                      f"alone with {result['slots']} streams, {result['model']} on "
                      f"{result['hardware']}, {versions}, `{result['command']}`."])


def models_text():
    """Which kinds of models are served."""
    result = load("models")
    said = {"fused": "exact, and fused by the fast step", "plain": "exact",
            "refused": "refused at load, with one sentence",
            "not built": "not tried: no tiny one could be made"}
    lines = ["| in company, with default settings and made-up weights | of them | types |",
             "| --- | ---: | --- |"]
    for what, words in said.items():
        names = [row["model"] for row in result["rows"] if row["what"] == what]
        shown = ", ".join(names) if what in ("fused", "plain") else ""
        lines.append(f"| {words} | {len(names)} | {shown} |")
    return "\n".join([*lines, "", f"transformers {result['versions']['transformers']}, "
                      f"`{result['command']}`."])


def ladder_text():
    """bench.offline's results: a figure, a table and the setting for each device."""
    parts = []
    for device in (GPU, "cpu"):
        name = f"offline-{device}"
        result = load(name)
        if result:
            parts += [f"![Tokens per second of each rung](figures/{name}.png)", "",
                      table(result), "", setting(result), *more_text(device), ""]
    guesses = ", ".join(f"{arm} {speed:,.0f}"
                        for arm, speed in ladder.predict(load(f"offline-{GPU}")).items())
    parts.append(f"A prediction, not a measurement: on a T4 (320 GB/s) the same model of a step "
                 f"gives, in tokens/s at 16 slots, {guesses}; check it there with "
                 f"`{ladder.COMMAND}`.")
    return "\n".join(parts)


def http_text():
    """What HTTP costs: with a real model on a GPU, and with none on a CPU."""
    real = load(f"http-{GPU}")
    versions = ", ".join(f"{name} {version}" for name, version in real["versions"].items())
    commands = "; ".join(f"{name}: `{command}`" for name, command in real["commands"].items())
    repeats = 1 + max(row["repeat"] for row in real["rows"])
    return "\n\n".join([
        f"![Tokens per second of each way of serving](figures/http-{GPU}.png)", http_table(real),
        f"{real['model']} on {real['hardware']}, prompts and outputs of 16 to 256 tokens, raw "
        f"clients in four processes, closed loop, medians of {repeats} fresh servers with "
        f"{real['date']}'s versions: {versions}. {real.get('note', '')} {commands}.",
        processes_text(load(f"http-processes-{GPU}")), event_text(load("http-cpu"))])


def processes_text(result):
    """How many processes it takes until an event holds one token."""
    found = []
    for name in result["commands"]:
        rows = [row for row in result["rows"] if row["name"] == name]
        speed, tokens = (statistics.median(row[key] for row in rows)
                         for key in ("tokens_per_s", "tokens_per_event"))
        found.append(f"{name} give {speed:,.0f} tokens/s and {tokens:.2f} tokens an event")
    runs = 1 + max(row["repeat"] for row in result["rows"])
    return (f"A process that cannot keep up puts several tokens into one event. On another machine "
            f"of the same kind, {result['rows'][0]['streams']} users, {runs} fresh servers each: "
            f"{'; '.join(found)} ({', '.join(f'`{c}`' for c in result['commands'].values())}).")


def prefix_results():
    """bench.prefix's results, a CPU's first."""
    return [result for result in (load("prefix-cpu"), load(f"prefix-{GPU}")) if result]


def prefix_text():
    """What prefix reuse brings to conversations."""
    return "\n\n".join(["![TTFT of each turn, with and without](figures/prefix.png)",
                        *[prefix.table(result) for result in prefix_results()]])


def imitation_text():
    """The lessons on an imitation of a T4."""
    result = load("lessons-t4-imitation")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = ["| lesson | seconds | GiB of GPU memory, at most |", "|---|---:|---:|"]
    lines += [f"| {row['lesson']} | {row['seconds']} | {row['peak_gib']} |"
              for row in result["lessons"]]
    return "\n".join([*lines, "", f"{result['model']}, {versions}, {result['date']}."])


def soak_text():
    """How a long load went."""
    picture = "![Memory and latency over time](figures/soak-cpu.png)"
    return f"{soak_sentence(load('soak-cpu'))}\n\n{picture}"


def soak_sentence(result):
    found = result["verdict"]
    rss_before, rss_after = found["rss_mb"]
    gap_before, gap_after = found["itl_p50_ms"]
    return (f"A soak (`{result['command']}`), first against last third: memory {rss_before:,.0f} "
            f"and {rss_after:,.0f} MB, gap between tokens {gap_before:.0f} and {gap_after:.0f} "
            f"ms, {found['requests']:,} requests, {found['failures']} failures, every fifth "
            f"client gone before its end. {result.get('note', '')}").rstrip()


def guidellm_text():
    """How far load.run and guidellm are apart."""
    found = load("clients")["clients"]["agreement"]
    parts = []
    for server in ("planted delays", "cbserver"):
        off = found[server]["load.run against guidellm, %"]
        ours = found[server]["load.run"]["client_cpu_s"]
        theirs = found[server]["guidellm"]["client_cpu_s"]
        names = ", ".join(f"{name.removesuffix('_ms').replace('_per_s', '/s')} {percent:+.1f} %"
                          for name, percent in off.items())
        parts.append(f"{server}: {names} (CPU seconds {ours:.0f} and {theirs:.0f})")
    return (f"load.run against guidellm, {found['load']} (`make test-clients`): "
            f"{'; '.join(parts)}. {found['why they differ']}")


def feed_text():
    """What the live page costs."""
    found = load("overhead-cpu")
    if not found or "feed" not in found:
        return ""
    feed = found["feed"]
    speed = feed["tokens_per_s"]
    low, high = speed["interval"]
    return (f"{found['viewers']} open pages take {feed['share_of_a_core']:.1%} of a core of a "
            f"server whose {found['slots']} slots are full and held still (its CPU time, "
            f"{len(feed['held']) // 2} stretches of 10 s with and without, {found['hardware']}). "
            f"With {feed['model']} at work on a core of its own they change tokens/s by "
            f"{speed['median'] - 1:+.1%} (median of {speed['pairs']} pairs of neighbouring "
            f"stretches, 95% interval {low - 1:+.1%} to {high - 1:+.1%}; "
            f"`{found['command']} feed`). {feed.get('note', '')}").rstrip()


def ray_text():
    """What a Ray replica costs."""
    found = load("overhead-cpu")
    if not found:
        return ""
    parts = [ray_sentence(model, runs) for model, runs in found["models"].items()]
    return (f"One replica on Ray {found['versions']['ray']} against bare uvicorn, {found['users']} "
            f"users, {found['slots']} slots, {found['hardware']}, fresh processes, 3 runs each: "
            f"{'; '.join(parts)}. Ray's own processes share the cores here, and random:tiny, a "
            "step of a few milliseconds, shows the worst case.")


def ray_sentence(model, runs):
    """One model's speed and TTFT, on Ray and bare."""
    def median(name, server):
        return statistics.median(row[name] for row in runs["ray_runs"] if row["server"] == server)

    low, high = runs["ray"]["spread"]
    return (f"{model}: {median('tokens_per_s', 'ray'):,.0f} tokens/s against "
            f"{median('tokens_per_s', 'uvicorn'):,.0f} ({runs['ray']['median']:.0%}; {low:.0%} to "
            f"{high:.0%}), TTFT p50 {median('ttft_p50_ms', 'ray'):,.0f} ms against "
            f"{median('ttft_p50_ms', 'uvicorn'):,.0f} ms")


def capacity_text():
    """The check of the simulation and the plan."""
    parts = []
    timed = []
    for device in ("cpu", GPU):
        result = load(f"capacity-{device}")
        if not result:
            continue
        parts += [check_sentence(result), validation_table(result)]
        if "note" in result:
            parts.append(result["note"])
        if "plan" in result:
            parts += [f"![TTFT measured, simulated and planned](figures/capacity-{device}.png)",
                      plan_sentence(result["plan"]), plan_table(result)]
            count, seconds = result["plan"]["timed"]
            timed.append(f"{count:,} requests of {result['model']} in {seconds:.0f} s")
    if timed:
        parts.append("*In turn*: first come, next replica. *Two choices*: the emptier of two drawn "
                     "at random, as Ray Serve does. *Least loaded*: the fewest requests in flight "
                     f"of all. Simulated were {' and '.join(timed)}.")
    return "\n\n".join(parts)


def check_sentence(result):
    repeats = 1 + max(row["repeat"] for row in result["loads"])
    return (f"{result['model']} on {result['hardware']}, {result['slots']} slots, users who think "
            f"{result['think_s']:g} s on average, medians of {repeats} fresh servers "
            f"(`{result['command']}`). Off is the median of the runs' own ratios, since each run "
            "has requests of its own:")


def plan_sentence(plan):
    return (f"Replicas of this server that keep TTFT p99 under {plan['target_ms']:,.0f} ms for "
            f"users who think {plan['think_s']:g} s. None is given more than "
            f"{plan['checked_tokens_per_s']:,.0f} tokens/s, the heaviest load above at which the "
            f"simulation was right (tokens/s to 10 %, TTFT p99 to 20 %) (`{plan['command']}`):")


def more_text(device):
    """Sentences on two more runs: lengths as in chats, and all arms in float32."""
    chat = load(f"offline-{device}-chat")
    if chat:
        rows = ", ".join(f"{row['arm']} at {row['slots']} slots {row['tokens_per_s']:,.0f} "
                         f"tokens/s ({repeats(row)})" for row in chat["rows"])
        yield ("With lengths as in chats, and every 32nd prompt of 2,000 to 4,000 tokens: "
               f"{rows}.")
    exact = load(f"offline-{device}-float32")
    if exact:
        counts = {f"{same['whole']} of {same['compared']}" for same in exact["same_tokens"]}
        yield (f"In float32, answers of {exact['workload']['short']} tokens that equal "
               f"generate()'s: {' or '.join(sorted(counts))} in each of the "
               f"{len(exact['same_tokens'])} other arms measured.")


def repeats(row):
    count = len(row["repeats"])
    return "1 repeat" if count == 1 else f"{count} repeats"


def setting(result):
    """Hardware, versions, commands, what is missing, and what a long prompt does."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts = [f"{ladder.setting(result)}; {versions}; medians of fresh processes."]
    if "note" in result:
        parts.append(result["note"])
    stall = result.get("stall", {})
    if len(stall) == 2:
        paced, at_once = stall.values()
        parts.append(f"A prompt of {paced['prompt_tokens']:,} tokens that arrives among 15 running "
                     f"streams makes their longest pause {paced['worst_gap_ms']:,.0f} ms at "
                     f"{paced['prefill_budget']:,} tokens a step, {at_once['worst_gap_ms']:,.0f} "
                     f"ms if it is read at once (usually {paced['usual_gap_ms']:,.1f} ms).")
    commands = "; ".join(f"`{command}`" for command in result["commands"])
    parts.append(f"Commands: {commands}.")
    return " ".join(parts)


def filled(page, name, text):
    """`page` with the text between the two markers of that name replaced."""
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    return marked.sub(lambda found: f"{found[1]}{text}\n{found[2]}", page)


# The generated blocks of each page, and who writes them.
PAGES = {
    "README.md": {"headline": headline_text, "engine": engine_text},
    "docs/benchmarks.md": {"beside": beside_text, "numbers": numbers, "ladder": ladder_text,
                           "cpu": cpu_text,
                           "http": http_text, "invariance": invariance_text,
                           "prefix": prefix_text, "imitation": imitation_text},
    "docs/load-testing.md": {"guidellm": guidellm_text},
    "docs/operating.md": {"busy": busy_text, "soak": soak_text, "models": models_text},
    "docs/live-page.md": {"feed": feed_text},
    "docs/scaling.md": {"ray": ray_text, "capacity": capacity_text}}


def block(page, name):
    """The text of one block of a page, its links as that page needs them."""
    text = PAGES[page][name]()
    up = "../" * page.count("/")
    return text.replace("](figures/", f"]({up}figures/")


def save(figure, name):
    """A figure of matplotlib, as a committed PNG."""
    path = ROOT / "figures" / f"{name}.png"
    figure.savefig(path)
    print(path.relative_to(ROOT))


def draw():
    """Every figure whose data is committed."""
    for path in sorted(DATA.glob("compare-*.json")):
        result = load(path.stem)
        for figure in report.save_figures(result, ROOT / "figures", path.stem):
            print(figure.relative_to(ROOT))
    for path in sorted(DATA.glob("offline-*.json")):
        if path.stem.count("-") == 1:  # the others are told in a sentence
            save(ladder.ladder_figure(load(path.stem)), path.stem)
    save(http_figure(load(f"http-{GPU}")), f"http-{GPU}")
    save(prefix.figure(prefix_results()), "prefix")
    soaked = load("soak-cpu")
    if soaked:
        save(soak.soak_figure(soaked), "soak-cpu")
    for path in sorted(DATA.glob("capacity-*.json")):
        save(capacity_figure(load(path.stem)), path.stem)


def main():
    matplotlib.use("Agg")
    draw()
    for page, blocks in PAGES.items():
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        for name in blocks:
            text = filled(text, name, block(page, name))
        path.write_text(text, encoding="utf-8")
        print(page)


if __name__ == "__main__":
    main()

"""What prefix reuse brings to conversations, and that it costs nothing where nothing is shared.

    python -m bench.prefix --model smollm2 --repeats 3 --pairs 5 --out figures/data/prefix-cpu.json

Two servers in turn, one with and one without, each fresh: conversations of six turns over one
system prompt, as many at once as there are slots (`load.run --workload chat-turns`). Then pairs of
such servers under the workload `mixed`, whose prompts share nothing.

With --alone the same without HTTP, in token ids, for models whose tokenizer is made up: fresh
processes, each with the engine that the server would have.
"""
import argparse
import asyncio
import datetime
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from bench.arms import run_child
from bench.results import command_line, hardware, order, versions, write_json
from cbserver.metrics import percentile
from load.process import ServerProcess, first_model, http, python_module, warm_up
from load.run import exit_with, run_load
from load.workload import TURNS, token_workload, vocabulary

ARMS = {"without": "--no-prefix-reuse", "with reuse": "--prefix-reuse"}


def served(arm, options, workload, requests, say):
    """One fresh server under one workload: (records, summary, share of prompt tokens reused)."""
    command = python_module("cbserver", "--model", options.model, "--max-batch", options.slots,
                            "--max-len", options.max_len, "--max-waiting", 4 * options.slots,
                            *options.server_args.split(), ARMS[arm])
    with tempfile.TemporaryDirectory() as folder, ServerProcess(
            command, f"{folder}/server.log", say=say) as server:
        model = first_model(server.url)
        warm_up(server.url, model)
        before = counters(server.url)
        result = run_load(server.url, folder, users=options.slots, spawn_rate=1000, model=model,
                          workload=workload, requests=requests, seed=options.seed,
                          processes=options.processes)
        after = counters(server.url)
    queries, hits = (b - a for a, b in zip(before, after))
    return result["records"], result["summary"], hits / queries


def counters(url):
    """(prompt tokens, those of them that were reused) since the server's start."""
    _, text = http(f"{url}/metrics")
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[:1] != "#")
    return [float(found[f"prefix_cache_{name}_total"]) for name in ("queries", "hits")]


def conversation_row(arm, options, say):
    """One run of the conversations. TTFT in ms: of first turns, of later ones, of each turn."""
    if options.alone:
        found = run_child(case_of(arm, options, "conversations"))
        return {"arm": arm, "failures": 0, **found}
    requests = TURNS * options.conversations
    records, summary, reused = served(arm, options, "chat-turns", requests, say)
    by_turn = [[1e3 * r.ttft for r in records if not r.error and r.index % TURNS == turn]
               for turn in range(TURNS)]
    return {"arm": arm, "failures": summary["failures"],
            **numbers(by_turn, summary["tokens_per_s"], reused)}


def numbers(by_turn, tokens_per_s, reused):
    """What a row says. by_turn: TTFT in ms, a list for each turn."""
    later = [ttft for turn in by_turn[1:] for ttft in turn]
    return {"tokens_per_s": tokens_per_s, "reused": round(reused, 3),
            "first": spread(by_turn[0]), "later": spread(later),
            "turns_p50": [round(percentile(turn, 50), 1) for turn in by_turn]}


def unshared_speed(arm, options, say):
    """Tokens/s of one run in which no prompt begins like another."""
    if options.alone:
        return run_child(case_of(arm, options, "unshared"))["tokens_per_s"]
    _, summary, _ = served(arm, options, "mixed", options.requests, say)
    return summary["tokens_per_s"]


# Without HTTP, in a process of its own


def case_of(arm, options, work):
    """A run for `bench.arms`."""
    names = ("model", "slots", "max_len", "conversations", "requests", "seed", "server_args")
    return {"arm": f"turns:{arm}", "work": work} | {name: getattr(options, name) for name in names}


def run_case(case):
    """The numbers of one run, on the engine that the server would have."""
    from cbserver import cli, process

    arm = case["arm"].removeprefix("turns:")
    arguments = ["--model", case["model"], "--max-batch", case["slots"], "--max-len",
                 case["max_len"], "--max-waiting", case["requests"] + case["slots"],
                 *case["server_args"].split(), ARMS[arm]]
    sys.setswitchinterval(5e-4)  # as the server does
    engine = process.load_engine(cli.parse(list(map(str, arguments))))
    works = {"conversations": conversations, "unshared": unshared}
    return asyncio.run(works[case["work"]](engine, case))


async def conversations(engine, case):
    """`slots` users, each with one conversation after another, over 1,000 tokens that all share."""
    by_turn = [[] for _ in range(TURNS)]
    left = iter(range(case["conversations"]))
    system = ids(random.Random(f"system {case['seed']}"), 1000, case)

    async def user():
        for number in left:
            said = system
            for turn in range(TURNS):
                rng = random.Random(f"turn {case['seed']} {number} {turn}")
                question = ids(rng, rng.randint(16, 64), case)
                sequence = await answered(engine, said + question, rng.randint(16, 96))
                by_turn[turn].append(1e3 * (sequence.token_times[0] - sequence.arrival_time))
                said = sequence.prompt_tokens + sequence.generated_tokens

    stats, seconds = await timed(engine, [user() for _ in range(case["slots"])])
    return numbers(by_turn, round(stats.num_generated_tokens / seconds, 1),
                   stats.num_cached_tokens / stats.num_prompt_tokens)


async def unshared(engine, case):
    """All requests at once, 16 to 256 tokens in and out."""
    requests = token_workload("uniform", case["requests"], case["seed"], 256,
                              vocabulary(case["model"]))
    stats, seconds = await timed(engine, [answered(engine, r.prompt_tokens, r.max_tokens)
                                          for r in requests])
    return {"tokens_per_s": round(stats.num_generated_tokens / seconds, 1)}


async def timed(engine, work):
    """(what the engine counted in it, its seconds); one request before it warms up."""
    await engine.start()
    await answered(engine, [1, 2, 3], 4)
    before = engine.stats()
    start = time.perf_counter()
    await asyncio.gather(*work)
    seconds = time.perf_counter() - start
    after = engine.stats()
    await engine.stop()
    counted = {name: getattr(after, name) - getattr(before, name)
               for name in ("num_prompt_tokens", "num_generated_tokens", "num_cached_tokens")}
    return after._replace(**counted), seconds


async def answered(engine, prompt, max_tokens):
    """The sequence of a prompt, at its end."""
    from cbserver.model.sampling import SamplingParams

    sequence = engine.submit(prompt, SamplingParams(max_tokens, ignore_eos=True))
    async for _ in sequence.stream():
        pass
    return sequence


def ids(rng, count, case):
    return [rng.randrange(vocabulary(case["model"])) for _ in range(count)]


# All runs


def spread(values):
    return {"p50": round(percentile(values, 50), 1), "p99": round(percentile(values, 99), 1)}


def measure(options):
    """Everything, on disk after each run."""
    result = {"model": options.model, "hardware": hardware(), "slots": options.slots,
              "conversations": options.conversations, "turns": TURNS, "alone": options.alone,
              "versions": versions("torch", "transformers"), "command": options.command,
              "date": datetime.date.today().isoformat(), "rows": [], "pairs": []}
    plan = order(ARMS, options.repeats)
    for number, (_, arm) in enumerate(plan, 1):
        say = labelled(f"[{number}/{len(plan)}] conversations, {arm}")
        row = conversation_row(arm, options, say)
        say(f"{row['tokens_per_s']} tokens/s; TTFT p50 {row['first']['p50']} ms in the first turn, "
            f"{row['later']['p50']} ms later, {row['reused']:.0%} reused")
        result["rows"].append(row)
        write_json(result, options.out)
    for number in range(options.pairs):
        speeds = {}
        for arm in list(ARMS) if number % 2 == 0 else list(ARMS)[::-1]:
            say = labelled(f"[pair {number + 1}/{options.pairs}] nothing shared, {arm}")
            speeds[arm] = unshared_speed(arm, options, say)
            say(f"{speeds[arm]} tokens/s")
        result["pairs"].append(speeds)
        write_json(result, options.out)
    return result


def labelled(label):
    return lambda line: print(f"{label}: {line}", flush=True)


def medians(result):
    """{arm: numbers}: the medians of its runs, in the form of a row."""
    found = {}
    for arm in ARMS:
        rows = [row for row in result["rows"] if row["arm"] == arm]

        def median(*path, rows=rows):
            values = rows
            for key in path:
                values = [value[key] for value in values]
            return statistics.median(values)

        found[arm] = {
            "tokens_per_s": median("tokens_per_s"), "reused": median("reused"),
            "failures": sum(row["failures"] for row in rows), "repeats": len(rows),
            "first": {q: median("first", q) for q in ("p50", "p99")},
            "later": {q: median("later", q) for q in ("p50", "p99")},
            "turns_p50": [median("turns_p50", turn) for turn in range(result["turns"])]}
    return found


def table(result):
    """The conversations as a Markdown table, and a sentence on where nothing is shared."""
    lines = ["| | first turn: TTFT p50, p99 | later turns: TTFT p50, p99 | tokens/s | reused |",
             "|---|---:|---:|---:|---:|"]
    for arm, row in medians(result).items():
        first, later = (f"{row[name]['p50']:,.0f}, {row[name]['p99']:,.0f} ms"
                        for name in ("first", "later"))
        lines.append(f"| {arm} | {first} | {later} | {row['tokens_per_s']:,.0f} "
                     f"| {row['reused']:.0%} |")
    what = "processes, without HTTP" if result.get("alone") else "servers"
    found = f"{result['conversations']} conversations of {result['turns']} turns, " \
            f"{result['slots']} at once on {result['slots']} slots, medians of " \
            f"{medians(result)['without']['repeats']} fresh {what}. {pairs_sentence(result)} " \
            f"{result['model']} on {result['hardware']}, `{result['command']}`."
    return "\n".join([*lines, "", found])


def pairs_sentence(result):
    """With ÷ without where nothing is shared: the median and the range of the pairs."""
    ratios = [pair["with reuse"] / pair["without"] for pair in result["pairs"]]
    if not ratios:
        return ""
    return (f"Where nothing is shared, tokens/s with ÷ without in {len(ratios)} alternating pairs: "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}).")


def figure(results):
    """TTFT of each turn, with and without: a panel for each of the results."""
    import matplotlib.pyplot as plt

    from bench.report import COLORS

    colors = {"without": "lightgray", "with reuse": COLORS["continuous"]}
    picture, panels = plt.subplots(1, len(results), figsize=(4.5 * len(results), 3.2),
                                   layout="constrained", squeeze=False)
    for axes, result in zip(panels[0], results):
        arms = medians(result)
        highest = max(max(row["turns_p50"]) for row in arms.values())
        unit, scale = ("s", 1e3) if highest >= 1000 else ("ms", 1)
        for shift, (arm, row) in zip((-0.2, 0.2), arms.items()):
            places = [turn + 1 + shift for turn in range(result["turns"])]
            axes.bar(places, [ms / scale for ms in row["turns_p50"]], 0.4, color=colors[arm],
                     label=arm)
        axes.set(xlabel="turn of the conversation", ylabel=f"TTFT p50 ({unit})",
                 xticks=range(1, result["turns"] + 1),
                 title=f"{result['model']}, {result['slots']} at once")
        axes.grid(axis="x", visible=False)
        axes.legend()
    return picture


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m bench.prefix",
                                     description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default="smollm2")
    add("--slots", type=int, default=16, help="and users (16)")
    add("--max-len", type=int, default=2048)
    add("--conversations", type=int, default=16, help="of six turns each (16)")
    add("--requests", type=int, default=64, help="of a run where nothing is shared (64)")
    add("--repeats", type=int, default=3)
    add("--pairs", type=int, default=5)
    add("--processes", type=int, default=1, help="of Locust (1)")
    add("--seed", type=int, default=0)
    add("--alone", action="store_true", help="without HTTP, in token ids")
    add("--server-args", default="", help="more options for the servers, as one string")
    add("--out", type=Path, default=Path("figures/latest/prefix.json"))
    options = parser.parse_args(arguments)
    options.command = command_line("bench.prefix", arguments)
    return options


def main(arguments=None):
    options = parse(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    return exit_with(lambda: print(table(measure(options))))


if __name__ == "__main__":
    sys.exit(main())

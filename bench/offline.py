"""Measure engines without HTTP: every arm in a fresh process, through `submit()` and `stream()`.

One more arm, `http`, is the best of them behind the server, with 50 users or more: what HTTP costs.

    python -m bench.offline --slots 16,64 --repeats 3 --out figures/data/offline-h200.json
"""
import argparse
import datetime
import importlib.util
import json
import os
import re
import statistics
import sys
from pathlib import Path

from bench import machine
from bench.arms import run_child
from bench.results import command_line, first_gpu, hardware, order, versions, write_json
from load.process import LoadFailed
from load.workload import vocabulary

# The ladder, a rung a row. An arm runs the first `requests` of the list: the slow ones fewer.
GPU_ARMS = {"generate": 16, "static": 64, "continuous": 64, "continuous+graphs": 256,
            "continuous+graphs+fused": 256, "continuous+graphs+fused+kernel": 256, "http": 256,
            "one-slot": 32, "transformers-cb": 128, "vllm": 256}
CPU_ARMS = {"generate": 16, "static": 64, "continuous": 160, "continuous+fused": 160,
            "http": 160, "one-slot": 16, "transformers-cb": 160}
SINGLE = ("generate", "one-slot")  # one request at a time, whatever --slots says


def measure(options):
    """Run what is missing of every (arm, slots) × repeat; the result, on disk after each run."""
    result = begin(options)
    plan = order(cases(options), options.repeats)
    for number, (repeat, case) in enumerate(plan, 1):
        row = find_row(result, case)
        if len(row["repeats"]) > repeat:
            continue

        def say(line, label=f"[{number}/{len(plan)}] {name_of(case)}, repeat {repeat + 1}"):
            print(f"{label}: {line}", flush=True)

        say("starting")
        try:
            run = run_child(case, say=say)
        except LoadFailed as error:
            say(error)
            result.setdefault("failed", {})[name_of(case)] = str(error)[:400]
            continue
        say(f"{run['tokens_per_s']:.0f} tokens/s, warm-up {run['warmup_s']} s")
        add_run(row, run)
        result["same_tokens"] = same_tokens(result["rows"])
        save(result, options)
    if options.stall:
        measure_stall(result, options)
    return result


def add_run(row, run):
    """One more repeat; the answers of the first stand for all."""
    found = run.pop("digests")
    if not row.get("digests"):
        row["digests"] = found
    row["repeats"].append(run)
    row.update(summary(row["repeats"]))


def measure_stall(result, options):
    """What a long prompt does to running streams, read by the budget and in one step."""
    arm = "continuous+graphs+fused+kernel" if options.gpu else "continuous"
    first = next(iter(cases(options)))
    result["stall"] = {}
    for name, budget in (("by the budget", options.prefill_budget), ("in one step", 8192)):
        print(f"a long prompt, {name}: starting", flush=True)
        run = run_child(first | {"arm": f"stall:{arm}", "prefill_budget": budget})
        result["stall"][name] = run
        print(f"a long prompt, {name}: {run}", flush=True)
        save(result, options)


def save(result, options):
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(result, options.out)


def begin(options):
    """The result so far: what is on disk, if it was measured the same way, or an empty one."""
    setting = {"hardware": hardware(), "model": options.model,
               "dtype": options.dtype or dtype_name(options.gpu),
               "versions": versions("torch", "transformers", "vllm"),
               "workload": {"name": options.workload, "seed": options.seed,
                            "longest": options.longest, "short": options.short}}
    if options.out.exists() and not options.fresh:
        before = json.loads(options.out.read_text(encoding="utf-8"))
        if any(before.get(key) != value for key, value in setting.items()):
            raise LoadFailed(f"{options.out} was measured with another setting: "
                             "choose another --out, or start anew with --fresh.")
        if options.command not in before["commands"]:
            before["commands"].append(options.command)
        return before
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return setting | {"commands": [options.command], "date": now, "rows": []}


def dtype_name(gpu):
    """The name of the dtype that load_model takes on this device."""
    import torch

    from cbserver.model.load import default_dtype

    device = torch.device("cuda" if gpu else "cpu")
    return str(default_dtype(device)).removeprefix("torch.")


def cases(options):
    """One dict for each (arm, slots), with all that its process needs to know."""
    common = {"model": options.model, "dtype": options.dtype, "workload": options.workload,
              "seed": options.seed, "longest": options.longest, "short": options.short,
              "prefill_budget": options.prefill_budget, "vocab": options.vocab,
              "max_len": options.max_len}
    every = GPU_ARMS if options.gpu else CPU_ARMS
    for arm in options.arms:
        requests = every[arm]
        if options.requests:
            requests = min(requests, options.requests)
        for slots in [1] if arm in SINGLE else options.slots:
            yield common | {"arm": arm, "slots": slots, "requests": requests}


def name_of(case):
    return f"{case['arm']}, {case['slots']} slots"


def find_row(result, case):
    """The result's row for this case; a new one at the end if there is none."""
    for row in result["rows"]:
        if (row["arm"], row["slots"]) == (case["arm"], case["slots"]):
            return row
    row = {"arm": case["arm"], "slots": case["slots"], "repeats": []}
    result["rows"].append(row)
    return row


def summary(repeats):
    """A row's medians over its repeats, and the spread of its speed."""
    speeds = [run["tokens_per_s"] for run in repeats]
    row = {"tokens_per_s": statistics.median(speeds), "spread": [min(speeds), max(speeds)],
           "requests": repeats[0]["requests"], "tokens": repeats[0]["tokens"]}
    for key in ("step_ms", "step_floor_ms", "step_gb_s", "step_bandwidth_percent", "bandwidth_gb_s",
                "warmup_s", "peak_memory_gb"):
        values = [run[key] for run in repeats if key in run]
        if values:
            row[key] = round(statistics.median(values), 3)
    return row


def same_tokens(rows):
    """How many answers equal those of the first row: of their first 16 tokens, and whole."""
    rows = [row for row in rows if row.get("digests")]
    if not rows:
        return []
    first, *others = rows
    counts = []
    for row in others:
        same = {"arm": row["arm"], "slots": row["slots"], "as": first["arm"]}
        for part, ours in row["digests"].items():
            pairs = list(zip(first["digests"].get(part, []), ours))
            same[part] = sum(a == b for a, b in pairs)
            same["compared"] = len(pairs)
        counts.append(same)
    return counts


HEADER = ("arm", "slots", "tokens/s", "spread", "repeats", "requests", "tokens", "step ms",
          "floor ms", "× floor", "of bandwidth", "warm-up s", "memory GB")


def table(result):
    """The ladder as a Markdown table."""
    climb = list(CPU_ARMS | GPU_ARMS)

    def place(row):
        return row["slots"], climb.index(row["arm"])

    rows = sorted((row for row in result["rows"] if row["repeats"]), key=place)
    lines = [markdown(HEADER), "| --- " + "| ---: " * (len(HEADER) - 1) + "|"]
    lines += [markdown(cells(row)) for row in rows]
    return "\n".join(lines)


def markdown(words):
    return f"| {' | '.join(words)} |"


def cells(row):
    """A row of the table: list[str]; what was not measured is empty."""
    low, high = row["spread"]
    written = [row["arm"], str(row["slots"]), f"{row['tokens_per_s']:,.0f}",
               f"{low:,.0f}–{high:,.0f}", str(len(row["repeats"])), str(row["requests"]),
               f"{row['tokens']:,}"]
    if "step_ms" in row:
        written += [f"{row['step_ms']:.2f}", f"{row['step_floor_ms']:.2f}",
                    f"{row['step_ms'] / row['step_floor_ms']:.2f}",
                    f"{row['step_bandwidth_percent']:.0f} %"]
    else:
        written += [""] * 4
    for key in ("warmup_s", "peak_memory_gb"):
        written.append(f"{row[key]:.1f}" if key in row else "")
    return written


def parse(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.offline",
                                     description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", help="as for cbserver (random:llama-3.2-1b on a GPU, else smollm2)")
    add("--arms", help=f"any of {', '.join(CPU_ARMS | GPU_ARMS)} (default: all the device has)")
    add("--slots", help="sequences at once, a list (16,64 on a GPU, else 16)")
    add("--repeats", type=int, default=3, help="fresh processes for each arm (3)")
    add("--requests", type=int, help="at most so many for every arm (16 to 256, by its speed)")
    add("--workload", default="uniform", help="uniform or chat (uniform)")
    add("--seed", type=int, default=0, help="of the workload (0)")
    add("--longest", type=int, help="longest prompt and output, uniform (256 on a GPU, else 128)")
    add("--short", type=int, help="cut outputs to this many tokens, to compare them")
    add("--dtype", help="float32, float16 or bfloat16 (the device's default)")
    add("--prefill-budget", type=int, help="prompt tokens read in a step (as the engine does)")
    add("--stall", action="store_true", help="also what a long prompt does to running streams")
    add("--with-vllm", action="store_true", help="add vLLM, if it is installed")
    add("--fresh", action="store_true", help="forget what --out already holds")
    add("--report", action="store_true",
        help="a short run, and a report of this machine to paste back (minutes)")
    add("--out", type=Path, help="figures/data/offline-DEVICE.json")
    options = parser.parse_args(arguments)
    options.command = command_line("bench.offline", arguments)
    fill_in(options, parser)
    return options


def fill_in(options, parser):
    """Defaults by device, and the lists as lists."""
    gpu = first_gpu() is not None
    options.gpu = gpu
    if not options.model:
        options.model = ("random:llama-3.2-1b" if gpu else
                         os.environ.get("CBSERVER_MODEL", "smollm2"))
    slots = options.slots or ("16,64" if gpu else "16")
    options.slots = [int(number) for number in slots.split(",")]
    options.longest = options.longest or (256 if gpu else 128)
    options.max_len = 4608 if options.workload == "chat" else 2 * options.longest
    options.vocab = vocabulary(options.model)
    if options.report:
        options.arms = options.arms or ",".join(machine.ARMS[gpu])
        options.slots = options.slots[:1]
        options.requests = options.requests or 16
        options.repeats = 1
        options.fresh = True
        options.out = options.out or Path("figures/latest/report.json")
    every = GPU_ARMS if gpu else CPU_ARMS
    if options.arms:
        options.arms = options.arms.split(",")
    else:
        options.arms = [arm for arm in every if arm != "vllm"]
    for arm in options.arms:
        if arm not in every:
            parser.error(f"no arm {arm!r} on this device; there are {', '.join(every)}")
    if options.with_vllm:
        if importlib.util.find_spec("vllm") is None:
            print("vLLM is not installed here, so its row is left out: pip install vllm.",
                  flush=True)
        else:
            options.arms.append("vllm")
    if options.out is None:
        options.out = Path(f"figures/data/offline-{short_name(hardware()) if gpu else 'cpu'}.json")


def short_name(gpu):
    """`h200` of `NVIDIA H200`, `t4` of `Tesla T4`: a name for files."""
    found = re.search(r"\b[A-Z]+\d+\b", gpu)
    return found[0].lower() if found else "gpu"


def main(arguments=None):
    options = parse(arguments)
    try:
        result = measure(options)
    except (LoadFailed, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.report:
        print(f"\nPlease paste these lines back:\n\n{machine.report(result, options)}")
        return 0
    print("\n" + table(result) + "\n")
    for same in result.get("same_tokens", []):
        print(f"{same['arm']}, {same['slots']} slots: {same['whole']} of {same['compared']} "
              f"answers as {same['as']} (by their first 16 tokens "
              f"{same.get('first 16 tokens', '?')})")
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What load.offline measured: a figure, and a prediction for a card that is not here."""
import matplotlib.pyplot as plt

from load.report import STYLE

# A hue for each way to run a step; `continuous` keeps the colour it has in every figure.
LADDER = {"generate": "#E69F00", "one-slot": "#CC79A7", "transformers-cb": "#999999",
          "static": "#56B4E9", "continuous": "#0072B2", "continuous+graphs": "#009E73",
          "continuous+graphs+compile": "#D55E00", "vllm": "#000000"}
NAMES = {"generate": "generate(), one at a time", "one-slot": "our engine, one slot",
         "transformers-cb": "transformers' continuous batching", "static": "static batching",
         "continuous": "continuous batching", "continuous+graphs": "… + CUDA graphs",
         "continuous+graphs+compile": "… + compiled functions, kernel", "vllm": "vLLM"}
T4 = {"name": "T4", "gb_s": 320, "tflops": 65 * 0.4}  # data sheet; 40 % of peak for prompts
COMMAND = ("python -m load.offline --model random:llama-3.2-1b --slots 16 "
           "--arms continuous+graphs,continuous+graphs+compile --out figures/data/offline-t4.json")


def rungs(result, slots):
    """The rows with this many slots (and those that take one request at a time), as climbed."""
    wanted = [row for row in result["rows"] if row["repeats"] and
              (row["slots"] == slots or row["arm"] in ("generate", "one-slot"))]
    return sorted(wanted, key=lambda row: list(LADDER).index(row["arm"]))


def ladder_figure(result):
    """Tokens/s of every arm as bars, a panel for each number of slots; whiskers: all repeats."""
    sizes = sorted({row["slots"] for row in result["rows"]} - {1})
    with plt.rc_context(STYLE):
        height = 1.3 + 0.42 * max(len(rungs(result, n)) for n in sizes)
        figure, panels = plt.subplots(1, len(sizes), figsize=(5.2 + 3.6 * (len(sizes) - 1), height),
                                      layout="constrained", sharey=True, squeeze=False)
        top = max(row["spread"][1] for row in result["rows"] if row["repeats"])
        for axes, slots in zip(panels[0], sizes):
            rows = rungs(result, slots)
            names = [NAMES[row["arm"]] for row in rows]
            speeds = [row["tokens_per_s"] for row in rows]
            spread = [[s - row["spread"][0] for s, row in zip(speeds, rows)],
                      [row["spread"][1] - s for s, row in zip(speeds, rows)]]
            axes.barh(names, speeds, color=[LADDER[row["arm"]] for row in rows], xerr=spread,
                      error_kw={"ecolor": "#444444", "capsize": 2})
            for i, row in enumerate(rows):
                axes.text(row["spread"][1] + top * 0.015, i, f"{row['tokens_per_s']:,.0f}",
                          va="center")
            axes.set(xlabel="output tokens/s", title=f"{slots} slots", xlim=(0, top * 1.2))
            axes.grid(axis="y", visible=False)
        panels[0][0].invert_yaxis()
        figure.suptitle(setting(result))
        return figure


def setting(result):
    """One line: the model, the device, the workload."""
    load = result["workload"]
    return (f"{result['model']} in {result['dtype']} on {result['hardware']}; prompts and outputs "
            f"of 16 to {load['longest']} tokens")


def predict(result, card=T4, slots=16):
    """{arm: tokens/s} that the model of a step says for another card. A prediction, not a result.

    A step there: its bytes over that card's bandwidth, plus what a step takes here beyond its own
    floor. A prompt: 2 operations a weight and token, at `tflops`.
    """
    predictions = {}
    for row in rungs(result, slots):
        run = row["repeats"][0]
        if "step_ms" not in row or row["slots"] != slots or "graphs" not in row["arm"]:
            continue
        floor = row["step_floor_ms"] * row["bandwidth_gb_s"] / card["gb_s"]
        step = floor + row["step_ms"] - row["step_floor_ms"]
        prompts = row["tokens"] * 2 * 1.24e9 / card["tflops"] / 1e12  # as many read as written
        predictions[row["arm"]] = row["tokens"] / (run["steps"] * step / 1e3 + prompts)
    return predictions

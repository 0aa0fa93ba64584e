"""What bench.offline measured: a figure, and a prediction for a card that is not here."""
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from bench.offline import SINGLE
from bench.report import STYLE

# A hue for each way to run a step; `continuous` keeps the colour it has in every figure.
LADDER = {"generate": "#E69F00", "one-slot": "#CC79A7", "transformers-cb": "#999999",
          "static": "#56B4E9", "continuous": "#0072B2", "continuous+graphs": "#009E73",
          "continuous+fused": "#D55E00", "continuous+graphs+fused": "#882255",
          "continuous+graphs+fused+kernel": "#D55E00", "http": "#999933", "vllm": "#000000"}
NAMES = {"generate": "generate(), one at a time", "one-slot": "our engine, one slot",
         "transformers-cb": "transformers' continuous batching", "static": "static batching",
         "continuous": "continuous batching", "continuous+graphs": "… + CUDA graphs",
         "continuous+graphs+fused": "… + joined weights, compiled functions",
         "continuous+fused": "… + joined weights, own forward pass",
         "continuous+graphs+fused+kernel": "… + our attention kernel",
         "http": "the server over HTTP, as shipped", "vllm": "vLLM"}
# Data sheet; a copy reaches 86 % of it on an H200, prompts are taken to run at 40 % of the peak.
T4 = {"gb_s": 320 * 0.86, "tflops": 65 * 0.4}
WEIGHTS = 1.24e9  # of Llama-3.2-1B
COMMAND = ("python -m bench.offline --model random:llama-3.2-1b --dtype float16 --slots 16 "
           "--arms continuous+graphs,continuous+graphs+fused+kernel "
           "--out figures/data/offline-t4.json")


def rungs(result, slots):
    """The rows with this many slots (and those that take one request at a time), as climbed."""
    climb = list(LADDER)
    wanted = [row for row in result["rows"] if row["repeats"] and
              (row["slots"] == slots or row["arm"] in SINGLE)]
    return sorted(wanted, key=lambda row: climb.index(row["arm"]))


def ladder_figure(result):
    """Tokens/s of every arm as bars, a panel for each number of slots; whiskers: all repeats."""
    sizes = sorted({row["slots"] for row in result["rows"]} - {1})
    panels = [{row["arm"]: row for row in rungs(result, slots)} for slots in sizes]
    arms = [arm for arm in LADDER if any(arm in panel for panel in panels)]
    top = max(row["spread"][1] for panel in panels for row in panel.values())
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(sizes), layout="constrained", sharey=True, squeeze=False,
                                    figsize=(5.6 + 3.4 * (len(sizes) - 1), 1.5 + 0.4 * len(arms)))
        for ax, panel, slots in zip(axes[0], panels, sizes):
            draw_rungs(ax, [panel.get(arm) for arm in arms], top)
            ax.set(xlabel="output tokens/s", title=f"{slots} slots", xlim=(0, top * 1.25))
        axes[0][0].set_yticks(range(len(arms)), [NAMES[arm] for arm in arms])
        axes[0][0].invert_yaxis()
        figure.suptitle(setting(result).replace("; ", "\n"), fontsize=9)
        return figure


def draw_rungs(axes, rows, top):
    """A bar for each row, its speed written behind it; a rung without data says so."""
    for y, row in enumerate(rows):
        if row is None:
            axes.text(top * 0.01, y, "not measured", va="center", color="#777777")
            continue
        speed = row["tokens_per_s"]
        low, high = row["spread"]
        axes.barh(y, speed, color=LADDER[row["arm"]], xerr=[[speed - low], [high - speed]],
                  error_kw={"ecolor": "#444444", "capsize": 2})
        axes.text(high + top * 0.02, y, f"{speed:,.0f}", va="bottom", fontsize=10)
        axes.text(high + top * 0.02, y, f"{row['requests']} requests", va="top", fontsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.tick_params(axis="x", labelsize=9)
    axes.grid(axis="y", visible=False)


def setting(result):
    """One line: the model, the device, the workload."""
    load = result["workload"]
    return (f"{result['model']}, {result['dtype']}, {result['hardware']}; "
            f"prompts and outputs of 16 to {load['longest']} tokens")


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
        prompts = row["tokens"] * 2 * WEIGHTS / card["tflops"] / 1e12  # as many read as written
        speed = row["tokens"] / (run["steps"] * step / 1e3 + prompts)
        digits = len(str(int(speed)))
        predictions[row["arm"]] = round(speed, 2 - digits)  # two of them count
    return predictions

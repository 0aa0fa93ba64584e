"""All products of a model's float32 weights with a few rows, on a CPU: which way is quickest?

    python -m bench.linear --out figures/latest/linear.json

Ways: torch's own `F.linear`; the product turned round, `(W @ x.T).T`; weights stored transposed;
a convolution of width one; oneDNN with weights as they are (`to_mkldnn`), and packed once, which is
what cbserver.model.linear does.
"""
import argparse
import datetime
import json
import statistics
import sys
import time
from pathlib import Path

from bench.results import command_line, hardware, versions, write_json

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


def ways_of(weights):
    """{name: function of (number of the weight, rows [rows, in])}."""
    import torch
    import torch.nn.functional as F

    oned = torch.ops.mkldnn
    transposed = [weight.T.contiguous() for weight in weights]
    packed = [oned._reorder_linear_weight(weight) for weight in weights]
    plain = [weight.to_mkldnn() for weight in weights]
    return {
        "F.linear": lambda i, x: F.linear(x, weights[i]),
        "turned round": lambda i, x: (weights[i] @ x.T).T,
        "transposed weights": lambda i, x: x @ transposed[i],
        "convolution": lambda i, x: F.conv1d(x.T[None], weights[i][:, :, None]),
        "oneDNN": lambda i, x: F.linear(x.to_mkldnn(), plain[i]).to_dense(),
        "oneDNN, packed": lambda i, x: oned._linear_pointwise(x, packed[i], None, "none", [], ""),
    }


def measure(options):
    """Medians of several rounds; in each, every way once, in turn."""
    import torch

    from cbserver.model.load import load_model

    model, _ = load_model(options.model, "cpu", torch.float32)
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, torch.nn.Linear)]
    rows_of = {}
    with torch.inference_mode():
        ways = ways_of(weights)
        for rows in ROWS:
            inputs = {w.shape[1]: torch.randn(rows, w.shape[1]) for w in weights}
            times = {name: [] for name in ways}
            for _ in range(options.rounds + 1):
                for name, way in ways.items():
                    begin = time.perf_counter()
                    for i, weight in enumerate(weights):
                        way(i, inputs[weight.shape[1]])
                    times[name].append(1e3 * (time.perf_counter() - begin))
            rows_of[str(rows)] = {name: round(statistics.median(found[1:]), 1)
                             for name, found in times.items()}  # the first round warms up
            print(f"{rows} rows: {json.dumps(rows_of[str(rows)])}", flush=True)
    return {"command": options.command, "hardware": hardware(), "model": options.model,
            "versions": versions("torch", "transformers"), "threads": torch.get_num_threads(),
            "date": datetime.date.today().isoformat(), "megabytes": round(
                sum(w.nbytes for w in weights) / 1e6), "ms": rows_of}


def table(result):
    """Markdown: a row for each way, milliseconds by rows."""
    counts = list(result["ms"])
    lines = [f"| ms at so many rows | {' | '.join(map(str, counts))} |",
             f"| --- |{' ---: |' * len(counts)}"]
    for way in next(iter(result["ms"].values())):
        cells = [f"{result['ms'][count][way]:.0f}" for count in counts]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.linear",
                                     description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2", help="a model in float32 (smollm2)")
    parser.add_argument("--rounds", type=int, default=7, help="the median of so many (7)")
    parser.add_argument("--out", type=Path, required=True, help="the result, as JSON")
    options = parser.parse_args(arguments)
    options.command = command_line("bench.linear", arguments)
    result = measure(options)
    write_json(result, options.out)
    print(table(result))


if __name__ == "__main__":
    sys.exit(main())

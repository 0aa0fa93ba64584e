"""What a measurement needs beside its numbers: hardware, versions, order, a safe way to disk."""
import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "figures" / "data"


def hardware():
    """The GPU's name, or the CPU's and its number of cores."""
    gpu = first_gpu()
    if gpu is None:
        return f"{os.cpu_count()} CPU cores ({cpu_name()})"

    import pynvml

    name = pynvml.nvmlDeviceGetName(gpu)
    return name.decode() if isinstance(name, bytes) else name


def cpu_name():
    """Linux keeps the name in /proc/cpuinfo; elsewhere the architecture has to do."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def first_gpu():
    """NVML's handle of the GPU that CUDA would take first; None without one, or if it can't say."""
    try:
        import pynvml

        pynvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        if visible.isdigit():
            handle = pynvml.nvmlDeviceGetHandleByIndex(int(visible))
        else:
            handle = pynvml.nvmlDeviceGetHandleByUUID(visible.encode())
        pynvml.nvmlDeviceGetUtilizationRates(handle)  # a slice of a GPU refuses this
        return handle
    except Exception:  # no package, no driver, no device: all mean "no GPU to watch"
        return None


def versions(*packages):
    """Python's version and those of the packages that are installed: {name: version}."""
    found = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def command_line(module, arguments=None):
    """What a reader types to run this again; arguments: None for those of this process."""
    words = sys.argv[1:] if arguments is None else arguments
    return shlex.join(["python", "-m", module, *map(str, words)])


def order(cases, repeats):
    """[(repeat, case), ...]; odd repeats run backwards, so that no case is always the first."""
    forwards = list(cases)
    backwards = forwards[::-1]
    runs = []
    for repeat in range(repeats):
        for case in backwards if repeat % 2 else forwards:
            runs.append((repeat, case))
    return runs


def write_json(result, path):
    """Write a file whole or not at all."""
    draft = path.with_suffix(".json.part")
    draft.write_text(json_text(result) + "\n", encoding="utf-8")
    os.replace(draft, path)


def json_text(result, indent=""):
    """JSON with a line for each entry of a dict, and each list of plain values on one line."""
    inner = indent + "  "
    if isinstance(result, dict) and result:
        lines = [f"{inner}{json.dumps(k)}: {json_text(v, inner)}" for k, v in result.items()]
        return "{\n" + ",\n".join(lines) + "\n" + indent + "}"
    if isinstance(result, list) and any(isinstance(item, dict) for item in result):
        lines = [inner + json_text(item, inner) for item in result]
        return "[\n" + ",\n".join(lines) + "\n" + indent + "]"
    return json.dumps(result, ensure_ascii=False)

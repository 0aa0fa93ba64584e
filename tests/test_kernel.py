"""The attention kernel compiles for cards that are not here: a T4, an A100, an H100."""
import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import ROOT

SHAPES = {"llama-3.2-1b": (32, 8, 64), "smollm2": (9, 3, 64), "qwen2.5-0.5b": (14, 2, 64),
          "qwen2.5-1.5b": (12, 2, 128)}  # heads, kv_heads, head_dim
T4_SHARED = 64 * 1024  # bytes of shared memory that a program may use there

# In a process of its own: a compiler that aborts fails a test and not the run.
COMPILE = """
import json, re, subprocess, sys, tempfile
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cbserver.fast import attend_kernel

heads, kv_heads, dim, dtype, capability = json.loads(sys.argv[1])
group = triton.next_power_of_2(heads // kv_heads)
if capability >= 80:
    group = max(16, group)
tensor = f"*{dtype}"
types = dict.fromkeys(("qkv", "cosines", "sines", "keys", "values"), tensor)
types |= {"positions": "*i64", "out": tensor, "scale": "fp32", "max_len": "i32"}
sizes = {"HEADS": heads, "KV_HEADS": kv_heads, "GROUP": group, "DIM": dim, "BLOCK": 64}
kernel = triton.jit(attend_kernel)
names = kernel.arg_names
signature = {name: types.get(name, "constexpr") for name in names}
aligned = [name for name in names if types.get(name, "").startswith("*") or name == "max_len"]
source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in sizes.items()},
                   {(names.index(name),): [["tt.divisibility", 16]] for name in aligned})
made = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                      options={"num_stages": 3, "num_warps": 4})
with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
    file.write(made.asm["ptx"])
    file.flush()
    name = f"sm_{capability}" + ("a" if capability >= 90 else "")
    said = subprocess.run([knobs.nvidia.ptxas.path, "-v", f"--gpu-name={name}", file.name, "-o",
                           "/dev/null"], capture_output=True, text=True).stderr
spilled = re.search(r"([0-9]+) bytes spill stores", said)
print(json.dumps({"cubin": len(made.asm["cubin"]), "shared": made.metadata.shared,
                  "spilled": int(spilled[1]) if spilled else None}))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("shape, capability", [
    (shape, card) if (shape, card) == ("llama-3.2-1b", 75)
    else pytest.param(shape, card, marks=pytest.mark.slow) for shape in SHAPES
    for card in (75, 80, 90)])
def test_the_kernel_compiles_for_every_card(shape, capability):
    dtype = "fp16" if capability == 75 else "bf16"
    case = json.dumps([*SHAPES[shape], dtype, capability])
    done = subprocess.run([sys.executable, "-c", COMPILE, case], cwd=ROOT, capture_output=True,
                          text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-1500:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["cubin"] > 1000
    _, _, head_dim = SHAPES[shape]
    if capability == 75 and head_dim == 64:  # where a T4 uses it, see kernel_pays
        assert found["shared"] <= T4_SHARED and found["spilled"] == 0, found

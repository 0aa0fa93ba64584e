"""Linear layers whose weights are packed once, in the order in which a CPU multiplies them."""
import platform

import torch
import torch.nn.functional as F
from torch import nn


class PackedLinear(nn.Linear):
    """A Linear layer that multiplies by a packed copy of its weight: see `pack_linears`.

    torch multiplies a few rows by float32 weights with a routine made for many rows. oneDNN, which
    comes with torch, reads packed weights once, in order. docs/benchmarks.md has the ways that
    were tried. fewest_rows: with fewer, torch's own way is the quicker one.
    """

    def forward(self, x):
        few = x.numel() < self.fewest_rows * x.shape[-1]
        if few or torch.is_grad_enabled():  # oneDNN's product has no gradient
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def pack_linears(model):
    """Pack the weights of a model's Linear layers. Those changed later must be packed anew.

    The weights themselves stay, for whoever reads them.
    """
    fewest_rows = 3 if is_intel() else 1
    for module in model.modules():
        if type(module) in (nn.Linear, PackedLinear):  # another kind may compute something else
            packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach())
            module.register_buffer("packed", packed, persistent=False)
            module.fewest_rows = fewest_rows
            module.__class__ = PackedLinear


def is_intel():
    """Whether this CPU is Intel's: its library (MKL) is quick there with a row or two."""
    return "intel" in torch.cpu.get_capabilities().get("cpu_name", "").lower()


def packing_pays(model):
    """Whether this device gains by oneDNN's product of packed weights: an x86 CPU, in float32."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return (x86 and model.device.type == "cpu" and model.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
            and hasattr(torch.ops.mkldnn, "_reorder_linear_weight"))


def packed_bytes(model):
    """Bytes that the packed copies take."""
    return sum(m.weight.nbytes for m in model.modules() if type(m) is nn.Linear)

"""Linear layers whose weights are packed once, in the order in which a CPU multiplies them."""
import platform

import torch
from torch import nn


class PackedLinear(nn.Linear):
    """A Linear layer that multiplies by a packed copy of its weight: see `pack_linears`.

    torch multiplies a few rows by float32 weights with a routine made for many rows. oneDNN, which
    comes with torch, reads packed weights once, in order: two to three times as fast at 2 to 16
    rows, and no slower at one or at hundreds. docs/benchmarks.md has the ways that were tried.
    """

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def pack_linears(model):
    """Pack the weights of a model's Linear layers, where that is known to pay: on an x86 CPU.

    The weights themselves stay, for whoever reads them; changed later, they must be packed anew.
    """
    for module in model.modules():
        if type(module) in (nn.Linear, PackedLinear):  # another kind may compute something else
            packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach())
            module.register_buffer("packed", packed, persistent=False)
            module.__class__ = PackedLinear


def packing_pays(model):
    """Whether this device has oneDNN's product of packed float32 weights, and gains by it."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return (x86 and model.device.type == "cpu" and model.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
            and hasattr(torch.ops.mkldnn, "_reorder_linear_weight"))


def packed_bytes(model):
    """Bytes that the packed copies take."""
    return sum(m.weight.nbytes for m in model.modules() if type(m) is nn.Linear)

"""Whether one way to run a model gives the numbers of another: tried when it is loaded."""
import torch


def check_same(forward, own, cache):
    """Read and decode a little with both passes, as BatchRunner.forward; ValueError if they differ.

    In float32 they must agree to rounding, in half precision roughly.
    """
    tolerance = 1e-4 if cache.keys.dtype == torch.float32 else 0.1
    rows = min(2, len(cache.all_slots))
    tokens = 1 + cache.all_positions[:4 * rows].view(rows, 4)  # a prompt a row
    positions = cache.all_positions[:5].expand(rows, 5)
    reads = tokens, positions[:, :4], cache.all_slots[:rows], 4
    decodes = tokens[:, :1], positions[:, 4:], slice(0, rows), 5
    for inputs in (reads, decodes):
        wanted = own(*inputs)
        off = (forward(*inputs) - wanted).norm() / wanted.norm()
        if not off < tolerance:
            raise ValueError(f"it differs from the model's own pass by {off:.1e}")

"""Packed weights: the layer's own numbers, shared by a model's copies, and only where they pay."""
import platform

import pytest
import torch
from torch import nn

from cbserver.model import linear, load
from cbserver.model.attention import with_attention
from cbserver.model.linear import PackedLinear, pack_linears, packed_bytes
from cbserver.model.random_llama import random_llama

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64")
    or not torch.backends.mkldnn.is_available(), reason="packed weights need an x86 CPU and oneDNN")
ROWS = (1, 2, 3, 16, 64)


@pytest.fixture(params=[True, False], ids=["Intel's", "another's"])
def any_cpu(request, monkeypatch):
    """Both kinds of CPU: on Intel's, one row or two go torch's own way."""
    monkeypatch.setattr(linear, "is_intel", lambda: request.param)


def fresh():
    """random:tiny as it is made, nothing packed."""
    model, _ = random_llama("tiny", torch.device("cpu"), torch.float32)
    return model.eval()


def kinds(model):
    """The classes of a model's Linear layers: set."""
    return {type(module) for module in model.modules() if isinstance(module, nn.Linear)}


def close(a, b):
    """Equal to rounding: sums of a few hundred numbers, in another order."""
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_a_packed_layer_gives_the_layers_own_numbers(any_cpu, bias):
    torch.manual_seed(0)
    layer = nn.Linear(96, 40, bias=bias)
    inputs = [torch.randn(rows, 96) for rows in ROWS] + [torch.randn(rows, 1, 96) for rows in ROWS]
    inputs += [torch.randn(1, 5, 96), torch.randn(96)]
    own = [layer(x) for x in inputs]
    pack_linears(layer)
    assert type(layer) is PackedLinear
    for x, wanted in zip(inputs, own):
        found = layer(x)
        assert found.shape == wanted.shape and close(found, wanted), x.shape


@torch.inference_mode()
def test_a_changed_weight_counts_once_it_is_packed_anew():
    layer = nn.Linear(8, 8)
    pack_linears(layer)
    layer.weight.mul_(2)
    x = torch.randn(16, 8)
    wanted = nn.functional.linear(x, layer.weight, layer.bias)
    assert not close(layer(x), wanted)
    pack_linears(layer)
    assert close(layer(x), wanted)


@torch.inference_mode()
def test_a_packed_model_has_its_logits_and_its_tied_head(any_cpu):
    model = fresh()
    model.lm_head.weight = model.get_input_embeddings().weight
    tokens = torch.arange(3 * 7).view(3, 7)
    own = model(tokens).logits
    pack_linears(model)
    assert kinds(model) == {PackedLinear}
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert close(model(tokens).logits, own) and close(model(tokens[:1, :1]).logits, own[:1, :1])


def test_a_packed_model_can_be_trained():
    model = fresh()
    tokens = torch.arange(7)[None]
    model(tokens).logits.square().sum().backward()
    own = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    pack_linears(model)
    model(tokens).logits.square().sum().backward()
    assert all(torch.equal(weight.grad, its) for weight, its in zip(model.parameters(), own))


def test_a_copy_with_other_attention_shares_what_is_packed():
    model = fresh()
    pack_linears(model)
    twin = with_attention(model)
    pairs = [(own, its) for own, its in zip(model.modules(), twin.modules())
             if type(own) is PackedLinear]
    assert pairs and all(own is not its and own.packed is its.packed for own, its in pairs)
    assert all(own.weight is its.weight for own, its in pairs)


@torch.inference_mode()
def test_a_layer_that_computes_something_else_is_left_alone():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(8, 8), nn.Linear(8, 8))
    x = torch.randn(4, 8)
    own = model(x)
    pack_linears(model)
    assert [type(layer) for layer in model] == [Doubled, PackedLinear]
    assert close(model(x), own)


def test_what_is_packed_is_no_part_of_a_saved_model():
    model = fresh()
    names = model.state_dict().keys()
    pack_linears(model)
    assert model.state_dict().keys() == names


def test_a_model_is_packed_at_load_in_float32_and_nothing_else():
    exact, _ = load.load_model("random:tiny", device="cpu", dtype=torch.float32)
    half, _ = load.load_model("random:tiny", device="cpu", dtype=torch.bfloat16)
    assert kinds(exact) == {PackedLinear} and kinds(half) == {nn.Linear}


@pytest.mark.parametrize("spare, kind", [(0, nn.Linear), (1, PackedLinear)])
def test_a_model_is_packed_where_its_copies_leave_as_much_memory_free(monkeypatch, spare, kind):
    copies = packed_bytes(fresh())
    monkeypatch.setattr(load, "free_bytes", lambda device: 2 * copies + spare)
    model, _ = load.load_model("random:tiny", device="cpu", dtype=torch.float32)
    assert kinds(model) == {kind}

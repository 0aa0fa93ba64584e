"""Whether a model does in our passes what it does by itself: tried at load, on a small copy of it."""
import copy
import functools
import json

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from .linear import PackedLinear
from .load import ModelUnavailable, check_finite, first_line

SMALL = {"vocab_size": 256, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
SIDE = 64  # of what may be narrower without being another model: feed-forward layers
WINDOW = 8  # tokens: where attention is limited to a window or a chunk, a trial must notice
SCALARS = bool, int, float, str


def check_served(model, runner_class):
    """Refuse, with a ModelUnavailable, a model whose answers here would not be its own.

    runner_class: BatchRunner. A process tries each kind of model once, so asking again is cheap.
    """
    try:
        settings = model.config.to_json_string(use_diff=False)
        check_kind(type(model.config), settings, layers_needed(model), runner_class)
    except Exception as error:  # whatever a model may do with a cache or a mask it does not know
        raise ModelUnavailable(
            f"A {model.config.model_type} model cannot be served here ({first_line(error)}). This "
            "server takes decoder-only models that look at all earlier tokens through keys and "
            "values of one shape, such as Llama, SmolLM2, Qwen2 or Qwen3.") from error
    if model.dtype != torch.float32:
        check_range(model, runner_class)


@functools.cache
@torch.inference_mode()
def check_kind(config_class, settings, depth, runner_class):
    """ValueError unless a small copy answers in slots as it does by itself, in float32.

    config_class, settings: of its configuration, as JSON. depth: how many layers the copy needs.
    Two prompts of unlike lengths, one of them read in two pieces, then a token of each in one pass.
    """
    small = small_copy(config_class.from_dict(json.loads(settings)), depth)
    runner = runner_class(small, 3, 64)
    prompts = {1: trial_tokens(small, 29), 2: trial_tokens(small, 7)}
    found = {1: [], 2: []}
    for slot, start, end in ((1, 0, 16), (1, 16, 28), (2, 0, 6)):
        tokens = prompts[slot][None, start:end]
        positions = torch.arange(start, end, device=small.device)[None]
        hidden = runner.forward(tokens, positions, slice(slot, slot + 1), end)
        found[slot].append(hidden[0])
    tokens = torch.stack([prompts[2][:1], prompts[1][28:], prompts[2][6:]])  # row 0 is idle
    positions = torch.tensor([[63], [28], [6]], device=small.device)
    hidden = runner.forward(tokens, positions, slice(0, 3), 29)
    head = small.get_output_embeddings()
    for slot, tokens in prompts.items():
        parts = [*found[slot], hidden[slot]]
        logits = head(torch.cat(parts))  # [tokens, vocabulary]
        compare(logits, small(input_ids=tokens[None], use_cache=False).logits[0])


@torch.inference_mode()
def check_range(model, runner_class):
    """Refuse a model whose numbers overflow in half precision, in a prompt or in a token after."""
    runner = runner_class(model, 1, 16)
    tokens = torch.arange(9, device=model.device)[None]  # the positions, too
    slot = slice(0, 1)
    prompt = runner.forward(tokens[:, :8], tokens[:, :8], slot, 8)
    decoded = runner.forward(tokens[:, 8:], tokens[:, 8:], slot, 9)
    hidden = torch.cat([prompt, decoded], 1)
    check_finite(model.get_output_embeddings()(hidden))


def trial_tokens(model, count):
    """Token ids for a trial, [count], the same each time."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(3, 250, (count,), generator=generator).to(model.device)


def compare(found, wanted):
    """ValueError unless two tensors agree: to rounding in float32, roughly in half precision."""
    tolerance = 1e-4 if wanted.dtype == torch.float32 else 0.1
    off = (found - wanted).norm() / wanted.norm()
    if not off < tolerance:
        raise ValueError(f"in our passes its numbers differ from its own by {off:.1e}")


@torch.inference_mode()
def check_same(forward, own, cache):
    """Read and decode a little with both passes, as BatchRunner.forward; ValueError if they differ.

    The last decode is as far out as the cache goes.
    """
    rows = min(2, len(cache.all_slots))
    tokens = 1 + cache.all_positions[:4 * rows].view(rows, 4)  # a prompt a row
    positions = cache.all_positions[:5].expand(rows, 5)
    far = torch.full_like(positions[:, 4:], cache.max_len - 2)
    reads = tokens, positions[:, :4], cache.all_slots[:rows], 4
    decodes = tokens[:, :1], positions[:, 4:], slice(0, rows), 5
    far_decodes = tokens[:, :1], far, slice(0, rows), cache.max_len
    for inputs in (reads, decodes, far_decodes):
        compare(forward(*inputs), own(*inputs))


# A small copy


def shrunken(model):
    """A model of the same kind in float32, with made-up weights: one layer of each kind.

    It is narrow, too, if its configuration allows that.
    """
    return small_copy(model.config, layers_needed(model))


def small_copy(config, depth):
    """The same for a configuration; depth: how many of its layers, 2 at least."""
    shallow = fewer_layers(config, max(2, depth))
    try:
        small = made_up(type(config).from_dict(narrower(shallow)))
    except Exception:  # its configuration does not allow these sizes together
        small = made_up(type(config).from_dict(shallow))
    small.set_attn_implementation("eager")  # the model's own, which knows all that it does
    return small.eval()


def fewer_layers(config, depth):
    """A configuration's settings for its first layers, with windows that a trial would notice."""
    settings = copy.deepcopy(config.to_dict())
    layers = config.num_hidden_layers
    for name, value in settings.items():
        limits = any(word in name for word in ("window", "chunk", "local_attention"))
        if isinstance(value, list) and len(value) == layers:  # a setting for each layer
            settings[name] = value[:depth]
        elif limits and type(value) is int and value > WINDOW:
            settings[name] = WINDOW
    settings["num_hidden_layers"] = depth
    return settings


def narrower(settings):
    """The same settings with a small vocabulary and narrow feed-forward layers."""
    sides = {name: SIDE for name, value in settings.items()
             if name.endswith(("intermediate_size", "ffn_dim")) and isinstance(value, int)}
    return settings | sides | SMALL


def made_up(config):
    """A model of this configuration in float32, with the same made-up weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # the CPU's alone
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        make_up_weights(model)
    return model


def make_up_weights(model):
    """Random weights with which an answer needs all of its context; norms and biases vary too."""
    embedding = model.get_input_embeddings().weight
    for weight in model.parameters():
        if weight is embedding:
            weight.data.normal_(0, 0.3)
        elif weight.dim() > 1:
            weight.data.normal_(0, 2 / weight.shape[-1] ** 0.5)
        else:
            weight.data.add_(torch.randn_like(weight), alpha=0.1)


def layers_needed(model):
    """How many of the first layers hold one of each kind."""
    layers = layers_of(model)
    kinds = [kind(layer) for layer in layers]
    first = {}
    for number, name in enumerate(kinds):
        first.setdefault(name, number)
    return 1 + max(first.values(), default=0)


def layers_of(model):
    """The list of the model's layers; an empty one if it cannot be found."""
    depth = getattr(model.config, "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    return nn.ModuleList()


def kind(layer):
    """What a layer is: the types of its modules and their settings, but for its number."""
    said = []
    for name, module in layer.named_modules():
        settings = {key: value for key, value in vars(module).items()
                    if isinstance(value, SCALARS) and not key.endswith(("_idx", "_id"))}
        said.append((name, type(module).__name__, tuple(sorted(settings.items()))))
    return tuple(said)


# What the fused pass takes

PARTS = {"": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
         "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
         "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"}}


def check_structure(model):
    """ValueError unless every layer is made as Llama's are, and all are alike."""
    layers = layers_of(model)
    if not len(layers) or layers_needed(model) > 1:
        raise ValueError("its layers are not all alike")
    for name, expected in PARTS.items():
        part = layers[0].get_submodule(name)
        children = dict(part.named_children())
        if children.keys() != expected:
            raise ValueError(f"its {name or 'layers'} have {', '.join(sorted(children))}")
        for child, module in children.items():
            if child.endswith("_proj") and type(module) not in (nn.Linear, PackedLinear):
                raise ValueError(f"its {child} is a {type(module).__name__}")
    x = torch.linspace(-3, 3, 7)
    if not torch.allclose(layers[0].mlp.act_fn(x), F.silu(x)):
        raise ValueError(f"its activation is {layers[0].mlp.act_fn}")

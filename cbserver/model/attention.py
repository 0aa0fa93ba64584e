"""Attention that leaves grouped heads packed, and the shape of what it keeps of a token."""
import copy
import functools
import inspect
import math
import mmap

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface


def kv_shape(model):
    """(layers, kv_heads, head_dim): a token's keys are that many numbers, and so are its values."""
    config = model.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, kv_heads, head_dim


def rope_limit(config):
    """Positions up to which rotary embedding is the same whoever else is in a pass; None: always.

    "longrope" and "dynamic" choose their frequencies by the longest sequence of a pass.
    """
    scaling = getattr(config, "rope_parameters", None) or {}
    kind = scaling.get("rope_type", "default")
    if kind == "longrope":
        return scaling.get("original_max_position_embeddings") or config.max_position_embeddings
    return config.max_position_embeddings if kind == "dynamic" else None


def context_of(model):
    """The most positions that a sequence may have with this model; infinity if nothing limits it."""
    return rope_limit(model.config) or getattr(model.config, "max_position_embeddings", math.inf)


def untouched_zeros(shape, dtype, device):
    """Zeros. On a CPU their memory is taken page by page as it is written, not at once."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = torch.Size(shape).numel()
    pages = mmap.mmap(-1, count * dtype.itemsize)  # the operating system's, zero until written
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def grouped_attention(module, query, keys, values, attention_mask, scaling=None, **kwargs):
    """Attention that decodes with grouped heads left packed: keys are read once, not per head.

    query: [rows, heads, new, head_dim]. keys, values: [rows, kv_heads, span, head_dim].
    attention_mask: [rows, 1, new, span], true where a query sees a key; None: the new tokens are
    the last of the span, and each sees what stands before it. scaling: of the scores; None: by the
    root of head_dim. Returns ([rows, new, heads, head_dim], None), as transformers wants it.
    """
    if scaling is None:
        scaling = query.shape[3] ** -0.5
    masked = attention_mask is not None
    if masked and not query.is_cuda:
        attend = attend_off_gpu
    else:
        attend = attend_packed if masked and query.shape[2] == 1 else attend_expanded
    out = attend(query, keys, values, attention_mask, scaling)  # as query
    return out.transpose(1, 2).contiguous(), None  # some models take a view of it


def attend_packed(query, keys, values, mask, scaling):
    """One new token a row: the query heads that share a key head are rows of one product."""
    kv_heads = keys.shape[1]
    packed = query.view(len(query), kv_heads, -1, query.shape[3])  # [rows, kv_heads, group, dim]
    scores = products(packed * scaling, keys)  # [rows, kv_heads, group, span]
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1).to(values.dtype)
    return (weights @ values).view(query.shape)


def attend_off_gpu(query, keys, values, mask, scaling):
    """torch's fused attention. Heads that share a key head are rows of it: no key is copied."""
    group = query.shape[1] // keys.shape[1]
    packed = query.unflatten(1, (-1, group)).flatten(2, 3)  # [rows, kv_heads, group x new, dim]
    mask = mask.repeat(1, 1, group, 1)  # [rows, 1, group x new, span]
    mixed = F.scaled_dot_product_attention(packed, keys, values, mask, scale=scaling)
    return mixed.unflatten(2, (group, -1)).flatten(1, 2)  # as query


def products(query, keys):
    """query @ keys.mT in float32: float16 has no number beyond 65,504, and some scores are larger.

    query: [rows, kv_heads, group, head_dim]. keys: [rows, kv_heads, span, head_dim].
    """
    if query.is_cuda and query.dtype != torch.float32:  # without a copy of the keys in float32
        found = torch.bmm(query.flatten(0, 1), keys.flatten(0, 1).mT, out_dtype=torch.float32)
        return found.unflatten(0, query.shape[:2])
    return query.float() @ keys.float().mT


def attend_expanded(query, keys, values, mask, scaling):
    """Many new tokens, which are bound by arithmetic: torch's fused attention, keys per head."""
    new = query.shape[2]
    span = keys.shape[2]
    if mask is None and new == span and has_flash(query):
        return F.scaled_dot_product_attention(query, keys, values, scale=scaling, is_causal=True,
                                              enable_gqa=True)
    if mask is None and new < span:
        mask = causal_lower_right(new, span)
    group = query.shape[1] // keys.shape[1]
    keys = keys.repeat_interleave(group, 1)
    values = values.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(query, keys, values, mask, scale=scaling,
                                          is_causal=mask is None)


def has_flash(query):
    """Whether torch has flash attention for these, which takes grouped heads as they are."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    return half and query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)


AttentionInterface.register("grouped", grouped_attention)


def hidden_states(model, tokens, mask, positions, cache):
    """One pass without the head: [rows, new, hidden].

    tokens, positions: [rows, new]. mask: [rows, 1, new, span], true where a row sees a key. All are
    passed by name: models have them in different orders.
    """
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions,
              cache_name(type(model.base_model)): cache}
    return model.base_model(**inputs)[0]


@functools.cache
def cache_name(model_class):
    """What a model's forward calls the cache: newer versions of transformers have renamed it."""
    names = inspect.signature(model_class.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def with_attention(model, name="grouped"):
    """The same weights in modules of their own, whose attention is another: `model` is untouched."""
    weights = {id(w): w for w in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, weights)
    twin.set_attn_implementation(name)
    return twin

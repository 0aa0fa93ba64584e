"""Which models can be served: every causal language model that transformers can build tiny.

    python -m bench.models     writes figures/data/models.json

Each is built with made-up weights and either gives generate()'s tokens in company, by the plain and
by the fast step, or is refused at load with one sentence. Anything else is a fault.
"""
import datetime
import json
import sys
import time
import warnings

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from bench.results import DATA, command_line, hardware, versions, write_json
from cbserver.baseline import generate_tokens
from cbserver.batch import BatchRunner
from cbserver.fast import FastStep
from cbserver.model.load import ModelUnavailable
from cbserver.model.random_llama import byte_tokenizer
from cbserver.model.sampling import SamplingParams
from cbserver.model.trial import check_served, make_up_weights, trial_tokens
from cbserver.scheduler import ContinuousEngine
from cbserver.sequence import put_all

OUT = DATA / "models.json"
LARGEST = 20e6  # parameters
NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
SIZES = {  # what a configuration has of these is set to them
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "ffn_dim": 96,
    "max_position_embeddings": 256, "moe_intermediate_size": 32, "num_experts": 4,
    "n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "n_group": 1, "topk_group": 1, "embedding_size": 64,
    "word_embed_proj_dim": 64, "rotary_dim": 8,
    "d_model": 64, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_inner": 96, "num_layers": 4,
    "encoder_layers": 2, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96,
    "encoder_attention_heads": 4, "encoder_ffn_dim": 96, "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 512, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None}


def build(name):
    """A tiny model of this type with made-up weights; raises if no configuration makes one."""
    kind = CONFIG_MAPPING[name]
    default = kind()
    sizes = {key: value for key, value in SIZES.items() if hasattr(default, key)}
    failure = None
    for change in CHANGES:  # sizes that some types do not take together
        try:
            return made(kind(**sizes | {k: v for k, v in change.items() if k in sizes}))
        except Exception as error:
            failure = failure or error
    raise failure


CHANGES = [{}, {"head_dim": 8}, {"num_key_value_heads": 4}, {"head_dim": None},
           {"num_key_value_heads": 4, "head_dim": 8}, {"num_hidden_layers": 8},
           {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}]


def made(config):
    """The model of a configuration, with made-up weights; raises if it does not run."""
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters are not tiny")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.inference_mode():
        make_up_weights(model)
        if not model(trial_tokens(model, 9)[None]).logits.isfinite().all():
            raise ValueError("made-up weights give no finite numbers")
    return model


def serve(model, runner):
    """[(tokens generated in company, what generate() makes alone)], and whether it is fused."""
    engine = ContinuousEngine(model, byte_tokenizer(512), 2, 96, runner=runner, prefill_budget=16)
    engine.open(put_all)
    sequences = []
    for number, length in enumerate((5, 40, 11, 23)):
        tokens = trial_tokens(model, length).tolist()
        sequences.append(engine.submit(tokens, SamplingParams(6 + 2 * number, ignore_eos=True)))
    for _ in range(200):
        if not (engine.waiting or engine.running):
            break
        engine.step()
    pairs = [(s.generated_tokens, list(generate_tokens(model, s.prompt_tokens, s.params)))
             for s in sequences]
    return pairs, bool(getattr(engine.runner, "fused", None))


def try_model(name):
    """{"model", "what", "why"}; what: "fused", "plain", "refused", "not built" or "FAULT"."""
    found = {"model": name, "what": "not built", "why": ""}
    try:
        model = build(name)
    except Exception as error:
        return found | {"why": f"{type(error).__name__}: {error}"[:160]}
    try:
        check_served(model, BatchRunner)
    except ModelUnavailable as error:
        return found | {"what": "refused", "why": str(error)}
    try:
        plain, _ = serve(model, BatchRunner)
        fast, fused = serve(model, FastStep)
    except Exception as error:
        return found | {"what": "FAULT", "why": f"{type(error).__name__}: {error}"[:300]}
    if any(ours != its for ours, its in plain + fast):
        return found | {"what": "FAULT", "why": "other tokens than generate()"}
    return found | {"what": "fused" if fused else "plain"}


def main(arguments=None):
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    names = (sys.argv[1:] if arguments is None else arguments) or NAMES
    rows = []
    for number, name in enumerate(names, 1):
        begin = time.perf_counter()
        rows.append(try_model(name))
        print(f"[{number}/{len(names)}] {name}: {rows[-1]['what']} {rows[-1]['why'][:150]} "
              f"({time.perf_counter() - begin:.1f} s)", flush=True)
    counts = {}
    for row in rows:
        counts[row["what"]] = counts.get(row["what"], 0) + 1
    print(json.dumps(counts))
    if names == NAMES:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write_json({"command": command_line("bench.models", arguments), "counts": counts,
                    "date": now, "hardware": hardware(),
                    "versions": versions("torch", "transformers"), "rows": rows}, OUT)
    return 1 if counts.get("FAULT") else 0


if __name__ == "__main__":
    sys.exit(main())

"""A model is served right or refused with one sentence; what it does decides, not its name."""
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import by_hand, prompt
from gguf import GGUFWriter
from transformers import (
    AfmoeConfig,
    AfmoeForCausalLM,
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    MistralConfig,
    Phi3Config,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    Starcoder2Config,
)

from bench.models import NAMES, build, try_model
from cbserver.baseline import generate_tokens
from cbserver.batch import BatchRunner, StaticEngine
from cbserver.fast import FastStep
from cbserver.model import load, trial
from cbserver.model.attention import grouped_attention
from cbserver.model.load import ModelUnavailable, fit_slots, load_model
from cbserver.model.sampling import SamplingParams
from cbserver.model.trial import check_served, fewer_layers, make_up_weights, shrunken
from cbserver.scheduler import ContinuousEngine
from cbserver.sequence import SequentialEngine

SIZES = dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
             pad_token_id=None, bos_token_id=None, eos_token_id=None)


def made_up(kind, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.inference_mode():
        make_up_weights(model)
    return model


def test_layers_without_rotary_embedding_are_not_fused_and_stay_exact(tiny):
    config = SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1, 0])
    model = made_up(SmolLM3ForCausalLM, config)
    check_served(model, BatchRunner)
    with pytest.warns(UserWarning, match="not all alike"):
        engine = by_hand(ContinuousEngine(model, tiny[1], 3, 96, runner=FastStep))
    assert engine.runner.fused is None
    sequences = [engine.submit(prompt(i, 5 + 9 * i), SamplingParams(12)) for i in range(6)]
    while engine.waiting or engine.running:
        engine.step()
    for s in sequences:
        assert s.generated_tokens == list(generate_tokens(model, s.prompt_tokens, s.params))


def test_a_scale_that_changes_far_out_is_noticed_before_a_pass_is_fused(tiny):
    rope = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 32}
    model = made_up(Ministral3ForCausalLM, Ministral3Config(
        **SIZES, head_dim=16, sliding_window=None, rope_parameters=rope))
    with pytest.warns(UserWarning, match="differ"):
        engine = by_hand(ContinuousEngine(model, tiny[1], 2, 96, runner=FastStep))
    sequence = engine.submit(prompt(1, 50), SamplingParams(20))
    while engine.waiting or engine.running:
        engine.step()
    assert sequence.generated_tokens == list(
        generate_tokens(model, prompt(1, 50), sequence.params))


@pytest.mark.parametrize("scaling, limit", [
    ({"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128,
      "factor": 16.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}, 128),
    ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, 2048)])
def test_a_rotary_embedding_that_looks_at_the_whole_pass_stays_below_where_it_changes(
        tiny, scaling, limit):
    model = made_up(LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=scaling))
    assert ContinuousEngine(model, tiny[1], 2, 4096).max_len == limit
    assert fit_slots(model, 2)[1] == limit
    with pytest.raises(ModelUnavailable, match=f"--max-len {limit} or less"):
        fit_slots(model, 2, limit + 1)
    engine = by_hand(ContinuousEngine(model, tiny[1], 2, runner=FastStep))
    sequences = [engine.submit(prompt(i, 20 + 80 * i), SamplingParams(20)) for i in range(2)]
    while engine.waiting or engine.running:
        engine.step()
    for s in sequences:
        assert s.generated_tokens == list(generate_tokens(model, s.prompt_tokens, s.params))


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "glm4_moe_lite", "doge", "gpt_oss",
                                  "gemma2", "cohere", "mamba"])
def test_what_our_passes_would_get_wrong_is_refused_with_one_sentence(name):
    found = try_model(name)
    assert found["what"] == "refused", found
    assert found["why"].startswith("A ") and "\n" not in found["why"]
    assert len(found["why"]) < 500


@pytest.mark.parametrize("name", ["doge", "glm4_moe_lite", "mamba"])
def test_an_engine_made_by_hand_refuses_what_the_command_line_refuses(tiny, name):
    model = build(name)
    for engine_class in (StaticEngine, ContinuousEngine):
        with pytest.raises(ModelUnavailable, match=f"A {name} model cannot be served here"):
            engine_class(model, tiny[1])
    baseline = by_hand(SequentialEngine(model, tiny[1]))  # generate() takes any
    sequence = baseline.submit([5, 6, 7], SamplingParams(4, ignore_eos=True))
    baseline.step()
    assert len(sequence.generated_tokens) == 4


def test_a_kind_of_model_is_tried_once(tiny, monkeypatch):
    ContinuousEngine(*tiny)
    monkeypatch.setattr(trial, "small_copy", None)
    ContinuousEngine(*tiny)


def test_a_model_whose_numbers_overflow_in_our_passes_alone_is_refused_in_half_precision():
    class Overflowing(BatchRunner):
        def forward(self, tokens, positions, slots, span):
            hidden = super().forward(tokens, positions, slots, span)
            decodes = tokens.shape[1] == 1 and hidden.dtype == torch.float16
            return hidden * torch.inf if decodes else hidden

    check_served(load_model("random:tiny", "cpu")[0], Overflowing)
    with pytest.raises(ModelUnavailable, match="overflow in float16"):
        check_served(load_model("random:tiny", "cpu", torch.float16)[0], Overflowing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scores_beyond_float16_are_no_infinities(dtype):
    rows, span = 3, 20
    query = torch.randn(rows, 4, 1, 16).to(dtype) * 200
    keys = torch.randn(rows, 2, span, 16).to(dtype) * 200
    values = torch.randn(rows, 2, span, 16).to(dtype)
    mask = torch.ones(rows, 1, 1, span, dtype=torch.bool)
    found, _ = grouped_attention(None, query, keys, values, mask, 1.0)
    exact = F.scaled_dot_product_attention(query.double(), keys.double(), values.double(),
                                           scale=1.0, enable_gqa=True)
    assert (query.double() @ keys.double().repeat_interleave(2, 1).mT).abs().max() > 65504
    assert torch.allclose(found.transpose(1, 2).double(), exact, atol=0.02)


def test_a_window_counts_where_it_limits_a_layer():
    sizes = SIZES | {"num_hidden_layers": 2}
    model = like(MistralConfig(**sizes, sliding_window=None))
    check_served(model, BatchRunner)
    with pytest.raises(ModelUnavailable, match="mistral"):
        check_served(like(MistralConfig(**sizes, sliding_window=4096)), BatchRunner)
    with pytest.raises(ModelUnavailable, match="gemma2"):
        check_served(like(Gemma2Config(**sizes, head_dim=16)), BatchRunner)


@pytest.mark.parametrize("config_class, settings", [
    (GraniteConfig, {"logits_scaling": 8.0}), (Phi3Config, {"sliding_window": 2047}),
    (Starcoder2Config, {"sliding_window": 4096}),
    (Lfm2Config, {"layer_types": ["conv", "conv", "full_attention", "conv"]})])
def test_settings_of_a_checkpoint_may_have_a_kind_refused_that_its_defaults_do_not(
        config_class, settings):
    check_served(like(config_class(**SIZES)), BatchRunner)
    with pytest.raises(ModelUnavailable):
        check_served(like(config_class(**SIZES | settings)), BatchRunner)


def like(config):
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_trial_is_small_and_holds_one_layer_of_each_kind():
    config = SmolLM3Config(**SIZES | {"num_hidden_layers": 12}, no_rope_layers=[1, 1, 1, 0] * 3)
    model = made_up(SmolLM3ForCausalLM, config)
    small = shrunken(model)
    assert len(small.model.layers) == 4
    assert small.num_parameters() < model.num_parameters() / 2
    assert small.dtype == torch.float32
    assert fewer_layers(config, 4)["no_rope_layers"] == [1, 1, 1, 0]


def test_a_model_that_cannot_be_narrow_is_tried_with_a_small_window_all_the_same(monkeypatch):
    monkeypatch.setattr(trial, "SMALL", {"vocab_size": -1})
    sizes = SIZES | {"max_position_embeddings": 999}  # which nobody has tried yet
    check_served(like(LlamaConfig(**sizes)), BatchRunner)
    with pytest.raises(ModelUnavailable, match="differ"):
        check_served(like(MistralConfig(**sizes, sliding_window=4096)), BatchRunner)


@pytest.mark.parametrize("name", ["gpt2", "gpt_bigcode", "gpt_neox", "opt"])
def test_a_model_of_other_names_and_orders_is_served_as_it_is(name):
    found = try_model(name)
    assert found["what"] == "plain", found


def test_inputs_are_passed_by_name_so_that_a_model_may_have_them_in_any_order():
    config = AfmoeConfig(**SIZES | {"head_dim": 16}, layer_types=["full_attention"] * 4)
    check_served(made_up(AfmoeForCausalLM, config), BatchRunner)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_model_is_exact_or_refused(name):
    found = try_model(name)
    assert found["what"] != "FAULT", found


# Files


@pytest.fixture
def folder(tiny, tmp_path):
    """A model that lies in a folder, with its tokenizer."""
    model = build("llama")
    model.save_pretrained(tmp_path)
    tiny[1].save_pretrained(tmp_path)
    return tmp_path


def refusal(folder):
    with pytest.raises(ModelUnavailable) as raised:
        load_model(str(folder), device="cpu")
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_files_that_are_no_weights_are_one_sentence(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 134\n")
    assert "Cannot load" in refusal(folder)
    weights.write_bytes(whole[:len(whole) // 2])
    assert "Cannot load" in refusal(folder)
    weights.write_bytes(whole)
    load_model(str(folder), device="cpu")


def changed(folder, **settings):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | settings))


def test_weights_that_do_not_fit_or_are_missing_are_one_sentence(folder):
    changed(folder, num_hidden_layers=5)
    assert "lack" in refusal(folder)
    changed(folder, num_hidden_layers=4, intermediate_size=128)
    assert "Cannot load" in refusal(folder)


def test_a_quantised_checkpoint_without_its_package_is_one_sentence(folder):
    changed(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "Cannot load" in refusal(folder)


def test_no_end_of_sequence_in_the_configuration_leaves_the_tokenizers(folder, tiny):
    changed(folder, eos_token_id=[])
    generation = folder / "generation_config.json"
    generation.write_text('{"eos_token_id": []}')
    model, tokenizer = load_model(str(folder), device="cpu")
    assert load.stop_tokens(model) == {tokenizer.eos_token_id}


def test_a_home_that_cannot_be_written_is_one_sentence_before_the_conversion(monkeypatch):
    monkeypatch.setenv("CBSERVER_CACHE", "/proc/nothing/here")
    with pytest.raises(ModelUnavailable, match="CBSERVER_CACHE"):
        load.embedded_smollm2()
    monkeypatch.delenv("CBSERVER_CACHE")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(ModelUnavailable, match="CBSERVER_CACHE"):
        load.embedded_smollm2()


# The embedded model


@pytest.fixture(scope="module")
def smollm2():
    return load_model("smollm2", device="cpu")


@pytest.mark.parametrize("text, tokens", [
    ("Three tips:\n\n1. Sleep.", "Three Ġtips : ĊĊ 1 . ĠSleep ."),
    ("a  1", "a ĠĠ 1"),
    ("in 1969, 30%", "in Ġ 1 9 6 9 , Ġ 3 0 %"),
    ("x²½", "x Â² Â½"),
    ("\n\nWe're here.", "Ċ Ċ We 're Ġhere .")])
def test_the_embedded_tokenizer_splits_text_as_its_file_names_it(smollm2, text, tokens):
    assert smollm2[1].tokenize(text) == tokens.split()
    assert smollm2[1].decode(smollm2[1](text)["input_ids"]) == text


def test_an_answer_with_a_list_is_read_again_as_the_tokens_it_was_made_of(smollm2):
    model, tokenizer = smollm2
    question = [{"role": "user", "content": "How do I make tea? Number the steps."}]
    asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    answer = list(generate_tokens(model, asked, SamplingParams(48)))
    text = tokenizer.decode(answer)
    assert "\n\n1. " in text
    assert tokenizer(text)["input_ids"] == answer


def test_a_tokenizer_whose_rule_is_not_known_is_not_converted(tmp_path):
    for rule in ("gpt-2", "smollm", "llama-bpe"):
        writer = GGUFWriter(tmp_path / f"{rule}.gguf", "llama")
        writer.add_tokenizer_pre(rule)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
    assert load.splitting_rule(tmp_path / "gpt-2.gguf").pre_tokenize_str("a 12")[1][0] == "Ġ12"
    assert len(load.splitting_rule(tmp_path / "smollm.gguf").pre_tokenize_str("a 12")) == 4
    with pytest.raises(ModelUnavailable, match="'llama-bpe', which is not known here"):
        load.splitting_rule(tmp_path / "llama-bpe.gguf")


def test_a_second_gpu_is_one_sentence():
    with pytest.raises(ModelUnavailable, match="CUDA_VISIBLE_DEVICES=1"):
        load_model("random:tiny", device="cuda:1")


def test_two_fast_steps_over_the_same_weights_both_stay_right(tiny):
    model, tokenizer = tiny
    engines = [by_hand(ContinuousEngine(model, tokenizer, 2, 96, runner=FastStep))
               for _ in range(2)]
    plain = by_hand(ContinuousEngine(model, tokenizer, 2, 96))
    for engine in (*engines, plain):
        sequence = engine.submit(prompt(3, 21), SamplingParams(12, ignore_eos=True))
        while engine.waiting or engine.running:
            engine.step()
        want = list(generate_tokens(model, prompt(3, 21), sequence.params))
        assert sequence.generated_tokens == want


@pytest.mark.parametrize("runner", [BatchRunner, FastStep])
def test_what_is_no_number_does_not_reach_the_slots_next_owner(tiny, runner):
    model, tokenizer = tiny
    engine = by_hand(ContinuousEngine(model, tokenizer, 1, 96, runner=runner))
    embedding = model.get_input_embeddings().weight
    kept = embedding[500].clone()
    with torch.inference_mode():
        embedding[500] = float("nan")
    try:
        engine.submit([500] * 40, SamplingParams(4, ignore_eos=True))
        sequence = engine.submit(prompt(1, 9), SamplingParams(12, ignore_eos=True))
        while engine.waiting or engine.running:
            engine.step()
    finally:
        with torch.inference_mode():
            embedding[500] = kept
    want = list(generate_tokens(model, prompt(1, 9), sequence.params))
    assert sequence.generated_tokens == want

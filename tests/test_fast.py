"""The fast step: same numbers, the model untouched for others, and a way on where it cannot be."""
import importlib.util
import os
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import ROOT, by_hand, plant, prompt

from cbserver.baseline import generate_tokens
from cbserver.fast import FastStep
from cbserver.model.sampling import SamplingParams
from cbserver.scheduler import ContinuousEngine
from cbserver.sequence import Sequence


def run(model, tokenizer, count=5, tokens=10, **options):
    engine = by_hand(ContinuousEngine(model, tokenizer, slots=3, max_len=96, runner=FastStep,
                                      **options))
    sequences = [engine.submit(prompt(i, 4 + 9 * i), SamplingParams(tokens, ignore_eos=True))
                 for i in range(count)]
    while engine.waiting or engine.running:
        engine.step()
    return engine, sequences


def test_the_model_stays_as_it_is_for_others_and_its_weights_are_not_copied(tiny):
    model, tokenizer = tiny
    ids = torch.tensor([prompt(1, 9)], device=model.device)
    before = model(ids).logits
    attention = model.config._attn_implementation
    engine, _ = run(model, tokenizer)
    assert engine.runner.fused
    assert torch.equal(model(ids).logits, before)
    assert model.config._attn_implementation == attention
    layer = model.base_model.layers[0].self_attn
    assert (layer.q_proj.weight.untyped_storage().data_ptr()
            == layer.v_proj.weight.untyped_storage().data_ptr())


def test_a_model_built_otherwise_costs_one_warning_and_stays_exact(tiny, qwen3):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine, sequences = run(qwen3, tiny[1])
    assert not engine.runner.fused
    assert ["speed only" in str(w.message) for w in caught].count(True) == 1
    for s in sequences:
        assert s.generated_tokens == list(generate_tokens(qwen3, s.prompt_tokens, s.params))


def test_one_slot_has_the_fused_pass_too(tiny):
    model, tokenizer = tiny
    engine = by_hand(ContinuousEngine(model, tokenizer, 1, 96, runner=FastStep))
    assert engine.runner.fused
    sequence = engine.submit(prompt(1, 9), SamplingParams(5, ignore_eos=True))
    while engine.running or engine.waiting:
        engine.step()
    assert sequence.generated_tokens == list(generate_tokens(model, prompt(1, 9), sequence.params))


def answers(runner, prompts):
    """Six tokens for each prompt, in a slot each, whatever a former owner has left there."""
    runner.tokens.fill_(511)  # no prompt here has it
    sequences = [Sequence(tokens, slot=slot) for slot, tokens in enumerate(prompts)]
    for sequence in sequences:
        if sequence.prefill_end > 0:
            runner.prefill(sequence, sequence.prefill_end)
    for _ in range(7):
        for sequence, token in runner.decode(sequences):
            sequence.generated_tokens.append(token)
    return [sequence.generated_tokens for sequence in sequences]


PROMPTS = [prompt(1, 1), prompt(2, 2), prompt(3, 40)]


def test_a_sequences_first_pass_reads_its_prompts_last_token(tiny, reference):
    found = answers(FastStep(tiny[0], 3, 96), PROMPTS)
    assert found == [reference(tokens, 6) for tokens in PROMPTS]


@pytest.mark.parametrize("bug, wrong", [
    ("False", {0, 1, 2}), ("0 < sequence.position == sequence.prefill_end", {0}),
    ("sequence.position == 0", {1, 2}), ("sequence.position >= sequence.prefill_end", {0, 1, 2})])
def test_a_last_token_forgotten_or_read_twice_shows_in_the_answers(bug, wrong, tiny, reference,
                                                                   monkeypatch):
    plant(monkeypatch, FastStep, "launch", "sequence.position == sequence.prefill_end", bug)
    found = answers(FastStep(tiny[0], 3, 96), PROMPTS)
    assert wrong == {i for i, tokens in enumerate(PROMPTS) if found[i] != reference(tokens, 6)}


KERNEL = """
from conftest import prompt
from test_fast import FastStep, run
import cbserver.fast as fast
from cbserver.baseline import generate_tokens
from cbserver.model.load import load_model

fast.kernel_pays = lambda model, max_len: True  # in Triton's interpreter, slowly
model, tokenizer = load_model("random:tiny", device="cpu")
engine, sequences = run(model, tokenizer, count=3, tokens=5, prefill_budget=20)
assert engine.runner.fused.kernel is not None
for s in sequences:
    assert s.generated_tokens == list(generate_tokens(model, s.prompt_tokens, s.params))
print("exact")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(os.environ.get("CB_TEST_DEVICE") == "cuda", reason="this one is for a CPU")
def test_the_attention_kernel_is_exact_in_tritons_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run([sys.executable, "-c", KERNEL], cwd=ROOT, capture_output=True, text=True,
                          timeout=240, env=env)
    assert done.stdout.strip().endswith("exact"), done.stderr[-2000:]

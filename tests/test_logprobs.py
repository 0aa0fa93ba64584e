"""Log-probabilities: the model's own, of prompt and answer, alone and in company."""
import functools

import pytest
import torch
from conftest import by_hand, prompt, received
from hypothesis import given, settings
from hypothesis import strategies as st

from cbserver.batch import BatchRunner, StaticEngine
from cbserver.fast import FastStep
from cbserver.model.logprobs import TOP
from cbserver.model.sampling import SamplingParams
from cbserver.scheduler import ContinuousEngine

RUNNERS = {"plain": BatchRunner, "fast": FastStep,
           "own pass": functools.partial(FastStep, fused=False)}
runners = pytest.mark.parametrize("runner", RUNNERS)

requests = st.fixed_dictionaries({
    "seed": st.integers(0, 11), "length": st.integers(1, 40), "max_tokens": st.integers(1, 12),
    "logprobs": st.none() | st.integers(0, TOP), "echo": st.booleans(),
    "temperature": st.sampled_from([0.0, 1.0])})


def play(engine, wishes):
    """All of them at once: their sequences, at their end."""
    engine = by_hand(engine)
    sequences = [engine.submit(prompt(r["seed"], r["length"]), SamplingParams(
        r["max_tokens"], ignore_eos=True, logprobs=r["logprobs"], echo=r["echo"], seed=r["seed"],
        temperature=r["temperature"], top_k=5)) for r in wishes]
    for _ in range(500):
        if not (engine.waiting or engine.running):
            break
        engine.step()
    for sequence in sequences:
        assert received(sequence) == sequence.generated_tokens
    return sequences


@torch.no_grad()
def of_a_forward_pass(model, tokens):
    """Log-probabilities of what comes behind each of these tokens: [tokens, vocabulary]."""
    ids = torch.tensor([tokens], device=model.device)
    return model(ids).logits[0].float().log_softmax(-1).cpu()


def check(sequence, model):
    params = sequence.params
    if params.logprobs is None:
        assert sequence.logprobs == [], "requests that ask for none pay nothing"
        return
    tokens = sequence.prompt_tokens + sequence.generated_tokens
    own = of_a_forward_pass(model, tokens)
    first = len(sequence.prompt_tokens)
    found = sequence.logprobs
    if params.echo:
        first = 1  # nothing foretells a prompt's first token
    found = found[:len(tokens) - first]
    assert len(found) == len(tokens) - first
    for at, entry in enumerate(found, first):
        right = own[at - 1]
        assert abs(entry.logprob - right[tokens[at]].item()) < 1e-4
        assert len({token for token, _ in entry.top}) == params.logprobs
        # Two tokens may be as likely as each other, to rounding: then either order is right.
        for (token, logprob), most in zip(entry.top, right.topk(params.logprobs).values.tolist()):
            assert abs(logprob - right[token].item()) < 1e-4
            assert abs(logprob - most) < 1e-4


@runners
@pytest.mark.parametrize("engine_class", [ContinuousEngine, StaticEngine])
def test_they_are_those_of_a_forward_pass_whoever_else_is_served(engine_class, runner, tiny):
    one = RUNNERS[runner](tiny[0], 3, 96)

    @settings(max_examples=15, deadline=None)
    @given(st.lists(requests, min_size=1, max_size=6), st.sampled_from([64, 6]))
    def holds(wishes, piece):
        one.piece = piece
        budget = {} if engine_class is StaticEngine else {"prefill_budget": piece}
        engine = engine_class(*tiny, slots=3, max_len=96, runner=lambda *sizes: one, **budget)
        for sequence in play(engine, wishes):
            check(sequence, tiny[0])

    holds()


@runners
def test_they_are_the_same_alone_and_in_company_to_rounding(runner, tiny):
    wish = dict(seed=3, length=20, max_tokens=8, logprobs=5, echo=True, temperature=0.0)
    others = [dict(wish, seed=i, length=5 + i, temperature=1.0) for i in range(5)]

    def logprobs(wishes):
        engine = ContinuousEngine(*tiny, slots=8, max_len=96, runner=RUNNERS[runner])
        return [entry.logprob for entry in play(engine, wishes)[0].logprobs[:27]]

    assert logprobs([wish, *others]) == pytest.approx(logprobs([wish]), abs=1e-5)


def test_an_answer_is_the_same_with_and_without_them(tiny):
    plain = dict(seed=3, length=20, max_tokens=12, logprobs=None, echo=False, temperature=1.0)
    asked = plain | {"logprobs": 3, "echo": True}
    without, with_them = (play(ContinuousEngine(*tiny, max_len=96), [wish])[0]
                          for wish in (plain, asked))
    assert without.generated_tokens == with_them.generated_tokens

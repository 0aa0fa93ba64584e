"""Sampling: draws follow the softmax, and (seed, position) alone decide each of them."""
import pytest
import torch

from cbserver.model.sampling import SamplingParams, gumbel, sample
from cbserver.sequence import Sequence

MANY = 6000


def draws(logits, params, position=3):
    """One draw for each params, all from the same logits: [len(params)]."""
    return sample(logits.expand(len(params), -1), at([position] * len(params), params))


def at(positions, params):
    """Sequences that are at these positions."""
    return [Sequence([], its, position=position) for position, its in zip(positions, params)]


def hot(**options):
    return [SamplingParams(temperature=1.0, seed=i, **options) for i in range(MANY)]


def shares(tokens, count):
    return tokens.bincount(minlength=count) / len(tokens)


def test_draws_follow_the_softmax():
    chances = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    found = shares(draws(chances.log(), hot()), 5)
    spread = (chances * (1 - chances) / MANY).sqrt()
    assert ((found - chances).abs() < 4 * spread).all(), found
    found = shares(draws(chances.log(), [SamplingParams(temperature=0.5, seed=i)
                                         for i in range(MANY)]), 5)
    sharper = chances**2 / (chances**2).sum()
    assert ((found - sharper).abs() < 0.03).all(), found


def test_the_noise_of_neighbouring_seeds_and_positions_is_unrelated():
    count = torch.arange(200)
    for a, b in (((count, count * 0), (count + 1, count * 0)),
                 ((count, count), (count, count + 1))):
        pair = torch.stack([gumbel(*a, 50).flatten(), gumbel(*b, 50).flatten()])
        assert abs(torch.corrcoef(pair)[0, 1]) < 0.05
    noise = gumbel(torch.arange(300), torch.zeros(300, dtype=torch.long), 400)
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772) < 0.02 and abs(noise.var() - 1.6449) < 0.05  # Gumbel's


def test_top_k_and_top_p_leave_exactly_their_tokens():
    chances = torch.tensor([0.05, 0.4, 0.3, 0.15, 0.1])
    assert set(draws(chances.log(), hot(top_k=2)).tolist()) == {1, 2}
    assert set(draws(chances.log(), hot(top_p=0.75)).tolist()) == {1, 2, 3}, "the last one in stays"
    assert set(draws(chances.log(), hot(top_p=0.75, top_k=1)).tolist()) == {1}
    found = shares(draws(chances.log(), hot(top_k=2)), 5)
    assert abs(found[1] - 4 / 7) < 0.03, "what is left is drawn in proportion"


def test_min_p_leaves_what_has_that_share_of_the_likeliests_chance():
    chances = torch.tensor([0.05, 0.4, 0.3, 0.15, 0.1])
    assert set(draws(chances.log(), hot(min_p=0.3)).tolist()) == {1, 2, 3}
    assert set(draws(chances.log(), hot(min_p=1.0)).tolist()) == {1}
    assert set(draws(chances.log(), hot(min_p=0.3, top_k=2)).tolist()) == {1, 2}


def test_before_min_tokens_no_sign_for_the_end_is_chosen():
    logits = torch.tensor([[0.0, 5.0, 4.0, 3.0]]).expand(4, 4)
    params = [SamplingParams(min_tokens=2), SamplingParams(min_tokens=2, stop_token_ids=(2, 9)),
              SamplingParams(min_tokens=2, ignore_eos=True), SamplingParams()]
    assert sample(logits, at([1] * 4, params), eos={1}).tolist() == [2, 3, 1, 1]
    assert sample(logits, at([2] * 4, params), eos={1}).tolist() == [1] * 4


def test_a_row_draws_the_same_alone_and_among_others():
    logits = torch.randn(6, 100, generator=torch.Generator().manual_seed(0))
    params = [SamplingParams(temperature=0.3 + i / 3, seed=7 * i, top_k=5 * (i % 2),
                             top_p=1 - i / 20) for i in range(6)]
    together = sample(logits, at(range(6), params))
    alone = [sample(logits[i:i + 1], at([i], params[i:i + 1])).item() for i in range(6)]
    assert together.tolist() == alone


def test_a_greedy_row_among_sampling_ones_stays_greedy():
    logits = torch.randn(40, 50, generator=torch.Generator().manual_seed(1))
    params = [SamplingParams(temperature=2.0 * (i % 2), seed=i) for i in range(40)]
    tokens = sample(logits, at([0] * 40, params))
    assert (tokens[::2] == logits.argmax(-1)[::2]).all()
    assert (tokens[1::2] != logits.argmax(-1)[1::2]).any()


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1, 2**80])
def test_any_integer_is_a_seed(seed):
    params = [SamplingParams(temperature=1.0, seed=seed)] * 2
    first, second = sample(torch.zeros(2, 50), at([4, 4], params)).tolist()
    assert first == second


def test_without_a_seed_draws_differ():
    params = [SamplingParams(temperature=1.0)] * 50
    assert len(set(sample(torch.zeros(50, 1000), at([0] * 50, params)).tolist())) > 25


@pytest.mark.parametrize("top_p", [1e-46, 1e-300, 5e-324])
def test_a_top_p_that_is_zero_in_float32_leaves_the_likeliest(top_p):
    logits = torch.tensor([[0.0, 1.0, 5.0, 2.0]])
    params = [SamplingParams(temperature=1.0, top_p=top_p, seed=1)]
    assert sample(logits, at([3], params)).tolist() == [2]

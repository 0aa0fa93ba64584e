"""The same answer at any load: what a request's passes look like does not depend on its neighbours.

Equal shapes are what bit-equality on a GPU rests on. Here they are written down on a CPU, with the
decisions that the attention kernel brings and torch's own attention in its place.
"""
import functools

import pytest
from conftest import by_hand, prompt
from hypothesis import given, settings
from hypothesis import strategies as st

import cbserver.fast as fast
from cbserver.fast import FastStep, FusedPass
from cbserver.model.sampling import SamplingParams
from cbserver.scheduler import ContinuousEngine
from cbserver.sequence import Status

requests = st.fixed_dictionaries({
    "arrival": st.integers(0, 12),  # steps before it is submitted
    "seed": st.integers(0, 11),
    "length": st.integers(1, 70),
    "max_tokens": st.integers(1, 12),
})


class Noted(FastStep):
    """Writes down the sizes of each sequence's passes, in order."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.sizes = {}
        self.in_this_pass = []

    def prefill(self, sequence, end):
        self.in_this_pass = [sequence]
        super().prefill(sequence, end)

    def launch(self, sequences):
        self.in_this_pass = sequences
        return super().launch(sequences)

    def run(self, one_pass, *sizes):
        for sequence in self.in_this_pass:
            self.sizes.setdefault(id(sequence), []).append((one_pass.__name__, *sizes))
        return super().run(one_pass, *sizes)


def attend_by_torch(self, layer, qkv, positions):
    """FusedPass.attend_by_kernel without Triton: all keys of a slot, behind a mask."""
    cos = self.cos[positions.flatten(), None]
    sin = self.sin[positions.flatten(), None]
    mask = self.cache.select(slice(0, len(qkv)), positions, self.cache.max_len)
    return self.attend(layer, qkv, cos, sin, positions, mask)


@pytest.fixture(scope="module", autouse=True)
def as_with_the_kernel():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "jit", lambda kernel: kernel)
        patch.setattr(fast, "kernel_pays", lambda model, max_len: True)
        patch.setattr(FusedPass, "attend_by_kernel", attend_by_torch)
        yield


def play(tiny, schedule, engine_class=ContinuousEngine, slots=9, invariant=None):
    """[(sequence, sizes of its passes)] of a schedule, in the order of its requests."""
    runner = functools.partial(Noted, invariant=invariant)
    engine = by_hand(engine_class(*tiny, slots=slots, max_len=96, prefill_budget=24,
                                  runner=runner))
    waiting = sorted(schedule, key=lambda r: r["arrival"])
    started = []
    step = 0
    while waiting or engine.waiting or engine.running:
        while waiting and waiting[0]["arrival"] <= step:
            r = waiting.pop(0)
            params = SamplingParams(r["max_tokens"], ignore_eos=True)
            started.append(engine.submit(prompt(r["seed"], r["length"]), params))
        engine.step()
        step += 1
        assert step < 1000
    assert all(s.status is Status.FINISHED for s in started)
    return [(s, engine.runner.sizes[id(s)]) for s in started]


def differ(tiny, schedule, **options):
    """The requests whose passes have other sizes than when they are served alone."""
    in_order = sorted(schedule, key=lambda r: r["arrival"])
    together = play(tiny, schedule, **options)
    different = []
    for request, (sequence, sizes) in zip(in_order, together):
        [(alone, sizes_alone)] = play(tiny, [request | {"arrival": 0}], **options)
        assert sequence.generated_tokens == alone.generated_tokens
        if sizes != sizes_alone:
            different.append(request)
    return different


@settings(max_examples=25, deadline=None)
@given(st.lists(requests, min_size=2, max_size=12))
def test_the_sizes_of_a_requests_passes_do_not_depend_on_its_neighbours(tiny, schedule):
    assert differ(tiny, schedule) == []


CROWD = [{"arrival": 0, "seed": i, "length": 50 - i, "max_tokens": 8} for i in range(9)]


class Cutting(ContinuousEngine):
    """Cuts a piece to what is left of the step's budget: this is what must not happen."""

    def prefill_prompts(self):
        left = self.prefill_budget
        for sequence in self.running:
            piece = min(sequence.prefill_end - sequence.position, left)
            if piece > 0:
                self.runner.prefill(sequence, sequence.position + piece)
                left -= piece


@pytest.mark.parametrize("broken", [{"engine_class": Cutting}, {"invariant": False}])
def test_pieces_cut_to_fit_a_step_and_rows_left_out_would_be_noticed(tiny, broken):
    assert differ(tiny, CROWD) == []
    assert differ(tiny, CROWD, **broken)

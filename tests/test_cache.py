"""The cache: a pass reads it where it lies, and it takes memory as it is used."""
import os

import psutil
import pytest
import torch
from conftest import by_hand, prompt

from cbserver.batch import BatchRunner, SlotCache
from cbserver.fast import FastStep
from cbserver.model.sampling import SamplingParams
from cbserver.scheduler import ContinuousEngine

ON_GPU = os.environ.get("CB_TEST_DEVICE") == "cuda"


@pytest.mark.parametrize("runner", [BatchRunner, FastStep])
def test_a_decode_pass_reads_views_of_the_cache_and_no_copies(runner, tiny, monkeypatch):
    seen = []
    update = SlotCache.update

    def noted(cache, *args, **kwargs):
        keys, values = update(cache, *args, **kwargs)
        seen.append((keys.untyped_storage().data_ptr(), values.untyped_storage().data_ptr()))
        return keys, values

    if runner is FastStep and ON_GPU:
        pytest.skip("there the kernel reads the cache itself")
    engine = by_hand(ContinuousEngine(*tiny, slots=4, max_len=96, runner=runner))
    cache = engine.runner.cache
    monkeypatch.setattr(SlotCache, "update", noted)
    for i in range(3):
        engine.submit(prompt(i, 8 + 9 * i), SamplingParams(6, ignore_eos=True))
    engine.step()
    seen.clear()
    while engine.running:
        engine.step()
    here = cache.keys.untyped_storage().data_ptr(), cache.values.untyped_storage().data_ptr()
    assert seen
    assert set(seen) == {here}


@pytest.mark.skipif(ON_GPU, reason="a GPU has no such pages")
def test_memory_is_taken_as_it_is_used(tiny):
    process = psutil.Process()
    before = process.memory_info().rss
    engine = by_hand(ContinuousEngine(*tiny, slots=512))
    cache = engine.runner.cache
    engine.submit(prompt(1, 40), SamplingParams(8, ignore_eos=True))
    while engine.waiting or engine.running:
        engine.step()
    taken = process.memory_info().rss - before
    assert cache.keys.nbytes + cache.values.nbytes > 500e6
    assert taken < 100e6
    # Zeros all the same; at position 0 the budget was measured.
    assert not cache.keys[:, 15, :, 1:].any()
    assert torch.any(cache.keys[:, 0])

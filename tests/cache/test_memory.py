"""The budget bounds memory: the buffers, and the process."""

import math
import subprocess
import sys

import pytest
import torch

from raas_cache import RaaSCache

from ..helpers import generate, prompt, tiny_model


@pytest.mark.parametrize(("length", "budget", "page_size"), [(21, 64, 4), (20, 64, 4), (33, 128, 16)])
def test_nbytes_is_pages_times_page_bytes(length, budget, page_size):
    model = tiny_model(dtype=torch.float32)
    cache = RaaSCache(budget, page_size=page_size, min_decode_pages=2)
    generate(model, prompt(2, length), cache, 1)
    prompt_pages = math.ceil(length / page_size)
    slots = (prompt_pages + max(budget // page_size - prompt_pages, 2)) * page_size
    assert cache.nbytes == 2 * 2 * 2 * 2 * slots * 8 * 4  # K and V, layers, rows, KV heads, slots, head size, fp32
    assert cache.resident_positions(0).shape == (2, 2, slots)


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_codes_take_a_byte_each_and_a_scale_a_token(kv_dtype):
    cache = RaaSCache(64, page_size=4, min_decode_pages=2, kv_dtype=kv_dtype)
    generate(tiny_model(dtype=torch.float32), prompt(2, 20), cache, 1)
    assert cache.nbytes == 2 * 2 * 2 * 2 * 64 * (8 + 4)  # K and V, layers, rows, KV heads, slots, head size + scale


def test_4_bit_codes_take_half_a_byte_each_and_their_bounds():
    cache = RaaSCache(64, page_size=4, min_decode_pages=2, kv_dtype="int4")
    generate(tiny_model(dtype=torch.float32), prompt(2, 20), cache, 1)
    keys = 64 * 8 // 2 + 2 * 16 * 8 * 4 + 4 * 8 * 4  # codes, key_min and key_max of 16 pages, the open page
    values = 64 * 8 // 2 + 2 * 64 * 4  # codes, the two bounds of each token
    assert cache.nbytes == 2 * 2 * 2 * (keys + values)  # layers, rows, KV heads


@pytest.mark.filterwarnings("ignore:budget=64 leaves")
@pytest.mark.parametrize(("mode", "slots"), [("pin", 200 + 8 * 4), ("select", 200 + 32), ("evict", 64)])
def test_a_prompt_longer_than_the_budget(mode, slots):
    """In one forward and in chunks: pinned and the floor of decode pages, or and half of the budget, or the budget."""
    model = tiny_model(dtype=torch.float32)
    for chunk in (200, 37):
        cache = RaaSCache(64, page_size=4, prompt=mode)
        generate(model, prompt(2, 200), cache, 40, sample=False, prefill_chunk_size=chunk)
        assert {layer.keys.shape[2] for layer in cache.layers} == {slots}
        assert cache.resident_tokens(0).max() <= slots


def test_nbytes_is_the_same_after_5000_steps():
    model = tiny_model(layers=1, dtype=torch.float32)
    cache = RaaSCache(64, page_size=4)
    sizes, pointers = set(), set()
    with torch.no_grad():
        model(**prompt(1, 21), past_key_values=cache)
        for step in range(5000):
            model(torch.tensor([[1 + step % 90]]), past_key_values=cache)
            if step >= 99:
                sizes.add(cache.nbytes)
                pointers.add(cache.layers[0].keys.data_ptr())
    assert len(sizes) == 1 and len(pointers) == 1
    assert cache.get_seq_length() == 5021
    assert cache.evicted_pages(0).tolist() == [[1240, 1240]]
    assert cache.resident_tokens(0).tolist() == [[61, 61]]


def noted_elements(note):
    """Elements of the tensors of a note of the rollback."""
    tensors = [*vars(note).values(), *(vars(note.contents).values() if note.contents else [])]
    return sum(tensor.numel() for tensor in tensors if isinstance(tensor, torch.Tensor))


def test_recording_left_on_stays_within_a_budget():
    """`generate` never says that assisted decoding is over: what is noted must not grow either."""
    model, cache = tiny_model(layers=1, dtype=torch.float32), RaaSCache(64, page_size=4)
    cache.activate_past_recording()
    sizes = set()
    with torch.no_grad():
        model(**prompt(1, 21), past_key_values=cache)
        for step in range(600):
            model(torch.tensor([[1 + step % 90]]), past_key_values=cache)
            if step > 200:
                sizes.add(sum(map(noted_elements, cache.layers[0].engine.rollback.notes)))
    assert max(sizes) < 1.1 * min(sizes)
    with pytest.raises(RuntimeError, match="can take back only 64 tokens"):
        cache.crop(-65)
    cache.crop(-64)
    assert cache.get_seq_length() == 621 - 64


SCRIPT = """
import resource, sys, torch
torch.set_num_threads(1)
from raas_cache import RaaSCache
from tests.helpers import prompt, tiny_model
model, cache = tiny_model(layers=1, head_dim=64, dtype=torch.float32), RaaSCache(256)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.no_grad():
    model(**prompt(1, 21), past_key_values=cache)
    for step in range(20_000):
        model(torch.tensor([[1 + step % 90]]), past_key_values=cache)
        if step == 2_000:
            early = peak()
print(early, peak())
"""


def test_peak_process_memory_is_flat_from_2k_to_20k_steps():
    """A cache that grew by these 18,000 tokens would add 18 MB of K and V; the allocator may drift by a few."""
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    early, late = map(int, result.stdout.split())
    assert late - early < 6 * 1024, f"peak grew from {early} KiB to {late} KiB"

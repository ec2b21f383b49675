"""The draws of `random`: even, new at each eviction, and a function of the seed and of the row's own tokens."""

import pytest
import torch

from raas_cache import RandomCache
from raas_cache.engine.draw import WORD, layer_seed, mixed, uniform

from ..helpers import generate, prompt, resident_set, tiny_model


def pages_at(step, pages=50, rows=1, heads=2):
    """The clock and the first tokens of so many pages of 4 tokens, `step` tokens after the oldest was opened."""
    clock = torch.full((rows, heads, 2), step)
    first = torch.arange(0, 4 * pages, 4, dtype=torch.int32).expand(rows, heads, -1)
    return clock, first


def test_a_hash_is_the_same_for_an_int_and_a_tensor():
    words = [0, 1, 2, 0x80000000, WORD]
    assert mixed(torch.tensor(words)).tolist() == [mixed(word) for word in words]
    assert len({mixed(word) for word in range(10_000)}) == 10_000
    assert all(0 <= mixed(word) <= WORD for word in words)


def test_every_page_is_evicted_equally_often():
    """The page with the smallest number of each of 20,000 steps: chi squared with 49 degrees of freedom."""
    for seed in (0, 1):
        counts = torch.zeros(2, 50)
        for step in range(200, 20_200):
            smallest = uniform(seed, *pages_at(step)).argmin(-1)[0]
            counts[torch.arange(2), smallest] += 1
        chi_squared = ((counts - 400) ** 2 / 400).sum(-1)
        assert (chi_squared > 22).all() and (chi_squared < 92).all(), chi_squared  # 1 in 4,000 on either side


def test_steps_heads_layers_and_seeds_draw_independently():
    draws = [
        uniform(layer_seed(seed, layer), *pages_at(step)) for seed in (0, 1) for layer in (0, 1) for step in (9, 10)
    ]
    numbers = torch.stack(draws).flatten(0, 2)  # [2 * 2 * 2 * heads, pages]
    correlation = torch.corrcoef(numbers) - torch.eye(len(numbers))
    assert correlation.abs().max() < 0.5  # 50 pages: a standard deviation of 0.14
    assert numbers.unique().numel() == numbers.numel()


def held_after(seed=0, steps=60, inputs=None, **options):
    cache = RandomCache(56, page_size=4, recent_tokens=8, seed=seed, **options)
    generate(tiny_model(), inputs or prompt(1, 21), cache, steps, sample=False)
    return [resident_set(cache, layer, 0, head) for layer in range(2) for head in range(2)]


def test_the_seed_decides():
    assert held_after(seed=3) == held_after(seed=3)
    assert held_after(seed=3) != held_after(seed=4)
    assert len({frozenset(held) for held in held_after()}) == 4, "layers and heads draw alike"


def test_the_prompt_and_the_newest_tokens_are_held():
    for held in held_after():
        assert set(range(21)) | set(range(80 - 8, 80)) <= held
        # 6 pages of the prompt and 8 decode pages, of which the last has 3 tokens.
        assert len(held) == 21 + 8 * 4 - 1


def test_without_room_for_more_than_the_newest_tokens_it_is_a_window():
    cache = RandomCache(48, page_size=4, min_decode_pages=2, recent_tokens=64)
    generate(tiny_model(), prompt(1, 21), cache, 60, sample=False)
    assert resident_set(cache, 1, 0, 1) == set(range(21)) | set(range(57, 80))


def test_the_random_state_of_torch_stays():
    before = torch.get_rng_state()
    held_after()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mode", ["pin", "evict"])
def test_a_page_that_survived_once_may_be_evicted_later(mode):
    """Each eviction is a new draw: with one draw for each page, the oldest pages would stay for ever."""
    cache = RandomCache(64, page_size=4, recent_tokens=8, prompt=mode)
    generate(tiny_model(), prompt(1, 5), cache, 700, sample=False)
    oldest = min(token for token in resident_set(cache, 0, 0, 0) if token >= 8)
    assert oldest > 100

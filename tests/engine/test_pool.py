"""A pool of pages: rows that come and go at random compute what rows with memory of their own compute, bit for bit."""

import copy
import random

import numpy as np
import pytest
import torch

from raas_cache.engine.block_pool import BlockPool
from raas_cache.engine.forward import Decode
from raas_cache.engine.prefill import truncate
from raas_cache.methods.registry import POLICIES

from .pooled import SOFTMAX, SideBySide
from .tables import PAGE, rows_of, snapshot


class TestBlocks:
    def test_blocks_are_taken_shared_and_given_back(self):
        pool = BlockPool(6)
        assert pool.free == 5 and pool.peak == 0
        first, second = pool.take(2), pool.take(3)
        assert sorted([*first, *second]) == [1, 2, 3, 4, 5] and first.dtype == np.int32
        assert pool.free == 0 and pool.peak == 5
        pool.share(first)
        pool.give_back(first)
        assert pool.free == 0
        pool.give_back(first)
        assert pool.free == 2 and sorted(pool.take(2)) == sorted(first)
        pool.give_back(second)
        assert pool.free == 3 and pool.peak == 5

    def test_too_many_blocks_are_refused_and_none_is_taken(self):
        pool = BlockPool(4)
        pool.take(1)
        with pytest.raises(RuntimeError, match="3 blocks are needed, but only 2 of 3 blocks are free: release a row"):
            pool.take(3)
        assert pool.free == 2 and pool.peak == 1 and len(pool.take(2)) == 2


def options_of(method):
    """The options of the layers for a method, so that its pages differ and are evicted."""
    policy = POLICIES[method]
    return {"policy": policy(**({"recent_tokens": PAGE} if method in ("random", "lazy_eviction") else {}))}


CASES = [
    *((method, {"prompt": prompt}) for method, policy in POLICIES.items() for prompt in policy.prompts),
    *(("raas", {"kv_dtype": kv_dtype, "prompt": prompt})
      for kv_dtype in ("int8", "int4", "fp8") for prompt in ("pin", "evict", "select")),
    ("raas", {"scoring": "minmax", "granularity": "layer"}),
    ("h2o", {"kv_dtype": "int4", "prompt": "evict"}),
    ("quest", {"kv_dtype": "int4"}),
    ("rkv", {"kv_dtype": "int8", "prompt": "evict"}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_rows_that_come_and_go_at_random(method, options):
    choose = random.Random(f"{method}{options}")
    is_coded = "kv_dtype" in options
    # A row that reserves fewer pages than its limit selects among fewer: sums over zeros then have another order.
    tolerance = (1e-5 if is_coded else 1e-12) if options.get("prompt") == "select" else 0.0
    layers = SideBySide(
        4, 18, dtype=torch.float32 if is_coded else torch.float64, tolerance=tolerance, **options_of(method), **options
    )
    table, left, is_evict = layers.table, {}, layers.table.settings.prompt == "evict"
    layers.poison()
    evicted = waits = 0
    for _ in range(130):
        free = [row for row in range(4) if row not in left]
        if free and choose.random() < 0.5:
            row, prompt, answer = choose.choice(free), choose.randint(1, 4 * PAGE), choose.randint(1, 12 * PAGE)
            prompt_pages, decode_pages = -(-prompt // PAGE), -(-answer // PAGE)
            pages = prompt_pages + min(decode_pages, table.limit_beside(1 if is_evict else prompt_pages))
            before = copy.deepcopy(table.blocks), snapshot(table)
            if pages > table.blocks.pool.free:
                with pytest.raises(RuntimeError, match="blocks are needed, but only"):
                    layers.reserve(row, pages)
                assert np.array_equal(table.blocks.ids, before[0].ids) and table.blocks.pool.free == before[0].pool.free
                layers.check()
                waits += 1
            else:
                layers.reserve(row, pages)
                left[row] = answer
                chunk = prompt if is_evict else choose.randint(1, prompt)
                layers.forward([row], layers.draw_tokens(1, chunk), admits=True)
                if chunk < prompt:
                    layers.forward([row], layers.draw_tokens(1, prompt - chunk), is_prefill=True)
        elif left:
            rows = choose.sample(sorted(left), choose.randint(1, len(left)))
            layers.forward(rows, layers.draw_tokens(len(rows), 1))
            evicted += int(table.evicted.sum() > 0)
            for row in rows:
                left[row] -= 1
                if not left[row]:
                    del left[row]
                    layers.release(row)
                    layers.poison()
    assert waits and (evicted or not table.settings.policy.evicts)
    for row in left:
        layers.release(row)
    assert table.blocks.pool.free == 17 and not table.blocks.ids.any()


@pytest.mark.parametrize("prompt", ["pin", "select"])
@pytest.mark.parametrize("kv_dtype", [None, "int8", "int4"])
def test_rows_share_the_pages_of_a_prompt(kv_dtype, prompt):
    """Row 1 shares two pages of row 0, and goes on alone; row 0 leaves, and row 2 shares what row 1 still has."""
    layers = SideBySide(3, 30, dtype=torch.float32, tolerance=1e-5, kv_dtype=kv_dtype, prompt=prompt,
                        scoring="minmax")  # fmt: skip
    pool, tokens = layers.table.blocks.pool, layers.draw_tokens(1, 3 * PAGE)

    def chunk(begin, end):
        return [states[:, :, begin:end] for states in tokens]

    layers.reserve(0, 6)
    layers.forward([0], chunk(0, 2 * PAGE + 3), admits=True)
    for source, row in ((0, 1), (1, 2)):
        free = pool.free
        layers.reserve(row, 6, shared_from=(source, 2))
        assert pool.free == free - 4
        ids = layers.table.blocks.ids
        assert np.array_equal(ids[row, :2], ids[source, :2]) and not np.isin(ids[row, 2:6], ids[source]).any()
        fill_plain(layers, row, chunk(0, 2 * PAGE))
        layers.forward([row], chunk(2 * PAGE, 3 * PAGE), is_prefill=True)
        shared = layers.table.kv.keys[ids[row, :2]].clone()
        for _ in range(5 * PAGE):
            rows = sorted(layers.active)
            layers.forward(rows, layers.draw_tokens(len(rows), 1))
        assert layers.table.evicted[row] > 0
        assert torch.equal(layers.table.kv.keys[ids[row, :2]], shared)
        layers.release(source)
        layers.poison()
    layers.release(2)
    assert pool.free == 29 and pool.peak < 18


def fill_plain(layers, row, tokens):
    """Give the plain layer the tokens that the row of the other layer shares."""
    query, key, value = tokens
    layer = layers.plain
    layer.set_rows(rows_of(row))
    layer.admits = True
    Decode(layer).begin(key, value)[0].attend(query, SOFTMAX)


def test_a_row_that_writes_more_than_it_reserved_is_refused_before_anything_changes():
    layers = SideBySide(3, 30)
    with pytest.raises(RuntimeError, match="Row 1 has reserved 0 pages, but needs 2: reserve as many pages"):
        layers.forward([1], layers.draw_tokens(1, PAGE + 1), admits=True)
    layers = SideBySide(3, 30)
    layers.reserve(0, 2)
    layers.forward([0], layers.draw_tokens(1, PAGE), admits=True)
    for _ in range(PAGE):
        layers.forward([0], layers.draw_tokens(1, 1))
    before, tokens = snapshot(layers.table), layers.table.tokens
    with pytest.raises(RuntimeError, match="Row 0 has reserved 2 pages, but needs 3"):
        layers.forward([0], layers.draw_tokens(1, 1))
    with pytest.raises(RuntimeError, match="Row 0 has reserved 2 pages, but needs 3"):
        layers.table.before_decode()
    assert layers.table.tokens == tokens and layers.table.counts.decoded[0] == PAGE
    assert torch.equal(layers.table.kv.clock, before.kv.clock)
    layers.check()


@pytest.mark.parametrize("kv_dtype", [None, "int4"])
def test_a_turn_of_a_user_goes_into_pages_that_were_reserved_for_it(kv_dtype):
    layers = SideBySide(3, 30, dtype=torch.float32, tolerance=1e-5, kv_dtype=kv_dtype)
    limit = layers.table.limit_beside(2)
    layers.reserve(1, 2 + limit + 2)
    layers.forward([1], layers.draw_tokens(1, PAGE + 2), admits=True)
    for _ in range((limit + 2) * PAGE):
        layers.forward([1], layers.draw_tokens(1, 1))
    layers.forward([1], layers.draw_tokens(1, PAGE + 3), is_prefill=True)
    assert layers.table.counts.pinned_pages[1] == 4 and layers.table.evicted[1] > 0
    for _ in range(2 * PAGE):
        layers.forward([1], layers.draw_tokens(1, 1))
    with pytest.raises(RuntimeError, match="Row 1 has reserved 8 pages, but needs 10"):
        layers.forward([1], layers.draw_tokens(1, 2 * PAGE), is_prefill=True)


@pytest.mark.parametrize("answer", [PAGE + 1, 8 * PAGE])
def test_a_prompt_that_is_evicted_is_the_only_one_of_its_row(answer):
    layers = SideBySide(2, 40, prompt="evict")
    layers.reserve(0, 12)
    layers.forward([0], layers.draw_tokens(1, 8 * PAGE), admits=True)
    for _ in range(answer):
        layers.forward([0], layers.draw_tokens(1, 1))
    with pytest.raises(RuntimeError, match="Row 0 has reserved 6 pages, but needs"):
        layers.forward([0], layers.draw_tokens(1, 2), is_prefill=True)
    layers.check()


def test_a_row_of_its_full_limit_recycles_its_pages_without_the_host():
    layers = SideBySide(2, 30)
    for row in range(2):
        layers.reserve(row, 6)
        layers.forward([row], layers.draw_tokens(1, PAGE), admits=True)
    assert layers.table.is_full_size
    layers.table.before_decode()
    assert layers.table.quiet_steps > 10**9


@pytest.mark.parametrize("prompt", ["pin", "evict"])
def test_a_spare_row_fills_up_a_step_and_needs_no_memory(prompt):
    layers = SideBySide(3, 10, prompt=prompt)
    layers.reserve(1, 6)
    layers.forward([1], layers.draw_tokens(1, 2 * PAGE), admits=True)
    for _ in range(2 * PAGE):
        tokens = layers.draw_tokens(1, 1)
        layers.pooled.set_rows(rows_of(1, 2, 2))
        query, key, value = (states.expand(3, -1, -1, -1).clone() for states in tokens)
        ours = Decode(layers.pooled).begin(key, value)[0].attend(query, SOFTMAX)
        layers.plain.set_rows(rows_of(1))
        layers.plain.table.set_pages(layers.table.num_pages)
        expected = Decode(layers.plain).begin(*(states.clone() for states in tokens[1:]))[0].attend(tokens[0], SOFTMAX)
        assert torch.equal(ours[:1], expected)
        layers.check()
    layers.reserve(2, 3)
    layers.forward([2], layers.draw_tokens(1, PAGE + 1), admits=True)
    layers.forward([1, 2], layers.draw_tokens(2, 1))


def test_what_cannot_be_reserved():
    layers = SideBySide(3, 20)
    layers.reserve(0, 4)
    with pytest.raises(RuntimeError, match="Row 0 holds a sequence, or has reserved pages already"):
        layers.reserve(0, 4)
    layers.forward([0], layers.draw_tokens(1, 2 * PAGE + 1), admits=True)
    for pages, shared in ((6, 3), (1, 2)):
        with pytest.raises(ValueError, match=rf"shared_from=\(0, {shared}\): row 1 reserves {pages} pages"):
            layers.reserve(1, pages, shared_from=(0, shared))
    evicts = SideBySide(2, 20, prompt="evict")
    evicts.reserve(0, 4)
    evicts.forward([0], evicts.draw_tokens(1, 2 * PAGE), admits=True)
    with pytest.raises(ValueError, match="use prompt='pin' or 'select'"):
        evicts.reserve(1, 4, shared_from=(0, 1))
    for one in (layers, evicts):
        assert one.table.blocks.reserved[1] == 0 and one.table.blocks.pool.free == 15
        one.check()


def test_memory_that_runs_out_while_rows_get_more_pages_takes_no_block(monkeypatch):
    from raas_cache.engine import page_table

    layers = SideBySide(2, 90)
    layers.reserve(0, 4)
    layers.forward([0], layers.draw_tokens(1, PAGE), admits=True)

    def out_of_memory(*arguments):
        raise torch.cuda.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(page_table, "resized", out_of_memory)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            layers.reserve(1, 60)
    assert layers.table.blocks.pool.free == 85 and layers.table.blocks.reserved.tolist() == [4, 0]
    layers.check()
    layers.reserve(1, 60)
    assert layers.table.num_pages == 60


def test_a_prompt_that_was_evicted_gives_its_blocks_back():
    layers = SideBySide(2, 40, prompt="evict")
    layers.reserve(0, 20)
    assert layers.table.blocks.pool.free == 19
    layers.forward([0], layers.draw_tokens(1, 20 * PAGE), admits=True)
    assert layers.table.blocks.pool.free == 39 - 6 and layers.table.num_pages == 6
    layers.reserve(1, 3)
    layers.forward([1], layers.draw_tokens(1, 2 * PAGE), admits=True)
    assert layers.table.blocks.reserved.tolist() == [6, 3], "what its decode tokens can need stays"


def test_what_a_pool_does_not_support():
    layers = SideBySide(2, 20)
    layers.reserve(0, 4)
    layers.forward([0], layers.draw_tokens(1, PAGE), admits=True)
    says = "is not supported by a cache whose rows share a pool of pages: use a cache without a pool"
    with pytest.raises(RuntimeError, match=rf"^Moving rows \(beam search, reorder_cache\) {says}"):
        layers.table.apply_to_rows(lambda state: state)
    with pytest.raises(RuntimeError, match=f"^A model that caches a latent .* {says}"):
        layers.pooled.expect_latent()
    with pytest.raises(RuntimeError, match=f"^Taking tokens back .* {says}"):
        truncate(layers.table, np.zeros(2, np.int64), drops_decoded=True)
    layers.check()
    layers.pooled.records_past = True
    with pytest.raises(RuntimeError, match=f"^Taking tokens back .* {says}"):
        layers.forward([0], layers.draw_tokens(1, 1))


def test_a_pool_is_chosen_before_the_first_allocation():
    layers = SideBySide(2, 20)
    layers.table.release()
    layers.table.use_pool(30)
    layers.table.allocate(*layers.draw_tokens(2, 1)[1:], 2)
    assert len(layers.table.kv.keys) == 30 and layers.table.blocks.pool.free == 29
    with pytest.raises(AssertionError, match="call use_pool before"):
        layers.table.use_pool(20)

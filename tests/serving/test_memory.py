"""The memory of the rows: allocated once, given out at admission, and given back at the end."""

import random
import time

import pytest
import torch

from raas_cache import continuous, from_name
from raas_cache.common.measure import kv_nbytes
from raas_cache.serving.row_plan import need

from ..helpers import VOCAB, tiny_model
from .alone import OPTIONS, answers, requests, rows


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float32)


def pools(manager):
    return [table.blocks.pool for table in manager.cache.store.tables]


def addresses(manager):
    return [table.kv.keys.data_ptr() for table in manager.cache.store.tables]


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.mark.parametrize(
    "options", [{}, {"prompt": "evict"}, {"shares": [[1.5, 0.5]] * 2}, {"kv_dtype": "int8"}], ids=str
)
def test_no_page_is_lost_and_no_buffer_moves(model, options):
    with rows(model, **options) as manager:
        free, before, nbytes = manager.cache.store.free_pages, addresses(manager), manager.nbytes
        answers(manager, requests(40, longest=50, new=20))
        manager.cache.store.clear_ended()
        assert manager.cache.store.free_pages == free
        assert addresses(manager) == before
        assert manager.cache.store.free_rows == 4
        assert manager.nbytes >= nbytes
        assert all(0 < pool.peak <= pool.blocks for pool in pools(manager))


def test_usual_rows_take_the_bytes_of_a_cache_with_this_budget(model):
    with rows(model, budget=64, max_rows=6) as manager:
        contents = sum(t.kv.keys.nbytes + t.kv.values.nbytes for t in manager.cache.store.tables)
        pages = 6 * 64 // 4 + 2  # and two pages that no request gets
        cache = from_name("raas", 64, **OPTIONS)
        cache.preallocate()
        with torch.no_grad():
            model(torch.ones(1, 32, dtype=torch.int64), past_key_values=cache)
        assert contents == pages * kv_nbytes(cache) // (64 // 4)


def test_memory_decides_the_number_of_rows(model):
    with rows(model, budget=64, max_rows=1) as manager:
        row = sum(t.kv.keys.nbytes + t.kv.values.nbytes for t in manager.cache.store.tables) * 16 // 18
    with rows(model, budget=64, max_rows=None, memory=5 * row + 7) as manager:
        assert manager.max_rows == 5
    with pytest.raises(ValueError, match=r"memory=.* hold no row: one row with this budget takes [\d,]+ bytes"):
        rows(model, budget=64, max_rows=None, memory=row - 1)


def test_a_short_answer_leaves_its_pages_to_others(model):
    """Four usual rows have 32 pages. They hold 10 requests with 2 pages of prompt and 1 page of answer."""
    with rows(model, max_rows=1) as manager:
        four_rows = 4 * sum(t.kv.keys.nbytes + t.kv.values.nbytes for t in manager.cache.store.tables) * 8 // 10
    with rows(model, max_rows=12, memory=four_rows) as manager:
        store = manager.cache.store
        assert store.free_pages == [32, 32]
        admitted = [store.admit(f"{i}", [i + 1] * 8, need(store.tables, 8, 4)) for i in range(12)]
        assert admitted == [0] * 10 + [None] * 2
        assert store.free_pages == [2, 2]


def test_samples_of_a_prompt_share_its_pages(model):
    prompt = [random.Random(0).randrange(1, VOCAB) for _ in range(41)]
    other = [*prompt[:18], 1, 2, 3]
    with rows(model, budget=96, max_rows=6) as manager:
        found = answers(manager, [(prompt, 12)] * 4 + [(other, 12)], at_random=False)
        peak = pools(manager)[0].peak
        # Spare page; 11 pages of the prompt and 3 of the chain; for each further sample 1 + 3; for the other 2 + 3.
        assert peak == 1 + 14 + 3 * 4 + 5
        assert found[0] == found[1] == found[2] == found[3]
    with rows(model, budget=96, max_rows=1) as manager:
        assert answers(manager, [(prompt, 12), (other, 12)]) == [found[0], found[4]]


def test_a_cancelled_request_gives_its_row_back(model):
    with rows(model, max_rows=2) as manager:
        manager.start()
        prompt = [5] * 20
        for name in "abc":
            manager.add_request(prompt, request_id=name, max_new_tokens=100_000)
        wait_until(lambda: len(manager.cache.store.rows) == 2)
        manager.cancel_request("a")
        wait_until(lambda: set(manager.cache.store.rows) == {"b", "c"})
        manager.cancel_request("b")
        manager.cancel_request("c")
        wait_until(lambda: manager.cache.store.free_rows == 2)
        manager.add_request(prompt, request_id="d", max_new_tokens=3)
        wait_until(lambda: not manager.output_router.output_queue.empty())
        assert len(manager.get_result(timeout=1).generated_tokens) == 3


@pytest.mark.parametrize("options", [{"prompt": "evict", "method": "h2o"}, {"kv_dtype": "int4"}], ids=str)
def test_a_request_cancelled_within_its_prompt_leaves_nothing_in_its_row(model, options):
    asked = ([7, 9, 11] * 8, 12)
    with rows(model, max_rows=1, budget=64, **options) as manager:
        expected = answers(manager, [asked])
    with rows(model, max_rows=1, budget=64, chunk=2, **options) as manager:
        manager.start()
        manager.add_request([5] * 60, request_id="a", max_new_tokens=4)
        wait_until(lambda: manager.cache.store.layers[0].engine.held_prompts)
        manager.cancel_request("a")
        wait_until(lambda: not manager.cache.store.rows)
        assert answers(manager, [asked]) == expected


def test_refused_requests_leave_the_others_alone(model):
    with rows(model, max_rows=2) as manager:
        manager.start()
        manager.add_request([5] * 20, request_id="good", max_new_tokens=40)
        for prompt, message in (
            ([], r"input_ids=\[\] is empty"),
            ([3, VOCAB], rf"input_ids has token {VOCAB}, .* vocabulary is 0 to {VOCAB - 1}"),
            ([-1], "input_ids has token -1"),
            ([5] * 200, r"input_ids has 200 tokens, which need \d+ pages of 4 tokens.* shorten the prompt"),
        ):
            with pytest.raises(ValueError, match=message):
                manager.add_request(prompt, max_new_tokens=4)
        wait_until(lambda: not manager.output_router.output_queue.empty())
        assert len(manager.get_result(timeout=1).generated_tokens) == 40


def test_a_request_that_needs_one_page_too_many_is_refused(model):
    with rows(model, max_rows=1) as manager:
        (free, _), tokens = manager.cache.store.free_pages, 4 * 7
        manager.start()
        with pytest.raises(ValueError, match=r"which need 9 pages of 4 tokens"):
            manager.add_request([3] * tokens, max_new_tokens=8)
        manager.add_request([3] * tokens, max_new_tokens=4)
        assert len(manager.get_result(timeout=20).generated_tokens) == 4
        assert free == 8


def test_after_an_error_new_rows_are_needed(model):
    def fail(*_):
        raise RuntimeError("a fault of the model")

    with rows(model) as manager:
        manager.start()
        handle = model.model.layers[1].mlp.register_forward_hook(fail)
        manager.add_request([1, 2, 3], max_new_tokens=4)
        output = manager.get_result(timeout=20)
        handle.remove()
        assert output.error == "a fault of the model"
        wait_until(lambda: not manager.is_running())
        manager.stop()
        with pytest.raises(RuntimeError, match=r"The rows cannot be used after an error .* create new ones"):
            manager.start()
    with rows(model) as manager:
        assert len(answers(manager, [([1, 2, 3], 4)])[0]) == 4


def test_arguments(model):
    for options, message in (
        ({"max_rows": 0}, "max_rows=0 must be positive"),
        ({"max_rows": None, "memory": -1}, "memory=-1 must be positive"),
        ({"method": "raass"}, "did you mean 'raas'"),
        ({"budget": 2}, "budget=2 is less than one page"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            rows(model, **options)
    with rows(model), pytest.raises(ValueError, match="model already has a manager of continuous batching: close it"):
        rows(model)
    with (
        rows(model, method="quest") as manager,
        pytest.raises(ValueError, match="max_new_tokens=None: this method never"),
    ):
        manager.add_request([1, 2])
    with continuous(model, 256) as manager:
        assert manager.max_rows == 32
    assert not hasattr(model, "_cached_continuous_batching_manager")

"""Sequences that begin and end at different steps in one cache give exactly what each gives alone."""

import random

import pytest
import torch
from torch._dynamo.utils import counters

from raas_cache import DenseCache, RaaSCache, record

from ..architectures import build, require
from ..helpers import prompt, resident_set, tiny_model
from ..methods.against_oracle import EVICTING, MODES
from .alone import BUDGET, PAGE, Alone, forward, make_cache, same_row, settings_of
from .shared_rows import SharedRows


pytestmark = pytest.mark.filterwarnings("ignore:budget=")
CHOOSING = 6 * PAGE  # decode steps after which every row has evicted a page


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("method", "mode"), MODES)
def test_rows_that_begin_at_different_steps(method, mode, kv_heads):
    shared = SharedRows(tiny_model(kv_heads=kv_heads, layers=1), settings_of(method, mode), 3)
    shared.admit({0: BUDGET - 3}).steps(PAGE + 1, [0])
    shared.admit({2: 2}).steps(3, [0, 2]).admit({1: PAGE + 1}).steps(CHOOSING + 3).check(evicts=(0, 1, 2))


@pytest.mark.parametrize(("method", "mode"), MODES)
def test_a_row_is_released_and_filled_again(method, mode):
    shared = SharedRows(tiny_model(layers=1), settings_of(method, mode), 2)
    shared.admit({0: 9, 1: BUDGET + 5}).steps(CHOOSING + 1).check(evicts=(0, 1))
    shared.release(1).steps(PAGE + 2, [0]).admit({1: 3}).steps(5).check()
    shared.admit({0: BUDGET + 2}).steps(CHOOSING + 2).check(evicts=(0, 1))  # without a release before


@pytest.mark.parametrize(("method", "mode"), MODES)
def test_a_step_over_all_rows_while_one_is_free(method, mode):
    shared = SharedRows(tiny_model(layers=1), settings_of(method, mode), 3)
    shared.admit({1: 6}).steps(PAGE + 3).admit({0: 11}).steps(CHOOSING).check(evicts=(1,))
    shared.admit({2: 5}).steps(3).release(1).steps(CHOOSING).check(evicts=(0,))
    shared.admit({1: 17}).steps(CHOOSING + PAGE).check(evicts=(0, 1, 2))


@pytest.mark.parametrize(("method", "mode"), MODES)
def test_several_rows_admitted_at_once_with_padding(method, mode):
    shared = SharedRows(tiny_model(layers=1), settings_of(method, mode), 4)
    shared.admit({3: 7, 1: 2}).steps(PAGE + 1, [1, 3])
    shared.admit({2: BUDGET + 3, 0: 5}).steps(CHOOSING).check()
    shared.admit({1: 3, 2: 10}).steps(CHOOSING + PAGE).check(evicts=(0, 1, 2, 3))


@pytest.mark.parametrize(("method", "mode"), MODES)
def test_turns_of_some_rows(method, mode):
    """A turn of one row, of two rows at different steps, and of all rows."""
    shared = SharedRows(tiny_model(layers=1), settings_of(method, mode), 3)
    shared.admit({0: 9, 1: 2, 2: 14}).steps(PAGE + 1).read([1], 6).steps(2, [2])
    shared.read([2, 0], 9).steps(PAGE + 3).read(None, 5).steps(CHOOSING + PAGE).check(evicts=(0, 1, 2))


@pytest.mark.parametrize("method", ["raas", "h2o", "dense"])
def test_buffers_that_grow_while_rows_differ(method):
    """A layer begins with pages for 128 tokens, and takes more when the first row needs them."""
    settings = settings_of(method, "pin", budget=48 * PAGE)
    shared = SharedRows(tiny_model(layers=1), settings, 3)
    shared.admit({1: 6}).steps(9, [1])
    before = shared.cache.layers[0].table.num_pages
    shared.steps(21, [1]).admit({0: 50}).steps(150, [1, 0]).admit({2: 3}).steps(40)
    assert shared.cache.layers[0].table.num_pages > before
    shared.check(evicts=(0, 1) if method in EVICTING else ())


@pytest.mark.parametrize(
    "more", [{"kv_dtype": "int8"}, {"kv_dtype": "int4"}, {"scoring": "minmax"}, {"granularity": "layer"}], ids=str
)
@pytest.mark.parametrize(("method", "mode"), [("raas", "pin"), ("h2o", "evict"), ("rkv", "select"), ("quest", "pin")])
def test_options(method, mode, more):
    shared = SharedRows(tiny_model(), settings_of(method, mode, **more), 3)
    shared.admit({0: 9}).steps(PAGE + 1).admit({1: 2, 2: BUDGET + 3}).steps(6, [1]).read([0], 7)
    shared.steps(CHOOSING + PAGE).check(evicts=(0, 1, 2))


@pytest.mark.parametrize(("method", "mode"), [("raas", "pin"), ("raas", "select"), ("h2o", "evict"), ("dense", "pin")])
def test_a_latent(method, mode):
    """Parts of DeepSeek-V3 compute in float32."""
    require("deepseek_v3")
    shared = SharedRows(build("deepseek_v3", torch.float64), settings_of(method, mode), 3, tolerance=1e-4)
    shared.admit({0: 9}).steps(PAGE + 1, [0]).admit({1: 2, 2: BUDGET + 3}).steps(6, [1]).read([0], 7)
    shared.steps(CHOOSING + PAGE).check(evicts=(0, 1, 2))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("method", "mode"), MODES)
def test_any_order(method, mode, seed):
    """Random admissions, releases, turns and steps."""
    rng = random.Random(f"{method} {mode} {seed}")
    settings = settings_of(method, mode, granularity=rng.choice(["head", "layer"]), page_size=rng.choice([1, 2, 4]))
    shared = SharedRows(tiny_model(layers=1, kv_heads=rng.choice([1, 2, 4])), settings, 3, seed)
    shared.admit({rng.randrange(3): rng.randint(1, 30)})
    for _ in range(25):
        action = rng.choice(["admit", "steps", "steps", "some", "some", "turn", "release"])
        held = sorted(shared.alone)
        some = rng.sample(held, rng.randint(1, len(held)))
        if action == "admit":
            shared.admit({row: rng.randint(1, 30) for row in rng.sample(range(3), rng.randint(1, 2))})
        elif action == "steps":
            shared.steps(rng.randint(1, 9))
        elif action == "some":
            shared.steps(rng.randint(1, 9), some)
        elif action == "turn":
            shared.read(some, rng.randint(2, 9))
        elif len(held) > 1:
            shared.release(held[0])
        shared.check()


def test_a_prompt_in_chunks_while_others_wait():
    """The chunks of one admission: only the first one finds an empty row."""
    for method, mode in MODES:
        model, settings = tiny_model(layers=1), settings_of(method, mode)
        shared = SharedRows(model, settings, 2).admit({0: 7}).steps(PAGE + 1)
        tokens, alone = shared.random(1, 23)[0], Alone(model, make_cache(settings))
        with shared.cache.admit(1):
            for chunk in tokens.split([9, 2, 12]):
                logits = forward(model, shared.cache, chunk[None], alone.seen)
                shared.compare(logits[0], 1, alone.read(chunk).logits[-1])
        shared.alone[1], shared.shift[1] = alone, 0
        shared.steps(CHOOSING + PAGE).check(evicts=(0, 1))


def test_a_prompt_token_by_token():
    model, settings = tiny_model(layers=1), settings_of("raas", "pin")
    shared = SharedRows(model, settings, 2).admit({0: 7}).steps(PAGE + 1)
    tokens, alone = shared.random(1, 6)[0], Alone(model, make_cache(settings)).read
    with shared.cache.admit(1), shared.cache.prefilling():
        for position, token in enumerate(tokens):
            forward(model, shared.cache, token[None, None], position)
    shared.alone[1], shared.shift[1] = alone(tokens), 0
    shared.steps(CHOOSING + PAGE).check(evicts=(0, 1))


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_generate_in_a_row(name):
    """`generate` gives its 2-d mask with every forward: it speaks of these rows only."""
    require(name)
    model = build(name, torch.float64)
    cache, inputs = make_cache(settings_of("raas", "pin")), [prompt(1, 23, seed=1), prompt(2, 9, (3, 0), seed=2)]
    kw = {"max_new_tokens": CHOOSING, "min_new_tokens": CHOOSING, "do_sample": False}
    for rows, given in zip(([2], [1, 0]), inputs, strict=True):
        with cache.admit(rows, batch_size=3):
            tokens = model.generate(**given, past_key_values=cache, **kw)
        alone = make_cache(settings_of("raas", "pin"))
        assert torch.equal(tokens, model.generate(**given, past_key_values=alone, **kw))
        for i, row in enumerate(rows):
            assert resident_set(cache, 0, row, 0) == resident_set(alone, 0, i, 0)


def test_a_mask_hides_tokens_of_the_rows_it_is_for():
    for name, rows in (("llama", [0, 2]), ("deepseek_v3", [0, 2]), ("llama", [1, 0, 2]), ("deepseek_v3", [1, 0, 2])):
        require(name)
        model, cache = build(name, torch.float64), RaaSCache(200, page_size=4)
        mask = torch.ones(len(rows), 11, dtype=torch.long)
        mask[0, 4], mask[0, 10], mask[-1, 9] = 0, 0, 0
        with torch.no_grad():
            with cache.admit([1, 0, 2]):
                model(prompt(3, 9)["input_ids"], past_key_values=cache)
            with cache.on_rows(rows):
                for length in (10, 11):
                    model(torch.ones(len(rows), 1, dtype=torch.long), past_key_values=cache,
                          attention_mask=mask[:, :length])  # fmt: skip
        everything = set(range(11))
        for row in range(3):
            expected = everything if row in rows else set(range(9))
            expected = expected - ({4, 10} if row == rows[0] else {9} if row == rows[-1] else set())
            assert resident_set(cache, 0, row, 0) == expected


@pytest.mark.parametrize("method", EVICTING)
def test_a_compiled_step_over_ragged_rows(method):
    """One graph serves rows at different steps, and rows that are admitted between its steps."""
    torch._dynamo.reset()
    counters.clear()
    model = tiny_model(layers=1)
    settings = settings_of(method, "pin")
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    shared = SharedRows(model, settings, 3)
    shared.cache.preallocate()
    shared.admit({0: 7}).steps(3, [0]).admit({1: 2, 2: 12})

    def steps(count):
        for _ in range(count):
            tokens = shared.random(3, 1)
            positions = shared.cache.seen_tokens - torch.tensor([shared.shift[row] for row in range(3)])
            with torch.no_grad():
                logits = compiled(tokens, position_ids=positions[:, None], past_key_values=shared.cache).logits
            for row, alone in shared.alone.items():
                shared.compare(logits[row], row, alone.read(tokens[row]).logits[-1])

    steps(CHOOSING)
    shared.check()
    assert counters["stats"]["unique_graphs"] == 1
    shared.admit({1: 9}).steps(2)
    steps(CHOOSING)
    shared.check(evicts=(0, 1, 2))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"] and not counters["recompiles"]


def test_memory_is_bounded_however_many_sequences_come():
    """Rows with turns come and go: the pages of a sequence that has gone serve the next one."""
    shared = SharedRows(tiny_model(layers=1), settings_of("raas", "pin"), 2)
    shared.admit({0: 9, 1: 5}).steps(2)
    pages = []
    for _ in range(6):
        shared.read([1], 6).steps(CHOOSING).read([1], 6).steps(3).check()
        pages.append(shared.cache.layers[0].table.num_pages)
        shared.admit({1: 5}).steps(2)
    assert max(pages[2:]) == pages[1], pages


@pytest.fixture
def started():
    """A cache of two rows, one free, and its model; whatever is refused, it stays usable."""
    shared = SharedRows(tiny_model(layers=1), settings_of("raas", "pin"), 2).admit({0: 7}).steps(3, [0])
    yield shared
    shared.steps(2, [0]).admit({1: 4}).steps(CHOOSING + PAGE).check(evicts=(0, 1))


@pytest.mark.parametrize(
    ("rows", "error", "says"),
    [
        (2, ValueError, "rows=2 must lie between 0 and 1: the cache has 2 rows"),
        (-1, ValueError, "rows=-1 must lie between 0 and 1"),
        ([0, 2], ValueError, r"rows=\[0, 2\] must lie between"),
        ([0, 0], ValueError, r"rows=\[0, 0\] must be one row index, or several different row indices"),
        (torch.tensor([0, 0]), ValueError, "several different row indices"),
        ([], ValueError, r"rows=\[\] must be one row"),
        (True, TypeError, "rows=True must be an int, or a list of ints"),
        ("0", TypeError, "rows='0' must be an int"),
        (0.0, TypeError, "rows=0.0 must be an int"),
        ([0.0], TypeError, r"rows=\[0.0\] must be an int"),
        (None, TypeError, "rows=None must be an int"),
    ],
    ids=str,
)
def test_rows_that_are_none(started, rows, error, says):
    for touch in (started.cache.on_rows, started.cache.admit):
        with pytest.raises(error, match=says), touch(rows):
            pass
    with pytest.raises(error, match=says):
        started.cache.release_rows(rows)


def test_any_kind_of_whole_number_is_a_row(started):
    for rows in (
        torch.tensor(0),
        torch.tensor([0]),
        range(1),
        (0,),
        torch.arange(1).numpy(),
        torch.arange(1).numpy()[0],
    ):
        started.cache.release_rows(1)
        with started.cache.on_rows(rows):
            started.alone[0].read(torch.tensor([5]))
            logits = forward(started.model, started.cache, torch.tensor([[5]]), started.alone[0].seen - 1)
        started.compare(logits[0], 0, started.alone[0].logits[-1])


def test_batch_size_is_checked(started):
    with pytest.raises(ValueError, match="batch_size=3: the cache already has 2 rows"), started.cache.admit(1, 3):
        pass
    for batch_size, error in ((0, ValueError), (-1, ValueError), ("a", TypeError), (True, TypeError)):
        with pytest.raises(error, match=f"batch_size={batch_size!r}"), RaaSCache(48).admit(0, batch_size):
            pass
    with pytest.raises(ValueError, match="rows=1 must lie between 0 and 0"), RaaSCache(48).admit(1, 1):
        pass
    with pytest.raises(ValueError, match="rows=-1 must not be negative"), RaaSCache(48).admit(-1):
        pass


def test_a_forward_of_another_batch_is_refused(started):
    for touch in (started.cache.on_rows, started.cache.admit):
        with pytest.raises(ValueError, match="batch size 1, but the new keys have batch size 2"), touch(1):
            forward(started.model, started.cache, torch.ones(2, 4, dtype=torch.long), 0)


def test_an_empty_cache():
    cache = RaaSCache(48)
    assert cache.seen_tokens.tolist() == [] and cache.seen_tokens.dtype == torch.int64
    with pytest.raises(ValueError, match=r"the cache is empty\. Call cache\.admit"), cache.on_rows(0):
        pass
    with pytest.raises(ValueError, match="rows=0: the cache is empty"):
        cache.release_rows(0)
    with pytest.raises(ZeroDivisionError), cache.admit(1):
        raise ZeroDivisionError  # nothing came
    forward(tiny_model(layers=1), cache, torch.ones(3, 4, dtype=torch.long), 0)
    assert cache.seen_tokens.tolist() == [4, 4, 4]


def test_notes_are_of_all_rows(started):
    started.cache.activate_past_recording()
    for touch in (started.cache.on_rows, started.cache.admit):
        with pytest.raises(ValueError, match=r"rows=0: rollback and raas_cache\.record need all rows"), touch(0):
            pass
    started.cache.deactivate_past_recording()
    with record(started.cache), pytest.raises(ValueError, match=r"leave the record block"), started.cache.on_rows(0):
        pass


def test_assisted_decoding_in_a_row_is_refused(started):
    with pytest.raises(ValueError, match="touch some rows only cannot be taken back"), started.cache.on_rows(0):
        started.model.generate(
            torch.ones(1, 12, dtype=torch.long),
            past_key_values=started.cache,
            prompt_lookup_num_tokens=2,
            max_new_tokens=4,
        )


@pytest.mark.parametrize("has_config", [False, True])
def test_windows_move_in_step(has_config):
    require("gemma3_text")
    model = build("gemma3_text", torch.float64)
    cache = RaaSCache(48, config=model.config if has_config else None)
    ids = prompt(1, 9)["input_ids"]
    with pytest.raises(ValueError, match="whose rows must have the same length"), cache.admit(0, batch_size=2):
        forward(model, cache, ids, 0)
    cache.reset()
    assert forward(model, cache, ids, 0).isfinite().all()


def test_lengths_are_of_the_rows_touched():
    shared = SharedRows(tiny_model(layers=1), settings_of("raas", "pin"), 3).admit({0: 9}).steps(2, [0]).admit({2: 4})
    cache = shared.cache
    assert cache.seen_tokens.tolist() == [11, 0, 4] and cache.get_seq_length() == 11
    with cache.on_rows([2]):
        assert cache.get_seq_length() == 4
        with cache.on_rows(0):
            assert cache.get_seq_length() == 11
        assert cache.get_seq_length() == 4
    assert cache.resident_tokens(0)[:, 0].tolist() == [11, 0, 4] and cache.evictions == 0
    cache.release_rows([0, 2])
    assert cache.seen_tokens.tolist() == [0, 0, 0] and cache.get_seq_length() == 0
    assert cache.resident_tokens(0).eq(0).all()
    with cache.admit([2, 0, 1]):
        forward(shared.model, cache, torch.ones(3, 5, dtype=torch.long), 0)
    assert cache.seen_tokens.tolist() == [5, 5, 5]


def test_a_forward_that_fails_leaves_the_other_rows(started):
    with pytest.raises(IndexError), started.cache.admit(1):
        forward(started.model, started.cache, torch.full((1, 3), 10**6), 0)
    same_row(started.cache, 0, started.alone[0].cache)


def test_a_free_row_has_evicted_nothing():
    shared = SharedRows(tiny_model(layers=1), settings_of("raas", "pin"), 2).admit({0: 4}).steps(3)
    shared.release(0).admit({1: 4}).steps(4)
    assert shared.cache.evictions == 0 and "evicted=0" in repr(shared.cache)


def test_a_store_that_grows():
    cache, model = DenseCache(48, page_size=4), tiny_model(layers=1)
    with cache.admit(0, batch_size=2):
        forward(model, cache, torch.ones(1, 5, dtype=torch.long), 0)
    for position in range(300):
        forward(model, cache, torch.ones(2, 1, dtype=torch.long), [5 + position, position])
    assert cache.resident_tokens(0)[0, 0] == 305

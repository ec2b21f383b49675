"""A request in a row gives what it gives alone, whatever happens in the other rows."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma3TextConfig, GenerationConfig

from raas_cache import RaaSCache, list_methods
from raas_cache.serving import row_cache
from raas_cache.serving.packed_batch import PackedBatch
from raas_cache.serving.row_cache import ANY_LENGTH

from ..helpers import tiny_model
from .alone import OPTIONS, alone, answers, requests, rows


SETTINGS = [
    *[(method, {}) for method in list_methods()],
    *[("h2o", {"prompt": "pin"}), ("rkv", {"prompt": "pin"}), ("raas", {"prompt": "evict"})],
    *[("raas", {"prompt": "select"}), ("raas", {"scoring": "minmax"}), ("raas", {"granularity": "layer"})],
    *[("raas", {"kv_dtype": "int8"}), ("raas", {"kv_dtype": "int4"}), ("h2o", {"kv_dtype": "int8"})],
    ("raas", {"shares": [[1.5, 0.5], [0.5, 1.5]]}),
]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def check_alone(model, asked, found, method, **options):
    evictions = 0
    for (prompt, new), tokens in zip(asked, found, strict=True):
        expected, evicted = alone(model, prompt, new, method, **options)
        assert tokens == expected, (len(prompt), new)
        evictions += evicted
    return evictions


@pytest.mark.parametrize(("method", "options"), SETTINGS, ids=str)
def test_each_request_gives_what_it_gives_alone(model, method, options):
    asked = requests(16)
    with rows(model, method=method, **options) as manager:
        found = answers(manager, asked)
    evictions = check_alone(model, asked, found, method, **options)
    assert evictions > 10 or method in ("dense", "quest")


@pytest.mark.parametrize("prompt", ["pin", "evict"])
def test_64_requests_that_join_and_leave_at_random(model, prompt):
    asked = requests(64, longest=90, new=80, seed=3)
    with rows(model, budget=48, max_rows=7, chunk=24, prompt=prompt) as manager:
        found = answers(manager, asked)
    assert check_alone(model, asked, found, "raas", budget=48, prompt=prompt) > 300


@pytest.mark.parametrize(
    "options", [{"prompt": "evict"}, {"kv_dtype": "int8"}, {"kv_dtype": "int4"}, {"method": "h2o"}], ids=str
)
def test_the_cuts_of_a_prompt_do_not_matter(model, options):
    asked = requests(6, longest=90, seed=5)
    found = []
    for chunk in (4, 13, 200):
        with rows(model, chunk=chunk, **options) as manager:
            found.append(answers(manager, asked, at_random=False))
    assert found[0] == found[1] == found[2]


def test_draws_depend_on_the_request_only(model):
    asked = [(prompt, 24) for prompt, _ in requests(10, longest=30)]
    sampled, seeds = GenerationConfig(do_sample=True, temperature=0.8, eos_token_id=-1, pad_token_id=0), range(50, 60)
    found = []
    for max_rows in (1, 4):
        with rows(model, max_rows=max_rows, generation_config=sampled) as manager:
            found.append(answers(manager, asked, seeds=list(seeds)))
    assert found[0] == found[1]
    with rows(model, generation_config=sampled) as manager:
        same = answers(manager, [asked[0]] * 4, seeds=[50, 50, 51, 52])
    assert same[0] == same[1] == found[0][0]
    assert len({tuple(tokens) for tokens in same}) == 3


@pytest.mark.parametrize(
    ("method", "options"), [("raas", {}), ("h2o", {}), ("quest", {}), ("raas", {"kv_dtype": "int4"})]
)
def test_steps_whose_rows_only_the_device_knows(model, method, options, monkeypatch):
    """As in a CUDA graph: the rows of a decode batch come as a tensor, padded."""
    asked = requests(12)
    known = []
    with rows(model, method=method, max_rows=7, **options) as manager:
        cache, create = manager.cache, manager._create_batch_processor
        manager.continuous_batching_config.max_blocks_per_request = cache.max_blocks_per_request = 1
        cache.max_decode_fast_path_length = ANY_LENGTH

        def padded():
            processor = create()
            processor.model_runner.pad_inputs = True
            return processor

        def decoding(given):
            known.append(len(given))
            return PackedBatch.decoding(given)

        monkeypatch.setattr(manager, "_create_batch_processor", padded)
        monkeypatch.setattr(row_cache, "PackedBatch", SimpleNamespace(of=PackedBatch.of, decoding=decoding))
        found = answers(manager, asked)
    assert set(known) == {1, 2, 4, 7}, "the sizes of graphs: powers of two, and all rows"
    check_alone(model, asked, found, method, **options)


def test_a_hybrid_keeps_its_windows(tmp_path):
    model = tiny_model(
        layers=3,
        cls=Gemma3TextConfig,
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    asked = requests(12)
    with rows(model) as manager:
        assert list(manager.cache.store.layers) == [1]
        found = answers(manager, asked)
    assert check_alone(model, asked, found, "raas", config=model.config) > 10


def test_generate_batch_takes_the_settings_of_a_cache(model):
    greedy = GenerationConfig(max_new_tokens=30, do_sample=False, eos_token_id=-1, pad_token_id=0)
    asked = [(prompt, 30) for prompt, _ in requests(6)]
    prompts = [prompt for prompt, _ in asked]
    cache = RaaSCache(32, **OPTIONS)
    outputs = model.generate_batch(prompts, greedy, past_key_values=cache)
    check_alone(model, asked, [outputs[f"req_{i}"].generated_tokens for i in range(6)], "raas")
    assert cache.get_seq_length() == 0
    assert not hasattr(model, "_cached_continuous_batching_manager"), "the rows are gone"
    with rows(model) as manager:  # the same manager serves several calls
        for _ in range(2):
            outputs = model.generate_batch(prompts, greedy)
            found = [output.generated_tokens for output in outputs.values()]
            check_alone(model, asked, found, "raas")
        assert manager.max_rows == 4


def test_weights_that_change_between_two_calls():
    """As in GRPO: several samples of each prompt, then a step of the optimizer on the same model."""
    model = tiny_model(dtype=torch.float32)
    prompts = [prompt for prompt, _ in requests(3, longest=20)]
    sampled = GenerationConfig(
        max_new_tokens=12, do_sample=True, num_return_sequences=4, eos_token_id=-1, pad_token_id=0
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    seen = []
    with rows(model, generation_config=sampled):
        for _ in range(2):
            outputs = model.generate_batch(prompts, sampled)
            assert len(outputs) == 12
            longest = max(outputs.values(), key=lambda output: len(output.prompt_ids))
            sequence = torch.tensor([longest.prompt_ids + longest.generated_tokens])
            model.train()
            loss = model(sequence, labels=sequence, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            seen.append(loss.item())
        greedy = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
        after = model.generate_batch(prompts, greedy)
    assert seen[0] != seen[1]
    check_alone(model, [(prompt, 8) for prompt in prompts], [o.generated_tokens for o in after.values()], "raas")

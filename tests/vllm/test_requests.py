"""A request in vLLM gives what `generate` gives, whatever happens in the other rows."""

import random

import pytest
import torch
from transformers import Gemma3TextConfig

from ..helpers import tiny_model
from .engines import answers, check_alone, requests, sampling


SHARES = [[1.5, 0.5], [0.5, 1.5]]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("raas", {}), ("window", {}), ("h2o", {}), ("raas", {"prompt": "select"}), ("raas", {"prompt": "evict"}),
        ("raas", {"shares": SHARES}),
    ],
    ids=str,
)  # fmt: skip
def test_32_requests(model, folder, engines, method, options):
    asked = requests(32, seed=1)
    found = answers(engines.start(folder, method, options=options), asked)
    assert check_alone(model, asked, found, method=method, **options) > 50


@pytest.mark.parametrize("method", ["raas", "h2o"])
@pytest.mark.parametrize("chunk", [16, 17, 512])
def test_the_cuts_of_a_prompt_do_not_matter(model, folder, engines, method, chunk):
    asked = requests(12, seed=2)
    found = answers(engines.start(folder, method, max_num_batched_tokens=chunk), asked)
    check_alone(model, asked, found, method=method)


@pytest.mark.parametrize(("method", "max_prompt"), [("raas", 24), ("h2o", 21), ("raas", None)])
def test_a_prompt_that_no_row_can_hold_is_decoded_from_there_on(model, folder, engines, method, max_prompt):
    asked = [*requests(4, longest=20, seed=3), *[([prompt[0]] * 9 + prompt * 2, new) for prompt, new in requests(6)]]
    found = answers(engines.start(folder, method, max_prompt=max_prompt), asked)
    pinned = 24 if max_prompt is None else max_prompt  # the budget of 32 less 2 decode pages of 4 tokens
    check_alone(model, asked, found, method=method, pinned=pinned)


def test_500_requests_in_memory_for_8(model, folder, engines):
    asked = random.Random(0).choices(requests(40, longest=30, new=24, seed=4), k=500)
    engine = engines.start(folder, rows=8)
    assert check_alone(model, asked, answers(engine, asked)) > 100


def test_memory_that_holds_no_whole_sequence(model, folder, engines):
    """A row takes 18,432 bytes here, and 4,096 tokens of keys and values would take a MiB."""
    asked = [(prompt, 300) for prompt, _ in requests(5, seed=8)]
    engine = engines.start(folder, kv_cache_memory_bytes=80_000, num_gpu_blocks_override=None, max_model_len=4096)
    assert engine.llm_engine.vllm_config.cache_config.num_gpu_blocks == 1 + 3
    assert check_alone(model, asked, answers(engine, asked)) > 200


def test_one_budget_per_layer(model, folder, engines):
    asked = requests(8, seed=5)
    found = answers(engines.start(folder, budget=[48, 24]), asked)
    check_alone(model, asked, found, budget=[48, 24])


def test_a_preempted_request_goes_on_with_its_text_as_the_prompt(model, folder, engines):
    engine = engines.start(folder).llm_engine
    asked = [(prompt, 40) for prompt, _ in requests(3, longest=16, seed=6)]
    for index, (prompt, new) in enumerate(asked):
        engine.add_request(str(index), {"prompt_token_ids": prompt}, sampling(new))
    texts = {}

    def step():
        for output in engine.step():
            texts[int(output.request_id)] = list(output.outputs[0].token_ids)

    for _ in range(12):
        step()
    before = dict(texts)
    assert engine.reset_prefix_cache(reset_running_requests=True), "vLLM has stopped all requests"
    while engine.has_unfinished_requests():
        step()
    for index, (prompt, new) in enumerate(asked):
        assert 5 < len(before[index]) < new
        check_alone(model, [(prompt, len(before[index]))], [before[index]])
        rest = texts[index][len(before[index]) :]
        check_alone(model, [(prompt + before[index], len(rest))], [rest])


@pytest.mark.parametrize("workers", [1, 2])
def test_the_engine_and_its_workers_in_processes_of_their_own(model, folder, engines, monkeypatch, workers):
    """With two workers, each has one of the two KV heads."""
    asked = requests(6, seed=7)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # two workers need no two CPUs
    check_alone(model, asked, answers(engines.start(folder, tensor_parallel_size=workers), asked))


def test_a_hybrid_keeps_its_windows(engines, tmp_path):
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = tiny_model(
        layers=3, cls=Gemma3TextConfig, head_dim=32, sliding_window=12, layer_types=kinds, dtype=torch.float32
    )
    model.save_pretrained(tmp_path)
    asked = requests(12)
    with pytest.raises(ValueError, match="--enable-prefix-caching: rows take part in no prefix caching"):
        engines.start(str(tmp_path))
    found = answers(engines.start(str(tmp_path), num_gpu_blocks_override=None, enable_prefix_caching=False), asked)
    assert check_alone(model, asked, found, config=model.config) > 10

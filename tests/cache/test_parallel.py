"""Layers on several devices, KV heads on several ranks."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from raas_cache import RaaSCache

from .. import tensor_parallel
from ..helpers import generate, prompt, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model(vocab_size=98).save_pretrained(path)  # transformers 5.17 wants it divisible by the ranks
    return str(path)


@pytest.mark.skipif(
    torch.accelerator.current_accelerator() is not None,
    reason="transformers puts a rank on each accelerator that torch was built for: two ranks on a CPU need a CPU build",
)
def test_each_rank_of_tensor_parallelism_pages_its_own_kv_heads(folder, tmp_path):
    out = str(tmp_path / "out.pt")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [sys.executable, *command, "-m", "tests.tensor_parallel", folder, out],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    tokens, heads_a_rank, positions = torch.load(out)
    expected, cache = tensor_parallel.run(folder)
    assert torch.equal(tokens, expected)
    assert heads_a_rank == 1 and torch.equal(positions, cache.resident_positions(1).sort(-1).values)
    assert cache.evicted_pages(1).min() >= 5


def test_device_map_auto(folder):
    """On a machine without a GPU it means accelerate's hooks around every layer, all on the CPU."""
    pytest.importorskip("accelerate")
    inputs = prompt(2, 12, (3, 0))
    results = []
    for device_map in ("auto", None):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=device_map)
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        results.append(generate(model, inputs, RaaSCache(64, page_size=4), 80, sample=False).cpu())
    assert torch.equal(*results)


@pytest.mark.gpu
def test_layers_on_different_devices(folder):
    """Layer 0 on the GPU by Triton, layer 1 on the CPU by torch, beams moving rows on both."""
    from accelerate import dispatch_model

    device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.norm": "cpu"}
    model = tiny_model(dtype=torch.float32)
    expected = generate(model, prompt(2, 12, (3, 0)), DynamicCache(), 60, sample=False, num_beams=2)
    rotary = {"model.rotary_emb": 0, "lm_head": "cpu"}
    model = dispatch_model(model, {**device_map, **rotary}, main_device="cpu", force_hooks=True)
    inputs = {name: tensor.to("cuda") for name, tensor in prompt(2, 12, (3, 0)).items()}
    cache = RaaSCache(256, page_size=4)
    assert torch.equal(generate(model, inputs, cache, 60, sample=False, num_beams=2).cpu(), expected)
    assert [layer.keys.device.type for layer in cache.layers] == ["cuda", "cpu"]


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_offloading_to_the_cpu_changes_nothing(layers):
    model = tiny_model(layers=layers, dtype=torch.float32).to("cuda")
    inputs = {name: tensor.to("cuda") for name, tensor in prompt(2, 12, (3, 0)).items()}
    expected = generate(model, inputs, RaaSCache(64, page_size=4), 100, sample=False)
    cache = RaaSCache(64, page_size=4, offloading=True)
    assert torch.equal(generate(model, inputs, cache, 100, sample=False), expected)
    on_gpu = sum(layer.keys.device.type == "cuda" for layer in cache.layers)
    assert on_gpu <= 2 and cache.evicted_pages(0).min() >= 5

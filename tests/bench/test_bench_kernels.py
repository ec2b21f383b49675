"""The kernels timed by themselves."""

import time

import pytest
import torch
from transformers import LlamaConfig

import raas_kernels
from raas_cache.bench import kernels
from raas_cache.bench.kernels import kernel_table, run_kernels

from .tiny import CONFIG, CPU


def test_kernel_rows():
    config = LlamaConfig(**CONFIG)
    options = {"batches": [1, 2], "budgets": [64, 128], "page_size": 4, "repeats": 3, "dtype": torch.float32}
    rows = run_kernels(config, **options, device=CPU)
    assert [(row.batch, row.budget) for row in rows] == [(1, 64), (1, 128), (2, 64), (2, 128)]
    for row in rows:
        assert row.bytes_read == 2 * row.batch * 2 * row.budget * 16 * 4
        assert len(row.timing.steps) == len(row.dense_timing.steps) == 3
        assert row.bandwidth == pytest.approx(row.bytes_read / (row.timing.median / 1e3))
        assert row.share == pytest.approx(row.bandwidth / row.copy_bandwidth) and 0 < row.share < 10
        assert 1e8 < row.copy_bandwidth < 1e14
    header, _, *lines = kernel_table(rows).splitlines()
    assert len(lines) == 4 and "share" in header
    assert f"{rows[0].share:.0%}" in lines[0] and rows[0].dense in lines[0]
    for wrong, message in (
        ({"budgets": [64, 66]}, "budget=66 must be whole pages"),
        ({"budgets": [0]}, "budget=0 must be whole pages"),
        ({"page_size": 6}, "page_size=6 must be a power of two"),
        ({"repeats": 1}, "repeats=1 must be at least 2"),
        ({"batches": [0]}, "batch=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            run_kernels(config, **{**options, **wrong}, device=CPU)


def test_the_best_dense_kernel_is_the_fastest(monkeypatch):
    slow, quick = lambda *_: time.sleep(0.01), lambda *_: None
    monkeypatch.setattr(kernels, "_dense_kernels", lambda inputs: {"slow": slow, "quick": quick, "too": slow})
    options = {"batches": [1], "budgets": [64], "page_size": 4, "repeats": 2, "dtype": torch.float32, "device": CPU}
    (row,) = run_kernels(LlamaConfig(**CONFIG), **options)
    assert row.dense == "quick" and row.dense_timing.median < 10


def test_dense_kernels_compute_the_same():
    query, keys, values = (torch.randn(2, heads, length, 16) for heads, length in ((4, 1), (2, 64), (2, 64)))
    dense = kernels._dense_kernels((query, keys, values))
    assert {"sdpa math", "sdpa math, packed"} <= dense.keys()
    ours, _ = raas_kernels.attend(raas_kernels.PagedKV.filled(keys, values, 4), query, scale=0.25)
    for name, kernel in dense.items():
        torch.testing.assert_close(kernel(query, keys, values), ours, msg=name)

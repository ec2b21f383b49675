"""The sizes of the tests' benchmarks, and the command that runs one."""

import pytest
import torch


CPU = torch.device("cpu")
BUDGET, PAGE, LAYERS = 64, 4, 2
TOKEN_BYTES = 2 * LAYERS * 2 * 16 * 4  # K and V, layers, KV heads, head size, float32
CONFIG = {
    "vocab_size": 32, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1 << 17,
}  # fmt: skip


def command(*options):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from raas_cache.cli import app

    return CliRunner().invoke(app, ["bench", "--device", "cpu", *map(str, options)])

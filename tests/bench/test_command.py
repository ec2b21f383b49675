"""`raas-cache bench`: its options, what it prints and what it writes."""

import json
import re
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig

from raas_cache.bench import steps
from raas_cache.bench.filling import build_model, load_config
from raas_cache.bench.kernels import run_kernels
from raas_cache.bench.steps import Grid, run

from .tiny import BUDGET, CONFIG, PAGE, command


def test_command_prints_and_writes(config_folder, tmp_path):
    pytest.importorskip("matplotlib")
    options = ("--model", config_folder, "--seen", "32,64", "--budget", "48,64", "--page-size", 4, "--steps", 3)
    result = command("--method", "streaming_llm", *options, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + 4 * 4
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert found["threads"] == torch.get_num_threads() and found["dtype"] == "float32" and found["device"] == "CPU"
    assert found["grid"]["budgets"] == [48, 64] and len(found["rows"]) == 16
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"bench.json", *(f"{n}.{e}" for n in ("ms_per_token", "kv_bytes") for e in ("png", "svg"))}


def test_command_times_kernels(config_folder, tmp_path):
    options = ("--model", config_folder, "--budget", 64, "--batch", 2, "--steps", 2, "--out", tmp_path / "out")
    result = command("--kernels", *options)
    assert result.exit_code == 0, result.output
    share = re.search(r"\| (\d+)% \|", result.stdout)
    assert 0 <= int(share[1]) < 1000
    (row,) = json.loads((tmp_path / "out" / "kernels.json").read_text())["rows"]
    assert row["bytes_read"] == 2 * 2 * 2 * 64 * 16 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "rass"], "did you mean 'raas'?"),
        (["--method", "raas,kvpress"], "an environment with kvpress as --peer-python"),
        (["--mode", "fast"], "mode='fast' is unknown: use one of 'eager', 'compiled'"),
        (["--seen", "1k"], "'1k' must be whole numbers"),
        (["--seen", "0"], "seen=0 must be at least 1"),
        (["--batch", "0"], "batch=0 must be at least 1"),
        (["--budget", "40"], "budget=40 must be at least 47"),
        (["--budget", "1024", "--page-size", 1024], "budget=1024 must be at least 2048"),
        (["--page-size", 6], "page_size=6"),
        (["--model", "medium"], "model='medium' must be one of small, llama-3-8b, a folder"),
        (["--dtype", "int4"], "'int4' must be float32, bfloat16 or float16"),
        (["--device", "tpu"], "--device"),
        (["--kernels", "--budget", "100"], "budget=100 must be whole pages"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(options, message):
    result = command(*options)
    assert result.exit_code == 2, result.output
    (error,) = (line for line in result.output.splitlines() if line.startswith("Error: "))
    assert message in error


def test_timing_needs_no_extra():
    code = "import sys; sys.modules.update(dict.fromkeys(['typer', 'rich', 'matplotlib'])); import raas_cache.bench"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plots_without_matplotlib_are_refused_at_once(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = command("--out", tmp_path)
    assert result.exit_code == 2 and "pip install raas-cache[viz]" in result.output


def test_help_lists_the_options():
    output = command("--help").output
    for option in (
        "method", "seen", "batch", "budget", "mode", "model", "page-size", "steps", "copies", "device", "dtype", "seed",
        "out", "kernels", "peer-python",
    ):  # fmt: skip
        assert f"--{option} " in output


@pytest.mark.gpu
def test_everything_on_a_gpu(tmp_path):
    config, device = LlamaConfig(**CONFIG), torch.device("cuda")
    grid = Grid(("raas", "h2o"), (512,), budgets=(BUDGET,), modes=steps.MODES, page_size=PAGE, steps=4)
    eager, compiled = run(build_model(config, device, torch.bfloat16), grid)
    assert {row.ran for row in eager} == {"eager"}
    assert {row.case.method for row in compiled if row.ran == "compiled"} >= {"StaticCache(seen)", "raas"}
    (row,) = run_kernels(
        load_config("llama-3-8b"), batches=[32], budgets=[2048], page_size=16, repeats=10, dtype=torch.bfloat16,
        device=device,
    )  # fmt: skip
    assert 0.1 < row.share < 1.2

"""kvpress in an environment of its own, timed in turns with the caches of this package: here with a stand-in for it."""

import json
import re
import shlex
import sys
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig

from raas_cache.bench import Grid, Peer, build_model, read_json, run, steps, table

from .. import kvpress_stand_in
from ..docs.test_docs import RESULTS
from ..docs.test_docs import table as table_of
from .tiny import BUDGET, CONFIG, CPU, PAGE, TOKEN_BYTES, command


@pytest.fixture
def stand_in(tmp_path):
    """The folder of an environment that has kvpress."""
    kvpress_stand_in.make(tmp_path / "peer")
    return tmp_path / "peer"


def noted(folder):
    return [json.loads(line) for line in (folder / "lib" / "noted").read_text().splitlines()]


@pytest.fixture(scope="module")
def model():
    return build_model(LlamaConfig(**CONFIG), CPU, torch.float32)


def test_it_takes_turns_with_the_others(model, stand_in, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/nowhere")  # of this environment, which is not the peer's
    grid = Grid(("raas",), (100, 30), batches=(3,), budgets=(BUDGET,), page_size=PAGE, steps=4)
    with Peer(stand_in / "bin" / "python") as peer:
        assert peer.about.keys() == {"kvpress", "torch", "transformers"} and peer.about["kvpress"] == "9.8"
        cells = list(run(model, grid, peer))
        process = peer._process
        assert process.poll() is None
    assert process.poll() is not None
    for cell in cells:
        assert [row.case.method for row in cell] == [*steps.BASELINES, "raas", "kvpress"]
        ours = cell[-1]
        assert ours.ran == "eager" and len(ours.timing.steps) == 4 and min(ours.timing.steps) > 0
        assert ours.kv_bytes == 3 * min(BUDGET, ours.case.seen) * TOKEN_BYTES
        assert ours.ratios["dynamic"] > 0 and ours.ratios["StaticCache(budget)"] > 0
    turns, seen = steps.WARMUP * 2 + 4, noted(stand_in)
    assert len(seen) == 2 * turns
    for cell, first in ((seen[:turns], 100), (seen[turns:], 30)):
        assert [step["position"] for step in cell] == [[first + turn // 2] for turn in range(turns)]
        assert [step["held"] for step in cell] == [min(first, BUDGET) + 1 + turn // 2 for turn in range(turns)]
        assert Counter(Counter(step["cache"] for step in cell).values()) == {turns // 2: 2}, "two caches, in turn"
        assert len({step["press"] for step in cell}) == 2, "a press counts the steps of one cache"
    assert {step["target"] for step in seen} == {BUDGET} and {step["batch"] for step in seen} == {3}
    assert len({step["weights"] for step in seen}) == 1, "twins have the same weights"


def test_without_one_there_is_no_such_row(model):
    (rows,) = run(model, Grid(("raas",), (40,), budgets=(BUDGET,), page_size=PAGE, steps=2))
    assert [row.case.method for row in rows] == [*steps.BASELINES, "raas"]
    with pytest.raises(ValueError, match=r"method='kvpress' runs on an older transformers .* as --peer-python"):
        Grid(("raas", "kvpress"), (40,))


def test_the_command_takes_it(stand_in, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **CONFIG}))
    options = ("--method", "raas", "--model", tmp_path, "--seen", 64, "--budget", 64, "--page-size", 4, "--steps", 3)
    result = command(*options, "--peer-python", stand_in / "bin" / "python", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "peer: kvpress 9.8, torch " in result.stdout
    lines = [line for line in result.stdout.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + 3 + 2 and re.match(r"\| kvpress \| 1 \| 64 \| 64 \| eager \| eager \| \d", lines[-1])
    written = tmp_path / "out" / "bench.json"
    assert json.loads(written.read_text())["peer"]["kvpress"] == "9.8"
    assert [row.case.method for row in read_json(written)][-1] == "kvpress"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "No such file or directory"),
        ("", "it printed nothing"),
        ("echo hello", "hello"),
        ("echo 3", "3"),
        ("echo [3]", r"\[3\]"),
        ("echo no such thing >&2; echo hello; exec sleep 600", "no such thing"),
        (f'exec {shlex.quote(sys.executable)} -c "import no_such_module"', "No module named 'no_such_module'"),
    ],
)
def test_what_does_not_run_it_is_refused(script, reason, tmp_path):
    path = tmp_path / "python"
    if script is not None:
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    with pytest.raises(
        ValueError, match=rf"peer_python='.*python' does not run kvpress \(.*{reason}\): give the Python"
    ):
        Peer(path)


def test_an_interpreter_without_kvpress_is_a_usage_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **CONFIG}))
    result = command("--model", tmp_path, "--seen", 64, "--peer-python", tmp_path / "config.json")
    (error,) = (line for line in result.output.splitlines() if line.startswith("Error: "))
    assert result.exit_code == 2 and "does not run kvpress (Permission denied)" in error


def test_a_peer_that_ends_is_an_error_that_says_why(model, stand_in, tmp_path):
    (stand_in / "lib" / "fail").touch()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **CONFIG}))
    options = ("--method", "raas", "--model", tmp_path, "--seen", 64, "--budget", 64, "--page-size", 4, "--steps", 3)
    result = command(*options, "--peer-python", stand_in / "bin" / "python")
    (error,) = (line for line in result.output.splitlines() if line.startswith("Error: "))
    assert result.exit_code == 2 and "(MemoryError: no room for the third step)" in error
    with Peer(stand_in / "bin" / "python") as peer:
        peer._process.kill()
        peer._process.wait()
        with pytest.raises(ValueError, match="does not run kvpress"):
            peer.build(model, seed=0)


def test_the_docs_show_what_was_measured():
    measured = read_json(RESULTS / "bench-kvpress-cpu.json")
    rows = table_of(table(measured), "")
    page = (RESULTS.parent / "performance.md").read_text()
    shown = table_of(page, "## Comparison with kvpress")
    assert len(shown) == 4 and {row["method"] for row in shown} == {"raas", "kvpress"}
    for row in shown:
        assert row in [{name: one[name] for name in row} for one in rows]

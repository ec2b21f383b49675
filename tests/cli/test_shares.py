"""`raas-cache shares` writes a file that the cache and the other commands read."""

import json
import re

import pytest


pytest.importorskip("typer")
pytest.importorskip("accelerate")
from typer.testing import CliRunner

from raas_cache import RaaSCache
from raas_cache.cli import app
from raas_cache.eval.chains import problems


TEXT = ["--model", "chain_reasoner", "--data", "chains.jsonl", "--page-size", "4"]
SMALL = [*TEXT, "--tokens", "100"]


def invoke(*arguments):
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chains = [chain for lines in (20, 18, 5) for chain in problems(1, lines, seed=0)]  # prompts of several lengths
    texts = [{"problem": chain.prompt, "reasoning": chain.chain} for chain in chains]
    (tmp_path / "chains.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    return tmp_path


def test_writes_a_file_that_caches_read(folder):
    result = invoke("shares", *SMALL, "--budget", "100%", "--out", "new/shares.json")
    assert result.exit_code == 0, result.output
    written = json.loads((folder / "new" / "shares.json").read_text())
    assert {key: written[key] for key in ("model", "budget", "page_size")} == {
        "model": "chain_reasoner", "budget": 100, "page_size": 4,
    }  # fmt: skip
    assert [len(layer) for layer in written["shares"]] == [2, 2, 2]
    assert "2 texts from chains.jsonl, 100 tokens each, chain_reasoner, torch.float32" in result.output
    assert "1 of 3 texts have shorter chains and are left out." in result.output
    assert result.output.splitlines()[-1] == "RaaSCache(budget=100, page_size=4, shares='new/shares.json')"
    cache = eval(result.output.splitlines()[-1], {"RaaSCache": RaaSCache})
    assert cache.budget == 100 and cache.settings.page_size == 4


def test_one_size_by_layer(folder):
    assert invoke("shares", *SMALL, "--budget", "100", "--sizes", "1", "--rows", "1", "--out", "s.json").exit_code == 0
    shares = json.loads((folder / "s.json").read_text())["shares"]
    assert all(len(set(layer)) == 1 for layer in shares) and len({layer[0] for layer in shares}) > 1


def test_other_commands_take_the_file(folder):
    (folder / "s.json").write_text('{"shares": [[2.0, 1.0], [0.5, 0.5], [1.0, 1.0]]}')
    method = "raas,raas:shares=s.json"
    result = invoke("fidelity", *SMALL, "--methods", method, "--budgets", "100", "--rows", "2", "--recommend")
    assert result.exit_code == 0, result.output
    assert "| raas:shares=s.json | 100 (100.0%) |" in result.output
    result = invoke("eval", "--dataset", "chains-4", "--limit", "1", "--method", method, "--budget", "64",
                    "--page-size", "4", "--max-new-tokens", "3", "--out", "rows")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "raas:shares=s.json" in result.output


def test_rows_of_another_file_are_refused(folder):
    """The file has the same name, so only its content tells that the stored rows are of other shares."""
    command = ["eval", "--dataset", "chains-4", "--limit", "1", "--method", "raas:shares=s.json", "--budget", "64",
               "--page-size", "4", "--max-new-tokens", "3", "--out", "rows"]  # fmt: skip
    (folder / "s.json").write_text('{"shares": [1.5, 0.5, 1.0]}')
    assert invoke(*command).exit_code == invoke(*command).exit_code == 0
    (folder / "s.json").write_text('{"shares": [0.5, 1.5, 1.0]}')
    result = invoke(*command)
    assert result.exit_code == 2
    assert "contains rows with shares=s.json=" in re.sub(r"\s+", " ", result.output)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--budget", "40"], "Invalid value for --budget: budget=40 leaves fewer than 2 pages of 4 tokens"),
        (["--budget", "300"], "Invalid value for --budget: budget=300 evicts nothing from rows of 166 tokens"),
        (["--budget", "much"], "Invalid value for --budget: 'much' must be a number of tokens"),
        (["--budget", "100,120"], "Invalid value for --budget: '100,120' must be one budget"),
        (
            ["--tokens", "5000"],
            "Invalid value for --tokens: tokens=5000 is more than the longest of 3 chains has: give at most 244",
        ),
        (["--data", "none.jsonl"], "Invalid value for --data: data='none.jsonl' does not exist"),
        (["--model", "nowhere/at/all"], "Invalid value for --model: name='nowhere/at/all' cannot be loaded"),
        (["--page-size", "6"], "Invalid value for '--page-size': page_size=6 must be a power of two"),
        (["--out", "."], "Invalid value for --out: '.' is a folder: give the name of a file"),
        (["--out", "chains.jsonl/s.json"], "Invalid value for --out: 'chains.jsonl' cannot be written to"),
        (["--dtype", "int4"], "Invalid value for --dtype: 'int4' must be"),
    ],
)
def test_wrong_options(folder, options, says):
    result = invoke("shares", *SMALL, "--budget", "100", "--out", "s.json", *options)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert re.search(says, re.sub(r"\s+", " ", result.output.replace("│", " "))), result.output
    assert not (folder / "s.json").exists()


def test_a_missing_file_of_shares(folder):
    for command in (["bench", "--method"], ["eval", "--method"], ["fidelity", "--methods"]):
        result = invoke(*command, "raas:shares=none.json")
        assert result.exit_code == 2
        said = re.sub(r"\s+", " ", result.output)
        assert "shares='none.json' does not exist: write this file with `raas-cache shares" in said

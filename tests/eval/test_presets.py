"""`--preset`: the RaaS paper's protocol, and options that win over it."""

import json

import pytest


pytest.importorskip("datasets")
pytest.importorskip("typer")
from typer.testing import CliRunner

from raas_cache.cli import app
from raas_cache.eval import command


def invoke(*options):
    return CliRunner().invoke(app, ["eval", *map(str, options)])


@pytest.fixture
def asked(monkeypatch):
    """What the command asks for, without a model and without the Hub."""
    found = {"tasks": []}

    def load_task(name, limit, seed, **_):
        found["tasks"].append((name, limit))

    def load(*_, **__):
        raise SystemExit(0)

    def settings(methods, budgets):
        found.update(methods=methods, budgets=budgets)

    def decoding(*arguments):
        found["decoding"] = arguments

    for name, stand_in in (
        ("load_task", load_task), ("load", load), ("settings", settings), ("Decoding", decoding),
    ):  # fmt: skip
        monkeypatch.setattr(command, name, stand_in)
    return found


PAPER = ["dynamic", "streaming_llm", "h2o", "quest", "raas"]


def test_the_protocol_of_the_paper(asked, tmp_path):
    invoke("--preset", "raas-paper", "--out", tmp_path)
    assert asked["tasks"] == [("gsm8k", 200), ("math500", 200), ("aime24", 200)]
    assert [name for name, _ in asked["methods"]] == PAPER
    assert all(options["page_size"] == 16 for name, options in asked["methods"] if name != "dynamic")
    assert list(asked["budgets"]) == [64, 128, 256, 512, 1024]
    assert asked["decoding"][:2] == (10_240, 0.0)


@pytest.mark.parametrize("order", [1, -1], ids=["options first", "preset first"])
def test_options_win(asked, tmp_path, order):
    options = ["--limit", 2, "--dataset", "math500", "--budget", "64", "--max-new-tokens", 48, "--page-size", 8]
    parts = [options, ["--preset", "raas-paper"]][::order]
    invoke(*parts[0], *parts[1], "--out", tmp_path)
    assert asked["tasks"] == [("math500", 2)] and list(asked["budgets"]) == [64]
    assert asked["decoding"][0] == 48 and [name for name, _ in asked["methods"]] == PAPER
    assert asked["methods"][-1][1]["page_size"] == 8


def test_without_a_preset_nothing_changes(asked, tmp_path):
    invoke("--out", tmp_path)
    assert asked["tasks"] == [("chains", None)] and asked["decoding"][0] is None


def test_end_to_end(tmp_path):
    """On chains of the embedded model: all methods of the paper at two budgets."""
    options = ["--dataset", "chains-4", "--limit", 2, "--max-new-tokens", 48, "--budget", "64,128", "--out", tmp_path]
    result = invoke("--preset", "raas-paper", *options)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "rows-0.jsonl").read_text().splitlines()]
    assert {(row["method"], row["budget"]) for row in rows} == {("dynamic", None)} | {
        (method, budget) for method in PAPER[1:] for budget in (64, 128)
    }
    assert all(row["tokens"] <= 48 for row in rows)


def test_help_shows_what_a_preset_sets():
    words = "".join(invoke("--help").output.split())  # the help breaks lines at hyphens too
    assert "raas-paper:--datasetgsm8k,math500,aime24--limit200" in words and "--max-new-tokens10240" in words

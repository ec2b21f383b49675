"""`measure` and `raas-cache fidelity`: rows, tables, resuming, refusals, processes."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch

from raas_cache import pretrained
from raas_cache.eval import Setting, chains
from raas_cache.fidelity import Fidelity, FidelityRow, Text, load_texts, measure
from raas_cache.fidelity import measure as measure_function
from raas_cache.fidelity.results import constructor

from ..helpers import refused


pytest.importorskip("typer")
from typer.testing import CliRunner

from raas_cache.cli import app


measuring = sys.modules[measure_function.__module__]
PAGES = {"page_size": 4, "min_decode_pages": 1}
RAAS = Setting("raas", 72, {**PAGES, "alpha": 0.1})
WINDOW = Setting("streaming_llm", 72, {**PAGES, "prompt": "pin"})
LARGE = Setting("raas", 512, PAGES)
TOKENS = 100


@pytest.fixture(scope="module")
def model():
    return pretrained("chain_reasoner")[0]


@pytest.fixture(scope="module")
def tokenizer():
    return pretrained("chain_reasoner")[1]


@pytest.fixture(scope="module")
def texts():
    """Three chains of 12 lines, and one that is too short."""
    sample = [*chains.problems(3, 12, seed=0), *chains.problems(1, 3, seed=0)]
    return [Text(problem.prompt, problem.chain) for problem in sample]


@pytest.fixture(scope="module")
def data(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "chains.jsonl"
    path.write_text("".join(json.dumps(vars(text)) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def found(model, tokenizer, texts):
    return measure(model, tokenizer, texts, [RAAS, WINDOW, LARGE], tokens=TOKENS, batch_size=2)


def lines(table):
    """Cells by column of each line of a Markdown table."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def never(*args, **options):
    raise AssertionError("a stored row ran again")


def test_rows(found, texts):
    assert found.too_short == 1
    assert [row.index for row in found.rows] == [0, 1, 2] * 4
    assert [setting.label for setting in found.settings] == ["dynamic", RAAS.label, WINDOW.label, LARGE.label]
    for row in found.rows:
        assert row.tokens == TOKENS and row.sums[..., 0].sum() == TOKENS
        assert FidelityRow.from_json(row.to_json().encode()) == row
    small, large = found.rows[3:6], found.rows[9:]
    assert all(one.kv_bytes < other.kv_bytes for one, other in zip(small, large, strict=True))


def test_table_is_of_the_rows(found):
    dynamic, raas, window, large = lines(found.table(against="streaming_llm:prompt=pin"))
    assert raas["method"] == "raas:alpha=0.1" and raas["budget"] == "72 (72.0%)" and dynamic["budget"] == "all"
    losses = {place: [row.sums[..., 1].sum() / TOKENS for row in found.rows[place : place + 3]] for place in (0, 3, 6)}
    assert raas["loss"] == f"{sum(losses[3]) / 3:.4f}"
    mean = sum(ours - dense for ours, dense in zip(losses[3], losses[0], strict=True)) / 3
    assert raas["loss - dynamic (95 %)"].startswith(f"{mean:+.4f} (") and mean > 0.001
    against = sum(ours - other for ours, other in zip(losses[3], losses[6], strict=True)) / 3
    assert raas["loss - streaming_llm:prompt=pin (95 %)"].startswith(f"{against:+.4f} (")
    assert raas["sign test"] in ("p = 0.250", "p = 1.000") and window["sign test"] == "-"
    # Nothing was evicted: the large cache is dynamic. The window has no such budget.
    assert large["loss - dynamic (95 %)"] == "+0.0000 (+0.0000 to +0.0000)"
    assert (large["KL"], large["same top token"], large["sign test"]) == ("0.0000", "100.0%", "-")
    assert found.table().count("|") < found.table(against="streaming_llm:prompt=pin").count("|")
    assert "Unless said otherwise: " in found.table() and "page_size=4" in found.table()


@pytest.mark.parametrize("split", ["by_position", "by_distance"])
def test_splits_add_up(found, split):
    """The differences in the cells, weighted by their tokens, give the difference of the whole."""
    raas = lines(getattr(found, split)())[0]
    axis = 1 if split == "by_position" else 0
    sums = sum(row.sums.sum(axis) for row in found.rows[3:6]) - sum(row.sums.sum(axis) for row in found.rows[:3])
    counts = sum(row.sums.sum(axis) for row in found.rows[:3])[:, 0]
    shown = list(raas.values())[2:]
    assert len(shown) == len(counts)
    for cell, lost, count in zip(shown, sums[:, 1], counts, strict=True):
        assert (cell == "-") == (count == 0)
        if split == "by_position":  # each text has the same number of tokens in a part
            assert float(cell.partition(" (")[0]) == pytest.approx(lost / count, abs=6e-5)
    dense, ours = (sum(row.sums[..., 1].sum() for row in found.rows[place : place + 3]) for place in (0, 3))
    assert sums[:, 1].sum() == pytest.approx(ours - dense)


def test_recommendation(found):
    small, reason, large, *_ = found.recommend().splitlines()
    means = {one.key: found.difference(one, Setting("dynamic")).mean for one in (RAAS, WINDOW)}
    best = min((RAAS, WINDOW), key=lambda one: means[one.key])
    assert small == f"72 (72.0%) tokens: {constructor(best)}"
    is_better = found.difference(*([WINDOW, RAAS] if best is RAAS else [RAAS, WINDOW])).low > 0
    assert ("significantly better than all others" in reason) == is_better
    assert ("not significantly better than" in reason) != is_better
    assert large == "512 (512.0%) tokens: RaaSCache(budget=512, page_size=4, min_decode_pages=1)"


def test_a_recommended_call_runs(found):
    import raas_cache

    for setting in (RAAS, WINDOW, LARGE, Setting("h2o", 64, {"prompt": "pin"})):
        cache = eval(constructor(setting), vars(raas_cache))
        assert vars(cache.settings) == vars(setting.new_cache().settings)


def test_methods_that_keep_everything_are_not_recommended(model, tokenizer, texts):
    found = measure(model, tokenizer, texts, [Setting("quest", 72, {"page_size": 4}), WINDOW], tokens=TOKENS)
    assert lines(found.table())[1]["loss - dynamic (95 %)"] < lines(found.table())[2]["loss - dynamic (95 %)"]
    assert found.recommend().startswith("72 (72.0%) tokens: StreamingLLMCache(")


def test_resumed_rows_do_not_run_again(model, tokenizer, texts, found, tmp_path, monkeypatch):
    options = {"tokens": TOKENS, "batch_size": 2, "out": tmp_path}
    measure(model, tokenizer, texts, [WINDOW], **options)
    path = tmp_path / "rows-0.jsonl"
    kept = path.read_text().splitlines(keepends=True)
    assert len(kept) == 6
    # A killed run leaves a part of its rows, and half a line.
    path.write_text("".join(kept[:5]) + kept[5][:20])
    again = measure(model, tokenizer, texts, [RAAS, WINDOW], **options)
    assert len(path.read_text().splitlines()) == 9
    for ours, theirs in zip(again.rows, found.rows[:9], strict=True):
        assert (ours.key, ours.text_hash) == (theirs.key, theirs.text_hash)
        assert ours.cells == pytest.approx(theirs.cells, abs=1e-4)
    monkeypatch.setattr(measuring, "read_batch", never)
    assert measure(model, tokenizer, texts, [RAAS, WINDOW], **options).rows == again.rows
    less = measure(model, tokenizer, texts, [RAAS], **options)
    assert [row.method for row in less.rows] == ["dynamic"] * 3 + ["raas"] * 3


def test_another_input_is_refused(model, tokenizer, texts, tmp_path):
    measure(model, tokenizer, texts[:1], [], tokens=50, out=tmp_path)
    refusals = {
        "contains rows with tokens=50, but this run has 60: give another folder": {"tokens": 60},
        "contains rows with model=None, but this run has 'b'": {"about": {"model": "b"}},
        "contains row 0 with another text: give another folder": {"data": texts[1:2]},
    }
    for message, change in refusals.items():
        options = {"data": texts[:1], "settings": [], "tokens": 50, "out": tmp_path, **change}
        with pytest.raises(ValueError, match=f"^out=.* {re.escape(message)}"):
            measure(model, tokenizer, options.pop("data"), options.pop("settings"), **options)
    other = pretrained("chain_reasoner", dtype=torch.float64)[0]
    with pytest.raises(ValueError, match="contains rows with dtype='float32'"):
        measure(other, tokenizer, texts[:1], [], tokens=50, out=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens=0 must be at least 1"),
        ({"tokens": 50, "batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"tokens": 500}, "tokens=500 is more than the longest of 4 chains has: give at most 148"),
    ],
)
def test_numbers_out_of_range(model, tokenizer, texts, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        measure(model, tokenizer, texts, [], **options)


def test_texts_of_a_problem_are_one_cluster(model, tokenizer, texts):
    same = measure(model, tokenizer, [texts[0], texts[0]], [RAAS], tokens=TOKENS)
    assert len({row.problem_hash for row in same.rows}) == 1
    lost = same.difference(RAAS, Setting("dynamic"))
    assert (lost.low, lost.high, lost.p) == (-math.inf, math.inf, 1.0)


def test_rows_in_any_order_are_paired_by_text(found):
    assert Fidelity(found.rows[:3] + found.rows[3:6][::-1]).table() == Fidelity(found.rows[:6]).table()


class TestCommand:
    OPTIONS = ("--model", "chain_reasoner", "--tokens", "60", "--page-size", "4", "--batch-size", "4")

    def run(self, data, *options):
        return CliRunner().invoke(app, ["fidelity", *self.OPTIONS, "--data", str(data), *map(str, options)])

    def test_prints_the_tables_and_a_recommendation(self, data, tmp_path):
        options = ["--methods", "raas:alpha=0.1,streaming_llm:prompt=pin", "--budgets", "150%,512", "--out", tmp_path]
        result = self.run(data, *options, "--against", "streaming_llm:prompt=pin", "--recommend")
        assert result.exit_code == 0, result.output
        assert f"3 texts from {data}, 60 tokens each, chain_reasoner, torch.float32" in result.output
        assert "1 of 4 texts have shorter chains and are left out" in result.output
        whole = result.output.partition("Loss - dynamic by position")[0]
        bounded = ["90 (150.0%)", "512 (853.3%)"]
        assert [row["budget"] for row in lines(whole)] == ["all", *bounded, *bounded]
        assert "90 (150.0%) tokens: " in result.output and "| 0 to 25 % of the chain |" in result.output
        assert "first use (" in result.output
        assert len((tmp_path / "rows-0.jsonl").read_text().splitlines()) == 15
        assert f"2 texts from {data}" in self.run(data, *options, "--rows", 2).output

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--budgets", "half"], "'half' must be a number of tokens, or a share such as 25%"),
            (["--budgets", "12.5"], "'12.5' must be a number of tokens, or a share such as 25%"),
            (["--budgets", "1%"], "--budgets: budget=1 is less than one page"),
            (["--methods", "rass"], "name='rass' is not a method: did you mean 'raas'?"),
            (["--methods", "raas:alpha"], "write 'alpha' as alpha=VALUE"),
            (["--tokens", "600"], "--tokens: tokens=600 is more than the longest of 4 chains has"),
            (["--against", "h2o"], "--against: against='h2o' is not among the methods: use one of"),
            (["--data", "missing.jsonl"], "--data: data='missing.jsonl' does not exist"),
            (["--dtype", "int8"], "'int8' must be float32, bfloat16 or float16"),
            (["--model", "no/such/folder"], "'no/such/folder' cannot be loaded"),
        ],
    )
    def test_bad_options_are_one_line(self, data, options, message):
        assert message in refused(self.run(data, "--budgets", "128", *options))

    def test_a_model_in_a_folder(self, data, model, tokenizer, tmp_path):
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        result = self.run(data, "--model", tmp_path, "--rows", 1, "--budgets", "128", "--methods", "raas")
        assert result.exit_code == 0, result.output

    def test_the_traces_need_a_model_that_knows_their_words(self):
        assert "tokenizer cannot read the data" in refused(self.run("traces", "--budgets", "128"))

    def test_two_processes_share_the_batches(self, data, tmp_path):
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        words += ["-m", "raas_cache.fidelity", *self.OPTIONS[:-1], "1", "--data", str(data), "--out", str(tmp_path)]
        words += ["--methods", "raas", "--budgets", "128"]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("3 texts from") == 1
        counts = [len((tmp_path / f"rows-{process}.jsonl").read_text().splitlines()) for process in (0, 1)]
        assert counts == [4, 2]


def test_smollm2_reads_a_real_trace():
    """A bounded cache that loses something, and one that loses nothing, on the model of the documentation."""
    model, tokenizer = pretrained("smollm2")
    settings = [Setting("streaming_llm", 96, {**PAGES, "prompt": "pin"}), Setting("raas", 256, PAGES)]
    found = measure(model, tokenizer, load_texts(limit=1), settings, tokens=64)
    _, window, large = lines(found.table())
    assert 1.0 < float(window["loss"]) < 3.0 and window["loss - dynamic (95 %)"] != large["loss - dynamic (95 %)"]
    assert large["loss - dynamic (95 %)"] == "+0.0000 (-inf to +inf)" and large["same top token"] == "100.0%"

"""`probe` and `raas-cache probe`: rows, tables, resuming, refusals, processes."""

import itertools
import math
import os
import re
import subprocess
import sys
from random import Random
from statistics import NormalDist

import pytest
import torch

from raas_cache.eval import Setting
from raas_cache.probes import PROBES, ProbeRow, Recalls, probe
from raas_cache.probes.results import DISTANCES, EDGES

from ..helpers import refused
from .tiny import model_of


pytest.importorskip("typer")
pytest.importorskip("accelerate")
from typer.testing import CliRunner

from raas_cache.cli import app


measuring = sys.modules[probe.__module__]
PAGES = {"page_size": 4, "min_decode_pages": 1}
RAAS, WINDOW, LARGE = Setting("raas", 48, PAGES), Setting("window", 48, PAGES), Setting("raas", 512, PAGES)
DYNAMIC = Setting("dynamic")
OPTIONS = {"tokens": 180, "texts": 3, "batch_size": 2}


@pytest.fixture(scope="module")
def found(model, tokenizer):
    return probe(model, tokenizer, "lemma-once", [RAAS, WINDOW, LARGE], **OPTIONS)


def lines(table):
    """Cells by column of each line of a Markdown table."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def drawn(seed=0, texts=5):
    """Random rows of three settings, with recalls at every distance, and different numbers of recalls."""
    random, rows = Random(seed), []
    counts = [random.randint(4, 30) for _ in range(texts)]
    distances = [[random.choice([8, 64, 65, 128, 200, 512, 513, 1024, 1025]) for _ in range(count)] for count in counts]
    for setting, share in ((DYNAMIC, 0.9), (RAAS, 0.5), (WINDOW, 0.6)):
        for index, since in enumerate(distances):
            correct = [int(random.random() < share) for _ in since]
            loss = [random.random() for _ in since]
            rows.append(
                ProbeRow(index, "t", setting.method, setting.budget, dict(setting.options), 9, 192, False, 1000 + index,
                         since, [2 * one for one in since], correct, loss)
            )  # fmt: skip
    return rows


def test_rows(found):
    assert [row.index for row in found.rows] == [0, 1, 2] * 4
    assert [setting.label for setting in found.settings] == ["dynamic", RAAS.label, WINDOW.label, LARGE.label]
    for row in found.rows:
        assert row.tokens == 180 and len(row.correct) == len(row.loss) == len(row.since_use) >= 3
        assert ProbeRow.from_json(row.to_json().encode()) == row
    dynamic, small, large = found.rows[:3], found.rows[3:6], found.rows[9:]
    for dense, one, other in zip(dynamic, small, large, strict=True):
        assert one.kv_bytes < other.kv_bytes and one.text_hash == other.text_hash
        assert other.loss == pytest.approx(dense.loss) and other.correct == dense.correct
        assert one.loss != pytest.approx(dense.loss, abs=1e-3)
    assert len({row.text_hash for row in dynamic}) == 3


def test_table_is_of_the_rows():
    rows = drawn()
    dynamic, raas, window = lines(Recalls("needle", rows[::-1]).table("window"))[::-1]
    assert raas["method"] == "raas" and raas["budget"] == "48 (25.0%)" and dynamic["budget"] == "all"
    of = {place: [one for row in rows[place : place + 5] for one in row.correct] for place in (0, 5, 10)}
    share = {place: sum(of[place]) / len(of[place]) for place in of}
    assert [row["recalled"] for row in (dynamic, raas, window)] == [f"{share[place]:.1%}" for place in of]
    assert raas["recalled - dynamic (95 %)"].startswith(f"{100 * (share[5] - share[0]):+.1f} (")
    assert raas["recalled - window (95 %)"].startswith(f"{100 * (share[5] - share[10]):+.1f} (")
    loss = [one for row in rows[5:10] for one in row.loss]
    assert raas["loss"] == f"{sum(loss) / len(loss):.4f}" and raas["KV bytes"] == "1,004"
    assert window["recalled - window (95 %)"] == window["sign test"] == dynamic["sign test"] == "-"
    assert "recalled - window" not in Recalls("needle", rows).table()
    assert "Unless said otherwise: min_decode_pages=1, page_size=4." in Recalls("needle", rows).table()


def test_intervals_are_clustered_by_text():
    """Recalls of a text are drawn together."""
    found = Recalls("needle", drawn())
    share = found.difference(RAAS, DYNAMIC)
    rows = drawn()
    counts = [len(row.correct) for row in rows[:5]]
    lost = [sum(ours.correct) - sum(dense.correct) for dense, ours in zip(rows[:5], rows[5:10], strict=True)]
    assert share.mean == pytest.approx(sum(lost) / sum(counts))
    # All draws of five texts, and the quantile that gives the width of a t-interval.
    draws = itertools.product(range(5), repeat=5)
    means = sorted(sum(lost[text] for text in draw) / sum(counts[text] for text in draw) for draw in draws)
    tail = NormalDist().cdf(-math.sqrt(5 / 4) * 2.776445)  # 97.5 % of Student's t with four degrees of freedom
    place = round(tail * (len(means) - 1))
    assert share.low == pytest.approx(means[place], abs=0.02) and share.high == pytest.approx(
        means[-1 - place], abs=0.02
    )
    below, above = sum(one < 0 for one in lost), sum(one > 0 for one in lost)
    tail = sum(math.comb(below + above, one) for one in range(min(below, above) + 1)) / 2 ** (below + above)
    assert share.p == pytest.approx(min(1.0, 2 * tail))


def test_distances():
    rows = drawn()
    found = Recalls("needle", rows)
    shares, differences = lines(found.by_distance()), lines(found.by_distance("window"))
    assert [row["method"] for row in shares] == ["dynamic", "raas", "window"]
    assert [row["method"] for row in differences] == ["raas"]
    since = [one for row in rows[:5] for one in row.since_use]
    right = {place: [one for row in rows[place : place + 5] for one in row.correct] for place in (0, 5, 10)}
    ends = [0, *EDGES, math.inf]
    for group, name in enumerate(DISTANCES):
        inside = [place for place, one in enumerate(since) if ends[group] < one <= ends[group + 1]]
        column = f"{name} ({len(inside)})"
        rate = {place: sum(right[place][one] for one in inside) / len(inside) for place in right}
        assert [row[column] for row in shares] == [f"{rate[place]:.1%}" for place in right]
        assert differences[0][column].startswith(f"{100 * (rate[5] - rate[10]) + 0.0:+.1f} (")
    near = [row for row in drawn() if row.method == "dynamic"]
    only = Recalls("needle", [ProbeRow(**{**vars(row), "since_use": [8] * len(row.since_use)}) for row in near])
    assert list(lines(only.by_distance())[0])[2:] == [f"1 to 64 ({len(since)})"], "groups without recalls are left out"


def test_summary():
    rows = drawn()
    said = Recalls("needle", rows).summary()
    count = sum(len(row.correct) for row in rows[:5])
    assert said.startswith(f"needle: {count} recalls in 5 texts. Tokens since the last use: 8 to 1,025, median ")
    assert said.endswith("Chance: 11.1%.")
    use, derivation = (int(one.replace(",", "")) for one in re.findall(r"median ([\d,]+)", said))
    assert derivation == 2 * use


def test_resumed_rows_do_not_run_again(model, tokenizer, found, tmp_path, monkeypatch):
    options = {**OPTIONS, "out": tmp_path}
    probe(model, tokenizer, "lemma-once", [WINDOW], **options)
    path = tmp_path / "rows-0.jsonl"
    kept = path.read_text().splitlines(keepends=True)
    assert len(kept) == 6
    path.write_text("".join(kept[:5]) + kept[5][:20])  # a killed run leaves a part of its rows, and half a line
    again = probe(model, tokenizer, "lemma-once", [RAAS, WINDOW], **options)
    assert len(path.read_text().splitlines()) == 9
    for ours, theirs in zip(again.rows, found.rows[:9], strict=True):
        assert (ours.key, ours.text_hash, ours.correct) == (theirs.key, theirs.text_hash, theirs.correct)
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)

    def never(*args):
        raise AssertionError("a stored row ran again")

    monkeypatch.setattr(measuring, "read_recalls", never)
    assert probe(model, tokenizer, "lemma-once", [RAAS, WINDOW], **options).rows == again.rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 190}, "contains rows with tokens=180, but this run has 190: give another folder"),
        ({"seed": 5}, "contains rows with seed=0, but this run has 5"),
        ({"name": "lemma-restated"}, "contains rows with probe='lemma-once', but this run has 'lemma-restated'"),
        ({"about": {"model": "b"}}, "contains rows with model=None, but this run has 'b'"),
    ],
)
def test_another_input_is_refused(model, tokenizer, tmp_path, change, message):
    options = {"name": "lemma-once", "settings": [], "tokens": 180, "texts": 1, "out": tmp_path}
    probe(model, tokenizer, **options)
    with pytest.raises(ValueError, match=f"^out=.* {re.escape(message)}"):
        probe(model, tokenizer, **{**options, **change})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens=0 must be at least 1"),
        ({"texts": 0}, "texts=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"name": "lemma"}, "probe='lemma' is unknown: use one of lemma-once, lemma-restated, needle"),
    ],
)
def test_wrong_arguments(model, tokenizer, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        probe(model, tokenizer, **{"name": "lemma-once", "settings": [], **OPTIONS, **options})


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model_of(tokenizer, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class TestCommand:
    def run(self, folder, *options):
        words = ["probe", "--model", folder, "--tokens", 320, "--texts", 2, "--page-size", 4, *options]
        return CliRunner().invoke(app, [str(word) for word in words])

    def test_prints_the_tables(self, folder, tmp_path):
        options = ["--methods", "raas,window", "--budgets", "40%,256", "--out", tmp_path, "--batch-size", 2]
        result = self.run(folder, *options, "--against", "window", "--probe", "lemma-once, needle")
        assert result.exit_code == 0, result.output
        assert result.output.count(f"320 tokens in each text, {folder}, torch.float32") == 2
        first, second = result.output.split("needle: ")
        for text in (first, second):
            whole, _, distances = text.partition("Recalled by tokens since the last use:")
            assert [row["budget"] for row in lines(whole)] == ["all", *["128 (40.0%)", "256 (80.0%)"] * 2]
            assert "Recalled - window by tokens since the last use:" in distances
        assert "lemma-once: " in first
        for name in ("lemma-once", "needle"):
            assert len((tmp_path / name / "rows-0.jsonl").read_text().splitlines()) == 10
        again = self.run(folder, *options, "--probe", "needle")
        assert again.exit_code == 0 and "Recalled - window" not in again.output

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--probe", "haystack"], "--probe: probe='haystack' is unknown: use one of lemma-once"),
            (["--budgets", "half"], "'half' must be a number of tokens, or a share such as 25%"),
            (["--budgets", "1%"], "--budgets: budget=3 is less than one page"),
            (["--methods", "rass"], "name='rass' is not a method: did you mean 'raas'?"),
            (["--against", "h2o"], "--against: against='h2o' is not among the methods: use one of"),
            (["--tokens", "12"], "--tokens: tokens=12 leaves a text of 'lemma-once' without a recall: give more"),
            (["--model", "chain_reasoner"], "--model: The model's tokenizer cannot read the data"),
            (["--model", "no/such/folder"], "'no/such/folder' cannot be loaded"),
            (["--dtype", "int8"], "'int8' must be float32, bfloat16 or float16"),
        ],
    )
    def test_bad_options_are_one_line(self, folder, options, message):
        assert message in refused(self.run(folder, "--budgets", "128", *options))

    def test_two_processes_share_the_batches(self, folder, tmp_path):
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        words += ["-m", "raas_cache.probes", "--model", folder, "--tokens", "180", "--texts", "3", "--methods", "raas"]
        words += ["--budgets", "160", "--probe", "lemma-once", "--out", tmp_path]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("lemma-once: ") == 1
        written = [len((tmp_path / "lemma-once" / f"rows-{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)]
        assert written == [4, 2]


def test_every_probe_has_its_own_texts(model, tokenizer):
    hashes = {
        row.text_hash
        for name in PROBES
        for row in probe(model, tokenizer, name, [], tokens=320, texts=2, batch_size=2).rows
    }
    assert len(hashes) == 6

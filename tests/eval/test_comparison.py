"""pass@k, maj@k, and the comparison of settings pair by pair, on rows written by hand."""

import itertools
from dataclasses import replace

import pytest

from raas_cache.common.statistics import difference
from raas_cache.eval import Setting, compare, compared, summarize, table
from raas_cache.eval import votes as voting
from raas_cache.eval.settings import rivals_of
from raas_cache.eval.votes import majority, pass_at

from ..helpers import refused
from .rows import ROW


def rows(method, budget, marks, **options):
    """Rows of a setting. `marks`: one text per problem, with a `1` or a `0` for each sample."""
    return [
        replace(ROW, index=index, sample=sample, method=method, budget=budget, options=options, correct=mark == "1")
        for index, text in enumerate(marks)
        for sample, mark in enumerate(text)
    ]


def votes(*cast):
    """Rows of one problem, from answers; an answer with a `*` is correct."""
    return [
        replace(ROW, sample=sample, answer=text and text.rstrip("*"), correct=bool(text) and text.endswith("*"))
        for sample, text in enumerate(cast)
    ]


class TestPassAt:
    @pytest.mark.parametrize("correct", range(6))
    def test_is_the_share_of_subsets_with_a_correct_sample(self, correct):
        marks = [True] * correct + [False] * (5 - correct)
        for k in range(1, 6):
            subsets = list(itertools.combinations(marks, k))
            assert pass_at(k, 5, correct) == pytest.approx(sum(map(any, subsets)) / len(subsets))

    def test_of_a_setting(self):
        (summary,) = summarize(rows("raas", 512, ["1100", "0000", "1111"]))
        assert (summary.problems, summary.samples, summary.rows, summary.correct) == (3, 4, 12, 6)
        assert summary.accuracy == pytest.approx((0.5 + 0 + 1) / 3)
        assert summary.pass_at(2) == pytest.approx((5 / 6 + 0 + 1) / 3) and summary.pass_at(4) == pytest.approx(2 / 3)
        with pytest.raises(ValueError, match="k=5 must be from 1 to 4, the number of samples of each problem"):
            summary.pass_at(5)
        low, high = summary.interval
        assert low < 0.1 and high > 0.9, "three problems say little, however many samples they have"


class TestMajority:
    @pytest.mark.parametrize(
        ("cast", "result"),
        [
            (("4*", "4*", "5"), 1.0),
            (("4*", "5", "5"), 0.0),
            (("4*", "5", "6"), 1 / 3),
            (("4*", "4*", "5", "5"), 1 / 2),
            (("4*", "4.0*", "5", "6"), 1.0),
            (("4*", "4*", "1/2", "0.5", "\\frac{1}{2}"), 0.0),  # three texts, one answer
            (("4*", "4*", "x+1", "1+x", "7"), 1 / 2),
            (("4*", None, None, None), 1.0),
            ((None, None), 0.0),
            (("5",), 0.0),
        ],
    )
    def test_of_a_problem(self, cast, result):
        pytest.importorskip("math_verify")
        for order in itertools.permutations(votes(*cast)):
            assert majority(order) == result

    def test_compares_answers_only_if_they_can_change_the_result(self, monkeypatch):
        monkeypatch.setattr(voting.answers, "are_equivalent", lambda *both: pytest.fail("compared"))
        assert majority(votes("4*", "4*", "4*", "1/2", "0.5")) == 1.0
        assert majority(votes("4*", "5", "5", "0.5")) == 0.0
        assert majority(votes("4", "5", "6")) == 0.0

    def test_of_an_unfinished_run_counts_the_samples_that_all_problems_have(self):
        first, second = votes("4*", "5", "5"), [replace(row, index=1) for row in votes("4*")]
        (summary,) = summarize([*first, *second])
        assert summary.samples == 1 and summary.majority == 1.0
        assert summary.rows == 4 and summary.accuracy == pytest.approx((1 / 3 + 1) / 2)


class TestTable:
    def test_has_samples(self):
        shown = table(summarize([*rows("raas", 512, ["10", "11"]), *rows("window", 512, ["00", "10"])])).splitlines()
        assert "| pass@1 (95 % interval) | pass@2 | maj@2 |" in shown[0]
        assert "| 75.0% (" in shown[2] and ") | 100.0% | 100.0% |" in shown[2]
        assert "| 25.0% (" in shown[3] and ") | 50.0% | 50.0% |" in shown[3]

    def test_of_an_unfinished_run_says_how_many(self):
        shown = table(summarize([*rows("raas", 512, ["10", "11"]), *rows("window", 512, ["0"])])).splitlines()
        assert "| pass@k | maj@k |" in shown[0]
        assert "| 100.0% (k = 2) | 100.0% (k = 2) |" in shown[2] and "| 0.0% (k = 1) | 0.0% (k = 1) |" in shown[3]

    def test_budget_without_the_prompt(self):
        found = [replace(ROW, prompt_tokens=100), replace(ROW, prompt_tokens=200, index=1)]
        (one,) = summarize(found)
        (layers,) = summarize([replace(row, budget=[128, 512]) for row in found])
        (dynamic,) = summarize([replace(row, method="dynamic", budget=None, options={}) for row in found])
        assert (one.decode_budget, layers.decode_budget, dynamic.decode_budget) == (362.0, (0.0, 362.0), None)
        shown = table([one, layers, dynamic]).splitlines()
        assert ["| 512 | 362 |" in shown[2], "| 128 / 512 | 0 / 362 |" in shown[3], "| all | all |" in shown[4]] == [
            True
        ] * 3


class TestCompare:
    OURS, THEIRS = ["11", "10", "00", "01"], ["10", "10", "01", "00"]

    def test_counts_pairs(self):
        (found,) = compare([*rows("raas", 512, self.OURS), *rows("window", 512, self.THEIRS)], "window")
        assert (found.setting.method, found.against.method) == ("raas", "window")
        assert (found.problems, found.pairs, found.won, found.lost) == (4, 8, 2, 1)
        assert found.difference == difference([0, 1, 0, 0, 0, -1, 0, 1], [0, 0, 1, 1, 2, 2, 3, 3])
        assert found.difference.mean == 1 / 8 and found.difference.p == 1.0
        (back,) = compare([*rows("raas", 512, self.OURS), *rows("window", 512, self.THEIRS)], "raas")
        assert (back.won, back.lost, back.difference.mean) == (1, 2, -1 / 8)

    def test_samples_of_a_problem_are_one_observation(self):
        """Eight samples that all say the same are not eight times the evidence."""
        few = compare([*rows("raas", 512, ["1"] * 6 + ["0"] * 4), *rows("window", 512, ["0"] * 10)], "window")[0]
        many = compare(
            [*rows("raas", 512, ["1" * 8] * 6 + ["0" * 8] * 4), *rows("window", 512, ["0" * 8] * 10)], "window"
        )
        assert many[0].difference == few.difference and few.difference.p == pytest.approx(2 / 64)

    def test_rows_without_a_partner_are_left_out(self):
        ours = rows("raas", 512, self.OURS)
        (found,) = compare([*ours, *rows("window", 512, self.THEIRS)[:3]], "window")
        assert (found.problems, found.pairs) == (2, 3)
        for changed in ({"seed": 1}, {"prompt_hash": "other"}):
            theirs = [replace(row, **changed) for row in rows("window", 512, self.THEIRS)]
            assert compare([*ours, *theirs], "window") == []

    def test_table(self):
        ours = rows("raas", 512, self.OURS, page_size=4) + rows("raas", 256, self.THEIRS, page_size=4)
        theirs = rows("window", 512, self.THEIRS, page_size=4)
        lines = compared(compare([*ours, *theirs], "window@512")).splitlines()
        assert lines[0].startswith("| method | budget | against | pass@1 difference (95 %) | sign test | won | lost |")
        assert lines[2].startswith("| raas | 512 | window | +12.5 (") and lines[2].endswith(
            "| p = 1.000 | 2 | 1 | 8 | 4 |"
        )
        assert lines[3] == "| raas | 256 | window @ 512 | +0.0 (+0.0 to +0.0) | p = 1.000 | 0 | 0 | 8 | 4 |"
        assert lines[-1] == "Unless said otherwise: page_size=4."


class TestRivals:
    SETTINGS = (
        Setting("dynamic"), Setting("raas", 256), Setting("raas", 512), Setting("raas", 512, {"alpha": 0.1}),
        Setting("window", 256),
    )  # fmt: skip

    @pytest.mark.parametrize(
        ("against", "pairs"),
        [
            ("window", {("raas", 256): ("window", 256)}),
            ("dynamic", {one.key: ("dynamic", None) for one in SETTINGS[1:]}),
            ("raas", {("raas:alpha=0.1", 512): ("raas", 512), ("window", 256): ("raas", 256)}),
            ("raas:alpha=0.1", {("raas", 512): ("raas:alpha=0.1", 512)}),
            ("raas@256", {one.key: ("raas", 256) for one in SETTINGS if one.key != ("raas", 256)}),
        ],
    )
    def test_of_each_setting(self, against, pairs):
        assert {key: rival.key for key, rival in rivals_of(self.SETTINGS, against).items()} == pairs

    @pytest.mark.parametrize("against", ["quest", "raas:alpha=0.2", "window@512", "raas@lots"])
    def test_unknown(self, against):
        listed = "use one of dynamic, raas@256, raas@512, raas:alpha=0.1@512, window@256"
        with pytest.raises(ValueError, match=f"against='{against}' is not among the methods: {listed}"):
            rivals_of(self.SETTINGS, against)


class TestCommand:
    def invoke(self, *words):
        pytest.importorskip("typer")
        from typer.testing import CliRunner

        from raas_cache.cli import app

        return CliRunner().invoke(app, ["compare", *map(str, words)])

    def test_prints_the_table(self, tmp_path):
        found = [*rows("raas", 512, ["1", "0"]), *rows("window", 512, ["0", "0"]), *rows("dynamic", None, ["1", "1"])]
        (tmp_path / "rows-0.jsonl").write_text("".join(row.to_json() for row in found), encoding="utf-8")
        result = self.invoke(tmp_path, "--against", "window")
        assert result.exit_code == 0 and result.stdout.strip() == compared(compare(found, "window"))
        assert compared(compare(found, "dynamic")) in self.invoke(tmp_path).stdout
        error = refused(self.invoke(tmp_path, "--against", "quest"))
        assert "--against" in error and "is not among the methods: use one of raas@512, window@512, dynamic" in error
        assert "--against" in refused(self.invoke(tmp_path, "--against", "raas:alpha"))

    def test_a_folder_without_rows(self, tmp_path):
        error = refused(self.invoke(tmp_path / "nothing"))
        assert "FOLDER" in error and "contains no results: run raas-cache eval --out" in error

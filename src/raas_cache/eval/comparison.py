"""Paired comparison of the settings of an evaluation: on the same problems, and with the same random numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..common.reporting import Cell, Table
from ..common.statistics import Difference, difference
from .results import budget_cell, note_of
from .rows import Row, by_setting
from .settings import Setting, common_options, rivals_of


@dataclass(frozen=True)
class Comparison:
    """How one setting does against another one. A pair is a row of each, with the same problem, sample and seed.

    Args:
        setting, against: the two settings.
        problems, pairs: number of problems, and number of pairs.
        won, lost: number of pairs in which only `setting` is correct, and in which only `against` is correct.
        difference: pass@1 of `setting` less pass@1 of `against` over the pairs, with its 95 % bootstrap interval and
            the p-value of the sign test, both by problem.
    """

    setting: Setting
    against: Setting
    problems: int
    pairs: int
    won: int
    lost: int
    difference: Difference


def compare(rows: Iterable[Row], against: str) -> list[Comparison]:
    """Compare settings with one other setting, pair by pair.

    Rows without a partner, as in the folder of an unfinished run, are left out. Settings without any pair are left out.

    Args:
        rows: the rows of a folder, from `read_rows`.
        against: a method among the rows, with its options if it has any. Each setting is compared with this method at
            the same budget, or with this method at one budget: `"window@1024"`. `"dynamic"` has no budget, and is
            compared with all settings.

    Returns:
        One entry per setting, in the order of the first row of each setting.

    Raises:
        ValueError: no row has this method.
        ImportError: scipy is missing.

    Example:
    >>> print(compared(compare(read_rows(Path("results/math500")), against="window")))
    """
    groups = by_setting(rows)
    rivals = rivals_of([group[0].setting for group in groups.values()], against)
    found = (_comparison(group, groups[rivals[key].key]) for key, group in groups.items() if key in rivals)
    return [one for one in found if one is not None]


def compared(comparisons: list[Comparison]) -> str:
    """A table of comparisons in GitHub's Markdown. Differences are in percentage points."""
    return str(compared_table(comparisons))


def compared_table(comparisons: list[Comparison]) -> Table:
    """The table of `compared`, before it is text."""
    common = common_options(setting for one in comparisons for setting in (one.setting, one.against))
    header = [
        "method",
        "budget",
        "against",
        "pass@1 difference (95 %)",
        "sign test",
        "won",
        "lost",
        "pairs",
        "problems",
    ]
    lines = []
    for one in comparisons:
        rival = one.against.label_but(common)
        if one.against.budget != one.setting.budget and one.against.budget is not None:
            rival += f" @ {budget_cell(one.against.budget).text}"
        counts = (one.won, one.lost, one.pairs, one.problems)
        lines.append([
            Cell(one.setting.label_but(common)), budget_cell(one.setting.budget), Cell(rival),
            Cell(one.difference.percent(), one.difference.mean), Cell(one.difference.p_text, one.difference.p),
            *(Cell(f"{count:,}", count) for count in counts),
        ])  # fmt: skip
    return Table(header, lines, note_of(common))


def _comparison(ours: list[Row], theirs: list[Row]) -> Comparison | None:
    partners = {(row.index, row.sample, row.seed, row.prompt_hash): row for row in theirs}
    pairs = [
        (row, partners[key]) for row in ours if (key := (row.index, row.sample, row.seed, row.prompt_hash)) in partners
    ]
    if not pairs:
        return None
    values = [float(row.correct) - partner.correct for row, partner in pairs]
    problems = [row.index for row, _ in pairs]
    return Comparison(
        setting=ours[0].setting,
        against=theirs[0].setting,
        problems=len(set(problems)),
        pairs=len(pairs),
        won=sum(value > 0 for value in values),
        lost=sum(value < 0 for value in values),
        difference=difference(values, problems),
    )

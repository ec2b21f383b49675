"""Summaries of the rows of each setting, and the table that shows them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from ..common.reporting import Cell, Table
from ..common.statistics import clustered_interval
from .rows import Row, by_setting
from .settings import Setting, common_options
from .votes import majority, pass_at


class Tally(NamedTuple):
    """The samples of one problem: how many there are, and how many are correct."""

    samples: int
    correct: int


@dataclass(frozen=True)
class Summary:
    """Totals and means over the rows of one setting.

    Args:
        tallies: one entry per problem.
        majority: maj@k, with k = `samples`: mean over the problems of `votes.majority`.
        truncated, over_budget: number of rows with this property.
        prompt_tokens: mean number of tokens of the prompt, over the rows.
        mean_tokens: mean number of generated tokens per row.
        tokens_per_second: generated tokens per second of one process.
        kv_bytes: largest number of bytes of keys and values held for a row.
        mean_kv_bytes: mean number of bytes of keys and values held for a row, over the tokens of all rows.
        evictions: mean number of evicted pages per row.
        devices: names of the cards or CPUs that generated the rows.
    """

    setting: Setting
    tallies: tuple[Tally, ...]
    majority: float
    truncated: int
    over_budget: int
    prompt_tokens: float
    mean_tokens: float
    tokens_per_second: float
    kv_bytes: int
    mean_kv_bytes: float
    evictions: float
    devices: tuple[str, ...]

    @property
    def problems(self) -> int:
        """Number of problems."""
        return len(self.tallies)

    @property
    def samples(self) -> int:
        """Number of samples that every problem has. In the folder of an unfinished run, some problems have more."""
        return min(tally.samples for tally in self.tallies)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(tally.samples for tally in self.tallies)

    @property
    def correct(self) -> int:
        """Number of correct rows."""
        return sum(tally.correct for tally in self.tallies)

    @property
    def accuracy(self) -> float:
        """pass@1: the mean over the problems of the share of correct samples."""
        return self.pass_at(1)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of `accuracy`, clustered by problem: `clustered_interval` of `common/statistics.py`.

        With one sample per problem, it is the Wilson interval.
        """
        return clustered_interval(self.tallies)

    def pass_at(self, k: int) -> float:
        """The unbiased estimate of pass@k, mean over the problems.

        Raises:
            ValueError: a problem has fewer than `k` samples.
        """
        if not 1 <= k <= self.samples:
            raise ValueError(f"k={k} must be from 1 to {self.samples}, the number of samples of each problem.")
        return fmean(pass_at(k, *tally) for tally in self.tallies)

    @property
    def decode_budget(self) -> float | tuple[float, ...] | None:
        """The budget without the tokens of the mean prompt, at least 0; one number per layer if the budget has them.

        None without a budget.
        """
        budget = self.setting.budget
        if isinstance(budget, tuple):
            return tuple(max(0.0, tokens - self.prompt_tokens) for tokens in budget)
        return None if budget is None else max(0.0, budget - self.prompt_tokens)


def summarize(rows: Iterable[Row]) -> list[Summary]:
    """Summarize the rows of each setting, in the order of the first row of each setting.

    Raises:
        ImportError: math-verify is needed to count votes, and missing.
    """
    return [_summary(group) for group in by_setting(rows).values()]


def table(summaries: list[Summary], **more: list[str]) -> str:
    """A table in GitHub's Markdown with one line per setting. Options that most settings share are listed below it.

    If problems have several samples, the table also has pass@k and maj@k.

    Args:
        more: additional columns: name -> one cell per setting.
    """
    shown = table_of(summaries)
    lines = [[*line, *map(Cell, cells)] for line, *cells in zip(shown.lines, *more.values(), strict=True)]
    return str(Table([*shown.header, *more], lines, shown.note))


def table_of(summaries: list[Summary]) -> Table:
    """The table of `table`, before it is text."""
    counts = {summary.samples for summary in summaries}
    several = any(count > 1 for count in counts)
    k = str(max(counts)) if len(counts) == 1 else "k"
    header = ["method", "budget", "budget without prompt"]
    header += ["pass@1 (95 % interval)", f"pass@{k}", f"maj@{k}"] if several else ["accuracy (95 % interval)"]
    header += ["tokens", "truncated", "tokens/s", "peak KV", "mean KV", "evicted"]
    common = common_options(summary.setting for summary in summaries)
    lines = []
    for one in summaries:
        low, high = one.interval
        budget = budget_cell(one.setting.budget)
        if one.over_budget:
            budget = budget._replace(text=f"{budget.text} (exceeded in {one.over_budget} rows)")
        votes = (one.pass_at(one.samples), one.majority) if several else ()
        of_k = f" (k = {one.samples})" * (k == "k")  # an unfinished run
        truncated = one.truncated / one.rows
        lines.append([
            Cell(one.setting.label_but(common)), budget, budget_cell(one.decode_budget),
            Cell(f"{one.accuracy:.1%} ({low:.1%} to {high:.1%})", one.accuracy),
            *(Cell(f"{vote:.1%}{of_k}", vote) for vote in votes),
            Cell(f"{one.mean_tokens:,.0f}", one.mean_tokens), Cell(f"{truncated:.1%}", truncated),
            Cell(f"{one.tokens_per_second:,.0f}", one.tokens_per_second), Cell(f"{one.kv_bytes:,}", one.kv_bytes),
            Cell(f"{one.mean_kv_bytes:,.0f}", one.mean_kv_bytes), Cell(f"{one.evictions:,.0f}", one.evictions),
        ])  # fmt: skip
    return Table(header, lines, note_of(common))


def versions(settings: Mapping[str, Any], rows: Iterable[Row]) -> str:
    """One line with what generated the rows: devices, and the versions of torch, transformers and this package.

    Args:
        settings: the settings of the folder, from `folder.read_settings`.
    """
    devices = sorted({row.device for row in rows})
    packages = [f"{name} {settings[name]}" for name in ("torch", "transformers") if name in settings]
    ours = [f"raas-cache {settings['raas_cache']}"] if "raas_cache" in settings else []
    return ", ".join([*devices, *packages, *ours])


def budget_cell(budget: float | tuple[float, ...] | None) -> Cell:
    """A budget in a table: tokens, tokens by layer, or `"all"`. It sorts by the mean over the layers, `"all"` last."""
    if budget is None:
        return Cell("all", math.inf)
    by_layer = budget if isinstance(budget, tuple) else (budget,)
    return Cell(" / ".join(f"{tokens:,.0f}" for tokens in by_layer), fmean(by_layer))


def note_of(common: list[str]) -> str:
    """The note below a table whose settings share these options; empty without options."""
    return f"Unless said otherwise: {', '.join(common)}." * bool(common)


def _summary(rows: list[Row]) -> Summary:
    seconds: dict[int, float] = {}  # batch -> seconds; the rows of a batch run at the same time
    problems: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.sample):
        seconds[row.batch] = max(seconds.get(row.batch, 0.0), row.seconds)
        problems.setdefault(row.index, []).append(row)
    samples = min(map(len, problems.values()))
    tokens = sum(row.tokens for row in rows)
    return Summary(
        setting=rows[0].setting,
        tallies=tuple(Tally(len(group), sum(row.correct for row in group)) for group in problems.values()),
        majority=fmean(majority(group[:samples]) for group in problems.values()),
        truncated=sum(row.truncated for row in rows),
        over_budget=sum(row.over_budget for row in rows),
        prompt_tokens=fmean(row.prompt_tokens for row in rows),
        mean_tokens=tokens / len(rows),
        tokens_per_second=tokens / max(sum(seconds.values()), 1e-9),
        kv_bytes=max(row.kv_bytes for row in rows),
        mean_kv_bytes=sum(row.mean_kv_bytes * row.tokens for row in rows) / max(tokens, 1),
        evictions=fmean(row.evictions for row in rows),
        devices=tuple(sorted({row.device for row in rows})),
    )

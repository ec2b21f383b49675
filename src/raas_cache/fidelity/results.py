"""The rows of a measurement (one per text and setting, stored as JSON lines), and the tables that summarize them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from ..common.reporting import markdown
from ..common.statistics import Difference, difference
from ..eval.settings import DYNAMIC, Setting, SettingKey, common_options, rivals_of
from ..methods.registry import CACHES, POLICIES
from .batches import TextRow
from .reading import DISTANCES, PARTS


@dataclass(frozen=True)
class FidelityRow(TextRow):
    """What one setting did to one text.

    Args:
        index: index of the text in the data.
        text_hash: hash of the text's token ids.
        problem_hash: hash of the problem. Texts of the same problem are drawn together by the bootstrap.
        method, budget, options: the setting, see `raas_cache.eval.Setting`.
        prompt_tokens, tokens: number of tokens of the prompt, and of the chain.
        over_budget: whether the prompt left fewer decode pages than `min_decode_pages`, so that the cache held more
            tokens than its budget.
        kv_bytes: bytes of keys and values that the cache held at the end, for the batch divided by its rows.
        cells: `PARTS * len(DISTANCES) * 4` numbers. For each part of the chain and each distance since the last use:
            the number of tokens, and the sums of loss, of KL(dynamic || method), and of agreements with `dynamic`.
    """

    index: int
    text_hash: str
    problem_hash: str
    method: str
    budget: int | list[int] | tuple[int, ...] | None
    options: dict[str, Any]
    prompt_tokens: int
    tokens: int
    over_budget: bool
    kv_bytes: int
    cells: list[float]

    @property
    def sums(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The cells as `[PARTS, len(DISTANCES), 4]`."""
        return np.array(self.cells).reshape(PARTS, len(DISTANCES), 4)


Cells = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
"""Chooses cells from `[..., PARTS, len(DISTANCES), 4]`, and adds them: `[..., 4]`."""


def _everything(sums: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The sum of all cells."""
    total: np.ndarray[Any, Any] = sums.sum((-3, -2))
    return total


AnyTextRow = TypeVar("AnyTextRow", bound=TextRow)


class TextResults(Generic[AnyTextRow]):
    """Rows by setting, with the rows of each setting in the order of the texts, so that differences are paired.

    Args:
        rows: one row per text and setting, `dynamic` included.
    """

    def __init__(self, rows: Sequence[AnyTextRow]):
        self.rows: list[AnyTextRow] = list(rows)
        self._groups: dict[SettingKey, list[AnyTextRow]] = {}
        for row in self.rows:
            self._groups.setdefault(row.setting.key, []).append(row)
        for group in self._groups.values():
            group.sort(key=lambda row: row.index)
        self._common = common_options(self.settings)

    @property
    def settings(self) -> list[Setting]:
        """The settings, in the order of their first row."""
        return [rows[0].setting for rows in self._groups.values()]

    def _budget(self, setting: Setting) -> str:
        """Tokens of the budget, and their share of the tokens of the chain."""
        if not isinstance(setting.budget, int):
            return "all" if setting.budget is None else " / ".join(map(str, setting.budget))
        return f"{setting.budget:,} ({setting.budget / self.rows[0].tokens:.1%})"

    def _budget_held(self, setting: Setting) -> str:
        """`_budget`, and in how many texts the cache exceeded it."""
        exceeded = sum(row.over_budget for row in self._groups[setting.key])
        return self._budget(setting) + f" (exceeded in {exceeded} texts)" * bool(exceeded)

    def _footer(self) -> str:
        """What follows a table whose labels leave out the options that all settings share."""
        return f"\n\nUnless said otherwise: {', '.join(self._common)}." * bool(self._common)


class Fidelity(TextResults[FidelityRow]):
    """The result of `measure`: its rows, and tables of them.

    Args:
        rows: one row per text and setting, `dynamic` included.
        too_short: number of texts that were left out, because their chains are too short.
    """

    def __init__(self, rows: Sequence[FidelityRow], too_short: int = 0):
        super().__init__(rows)
        self.too_short: int = too_short
        self._problems = [row.problem_hash for row in self._groups[DYNAMIC, None]]

    def difference(self, setting: Setting, other: Setting, cells: Cells = _everything) -> Difference:
        """The loss of `setting` less the loss of `other`, in nats per token, paired by text.

        Args:
            cells: the tokens to compare; all by default. Texts without such tokens are left out.
        """
        ours, theirs = (cells(self._sums(one)) for one in (setting, other))  # [texts, 4] each
        present = ours[:, 0] > 0
        values = (ours[present, 1] - theirs[present, 1]) / ours[present, 0]
        return difference(values.tolist(), [name for name, there in zip(self._problems, present, strict=True) if there])

    def table(self, against: str | None = None) -> str:
        """A table in GitHub's Markdown with one line per setting.

        Args:
            against: a method among the settings with its options, such as `"window"`. Each setting is
                also compared with this method at the same budget.

        Raises:
            ValueError: no setting has this method.
        """
        rivals = {} if against is None else rivals_of(self.settings, against)
        header = ["method", "budget", "KV bytes", "loss", "loss - dynamic (95 %)", "KL", "same top token"]
        header += [f"loss - {against} (95 %)", "sign test"] if against is not None else []
        lines = []
        for setting in self.settings:
            rows = self._groups[setting.key]
            count, loss, kl, same = self._sums(setting).sum((0, 1, 2))
            to_dynamic = "-" if setting.method == DYNAMIC else str(self.difference(setting, Setting(DYNAMIC)))
            cells = [f"{max(row.kv_bytes for row in rows):,}", f"{loss / count:.4f}", to_dynamic]
            cells += [f"{kl / count:.4f}", f"{same / count:.1%}"]
            if against is not None:
                rival = rivals.get(setting.key)
                found = self.difference(setting, rival) if rival else None
                cells += [str(found), found.p_text] if found else ["-", "-"]
            lines.append([setting.label_but(self._common), self._budget_held(setting), *cells])
        return markdown(header, lines) + self._footer()

    def by_position(self) -> str:
        """A table of the loss less that of `dynamic`, in each quarter of the chain."""
        parts = [f"{part * 100 // PARTS} to {(part + 1) * 100 // PARTS} % of the chain" for part in range(PARTS)]
        return self._split(parts, lambda part: lambda sums: sums[..., part, :, :].sum(-2))

    def by_distance(self) -> str:
        """A table of the loss less that of `dynamic`, by the tokens since the last use of the same token.

        The header has the share of the tokens of the chain in each group.
        """
        cells = self._sums(Setting(DYNAMIC))[..., 0].sum((0, 1))  # [len(DISTANCES)]
        names = [f"{name} ({count:.1%})" for name, count in zip(DISTANCES, cells / cells.sum(), strict=True)]
        return self._split(names, lambda group: lambda sums: sums[..., group, :].sum(-2))

    def recommend(self) -> str:
        """For each budget, the constructor of the bounded cache with the lowest loss, and what is not worse than it."""
        said = []
        bounded = [one for one in self.settings if one.method != DYNAMIC and POLICIES[one.method].evicts]
        for budget in dict.fromkeys(one.budget for one in bounded):
            candidates = [one for one in bounded if one.budget == budget]
            losses = {one.key: self._sums(one).sum((0, 1, 2)) for one in candidates}
            best = min(candidates, key=lambda one: losses[one.key][1] / losses[one.key][0])
            others = [one for one in candidates if one.key != best.key]
            level = [one.label_but(self._common) for one in others if not self.difference(one, best).is_significant]
            reason = f"{self.difference(best, Setting(DYNAMIC))} nats per token more than dynamic"
            verdict = (
                f"not significantly better than {', '.join(level)}" if level else "significantly better than all others"
            )
            said.append(
                f"{self._budget(best)} tokens: {constructor(best)}\n    {reason}" + f"; {verdict}" * bool(others)
            )
        return "\n".join(said)

    def _sums(self, setting: Setting) -> np.ndarray[Any, Any]:
        """`[texts, PARTS, len(DISTANCES), 4]`."""
        return np.stack([row.sums for row in self._groups[setting.key]])

    def _split(self, names: list[str], choose: Callable[[int], Cells]) -> str:
        counts = [choose(place)(self._sums(Setting(DYNAMIC))).sum(0)[0] for place in range(len(names))]
        lines = [
            [setting.label_but(self._common), self._budget(setting)]
            + [
                str(self.difference(setting, Setting(DYNAMIC), choose(place))) if counts[place] else "-"
                for place in range(len(names))
            ]
            for setting in self.settings
            if setting.method != DYNAMIC
        ]
        return markdown(["method", "budget", *names], lines) + self._footer()


def constructor(setting: Setting) -> str:
    """The Python expression that creates the setting's cache."""
    options = "".join(f", {name}={value!r}" for name, value in setting.options.items())
    if setting.method in CACHES:
        return f"{CACHES[setting.method].__name__}(budget={setting.budget}{options})"
    return f"from_name({setting.method!r}, budget={setting.budget}{options})"

"""The rows of a probe (one per text and setting, stored as JSON lines), and the tables that summarize them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..common.reporting import markdown
from ..common.statistics import Difference, difference
from ..eval.settings import DYNAMIC, Setting, rivals_of
from ..fidelity.batches import TextRow
from ..fidelity.results import TextResults
from .stories import PROBES


EDGES = (64, 128, 256, 512, 1024)
"""Largest distance of each group of recalls, except of the last group."""
DISTANCES = ("1 to 64", "65 to 128", "129 to 256", "257 to 512", "513 to 1,024", "over 1,024")
"""Tokens since the last use of the recalled fact."""


@dataclass(frozen=True)
class ProbeRow(TextRow):
    """What one setting did to one text. Each list has one number per recall in the second half of the text.

    Args:
        index: index of the text.
        text_hash: hash of the text's token ids and recalls.
        method, budget, options: the setting, see `raas_cache.eval.Setting`.
        prompt_tokens, tokens: number of tokens of the prompt, and after it.
        over_budget: whether the prompt left fewer decode pages than `min_decode_pages`, so that the cache held more
            tokens than its budget.
        kv_bytes: bytes of keys and values that the cache held at the end, for the batch divided by its rows.
        since_use: tokens since the text last gave the value of the recalled fact.
        since_derivation: tokens since the text first gave it.
        correct: 1 if the value is the most likely of all values of the probe, otherwise 0.
        loss: negative log-likelihood of the first token of the value, in nats.
    """

    index: int
    text_hash: str
    method: str
    budget: int | list[int] | tuple[int, ...] | None
    options: dict[str, Any]
    prompt_tokens: int
    tokens: int
    over_budget: bool
    kv_bytes: int
    since_use: list[float]
    since_derivation: list[float]
    correct: list[float]
    loss: list[float]


class Recalls(TextResults[ProbeRow]):
    """The result of `probe`: its rows, and tables of them.

    Args:
        name: the name of the probe.
        rows: one row per text and setting, `dynamic` included.
    """

    def __init__(self, name: str, rows: Sequence[ProbeRow]):
        super().__init__(rows)
        self.name: str = name

    def recalled(self, setting: Setting, group: int | None = None) -> float:
        """The share of correct recalls.

        Args:
            group: only the recalls with this distance since the last use, an index in `DISTANCES`.
        """
        found = [correct for _, correct, _ in self._recalls(setting, group)]
        return sum(found) / len(found)

    def difference(self, setting: Setting, other: Setting, group: int | None = None) -> Difference:
        """The share of recalls that `setting` gets right less that of `other`, paired by recall.

        The bootstrap draws texts, each with all of its recalls. The sign test is also by text.

        Args:
            group: as in `recalled`.
        """
        ours, theirs = (list(self._recalls(one, group)) for one in (setting, other))
        values = [one[1] - another[1] for one, another in zip(ours, theirs, strict=True)]
        return difference(values, [text for text, _, _ in ours])

    def summary(self) -> str:
        """One line: the number of recalls, their distances, and the share that a guess gets right."""
        rows = self._groups[DYNAMIC, None]
        use, derivation = ([one for row in rows for one in of(row)] for of in (_since_use, _since_derivation))
        return (
            f"{self.name}: {len(use):,} recalls in {len(rows)} texts. Tokens since the last use: {min(use):,.0f} to "
            f"{max(use):,.0f}, median {median(use):,.0f}; since the derivation: median {median(derivation):,.0f}. "
            f"Chance: {PROBES[self.name].chance:.1%}."
        )

    def table(self, against: str | None = None) -> str:
        """A table in GitHub's Markdown with one line per setting.

        Args:
            against: a method among the settings with its options, such as `"window"`. Each setting is also compared
                with this method at the same budget.

        Raises:
            ValueError: no setting has this method.
        """
        rivals = {} if against is None else rivals_of(self.settings, against)
        header = ["method", "budget", "KV bytes", "recalled", "recalled - dynamic (95 %)", "loss"]
        header += [f"recalled - {against} (95 %)", "sign test"] if against is not None else []
        lines = []
        for setting in self.settings:
            rows = self._groups[setting.key]
            loss = [one for _, _, one in self._recalls(setting, None)]
            to_dynamic = "-" if setting.method == DYNAMIC else self.difference(setting, Setting(DYNAMIC)).percent()
            cells = [f"{max(row.kv_bytes for row in rows):,}", f"{self.recalled(setting):.1%}", to_dynamic]
            cells.append(f"{sum(loss) / len(loss):.4f}")
            if against is not None:
                rival = rivals.get(setting.key)
                found = self.difference(setting, rival) if rival else None
                cells += [found.percent(), found.p_text] if found else ["-", "-"]
            lines.append([setting.label_but(self._common), self._budget_held(setting), *cells])
        return markdown(header, lines) + self._footer()

    def by_distance(self, against: str | None = None) -> str:
        """A table of the share of correct recalls, by the tokens since the last use of the fact.

        The header has the number of recalls in each group.

        Args:
            against: as in `table`. Shows the difference from this method instead of the share.

        Raises:
            ValueError: no setting has this method.
        """
        if against is None:
            return self._by_distance(self.settings, lambda setting, group: f"{self.recalled(setting, group):.1%}")
        rivals = rivals_of(self.settings, against)
        return self._by_distance(
            [one for one in self.settings if one.key in rivals],
            lambda setting, group: self.difference(setting, rivals[setting.key], group).percent(),
        )

    def _by_distance(self, settings: list[Setting], cell: Callable[[Setting, int], str]) -> str:
        counts = [len(list(self._recalls(Setting(DYNAMIC), group))) for group in range(len(DISTANCES))]
        groups = [group for group, count in enumerate(counts) if count]
        lines = [
            [setting.label_but(self._common), self._budget(setting)] + [cell(setting, group) for group in groups]
            for setting in settings
        ]
        header = ["method", "budget", *(f"{DISTANCES[group]} ({counts[group]:,})" for group in groups)]
        return markdown(header, lines) + self._footer()

    def _recalls(self, setting: Setting, group: int | None) -> Iterator[tuple[int, float, float]]:
        """Text, correctness and loss of each recall."""
        for row in self._groups[setting.key]:
            for since, correct, loss in zip(row.since_use, row.correct, row.loss, strict=True):
                if group is None or sum(since > edge for edge in EDGES) == group:
                    yield row.index, correct, loss


def _since_use(row: ProbeRow) -> list[float]:
    return row.since_use


def _since_derivation(row: ProbeRow) -> list[float]:
    return row.since_derivation

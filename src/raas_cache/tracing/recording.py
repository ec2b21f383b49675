"""A recording of a cache: the score, timestamp and eviction of each page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.extras import require
from . import recording_file
from .layer_trace import EVICTED, PER_PAGE, PREFILL, LayerTrace, TraceEntry
from .recording_file import PAGED


if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class History:
    """The life of every page of one row, layer and KV head.

    T is the number of steps, N the number of pages in the order in which they were opened. There are E entries, one for
    each page held at each step, ordered by step and then by page. `held`, `score` and `priority` convert the entries to
    matrices over steps and pages, which need O(T * N) memory.

    Args:
        steps: `[T]`, position of the newest token at each step.
        first: `[N]`, position of each page's first token: the step at which the page was opened.
        is_pinned: `[N]`, whether the page is pinned (prompt tokens that are never evicted).
        evicted: `[N]` float, the step at which the page was evicted; NaN if it was not evicted.
        resident: `[T]`, number of tokens held.
        at, page: `[E]`, index of each entry in `steps` and in `first`.
        scores: `[E]` float32, attention score; NaN if the policy needs no scores.
        priorities: `[E]` float32, priority of the page, for RaaS its timestamp (the step at which it was last a
            milestone); NaN for pinned pages.
    """

    steps: np.ndarray
    first: np.ndarray
    is_pinned: np.ndarray
    evicted: np.ndarray
    resident: np.ndarray
    at: np.ndarray
    page: np.ndarray
    scores: np.ndarray
    priorities: np.ndarray

    @property
    def held(self) -> np.ndarray:
        """`[T, N]` bool, whether the cache held the page at this step."""
        held = np.zeros((len(self.steps), len(self.first)), bool)
        held[self.at, self.page] = True
        return held

    @property
    def score(self) -> np.ndarray:
        """`[T, N]` float32, score of the page; NaN if it was not held or not scored."""
        return self._spread(self.scores)

    @property
    def priority(self) -> np.ndarray:
        """`[T, N]` float32, priority of the page, for RaaS its timestamp; NaN if it was not held or is pinned."""
        return self._spread(self.priorities)

    def last_use(self, alpha: float) -> np.ndarray:
        """`[N]` float, the last step at which each page scored `alpha` or more; NaN if there is none."""
        used = np.full(len(self.first), np.nan)
        uses = self.scores >= alpha
        used[self.page[uses]] = self.steps[self.at[uses]]  # if a page has several uses, the last assignment remains
        return used

    def _spread(self, values: np.ndarray) -> np.ndarray:
        matrix = np.full((len(self.steps), len(self.first)), np.nan, np.float32)
        matrix[self.at, self.page] = values
        return matrix


@dataclass
class Recording:
    """The result of `raas_cache.record`. It can be read while the recording continues.

    Args:
        method: the policy, with its arguments.
        budget: budget of the cache, for all layers or one number per layer.
        page_size: tokens per page.
        prompt: the prompt mode: `"pin"`, `"select"` or `"evict"`.
        layers: layer index -> trace of this layer.
        wanted: indices of the layers and of the KV heads to record; None for all.
    """

    method: str
    budget: int | tuple[int, ...]
    page_size: int
    prompt: str
    layers: dict[int, LayerTrace] = field(default_factory=dict)
    wanted: tuple[Sequence[int] | None, Sequence[int] | None] = (None, None)

    def trace_of(self, layer: int) -> LayerTrace | None:
        """The trace to which layer `layer` writes; None if this layer is not recorded."""
        layers, heads = self.wanted
        if layers is not None and layer not in layers:
            return None
        return self.layers.setdefault(layer, LayerTrace(None if heads is None else tuple(heads)))

    @property
    def recorded(self) -> list[int]:
        """Indices of the layers with at least one recorded attention call."""
        return sorted(
            index
            for index, trace in self.layers.items()
            if any(isinstance(entry, TraceEntry) for entry in trace.entries)
        )

    @property
    def rows(self) -> int:
        """Number of rows of the current batch."""
        return self.layers[self.recorded[0]].calls()[-1].first.shape[0] if self.recorded else 0

    @property
    def nbytes(self) -> int:
        """Size of the recording in bytes."""
        entries = (entry for trace in self.layers.values() for entry in trace.entries)
        calls = (entry for entry in entries if isinstance(entry, TraceEntry))
        return sum(getattr(call, name).nbytes for call in calls for name in (*PER_PAGE, "resident"))

    def heads(self, layer: int) -> tuple[int, ...]:
        """The recorded KV heads of a layer.

        Raises:
            ValueError: nothing was recorded of `layer`.
        """
        if layer not in self.recorded:
            raise ValueError(f"layer={layer} was not recorded, only the layers {self.recorded}.")
        return self.layers[layer].heads or ()

    def history(self, layer: int, head: int, row: int = 0) -> History:
        """The pages of one KV head over all steps.

        Args:
            layer: index of the layer in the model.
            head: index of the KV head in the layer.
            row: index of a row in the current batch. With beam search, this is the past of the current beam.

        Raises:
            ValueError: nothing was recorded of this layer, head or row.
        """
        heads = self.heads(layer)
        calls = self.layers[layer].calls()
        if head not in heads:
            raise ValueError(f"head={head} was not recorded, only the KV heads {list(heads)}.")
        self._check_row(row)
        place = row, heads.index(head)
        steps = np.array([call.step for call in calls])
        noted = np.concatenate([call.first[place] for call in calls])
        at = np.repeat(np.arange(len(steps)), [call.first.shape[2] for call in calls])
        first, page = np.unique(noted, return_inverse=True)
        order = np.lexsort((page, at))
        order = order[noted[order] >= 0]  # leave out empty pages
        page, first = page[order] - np.count_nonzero(first < 0), first[first >= 0]
        at = at[order]
        scores = np.concatenate([call.score[place] for call in calls])[order]
        priorities = np.concatenate([call.priority[place] for call in calls])[order]
        last = np.zeros(len(first), int)
        last[page] = np.arange(len(page))  # index of the last entry of each page: the last assignment remains
        is_gone = at[last] + 1 < len(steps)
        evicted = np.where(is_gone, steps[np.minimum(at[last] + 1, len(steps) - 1)], np.nan)
        is_pinned = np.isnan(priorities[last]) & ~is_gone
        resident = np.array([call.resident[place] for call in calls])
        return History(steps, first, is_pinned, evicted, resident, at, page, scores, priorities)

    def _check_row(self, row: int) -> None:
        if not 0 <= row < self.rows:
            raise ValueError(f"row={row}: the batch has {self.rows} rows.")

    def pages_of_tokens(self, layer: int, row: int = 0) -> np.ndarray:
        """`[tokens]` int: for each token seen, the position of the first token of its page.

        The value is `PREFILL` for tokens that were pinned after the first recorded step, and `EVICTED` for left padding
        and for tokens whose page was evicted before that step. If the `history` of a head lacks a page, this head
        evicted it before that step.

        Args:
            layer: index of the layer in the model.
            row: as in `history`. Rows with different padding have different pages.

        Raises:
            ValueError: nothing was recorded of this layer or row.
        """
        self.heads(layer)
        self._check_row(row)
        calls, begin = self.layers[layer].calls(), self.layers[layer].begin_of_current_rows()[row]
        pages = np.full(calls[-1].step + 1, PREFILL)
        pages[: len(begin)] = begin
        seen = len(begin)
        for call in calls[1:]:
            if call.page != PREFILL:
                pages[call.step] = call.page
            elif self.prompt == "evict":
                pages[seen : call.step + 1] = pages_in_order(call.first[row], seen, call.step + 1, self.page_size)
            seen = call.step + 1
        return pages

    def to_pandas(self) -> pandas.DataFrame:
        """A table with one line for each step and page held, for every recorded row, layer and KV head.

        Columns: `row`, `layer`, `head`, `step` (position of the newest token), `page` (position of the page's first
        token, which is the step at which the page was opened), `is_pinned`, `score`, `priority` (for RaaS the
        timestamp; NaN for pinned pages) and `evicted` (the step of the eviction; NaN if the page was not evicted).

        Raises:
            ImportError: pandas is missing. The message contains the pip command.
        """
        require("pandas", "to_pandas needs pandas", "viz")
        import pandas

        tables = []
        for layer in self.recorded:
            for row in range(self.rows):
                for head in self.heads(layer):
                    history = self.history(layer, head, row)
                    page = history.page
                    table = {"row": row, "layer": layer, "head": head, "step": history.steps[history.at]}
                    table |= {"page": history.first[page], "is_pinned": history.is_pinned[page]}
                    table |= {"score": history.scores, "priority": history.priorities, "evicted": history.evicted[page]}
                    tables.append(pandas.DataFrame(table))
        columns = ["row", "layer", "head", "step", "page", "is_pinned", "score", "priority", "evicted"]
        return pandas.concat(tables, ignore_index=True) if tables else pandas.DataFrame(columns=columns)

    def save(self, path: str | Path) -> None:
        """Write the recording to a file with a checksum. `load` reads it."""
        about: dict[str, Any] = {"method": self.method, "budget": self.budget}
        about |= {"page_size": self.page_size, "prompt": self.prompt, "heads": {}}
        arrays: dict[str, np.ndarray] = {}
        for layer in self.recorded:
            calls, about["heads"][layer] = self.layers[layer].calls(), self.heads(layer)
            arrays[f"{layer}/step"] = np.array([(call.step, call.page) for call in calls])
            arrays[f"{layer}/pages"] = np.array([call.first.shape[2] for call in calls])
            arrays[f"{layer}/begin"] = self.layers[layer].begin_of_current_rows()
            arrays[f"{layer}/resident"] = np.stack([call.resident for call in calls])
            for member, name in zip(PAGED, PER_PAGE, strict=True):
                arrays[f"{layer}/{member}"] = np.concatenate([getattr(call, name) for call in calls], axis=2)
        recording_file.write(path, about, arrays)

    @classmethod
    def load(cls, path: str | Path) -> Recording:
        """Read a file that `save` wrote, in the current or an earlier format, and check that it is consistent.

        Raises:
            OSError: the file cannot be read; FileNotFoundError if it does not exist.
            ValueError: the file is damaged or not a recording. The message describes the problem.
        """
        about, arrays = recording_file.read(path)
        budget = tuple(about["budget"]) if isinstance(about["budget"], list) else about["budget"]
        recording = cls(about["method"], budget, about["page_size"], about["prompt"])
        for layer, heads in about["heads"].items():
            ends = arrays[f"{layer}/pages"].cumsum()[:-1]
            paged = (np.split(arrays[f"{layer}/{name}"], ends, axis=2) for name in PAGED)
            calls = zip(arrays[f"{layer}/step"].tolist(), *paged, arrays[f"{layer}/resident"], strict=True)
            entries: list[TraceEntry | np.ndarray] = [TraceEntry(step, page, *held) for (step, page), *held in calls]
            trace = recording.layers[int(layer)] = LayerTrace(tuple(heads), entries)
            if f"{layer}/begin" in arrays:
                trace.begin = arrays[f"{layer}/begin"]
            else:  # formats 1 and 2
                start, size = trace.calls()[0], about["page_size"]
                trace.begin = np.stack([pages_in_order(first, 0, start.step + 1, size) for first in start.first])
        return recording


def pages_in_order(first: np.ndarray, start: int, stop: int, page_size: int) -> np.ndarray:
    """For each of the tokens from `start` to `stop`, the position of the first token of its page, `[tokens]` int32.

    `EVICTED` for a token of no page. The positions in a page must be consecutive, as they are in a prompt.

    Args:
        first: `[heads, pages]`, position of each page's first token, -1 for an empty page.
    """
    starts, tokens = np.unique(first[first >= 0]), np.arange(start, stop, dtype=np.int32)
    latest = np.concatenate([[EVICTED - page_size], starts])[np.searchsorted(starts, tokens, side="right")]
    return np.where(tokens < latest + page_size, latest, EVICTED).astype(np.int32)

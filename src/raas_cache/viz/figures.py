"""The figures. Each function takes a recording, and returns a matplotlib `Figure` or HTML."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from textwrap import fill
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from ..common import reporting
from ..engine.policy import check_number
from ..methods.dense import DensePolicy
from ..methods.raas import DEFAULT_ALPHA
from ..tracing.layer_trace import PREFILL
from ..tracing.recording import History, Recording
from . import html


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

CELLS = 300  # cells per side of a waterfall: each is a few pixels wide, so that a single use is visible


@dataclass(frozen=True)
class LostMass:
    """The attention of a `DenseCache` to pages that another cache had evicted before that step.

    T is the number of steps from the first eviction on, N the number of evicted pages.

    Args:
        steps: `[T]`, position of the newest token at each step.
        by_step: `[T]`, share of the step's attention on evicted pages, 0 to 1.
        pages: `[N]`, position of the first token of each evicted page.
        by_page: `[N]`, sum of the page's shares over all steps after its eviction; 1 is the whole attention of a step.
    """

    steps: np.ndarray
    by_step: np.ndarray
    pages: np.ndarray
    by_page: np.ndarray

    @property
    def share(self) -> float:
        """Share of all attention since the first eviction, 0 to 1. It is 0 if nothing was evicted."""
        return float(self.by_step.mean()) if len(self.steps) else 0.0


def lost_mass(recording: Recording, dense: Recording, layer: int, head: int, row: int = 0) -> LostMass:
    """Measure how much attention one KV head would have given to pages that it had evicted.

    Args:
        recording: recording of a cache that evicts.
        dense: recording of a `DenseCache` with the same `page_size`, through which `read` read the same ids.
        layer, head, row: as in `Recording.history`.

    Raises:
        ValueError: `dense` has another method or page size, or lacks steps or pages of `recording`.
    """
    mend = f"read the same ids after the same prompt through DenseCache(budget, page_size={recording.page_size})."
    if dense.method != repr(DensePolicy()) or dense.page_size != recording.page_size:
        raise ValueError(f"dense is a recording of {dense.method} with page_size={dense.page_size}: {mend}")
    history, whole = recording.history(layer, head, row), dense.history(layer, head, row)
    is_evicted = np.isfinite(history.evicted)
    pages, evicted = history.first[is_evicted], history.evicted[is_evicted]
    steps = history.steps[history.steps >= evicted.min(initial=np.inf)]
    for name, wanted, found in (("steps", steps, whole.steps), ("pages", pages, whole.first)):
        missing = np.setdiff1d(wanted, found)
        if len(missing):
            raise ValueError(f"dense lacks {len(missing)} {name} of the recording, the first at {missing[0]}: {mend}")
    step, first = whole.steps[whole.at], whole.first[whole.page]
    of_both = np.isin(step, steps) & np.isin(first, pages)
    at, page = np.searchsorted(steps, step[of_both]), np.searchsorted(pages, first[of_both])
    mass = np.where(steps[at] >= evicted[page], whole.scores[of_both], 0)
    by_step, by_page = np.bincount(at, mass, len(steps)), np.bincount(page, mass, len(pages))
    return LostMass(steps, by_step, pages, by_page)


def waterfall(recording: Recording, layer: int, head: int, row: int = 0, alpha: float = DEFAULT_ALPHA) -> Figure:
    """Draw the score of each page at each step: milestones are used for a while (section 2 of the paper).

    A column is a page, and a row is a step. The shade is the score, with middle grey at `alpha`. A column is blank
    above the birth of its page and hatched below its eviction. If there are more than `CELLS` steps or pages, a cell
    shows the highest score of several steps or pages.

    Args:
        layer, head, row: as in `Recording.history`.
        alpha: score that makes a page a milestone, in (0, 1).

    Raises:
        TypeError, ValueError: `alpha` is out of range, or nothing was recorded of that head.
        ImportError: matplotlib is missing.
    """
    reporting.require_matplotlib()
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm

    _check_alpha(alpha)
    history = recording.history(layer, head, row)
    figure, (axis,) = _figure(f"Score of each page: {_name(recording, layer, head, row)}", recording, height=6.8)
    sizes = len(history.steps), len(history.first)
    steps, pages = (-(-size // CELLS) for size in sizes)  # per cell
    score = np.full((-(-sizes[0] // steps), -(-sizes[1] // pages)), -1.0)
    np.maximum.at(score, (history.at // steps, history.page // pages), np.nan_to_num(history.scores))
    end = history.steps[-1] + 1
    tops = np.append(np.append(history.steps[0], history.steps[:-1] + 1)[::steps], end)
    left, right = _extents(history, recording)
    lefts, rights = left[::pages], np.append(right[pages - 1 : -1 : pages], right[-1])
    # The cells of a mesh have no gaps. Pages that were evicted before the recording become an empty cell.
    edges = np.union1d(lefts, rights)
    page = np.searchsorted(lefts, edges[:-1], side="right") - 1
    score = np.where(edges[:-1] < rights[page], score[:, page], -1)

    shades = LinearSegmentedColormap.from_list("", ["0.92", "0"])  # a score of 0 is light grey, not blank
    norm = TwoSlopeNorm(alpha, vmin=0, vmax=1)
    image = axis.pcolormesh(edges, tops, np.ma.masked_less(score, 0), cmap=shades, norm=norm, rasterized=True)
    gone = np.isfinite(history.evicted)
    if gone.any():
        since = history.evicted[gone]
        look: dict[str, Any] = {"facecolor": "none", "edgecolor": "0.75", "hatch": "//", "linewidth": 0}
        axis.bar(left[gone], end - since, (right - left)[gone], since, align="edge", label="evicted", **look)
        axis.legend(loc="upper right")
    for start, stop in _pinned(history, left, right):
        axis.vlines([start, stop], tops[0], end, color="0", linewidth=1)
        axis.text(start, 1.01, "pinned prompt", transform=axis.get_xaxis_transform(), fontsize=9)
    axis.set(
        xlabel="position in the sequence, in tokens (a column is a page)", ylabel="step: position of the new token"
    )
    axis.set(xlim=(edges[0], edges[-1]), ylim=(end, tops[0]))
    bar = figure.colorbar(image, ax=axis, label="score: attention weight on the page (0 to 1)", shrink=0.7, pad=0.02)
    bar.set_ticks([0, alpha, 1], labels=["0", f"{alpha:g}\n(alpha)", "1"])
    return figure


def lifetimes(recording: Recording, layer: int, head: int, row: int = 0, alpha: float = DEFAULT_ALPHA) -> Figure:
    """Draw how long each page lives, and when it was last used: one bar per page, from its birth to its eviction.

    The colour of a bar is the last step at which its page scored `alpha` or more. A page that never did is a thin line.

    Args:
        layer, head, row: as in `Recording.history`.
        alpha: score that makes a page a milestone, in (0, 1).

    Raises:
        TypeError, ValueError: `alpha` is out of range, or nothing was recorded of that head.
        ImportError: matplotlib is missing.
    """
    reporting.require_matplotlib()
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    _check_alpha(alpha)
    history = recording.history(layer, head, row)
    figure, (axis,) = _figure(f"Lifetime of each page: {_name(recording, layer, head, row)}", recording, height=6.8)
    top, bottom = _extents(history, recording)
    end, used = history.steps[-1] + 1, history.last_use(alpha)
    death = np.where(np.isnan(history.evicted), end, history.evicted)
    gone, ever = np.isfinite(history.evicted), np.isfinite(used)
    colours = ScalarMappable(Normalize(history.steps[0], end - 1), "cividis")
    look: dict[str, Any] = {"color": colours.to_rgba(used[ever])}
    axis.barh(top[ever], (death - top)[ever], (bottom - top)[ever], top[ever], align="edge", **look)
    middle, never = (top + bottom) / 2, f"never scored {alpha:g}"
    axis.hlines(middle[~ever], top[~ever], death[~ever], color="0.5", linewidth=0.7, label=never)
    axis.vlines(death[gone], top[gone], bottom[gone], color="0", linewidth=2, label="evicted")
    for start, stop in _pinned(history, top, bottom):
        axis.hlines([start, stop], top[0], end, color="0", linewidth=1)
        axis.text(end, start, "pinned prompt ", fontsize=9, va="bottom", ha="right")
    axis.set(xlabel="step: position of the new token", ylabel="position in the sequence, in tokens (a bar is a page)")
    axis.set(xlim=(top[0], end), ylim=(bottom[-1], top[0]))
    axis.legend(loc="lower left")
    figure.colorbar(colours, ax=axis, label=f"last step with a score of {alpha:g} or more", shrink=0.7, pad=0.02)
    return figure


def occupancy(recording: Recording, row: int = 0) -> Figure:
    """Draw tokens held against tokens seen, as the mean over the recorded KV heads of a layer.

    Layers that hold the same numbers of tokens share one line.

    Args:
        row: as in `Recording.history`.

    Raises:
        ValueError: nothing was recorded, or nothing of that row.
        ImportError: matplotlib is missing.
    """
    reporting.require_matplotlib()
    title = "Tokens held in a layer (mean of its KV heads)" + (f", row {row}" if recording.rows > 1 else "")
    figure, (axis,) = _figure(title, recording, height=4.5)
    lines: dict[tuple[float, ...], list[int]] = {}
    for layer in _recorded(recording):
        histories = [recording.history(layer, head, row) for head in recording.heads(layer)]
        seen = histories[0].steps + 1
        lines.setdefault(tuple(np.mean([history.resident for history in histories], axis=0)), []).append(layer)
    axis.plot([0, seen[-1]], [0, seen[-1]], color="0.6", linewidth=1, label="everything")
    looks = zip(cycle(reporting.STYLES), cycle(("-", "--", "-.")), strict=False)
    for (held, layers), ((colour, marker), dashes) in zip(lines.items(), looks, strict=False):
        label = fill(f"layer{'s' * (len(layers) > 1)} {_ranges(layers)}", 24)
        axis.plot(seen, held, color=colour, marker=marker, markevery=0.1, linestyle=dashes, label=label)
    budget = recording.budget
    budgets = {budget[layer] if isinstance(budget, tuple) else budget for layer in recording.recorded}
    axis.hlines(sorted(budgets), 0, seen[-1], color="0.3", linewidth=1, linestyle=":", label="budget")
    axis.set(xlabel="tokens seen", ylabel="tokens held", xlim=(0, seen[-1]), ylim=(0, None))
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=9)
    return figure


def regret(recording: Recording, dense: Recording, layer: int, head: int, row: int = 0) -> Figure:
    """Draw what eviction costs one KV head: the attention of a `DenseCache` to evicted pages, see `lost_mass`.

    The upper plot shows the lost attention at each step, the lower plot the lost attention on each page.

    Args:
        recording: recording of a cache that evicts.
        dense: recording of a `DenseCache` with the same `page_size`, through which `read` read the same ids.
        layer, head, row: as in `Recording.history`.

    Raises:
        ValueError: the two cannot be compared, or nothing was recorded of that head.
        ImportError: matplotlib is missing.

    Example:

    ```python
    >>> cache, dense = RaaSCache(budget=1024), DenseCache(budget=1024)
    >>> with record(cache) as recording:
    ...     out = model.generate(**inputs, past_key_values=cache)
    >>> with record(dense) as everything:
    ...     read(model, out, inputs["input_ids"].shape[1], dense)
    >>> viz.regret(recording, everything, layer=1, head=0)
    ```
    """
    reporting.require_matplotlib()
    lost, end = lost_mass(recording, dense, layer, head, row), recording.history(layer, head, row).steps[-1] + 1
    name, steps = _name(recording, layer, head, row), len(lost.steps)
    said = f"{lost.share:.1%} of its attention over the {steps:,} steps after the first eviction fell on evicted pages"
    title = f"Lost attention: {name}\n{said if steps else 'No page was evicted'}"
    figure, (above, below) = _figure(title, recording, height=6.2, rows=2)
    above.stairs(lost.by_step, np.append(lost.steps, end), fill=True, color="0.2")
    above.set(xlabel="step: position of the new token", ylabel="lost share of the\nstep's attention (0 to 1)")
    above.set_ylim(0, 1)
    below.bar(lost.pages, lost.by_page, recording.page_size, align="edge", color="0.2")
    below.set(xlabel="first token of the evicted page", ylabel="lost since its eviction\n(1: attention of one step)")
    below.set_ylim(bottom=0)
    for axis in (above, below):
        axis.set(xlim=(0, end), axisbelow=True)
        axis.grid(alpha=0.3)
    return figure


def tokens(
    recording: Recording,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor | Sequence[int],
    layer: int | None = None,
    head: int | None = None,
    row: int = 0,
) -> html.Html:
    """Show the text of the sequence. A token is shaded by how long it was kept, and struck out if all heads evicted it.

    Args:
        tokenizer: tokenizer of the model.
        ids: `[tokens]`, prompt and generated tokens: one row of the result of `generate`.
        layer, head: the layer and KV head to show; None for the mean over all that were recorded.
        row: as in `Recording.history`.

    Returns:
        HTML that a notebook displays. It is also a string: `Path("tokens.html").write_text(shown)`.

    Raises:
        ValueError: `ids` does not have the length of the recorded sequence, or nothing was recorded of that head.
    """
    layers = _recorded(recording) if layer is None else [layer]
    chosen = [(number, index) for number in layers for index in (recording.heads(number) if head is None else [head])]
    histories = {place: recording.history(*place, row) for place in chosen}
    steps = histories[chosen[0]].steps
    given = torch.as_tensor(ids)
    # The last token that `generate` returns was not read by the model, so the cache has not seen it.
    if given.ndim != 1 or len(given) not in (steps[-1] + 1, steps[-1] + 2):
        raise ValueError(
            f"ids has shape {list(given.shape)}, and the recording has seen {steps[-1] + 1} tokens: give one row of "
            "the ids that generate returned, including the prompt."
        )
    index = np.arange(steps[-1] + 1)
    # [KV heads, tokens], also `kept`
    gone = np.stack([_eviction_of_tokens(recording, number, row, histories[number, head]) for number, head in chosen])
    born = np.searchsorted(steps, index)
    kept = np.clip(np.searchsorted(steps, gone) - born, 0, None)
    share, left = kept.mean(0) / (len(steps) - born), np.isfinite(gone).sum(0)
    first = recording.layers[layers[0]].calls()[0]
    start = first.step + (first.page == PREFILL)  # the first token that is not part of the prompt
    heads = f"{len(chosen)} KV head{'s' * (len(chosen) > 1)}"

    parts: tuple[list[html.Piece], list[html.Piece]] = [], []
    for text, where in _texts(tokenizer, given.tolist()):
        title = f"token {where.start}" if len(where) == 1 else f"tokens {where.start} to {where.stop - 1}"
        if where.stop > len(index):
            piece = html.Piece(text, 1, False, f"{title}: not in the cache yet")
        else:
            span = slice(where.start, where.stop)
            title += f": held for {kept[:, span].mean():.0f} of {len(steps) - born[where.start]} steps"
            title += f", evicted by {left[span].max()} of {heads}"
            piece = html.Piece(text, float(share[span].mean()), bool((left[span] == len(chosen)).all()), title)
        parts[where.start >= start].append(piece)
    return html.of_text(*parts, heads)


def _eviction_of_tokens(recording: Recording, layer: int, row: int, history: History) -> np.ndarray:
    """`[tokens]` float, step at which each token was evicted; NaN: not evicted, -1: evicted before the recording."""
    evicted = dict(zip(history.first.tolist(), history.evicted.tolist(), strict=True)) | {PREFILL: np.nan}
    return np.array([evicted.get(page, -1) for page in recording.pages_of_tokens(layer, row).tolist()])


def _texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> Iterator[tuple[str, range]]:
    """Yield the text of each token and its positions, without left padding. Joins tokens that share a character."""
    padding = next((place for place, token in enumerate(ids) if token != tokenizer.pad_token_id), len(ids))
    before = start = padding
    for end in range(padding + 1, len(ids) + 1):
        # Decode together with the text before, because some tokenizers drop the space before the first word.
        decoded = (tokenizer.decode(ids[before:to], clean_up_tokenization_spaces=False) for to in (start, end))
        known, text = cast("tuple[str, str]", tuple(decoded))
        is_whole = len(text) > len(known) and not text.endswith("\ufffd")
        if is_whole or end == len(ids):
            yield text[len(known) :], range(start, end)
            before, start = start, end


def _check_alpha(alpha: float) -> None:
    check_number("alpha", alpha, lambda weight: 0 < weight < 1, "lie in (0, 1), as an attention weight: try 0.2")


def _recorded(recording: Recording) -> list[int]:
    if not recording.recorded:
        raise ValueError("recording is empty: generate inside `with record(cache) as recording`.")
    return recording.recorded


def _ranges(numbers: list[int]) -> str:
    """Numbers in ascending order, three or more consecutive ones as a range: `"0 to 4, 7, 8"`."""
    parts: list[str] = []
    for run in np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1):
        parts += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run)
    return ", ".join(parts)


def _name(recording: Recording, layer: int, head: int, row: int) -> str:
    return f"layer {layer}, KV head {head}" + (f", row {row}" if recording.rows > 1 else "")


def _figure(title: str, recording: Recording, height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    about = f"{recording.method}, budget={recording.budget}, page_size={recording.page_size}"
    figure.suptitle(f"{title}\n{fill(about, 105)}", x=0.01, ha="left", fontsize=11)
    return figure, list(figure.subplots(rows, squeeze=False)[:, 0])


def _extents(history: History, recording: Recording) -> tuple[np.ndarray, np.ndarray]:
    """`[N]` each: position of each page's first token, and position after its last token."""
    behind = np.append(history.first[1:], history.steps[-1] + 1)
    return history.first, np.minimum(history.first + recording.page_size, behind)


def _pinned(history: History, starts: np.ndarray, ends: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the start and the end of each group of adjacent pinned pages."""
    changes = np.flatnonzero(np.diff(history.is_pinned, prepend=False, append=False))
    for first, behind in changes.reshape(-1, 2):
        yield starts[first], ends[behind - 1]

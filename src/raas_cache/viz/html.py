"""HTML for notebooks: an overview of a cache, and the text of a chain, shaded by how long each token was kept.

The HTML has inline styles and no scripts. Its colours are readable on light and dark pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from ..cache.head_groups import HeadGroupsLayer
from ..cache.paged_layer import PagedLayer


PINNED, EVICTABLE = "#0072B2", "#E69F00"  # colours of Okabe and Ito: dark and light when printed in grey
GREY = "128,128,128"  # visible on white and on black
FREE = f"rgba({GREY},.25)"
SMALL = "font-size:85%;line-height:1.5"
TEXT = "white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.6;font-family:monospace;padding-left:8px"


class Html(str):
    """HTML that Jupyter displays, and that `Path.write_text` can write."""

    def _repr_html_(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Piece:
    """The text of a token, or of several tokens that share a character.

    Args:
        text: text of the token at its position in the sequence.
        kept: share of the steps since the token was written at which the cache held it, 0 to 1.
        is_evicted: whether all KV heads have evicted it.
        title: text that appears when the pointer is on the token.
    """

    text: str
    kept: float
    is_evicted: bool
    title: str


def plain(text: str) -> str:
    """Text for HTML, also inside quotes. It is ASCII, so that a file does not need to state its encoding."""
    return escape(text).encode("ascii", "xmlcharrefreplace").decode()


def of_text(prompt: Sequence[Piece], generated: Sequence[Piece], heads: str) -> Html:
    """The text of a sequence. A token is shaded by how long it was kept, and struck out if it was evicted.

    Args:
        prompt, generated: the tokens before the first recorded step, and the tokens after it.
        heads: description of the heads over which the shade is the mean, such as "6 KV heads".
    """
    legend = [Piece(" all ", 1, False, ""), Piece(" half ", 0.5, False, ""), Piece("evicted by all", 0, True, "")]
    shade = "Shade: share of the steps since a token was written at which it was held"
    parts = [f"{shade}, mean of {escape(heads)}: {_marked(legend)}"]
    for name, colour, pieces in (("Before the recording", PINNED, prompt), ("Since then", EVICTABLE, generated)):
        parts.append(f'{name}<div style="{TEXT};border-left:4px solid {colour}">{_marked(pieces)}</div>')
    return Html("".join(f'<div style="{SMALL};margin-bottom:.6em">{part}</div>' for part in parts))


def of_cache(name: str, about: str, layers: Sequence[object], is_over_budget: bool) -> Html:
    """An overview of a cache: the tokens that each layer holds. Adjacent layers with equal numbers share a line.

    Args:
        name: class of the cache.
        about: its method, settings and size.
        layers: its layers, in the order of the model. For layers that are not paged, only the class is shown.
        is_over_budget: whether the cache exceeds its budget.
    """
    lines = [f"<b>{escape(name)}</b> {escape(about)}"]
    glances = [_glances(layer) for layer in layers]
    widest = max((sum(pages) for of_layer in glances for _, _, pages in of_layer), default=0)
    for of_layer, alike in groupby(enumerate(glances), key=lambda glance: glance[1]):
        indices = [index for index, _ in alike]
        name = f"layer {indices[0]}" if len(indices) == 1 else f"layers {indices[0]} to {indices[-1]}"
        lines += [f"{name}{heads}: {said}{_bar(pages, widest)}" for heads, said, pages in of_layer]
    if not layers:
        lines.append("empty")
    if is_over_budget:
        lines.append("<b>over budget</b>: the prompt leaves fewer than min_decode_pages pages")
    return Html("".join(f'<div style="{SMALL}">{line}</div>' for line in lines))


def _glances(layer: object) -> list[tuple[str, str, tuple[int, ...]]]:
    """For each group of KV heads with the same share: the names of the heads, empty for all, and `_glance`."""
    if not isinstance(layer, HeadGroupsLayer) or not layer.is_initialized:
        return [("", *_glance(layer))]
    groups = zip(layer.head_groups, layer.parts, strict=True)
    return [
        (f", KV head{'s' * (len(heads) > 1)} {', '.join(map(str, heads))}", *_glance(part)) for heads, part in groups
    ]


def _glance(layer: object) -> tuple[str, tuple[int, ...]]:
    """What a layer is said to hold, and its pages: pinned, evictable and free; none where it has no pages."""
    if not isinstance(layer, PagedLayer) or not layer.is_initialized:
        return f"{type(layer).__name__}, no pages", ()
    table = layer.table
    pinned, opened, limit = (
        int(counts.max()) for counts in (table.counts.pinned_pages, table.opened, table.counts.limit)
    )
    allocated = table.num_pages - pinned
    evictable = min(opened, limit, allocated)
    pages = pinned, evictable, allocated - evictable
    held = int((layer.engine.kv.bias == 0).sum(-1).max())
    share = layer.settings.shares[0]
    budget = "" if layer.settings.grows else f", budget {layer.settings.budget:,}" + f", share {share:g}" * (share != 1)
    names = (PINNED, "pinned"), (EVICTABLE, "evictable"), (FREE, "free")
    counts = [
        f'<span style="background:{colour}">&emsp;</span> {count:,} {name}'
        for count, (colour, name) in zip(pages, names, strict=True)
    ]
    rows = f" in each of {table.batch_size} rows" if table.batch_size > 1 else ""
    return (
        f"{held:,} of {table.length:,} tokens held{budget}; pages: {', '.join(counts)}, "
        f"{int(table.evicted.max()):,} evicted by each KV head{rows}"
    ), pages


def _bar(pages: tuple[int, ...], widest: int) -> str:
    parts = [
        f'<div style="width:{100 * count / widest:.1f}%;background:{colour}"></div>'
        for count, colour in zip(pages, (PINNED, EVICTABLE, FREE), strict=False)
    ]
    style = "display:flex;height:8px;max-width:40em;margin-bottom:4px"
    return f'<div style="{style}">{"".join(parts)}</div>' if parts else ""


def _marked(pieces: Sequence[Piece]) -> str:
    marked = []
    for piece in pieces:
        text, title = plain(piece.text), plain(piece.title)
        tag = "del" if piece.is_evicted else "span"
        marked.append(f'<{tag} title="{title}" style="background:rgba({GREY},{0.6 * piece.kept:.2f})">{text}</{tag}>')
    return "".join(marked)

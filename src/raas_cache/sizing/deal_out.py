"""Deal out pages to KV heads by their cost curves."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar


Head = TypeVar("Head", bound=Hashable)


def deal_out(windows: Sequence[int], curves: Mapping[Head, Sequence[float]], pages: int) -> dict[Head, int]:
    """Give `pages` to the heads so that the sum of their costs is small, at least `windows[0]` to each.

    Args:
        windows: numbers of pages, ascending.
        curves: for each head, its cost with each of these numbers.
        pages: number of pages to deal out. What no head needs is left over.

    Returns:
        Pages of each head.
    """
    # 1. The lower convex hull of each curve, as steps of falling gain per page.
    steps = []
    for head, curve in curves.items():
        at = 0
        while at < len(windows) - 1:
            gains = [((curve[at] - curve[i]) / (windows[i] - windows[at]), i) for i in range(at + 1, len(windows))]
            gain, to = max(gains)
            if gain <= 0:
                break
            steps.append((gain, head, windows[to] - windows[at]))
            at = to
    # 2. Take the steps in the order of their gain. The steps of a head come in their own order, because its hull is
    #    convex. The last step may be taken in part.
    dealt = dict.fromkeys(curves, windows[0])
    left = pages - sum(dealt.values())
    for _, head, more in sorted(steps, key=lambda step: -step[0]):
        taken = min(more, max(left, 0))
        dealt[head] += taken
        left -= taken
    return dealt


def merged(windows: Sequence[int], curves: Sequence[Sequence[float]], pages: Sequence[int], sizes: int) -> list[int]:
    """Change the pages of a layer's heads so that there are at most `sizes` different numbers, with at most their sum.

    Args:
        curves: for each head, its cost with each of `windows` pages.
        pages: pages of each head.

    Returns:
        Pages of each head. Heads with similar needs have the same number, such that the sum of the costs is smallest.
    """
    order = sorted(range(len(pages)), key=lambda head: pages[head])
    best: dict[tuple[int, int], tuple[float, list[int]]] = {(0, 0): (0.0, [])}  # (heads done, groups): cost, pages
    for stop in range(1, len(order) + 1):
        for groups in range(1, min(sizes, stop) + 1):
            options = []
            for start in range(stop):
                if (start, groups - 1) in best:
                    cost, chosen = best[start, groups - 1]
                    group = order[start:stop]
                    mean = sum(pages[head] for head in group) // len(group)
                    cost += sum(_interpolated(windows, curves[head], mean) for head in group)
                    options.append((cost, chosen + [mean] * len(group)))
            if options:
                best[stop, groups] = min(options)
    _, chosen = min(best[len(order), groups] for groups in range(1, min(sizes, len(order)) + 1))
    result = [0] * len(pages)
    for head, count in zip(order, chosen, strict=True):
        result[head] = count
    return result


def _interpolated(windows: Sequence[int], curve: Sequence[float], pages: int) -> float:
    """The cost with `pages` pages, linear between the numbers tried."""
    for i in range(1, len(windows)):
        if pages <= windows[i]:
            share = (pages - windows[i - 1]) / (windows[i] - windows[i - 1])
            return curve[i - 1] + share * (curve[i] - curve[i - 1])
    return curve[-1]

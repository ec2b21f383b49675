"""Pages dealt out to KV heads, against every way to deal them out."""

from itertools import combinations, product

import pytest
import torch

from raas_cache.sizing.deal_out import _interpolated, deal_out, merged


WINDOWS = [1, 2, 3, 4, 5, 6]


def random_curves(heads, seed, convex):
    """Falling costs of 1 to 6 pages. The gains per page of a convex curve fall, too."""
    gains = torch.rand(heads, len(WINDOWS) - 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if convex:
        gains = gains.sort(descending=True).values
    curves = gains.flip(1).cumsum(1).flip(1)
    return torch.cat([curves, torch.zeros(heads, 1, dtype=torch.float64)], 1).tolist()


def total(curves, pages, windows=WINDOWS):
    return sum(_interpolated(windows, curve, count) for curve, count in zip(curves, pages, strict=True))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("pages", [3, 4, 7, 11, 18, 30])
def test_convex_curves_get_the_best_of_all_ways(seed, pages):
    curves = random_curves(3, seed, convex=True)
    dealt = deal_out(WINDOWS, dict(enumerate(curves)), pages)
    assert sum(dealt.values()) == min(pages, 18)
    best = min(total(curves, way) for way in product(WINDOWS, repeat=3) if sum(way) <= pages)
    assert total(curves, [dealt[head] for head in range(3)]) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(10))
def test_any_curves_get_the_best_where_no_step_is_cut(seed):
    """Only the last step of a hull may be taken in part."""
    curves = random_curves(3, seed, convex=False)
    checked = 0
    for pages in range(3, 19):
        dealt = deal_out(WINDOWS, dict(enumerate(curves)), pages)
        assert sum(dealt.values()) <= pages and min(dealt.values()) >= 1
        hulls = [hull(curve) for curve in curves]
        if all(dealt[head] in hulls[head] for head in range(3)) and sum(dealt.values()) == pages:
            best = min(total(curves, way) for way in product(WINDOWS, repeat=3) if sum(way) <= pages)
            assert total(curves, dealt.values()) == pytest.approx(best)
            checked += 1
    assert checked >= 3


def hull(curve):
    """The windows at which the curve touches its lower convex hull: no chord between two others is below it."""
    touching = set(WINDOWS)
    for (i, left), (j, middle), (k, right) in combinations(enumerate(curve), 3):
        if middle > left + (right - left) * (j - i) / (k - i):
            touching.discard(WINDOWS[j])
    return touching


def test_a_flat_start_does_not_stop_a_head():
    """A curve may be flat and then fall: more than one step ahead is looked at."""
    flat, near, far = [1.0, 1.0, 1.0, 1.0], [9.0, 0.5, 0.2, 0.1], [9.0, 9.0, 9.0, 0.0]
    assert deal_out([1, 2, 3, 4], {"flat": flat, "near": near, "far": far}, 7) == {"flat": 1, "near": 2, "far": 4}


def test_pages_that_no_head_needs_are_left_over():
    assert deal_out([2, 4, 8], {0: [5.0, 0.0, 0.0], 1: [0.0, 0.0, 0.0]}, 12) == {0: 4, 1: 2}


def test_every_head_gets_the_smallest_window():
    assert deal_out([2, 4], {0: [5.0, 0.0], 1: [5.0, 0.0]}, 1) == {0: 2, 1: 2}


def best_in_order(curves, pages, sizes):
    """The lowest cost of all ways to cut the heads, ordered by their pages, into at most `sizes` groups."""
    order = sorted(range(len(pages)), key=pages.__getitem__)
    costs = []
    for groups in range(1, sizes + 1):
        for cuts in combinations(range(1, len(order)), groups - 1):
            own = [0] * len(pages)
            for start, stop in zip((0, *cuts), (*cuts, len(order)), strict=True):
                mean = sum(pages[head] for head in order[start:stop]) // (stop - start)
                for head in order[start:stop]:
                    own[head] = mean
            costs.append(total(curves, own))
    return min(costs)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sizes", [1, 2, 3, 5])
def test_merged_is_the_best_way_to_cut_the_ordered_heads(seed, sizes):
    curves = random_curves(5, seed, convex=True)
    pages = torch.randint(1, 7, (5,), generator=torch.Generator().manual_seed(seed)).tolist()
    found = merged(WINDOWS, curves, pages, sizes)
    assert len(set(found)) <= sizes
    assert sum(pages) - 5 < sum(found) <= sum(pages)
    assert total(curves, found) == pytest.approx(best_in_order(curves, pages, sizes))
    if sizes == 5:
        assert total(curves, found) <= total(curves, pages) + 1e-12


def test_costs_between_two_windows_are_linear():
    assert [_interpolated([2, 4, 8], [6.0, 2.0, 0.0], pages) for pages in (2, 3, 4, 6, 8, 9)] == [6, 4, 2, 1, 0, 0]

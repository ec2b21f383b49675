"""Stamp: the rule of RaaS for the timestamps of milestone pages."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import flatten, implementation, is_traceable, operator
from ...paged_kv import PagedKV
from . import reference


__all__ = ["stamp"]


def stamp(
    kv: PagedKV, scores: Tensor, alpha: float | None, top_ratio: float | None, rows: Tensor | None = None
) -> None:
    """Set the timestamp of every milestone page to the present token's sequence index (RaaS, section 3).

    One of `alpha` and `top_ratio` is None. A page's timestamp is its priority. Pages that are not evictable may get a
    timestamp too, because their priority has no meaning.

    Args:
        kv: its `priority` is written in place.
        scores: `[R, H, P]`, any float dtype; 0 for pages that hold nothing.
        alpha: every page with `score >= alpha` is a milestone.
        top_ratio: of the evictable pages that hold a token, the `ceil(top_ratio * their number)` with the highest
            scores are milestones; the older of two pages with the same score goes first.
        rows: `[R]` int64, the batch rows to stamp, each at most once; None for all.
    """
    if torch.compiler.is_compiling() and not is_traceable(scores.device):
        _stamp(*flatten(kv), scores, alpha, top_ratio, rows)
        return
    run = reference if torch.compiler.is_compiling() else implementation(__name__, scores.device)
    run.stamp(kv, scores, alpha, top_ratio, rows)


@operator("Tensor scores, float? alpha, float? top_ratio, Tensor? rows", writes=("priority",))
def _stamp(kv: PagedKV, scores: Tensor, alpha: float | None, top_ratio: float | None, rows: Tensor | None) -> None:
    implementation(__name__, scores.device).stamp(kv, scores, alpha, top_ratio, rows)

"""Stamp in Triton: one program serves one block of pages of one (row, KV head), without a host synchronisation."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...paged_kv import PagedKV


@triton.jit
def stamp_kernel(
    priority, evictable, positions, clock, scores, rows, heads, pages, scores_row, scores_head, alpha,
    TOP_RATIO: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr, BLOCK_PAGES: tl.constexpr,
):  # fmt: skip
    """Program (i, block) serves KV head i % heads of the call's row i // heads."""
    call = tl.program_id(0).to(tl.int64)
    call_row, head = call // heads, call % heads
    row = tl.load(rows + call_row) if ROWS else call_row
    pair = row * heads + head  # index of the (row, KV head) in the buffers
    source = scores + call_row * scores_row + head * scores_head
    target = priority + pair * pages
    page = tl.program_id(1) * BLOCK_PAGES + tl.arange(0, BLOCK_PAGES)
    exists = page < pages
    score = tl.load(source + page, mask=exists, other=0.0)

    # 1. The milestone pages: those of a score of at least alpha, or of the highest scores.
    if TOP_RATIO is None:
        milestone = exists & (score >= alpha)
    else:
        # A page is among the k highest if fewer than k held pages beat it: no sort, no data-dependent shape.
        age = tl.load(positions + (pair * pages + page) * PAGE, mask=exists, other=0)
        better = tl.zeros([BLOCK_PAGES], tl.int32)
        count = 0
        for start in range(0, pages, BLOCK_PAGES):
            rival = start + tl.arange(0, BLOCK_PAGES)
            # Another program may stamp this rival at the same time, but a page that is held stays held.
            may_go = tl.load(evictable + row * pages + rival, mask=rival < pages, other=0).to(tl.int32) > 0
            is_rival = tl.load(target + rival, mask=may_go, other=float("-inf")) > float("-inf")
            rival_score = tl.load(source + rival, mask=rival < pages, other=0.0)
            rival_age = tl.load(positions + (pair * pages + rival) * PAGE, mask=rival < pages, other=0)
            beats = (rival_score[None, :] > score[:, None]) | (
                (rival_score[None, :] == score[:, None]) & (rival_age[None, :] < age[:, None])
            )
            better += tl.sum((beats & is_rival[None, :]).to(tl.int32), 1)
            count += tl.sum(is_rival.to(tl.int32), 0)
        is_evictable = tl.load(evictable + row * pages + page, mask=exists, other=0).to(tl.int32) > 0
        held = tl.load(target + page, mask=is_evictable, other=float("-inf")) > float("-inf")
        milestone = held & (better < tl.ceil(count.to(tl.float64) * TOP_RATIO))  # type: ignore[attr-defined]

    # 2. Their priority becomes the clock.
    tl.store(target + page, tl.load(clock + pair * 2).to(tl.float64), mask=milestone)


def stamp(
    kv: PagedKV, scores: Tensor, alpha: float | None, top_ratio: float | None, rows: Tensor | None = None
) -> None:
    """See `raas_kernels.stamp`."""
    heads, pages = kv.priority.shape[1:]
    scores = scores if scores.stride(-1) == 1 else scores.contiguous()
    block_pages = min(64, triton.next_power_of_2(pages))
    stamp_kernel[(scores.shape[0] * heads, triton.cdiv(pages, block_pages))](
        kv.priority, kv.evictable, kv.positions, kv.clock, scores, scores if rows is None else rows.contiguous(),
        heads, pages, *scores.stride()[:2], 0.0 if alpha is None else alpha,
        TOP_RATIO=top_ratio, ROWS=rows is not None, PAGE=kv.page_size, BLOCK_PAGES=block_pages,
    )  # fmt: skip

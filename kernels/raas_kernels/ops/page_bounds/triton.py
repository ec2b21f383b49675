"""Page bounds in Triton: one program computes the bounds of one block of pages of one (row, KV head)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...paged_kv import PagedKV
from ..attend.triton import capped
from .reference import extremes_of


@triton.jit
def page_bounds_kernel(
    query, key_min, key_max, bias, rows, bounds, scale, softcap, heads, pages, bias_row, bias_head,
    CAPPED: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, DK: tl.constexpr,
    BLOCK_PAGES: tl.constexpr, BLOCK_DK: tl.constexpr,
):  # fmt: skip
    """Program (i, block) serves KV head i % heads of the call's row i // heads."""
    call = tl.program_id(0).to(tl.int64)
    call_row, head = call // heads, call % heads
    row = tl.load(rows + call_row) if ROWS else call_row
    page = tl.program_id(1) * BLOCK_PAGES + tl.arange(0, BLOCK_PAGES)
    dk = tl.arange(0, BLOCK_DK)
    exists = page < pages

    # 1. The pages' bounds, [BLOCK_PAGES, BLOCK_DK], and whether they have a visible token.
    inside = exists[:, None] & (dk[None, :] < DK)
    address = ((row * heads + head) * pages + page[:, None]) * DK + dk[None, :]
    low = tl.load(key_min + address, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(key_max + address, mask=inside, other=0.0).to(tl.float32)
    slot = page[:, None] * PAGE + tl.arange(0, PAGE)[None, :]
    visible = tl.load(bias + row * bias_row + head * bias_head + slot, mask=exists[:, None], other=float("-inf"))

    # 2. The largest bound over the query group.
    best = tl.full([BLOCK_PAGES], float("-inf"), tl.float32)
    for g in range(GROUP):
        q = tl.load(query + (call * GROUP + g) * DK + dk, mask=dk < DK, other=0.0).to(tl.float32)
        best = tl.maximum(best, tl.sum(tl.maximum(q[None, :] * low, q[None, :] * high), 1))
    best *= scale
    if CAPPED:
        best = capped(best, softcap)
    best = tl.where(tl.max(visible, 1) == 0, best, float("-inf"))
    tl.store(bounds + call * pages + page, best, mask=exists)


def page_logit_bounds(
    kv: PagedKV, query: Tensor, scale: float, softcap: float | None = None, rows: Tensor | None = None
) -> Tensor:
    """See `raas_kernels.page_logit_bounds`."""
    key_min, key_max = extremes_of(kv)  # [B, H, P, Dk]
    heads, pages, dk = key_min.shape[1:]
    bounds = torch.empty(query.shape[0], heads, pages, dtype=torch.float32, device=query.device)
    block_pages = min(32, triton.next_power_of_2(pages))
    page_bounds_kernel[(query.shape[0] * heads, triton.cdiv(pages, block_pages))](
        query.contiguous(), key_min, key_max, kv.bias, bounds if rows is None else rows.contiguous(), bounds,
        scale, 1.0 if softcap is None else softcap, heads, pages, *kv.bias.stride()[:2],
        CAPPED=softcap is not None, ROWS=rows is not None, GROUP=query.shape[1] // heads, PAGE=kv.page_size, DK=dk,
        BLOCK_PAGES=block_pages, BLOCK_DK=triton.next_power_of_2(dk),
    )  # fmt: skip
    return bounds

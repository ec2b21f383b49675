"""TriAttention: Efficient Long Reasoning with Trigonometric KV Compression (Mao et al., 2026, arXiv 2604.04921).

Rule: the mean query before RoPE gives each key a score for queries at a distance, a sum of cosines of the distance.
If a page is needed, the page with the smallest mean score over its keys and over distances is evicted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..cache.paged_cache import PagedCache
from ..engine.policy import Pages, Policy
from .registry import register_cache, register_policy


if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..cache.settings import Budget, CacheOptions


FARTHEST = 16  # scores are averaged over the distances 1, 2, 4 to 2 ** FARTHEST tokens from now, as in the paper


@register_policy("triattention")
@dataclass(frozen=True)
class TriAttentionPolicy(Policy):
    """Evict the page whose keys matter least to the mean query of the chain, at many distances from now.

    The score of a key is `sum over pairs f of |c| |k| cos(angle) + (m - |c|) |k|`, where `c` is the mean query (the
    centre), `m` the mean length of the queries, and `k` the key, each in the pair of components f that RoPE rotates;
    `angle` is the angle between `c` and `k` for a query at this distance. The mean of the first term over a page is the
    product of the rotated centre and the mean key of the page with RoPE.

    The paper takes `c` and `m` from a calibration file. Here they are running means over the queries of the chain so
    far, one for each KV head (the paper: for each query head, and the largest standardised score counts). The paper
    evicts every 128 tokens; here one page is evicted whenever a page is needed. As in the paper, the prompt stays.
    """

    prompts = ("pin", "select")
    row_state = ("centre", "length")  # the mean query before RoPE; its first half: the mean length of each pair
    uses_rotation = True

    def on_scores(self, pages: Pages) -> None:
        query, rotation = pages.query(), pages.rotation
        if query is None or rotation is None:
            return  # prefill tokens do not belong to the chain
        now = pages.clock[..., 0]  # [batch, kv_heads]
        # 1. Centre and lengths: running means over the decode tokens so far.
        share = 1 / (pages.clock[..., 1:].double() + 1)  # [batch, kv_heads, 1]
        queries = rotation.rotated(query, -now[..., None])  # [batch, kv_heads, group, head_dim], without RoPE
        centre, length = pages.row_state["centre"], pages.row_state["length"][..., : len(rotation.frequency)]
        for mean, new in ((centre, queries.mean(2)), (length, rotation.sizes(queries).mean(2))):
            mean.copy_(torch.where(share < 1, mean.lerp(new, share), new))  # nothing remains of an earlier chain
        # 2. The mean score of each page over its keys and the distances, [batch, kv_heads, pages].
        distances = 2 ** torch.arange(FARTHEST + 1, device=now.device)
        ahead = rotation.averaged(rotation.rotated(centre, now), distances)  # [batch, kv_heads, head_dim]
        score = (pages.mean_keys().double() @ ahead[..., None])[..., 0]
        score += (pages.mean_keys(rotation.sizes) @ (length - rotation.sizes(centre))[..., None])[..., 0]
        ranked = score.masked_fill(pages.newest(1), float("inf"))
        pages.priority.copy_(ranked.masked_fill(~pages.held, float("-inf")))


@register_cache("triattention")
class TriAttentionCache(PagedCache):
    """TriAttention without a calibration file: evict the page whose keys matter least to the mean query of the chain.

    It serves models with a rotary embedding that cache keys, see `TriAttentionPolicy`. Arguments: as `PagedCache`.

    Raises:
        ValueError: in the first forward, if the model has no rotary embedding, or caches a latent.
    """

    def __init__(self, budget: Budget, **options: Unpack[CacheOptions]):
        super().__init__(budget, policy=TriAttentionPolicy(), **options)

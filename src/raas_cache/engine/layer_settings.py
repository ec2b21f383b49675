"""What one layer is told of the options of its cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .policy import Policy


@dataclass(frozen=True)
class LayerSettings:
    """What a paged layer is told; see `PagedCache` for the meanings.

    Args:
        policy: orders the evictable pages.
    """

    policy: Policy
    budget: int
    page_size: int = 16
    min_decode_pages: int = 8
    scoring: Literal["exact", "minmax"] = "exact"
    granularity: Literal["head", "layer"] = "head"
    prompt: Literal["pin", "select", "evict"] = "pin"
    kv_dtype: Literal["int8", "fp8"] | None = None

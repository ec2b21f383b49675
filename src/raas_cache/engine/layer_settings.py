"""The settings of one layer's pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .policy import Policy


CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}  # uint8: two 4-bit codes in a byte


@dataclass(frozen=True)
class LayerSettings:
    """The settings of one layer; `PagedCache` documents their meanings.

    Args:
        policy: ranks the evictable pages.
        shares: factors on the decode pages that the budget leaves beside the prompt, one for each KV head of the layer,
            or one for all. A page table has one.
    """

    policy: Policy
    budget: int
    page_size: int = 16
    min_decode_pages: int = 8
    scoring: Literal["exact", "minmax"] = "exact"
    granularity: Literal["head", "layer"] = "head"
    prompt: Literal["pin", "select", "evict"] = "pin"
    kv_dtype: Literal["int8", "fp8", "int4"] | None = None
    shares: tuple[float, ...] = (1.0,)

    @property
    def code(self) -> torch.dtype | None:
        """The dtype of the codes of keys and values; None if they are stored in the model's dtype."""
        return None if self.kv_dtype is None else CODES[self.kv_dtype]

    @property
    def is_packed(self) -> bool:
        """Whether keys and values are stored as 4-bit codes."""
        return self.kv_dtype == "int4"

    @property
    def grows(self) -> bool:
        """Whether the number of pages grows without a limit, because the policy never evicts."""
        return not self.policy.evicts

    @property
    def reads_all(self) -> bool:
        """Whether a decode step reads every page."""
        return self.policy.reads == "all" and (self.prompt != "select" or not self.policy.evicts)

    @property
    def has_key_bounds(self) -> bool:
        """Whether a decode step computes bounds of the pages' logits from `key_min` and `key_max`."""
        return self.scoring == "minmax" or not self.reads_all

    def prefill_pages_read(self, pinned_pages: int) -> int:
        """How many pages a decode step reads of a prefill with `pinned_pages` pages; they count against the budget."""
        if self.prompt == "evict":
            return 1
        half = max(1, self.budget // self.page_size // 2)
        return pinned_pages if self.prompt == "pin" else min(pinned_pages, half)

    def room_beside(self, pinned_pages: int) -> int:
        """Decode pages that the budget leaves beside `pinned_pages` pinned pages; may be negative."""
        return self.budget // self.page_size - self.prefill_pages_read(pinned_pages)

"""StreamingLLM: Efficient Streaming Language Models with Attention Sinks (Xiao et al., ICLR 2024, arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..cache.paged_cache import PagedCache
from ..engine.policy import Pages, Policy
from .registry import register_cache, register_policy


if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..cache.settings import Budget, CacheOptions


@register_policy("streaming_llm")
@dataclass(frozen=True)
class StreamingLLMPolicy(Policy):
    """Keep the first page (the sink) and a window of the newest pages (section 3.2).

    The cache sets the priority of a page to the position of its newest token, so the oldest page is evicted. Unlike in
    the paper, keys keep the rotary embedding of their position in the sequence. The paper has 4 sink tokens: use
    `page_size=4`.
    """

    prompt = "evict"
    prompt_window = 0

    def on_scores(self, pages: Pages) -> None:
        pass


@register_cache("streaming_llm")
class StreamingLLMCache(PagedCache):
    """StreamingLLM: keep the first page and the newest pages; see `StreamingLLMPolicy`. Options: as `PagedCache`."""

    def __init__(self, budget: Budget, **options: Unpack[CacheOptions]):
        super().__init__(budget, policy=StreamingLLMPolicy(), **options)

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

    A page's priority stays what the store makes it, the index of its newest token, so the oldest page goes. Unlike in
    the paper, keys keep the rotation of their place in the sequence; the paper's 4 sink tokens are `page_size=4`.
    """

    prompt = "evict"
    prompt_window = 0

    def on_scores(self, pages: Pages) -> None:
        pass


@register_cache("streaming_llm")
class StreamingLLMCache(PagedCache):
    """StreamingLLM: keep the first page and the newest ones; see `StreamingLLMPolicy`. Takes what `PagedCache` does."""

    def __init__(self, budget: Budget, **options: Unpack[CacheOptions]):
        super().__init__(budget, policy=StreamingLLMPolicy(), **options)

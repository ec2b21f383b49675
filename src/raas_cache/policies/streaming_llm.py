"""StreamingLLM: Efficient Streaming Language Models with Attention Sinks (Xiao et al., ICLR 2024, arXiv 2309.17453)."""

from dataclasses import dataclass

from .base import Pages, Policy, register_policy


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

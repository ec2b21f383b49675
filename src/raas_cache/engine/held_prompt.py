"""What is kept of the earlier chunks of a prompt, so that the result does not depend on how a prompt is cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from .attention_inputs import Expanded, Softmax


class Chunk(Protocol):
    """The forward of a chunk of a prompt, see `raas_cache.engine.prefill_forward.Prefill`."""

    def end_prompt(self, observed: torch.Tensor | None, softmax: Softmax) -> None: ...


@dataclass(frozen=True)
class HeldPrompt:
    """The chunks of one row's prompt so far.

    Args:
        queries: `[1, heads, queries, head_dim]`, the newest queries, which will score the pages of the prompt; None if
            the pages of a prompt are not evicted.
        exact: keys and values `[1, kv_heads, tokens, head_dim]` of all tokens before they became codes; None if keys
            and values are stored as they are.
        last_chunk: the forward of the last chunk so far.
    """

    queries: torch.Tensor | None
    exact: Expanded | None
    last_chunk: Chunk


def joined(before: torch.Tensor | None, new: torch.Tensor, last: int | None = None) -> torch.Tensor:
    """`new` after `before` along the tokens, `[1, heads, tokens, head_dim]`: the last `last` tokens, None for all."""
    whole = new if before is None else torch.cat([before, new], 2)
    return whole if last is None else whole[:, :, max(0, whole.shape[2] - last) :]

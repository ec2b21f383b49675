"""Which tokens of a packed forward belong to which row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..engine.row_counts import Rows


@dataclass(frozen=True)
class Chunk:
    """Consecutive prompt tokens of one row.

    Args:
        rows: the row.
        tokens: the chunk's place among the tokens of the forward.
        ends_prompt: whether this is the last chunk of the prompt.
    """

    rows: Rows
    tokens: slice
    ends_prompt: bool


@dataclass(frozen=True)
class PackedBatch:
    """The tokens of one forward: first one decode token of each of some rows, then chunks of prompts.

        tokens    | d | d | d | p p p p p p p | p p p p |
        rows      | 4 | 0 | 2 |       1       |    3    |
                  decode_rows   chunks[0]       chunks[1]

    Args:
        decode_rows: the rows of the decode tokens, in their order; None if there are none.
        chunks: the chunks of prompts.
    """

    decode_rows: Rows | None
    chunks: Sequence[Chunk]

    @classmethod
    def of(cls, decoding: list[int], prompts: list[tuple[int, int, bool]], device: torch.device) -> PackedBatch:
        """The batch of a forward.

        Args:
            decoding: the rows that decode one token each.
            prompts: (row, number of tokens, whether they end the prompt) of each chunk.
        """
        chunks, start = [], len(decoding)
        for row, length, ends_prompt in prompts:
            chunks.append(Chunk(Rows.from_list([row], device), slice(start, start + length), ends_prompt))
            start += length
        return cls(Rows.from_list(decoding, device) if decoding else None, chunks)

    @classmethod
    def decoding(cls, rows: torch.Tensor) -> PackedBatch:
        """One decode token for each of `rows` `[tokens]` int64, which a CUDA graph reads on the device.

        The rows have all their pages, so the host need not know them.
        """
        return cls(Rows(np.empty(0, np.int64), rows, is_known=False), ())

"""The forward of one layer for a packed batch: rows of their own in one forward of the model."""

from __future__ import annotations

import torch

from ..cache.paged_layer import PagedLayer
from ..engine.attention_inputs import Expanded, Seen, Softmax
from ..engine.forward_base import Forward
from ..engine.row_counts import Rows
from .packed_batch import PackedBatch


class PackedForward(Forward):
    """The tokens of one layer in one forward of a packed batch.

    The attention function calls `attend` with the queries of all tokens. Each part of the batch is then an ordinary
    forward of the layer, which touches only its own rows: one decode step for all decode rows, and one prefill for
    each chunk of a prompt.

    Args:
        paged_layer: the layer.
        key, value: `[1, kv_heads, tokens, head_dim]`; RoPE applied to the keys.
        batch: which tokens belong to which row. Tokens behind the last chunk are padding.
    """

    awaits_attention = False  # the mask of a packed batch says nothing that `batch` does not say
    is_at_work = False

    def __init__(self, paged_layer: PagedLayer, key: torch.Tensor, value: torch.Tensor, batch: PackedBatch):
        self.layer, self.paged_layer = paged_layer.engine, paged_layer
        # Without the attribute: a forward that held its own tag would be a reference cycle.
        self.key, self.value, self.batch, self.new = key.detach(), value.detach(), batch, key.shape[2]

    def attend(
        self, query: torch.Tensor, softmax: Softmax, seen: Seen | None = None, expanded: Expanded | None = None
    ) -> torch.Tensor:
        """Store the tokens and compute their attention, each over the tokens of its own row.

        Args:
            query: `[1, heads, tokens, head_dim]`.

        Returns:
            `[1, heads, tokens, value_dim]`; zeros for padding.
        """
        outputs, batch, stored = [], self.batch, 0
        # 1. Decode: the tokens become the rows of a batch, [rows, heads, 1, head_dim].
        if batch.decode_rows is not None:
            stored = len(batch.decode_rows.on_device)
            key, value, queries = (
                states[0, :, :stored].transpose(0, 1)[:, :, None] for states in (self.key, self.value, query)
            )
            output = self._attend_rows(batch.decode_rows, key, value, queries, softmax, is_prompt=False)
            outputs.append(output[:, :, 0].transpose(0, 1)[None])
        # 2. Prompts: each chunk is a forward of its row.
        for chunk in batch.chunks:
            for part in self.paged_layer.parts:
                part.engine.prompt_continues = not chunk.ends_prompt
            key, value, queries = (states[:, :, chunk.tokens] for states in (self.key, self.value, query))
            outputs.append(self._attend_rows(chunk.rows, key, value, queries, softmax, is_prompt=True))
            stored = chunk.tokens.stop
        # 3. Padding.
        if stored < self.new:
            value_dim = self.value.shape[-1]
            outputs.append(query.new_zeros(1, query.shape[1], self.new - stored, value_dim))
        return torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]

    def _attend_rows(
        self,
        rows: Rows,
        key: torch.Tensor,
        value: torch.Tensor,
        query: torch.Tensor,
        softmax: Softmax,
        is_prompt: bool,
    ) -> torch.Tensor:
        layer = self.paged_layer
        for part in layer.parts:
            part.engine.set_rows(rows)
            part.engine.reads_prefill = is_prompt
        forward = layer.begin(key, value)[0]
        output = forward.attend(query, softmax)
        assert output is not None  # no forward is the first one of an empty table: `RowStore` has opened it
        return output

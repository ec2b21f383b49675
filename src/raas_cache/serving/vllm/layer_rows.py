"""The rows of one layer, in the memory that vLLM allocated for it."""

from __future__ import annotations

import torch

from ...cache.paged_layer import PagedLayer
from ...engine.attention_inputs import Softmax
from ...engine.prefill_forward import end_prompt
from ...engine.reserve import reserve, use_memory
from ...engine.row_counts import Rows
from ..packed_forward import PackedForward
from .batch import RowMetadata
from .settings import RowSettings, heads_of


class LayerRows:
    """The rows of one attention layer. A row has the index of vLLM's block; block 0 is no row.

    Args:
        layer: an empty paged layer.
        kv_cache: `[blocks, kv_heads, slots, key_size + value_size]`, vLLM's memory for the layer. It is used as one
            piece: its pages lie in another order than vLLM's view says.
        key_size, value_size: head sizes of keys and values.
        settings: the settings of all rows.

    Raises:
        ValueError: the memory is not one piece.
    """

    def __init__(
        self, layer: PagedLayer, kv_cache: torch.Tensor, key_size: int, value_size: int, settings: RowSettings
    ):
        if not kv_cache.is_contiguous():
            raise ValueError(
                f"RAAS_BUDGET: vLLM pads the rows of this model, {tuple(kv_cache.shape)} with strides "
                f"{kv_cache.stride()}, because its layers with sliding windows have blocks of another size, which is "
                "not supported: start vLLM without RAAS_BUDGET."
            )
        self.layer, self.kv_cache = layer, kv_cache
        rows, kv_heads = kv_cache.shape[:2]
        layer.reset()
        memory, start = kv_cache.view(-1), 0
        for part, heads in zip(layer.parts, heads_of(layer, kv_heads), strict=True):
            table = part.table
            # A pool of pages, [blocks, heads, page_size, key_size + value_size].
            shape = rows * settings.pages(table), heads, table.page_size, key_size + value_size
            pool = memory[start : start + torch.Size(shape).numel()].view(shape)
            start += pool.numel()
            use_memory(table, pool[..., :key_size], pool[..., key_size:], rows)
        self._pages = [settings.pages(part.table) for part in layer.parts]

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        metadata: RowMetadata,
        softmax: Softmax,
        output: torch.Tensor,
    ) -> None:
        """Store the tokens of a forward, and attend.

        Args:
            query, key, value: `[tokens, heads, head_dim]`, and `[tokens, kv_heads, head_dim]` twice.
            output: `[tokens, heads, value_dim]`, gets the result. Tokens without a row get zeros.

        Raises:
            RuntimeError: a row does not hold the tokens that vLLM computed for its request.
        """
        # 1. Rows whose request begins are emptied.
        for row, seen in metadata.requests:
            if seen == 0:
                self._admit(row)
            else:
                self._check(row, seen)
        # 2. Attend. For each round, [1, heads, tokens, head_dim].
        for turn in metadata.rounds:
            if turn.batch.decode_rows is not None:
                self._end_prompts(turn.batch.decode_rows, softmax)
            chosen = slice(None) if turn.tokens is None else turn.tokens
            keys, values, queries = (states[chosen].transpose(0, 1)[None] for states in (key, value, query))
            attended = PackedForward(self.layer, keys, values, turn.batch).attend(queries, softmax)[0].transpose(0, 1)
            if turn.tokens is None:
                output[: len(attended)] = attended
            else:
                output[turn.tokens] = attended

    def _admit(self, row: int) -> None:
        """Empty a row for a new request, and give it all its pages."""
        for part, pages in zip(self.layer.parts, self._pages, strict=True):
            part.engine.release_rows(Rows.from_list([row], part.table.device))
            reserve(part.table, row, pages)

    def _check(self, row: int, seen: int) -> None:
        held = int(self.layer.parts[0].table.counts.seen[row])
        if held != seen:
            raise RuntimeError(
                f"Row {row} holds a sequence of {held} tokens, but vLLM has computed {seen} tokens of its request. "
                "This is a fault of raas-cache: please report it with your vLLM version and options."
            )

    def _end_prompts(self, decoding: Rows, softmax: Softmax) -> None:
        """With `prompt="evict"`, reduce the prompts to the budget whose first decode token has come."""
        for part in self.layer.parts:
            engine = part.engine
            for row in engine.held_prompts.keys() & set(decoding.on_host.tolist()):
                engine.set_rows(Rows.from_list([row], part.table.device))
                end_prompt(engine, softmax)

"""Which tokens of a forward belong to which row: vLLM's metadata of a batch, as packed batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionMetadata, AttentionMetadataBuilder, CommonAttentionMetadata

from ..packed_batch import PackedBatch
from .settings import current


@dataclass(frozen=True)
class Round:
    """Tokens that are attended at once.

    Args:
        batch: the rows of the tokens.
        tokens: `[tokens]` int64, their places in the forward; None if they are all tokens, in their order.
    """

    batch: PackedBatch
    tokens: torch.Tensor | None


@dataclass(frozen=True)
class RowMetadata(AttentionMetadata):
    """The batch of one forward, for all layers.

    Args:
        requests: (row, number of earlier tokens) of each request.
        rounds: the tokens. There is more than one round if a row cannot hold a whole prompt as a prompt: the other
            tokens of the prompt are decoded one by one, each in a round of its own.
    """

    requests: list[tuple[int, int]]
    rounds: list[Round]


class RowMetadataBuilder(AttentionMetadataBuilder[RowMetadata]):
    """Builds the metadata of a forward from vLLM's."""

    reorder_batch_threshold = 1  # vLLM then puts requests with one new token first

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._settings = current()

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> RowMetadata:
        """See `AttentionMetadataBuilder.build`."""
        common, count = common_attn_metadata, common_attn_metadata.num_reqs
        starts = common.query_start_loc_cpu[: count + 1].tolist()
        lengths = common.seq_lens_cpu_upper_bound[:count].tolist()
        is_prompt = common.is_prefilling[:count].tolist()
        rows = common.block_table_tensor[:count, 0].tolist()
        prompts: list[tuple[int, int, int]] = []  # (row, first token, number of tokens)
        decoding: list[list[tuple[int, int]]] = [[]]  # in each round, (row, token)
        requests = []
        for row, start, end, length, reads_prompt in zip(rows, starts, starts[1:], lengths, is_prompt, strict=False):
            if row == 0 or start == end:  # a dummy batch, or padding
                continue
            seen = length - (end - start)
            requests.append((row, seen))
            # 1. Prompt tokens, as many as a row holds.
            room = max(0, self._settings.longest_prompt - seen) if reads_prompt else 0
            stored = min(end - start, room)
            if stored:
                prompts.append((row, start, stored))
            # 2. All other tokens are decoded, one in each round.
            for turn, token in enumerate(range(start + stored, end), start=1 if stored else 0):
                if turn == len(decoding):
                    decoding.append([])
                decoding[turn].append((row, token))
        rounds = [
            self._round(decoding[turn], prompts if turn == 0 else [], common.num_actual_tokens)
            for turn in range(len(decoding))
        ]
        return RowMetadata(requests, rounds)

    def _round(self, decoding: list[tuple[int, int]], prompts: list[tuple[int, int, int]], tokens: int) -> Round:
        ends_prompt = not self._settings.evicts_prompts  # whether it ends is known when its first decode token comes
        batch = PackedBatch.of(
            [row for row, _ in decoding], [(row, length, ends_prompt) for row, _, length in prompts], self.device
        )
        order = [token for _, token in decoding]
        for _, start, length in prompts:
            order += range(start, start + length)
        if order == list(range(tokens)):
            return Round(batch, None)
        return Round(batch, torch.tensor(order, dtype=torch.int64, device=self.device))

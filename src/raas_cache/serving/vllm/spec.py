"""What vLLM's scheduler knows of the rows: a block is a row, and a request has one block from its start to its end."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import AttentionSpec, CircularBufferSpec


@dataclass(frozen=True, kw_only=True)
class RowSpec(CircularBufferSpec):
    """The memory of one row of one layer: one block of `block_size` slots.

    It is vLLM's spec of a ring buffer, of which a request has one block as long as it runs. So a request waits until a
    row is free, is never preempted for memory, and takes part in no prefix caching.
    """

    @classmethod
    def of(cls, spec: AttentionSpec, slots: int) -> RowSpec:
        """The rows of a layer that vLLM would give `spec`, with `slots` slots for each KV head."""
        return cls(
            block_size=slots,
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            head_size_v=spec.head_size_v,
            dtype=spec.dtype,
        )

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Entries of the block table of a request. Only the first is used.

        vLLM computes a slot for each token of a sequence, for which it reads the table up to the last token.
        """
        return -(-max_len // int(self.block_size))

"""The attention backend that vLLM loads by name."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheLayout, SlidingWindowSpec

from ...engine.attention_inputs import Softmax
from .batch import RowMetadata, RowMetadataBuilder
from .layer_rows import LayerRows
from .refusals import check_config, check_layer, check_windows
from .settings import current
from .spec import RowSpec


class RowAttention(AttentionImpl[RowMetadata]):
    """Attention of one layer over the rows of its requests."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ):
        check_config(get_current_vllm_config())
        check_layer(alibi_slopes, sliding_window, kv_cache_dtype, attn_type, kv_sharing_target_layer_name)
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, scale, num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.softmax: Softmax = {"scale": float(scale), "softcap": logits_soft_cap or None, "sinks": sinks}
        self.rows: LayerRows | None = None

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: RowMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionImpl.forward`.

        Args:
            query: `[tokens, heads, head_dim]`.
            key, value: `[tokens, kv_heads, head_dim]`; RoPE applied to the keys.
            kv_cache: `[blocks, kv_heads, slots, key_size + value_size]`.
            attn_metadata: None while vLLM measures the memory of a forward.
            output: `[tokens, heads, value_dim]`, gets the result.
        """
        output.zero_()
        if attn_metadata is None:
            return output
        if self.rows is None or self.rows.kv_cache is not kv_cache:
            paged = current().layer(extract_layer_index(layer.layer_name))
            self.rows = LayerRows(paged, kv_cache, key.shape[-1], value.shape[-1], current())
        self.rows.attend(query, key, value, attn_metadata, self.softmax, output)
        return output


class RowBackend(AttentionBackend):
    """vLLM's attention backend with rows."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        """Name of the member of `AttentionBackendEnum`."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[RowAttention]:
        """The attention of a layer."""
        return RowAttention

    @staticmethod
    def get_builder_cls() -> type[RowMetadataBuilder]:
        """The builder of the metadata of a batch."""
        return RowMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """The layout in which the memory of a layer is one piece."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sink(cls) -> bool:
        """Attention sinks are supported."""
        return True

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """The rows of a layer with full attention."""
        if type(spec) is not FullAttentionSpec:
            return spec
        return RowSpec.of(spec, current().slots(spec.num_kv_heads, spec.block_size))


class CPURowAttention(RowAttention):
    """Attention of one layer on a CPU. A layer with a sliding window gets vLLM's own attention instead."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """The attention of a layer. The arguments are those of `RowAttention`."""
        arguments = inspect.signature(cls.__init__).bind(None, *args, **kwargs).arguments
        if arguments["sliding_window"] is not None:
            check_windows(get_current_vllm_config())
            current().has_windows = True
            return CPUAttentionBackendImpl(*args, **kwargs)
        return super().__new__(cls)

    def do_kv_cache_update(self, *args: Any) -> None:
        """Nothing: `forward` stores keys and values."""


class CPURowMetadataBuilder(RowMetadataBuilder):
    """The builder of a group of layers on a CPU: for sliding windows, vLLM's own builder."""

    def __new__(cls, kv_cache_spec: Any, *args: Any, **kwargs: Any) -> Any:
        """The builder for layers with this spec. The arguments are those of `RowMetadataBuilder`."""
        if isinstance(kv_cache_spec, RowSpec):
            return super().__new__(cls)
        return CPUAttentionMetadataBuilder(kv_cache_spec, *args, **kwargs)


class CPURowBackend(RowBackend):
    """The backend on a CPU, under the name of vLLM's own, which a CPU always uses."""

    forward_includes_kv_cache_update = False  # as in vLLM's own, which serves sliding windows

    @staticmethod
    def get_name() -> str:
        """Name of the member of `AttentionBackendEnum`."""
        return "CPU_ATTN"

    @staticmethod
    def get_impl_cls() -> type[CPURowAttention]:
        """The attention of a layer."""
        return CPURowAttention

    @staticmethod
    def get_builder_cls() -> type[CPURowMetadataBuilder]:
        """The builder of the metadata of a batch."""
        return CPURowMetadataBuilder

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """vLLM's own attention serves layers with sliding windows."""
        return True

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Sizes of vLLM's blocks: any for a row, those of vLLM's own attention for sliding windows."""
        if isinstance(kv_cache_spec, SlidingWindowSpec):
            return list(CPUAttentionBackend.get_supported_kernel_block_sizes(kv_cache_spec))
        return list(RowBackend.get_supported_kernel_block_sizes(kv_cache_spec))

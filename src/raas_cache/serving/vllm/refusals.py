"""What vLLM's rows cannot serve is refused when vLLM starts."""

from __future__ import annotations

from typing import Any


WITHOUT = "or start vLLM without RAAS_BUDGET."


def check_config(config: Any) -> None:
    """Refuse an option of vLLM that the rows do not support.

    Args:
        config: vLLM's `VllmConfig`.

    Raises:
        ValueError: names the option.
    """
    parallel = config.parallel_config
    if config.model_config.is_mm_prefix_lm:
        raise ValueError(
            "RAAS_BUDGET: the tokens of an image see each other in this model, which is not supported: start vLLM "
            "without RAAS_BUDGET."
        )
    if config.speculative_config is not None:
        raise ValueError(
            "--speculative-config: drafted tokens cannot be taken back from a row. Leave the option out, " + WITHOUT
        )
    if parallel.pipeline_parallel_size > 1:
        raise ValueError(
            f"--pipeline-parallel-size {parallel.pipeline_parallel_size} is not supported with RAAS_BUDGET: use "
            f"--tensor-parallel-size, {WITHOUT}"
        )
    if parallel.decode_context_parallel_size > 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        raise ValueError(
            "--decode-context-parallel-size and --prefill-context-parallel-size are not supported with RAAS_BUDGET, "
            f"because a row is not divided: use --tensor-parallel-size, {WITHOUT}"
        )
    if config.kv_transfer_config is not None:
        raise ValueError(
            f"--kv-transfer-config: a row cannot be moved to another process. Leave the option out, {WITHOUT}"
        )


def check_layer(
    alibi_slopes: object,
    sliding_window: int | None,
    kv_cache_dtype: str,
    attn_type: str,
    kv_sharing_target_layer_name: str | None,
) -> None:
    """Refuse an attention layer that the rows do not support. The arguments are those of vLLM's `AttentionImpl`.

    Raises:
        ValueError: says what the layer has.
    """
    if kv_cache_dtype not in ("auto", "float16", "bfloat16", "float32"):
        raise ValueError(
            f"--kv-cache-dtype {kv_cache_dtype} is not supported with RAAS_BUDGET: leave the option out, {WITHOUT}"
        )
    for found, what in (
        (alibi_slopes is not None, "ALiBi"),
        (sliding_window is not None, "a sliding window"),
        (attn_type != "decoder", f"attention of type {attn_type!r}"),
        (kv_sharing_target_layer_name is not None, "the KV cache of another layer"),
    ):
        if found:
            raise ValueError(f"RAAS_BUDGET: a layer of this model has {what}, which is not supported: {WITHOUT[3:]}")


def check_windows(config: Any) -> None:
    """Refuse prefix caching for a model with sliding windows: windows would skip tokens that rows have not stored.

    Raises:
        ValueError: names the option.
    """
    if config.cache_config.enable_prefix_caching:
        raise ValueError(
            "--enable-prefix-caching: rows take part in no prefix caching, and this model has layers with sliding "
            "windows, which do. Start vLLM with --no-enable-prefix-caching, or without RAAS_BUDGET."
        )


class _Refusing(type):
    def __getattr__(cls, name: str) -> Any:
        raise ValueError(f"RAAS_BUDGET: this model caches a latent (MLA), which is not supported: {WITHOUT[3:]}")


class NoLatent(metaclass=_Refusing):
    """Stands in for vLLM's attention backends of models that cache a latent, and refuses every use of it."""

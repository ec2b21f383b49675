"""Bytes that one token needs in one KV head of one layer, for each `kv_dtype`: a Markdown table.

The budget is 4,096 tokens. The cache counts its buffers itself: codes, scales, bounds and open pages.
"""

from transformers import LlamaConfig

from raas_cache import plan


BUDGET, HEADS, LAYERS = 4096, 2, 1


def bytes_per_token(head_size: int, page_size: int, kv_dtype: str | None) -> float:
    """Bytes of keys and values in bfloat16 models, for each token, KV head and layer."""
    config = LlamaConfig(
        hidden_size=HEADS * head_size,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        num_hidden_layers=LAYERS,
        intermediate_size=32,
        vocab_size=32,
        dtype="bfloat16",
    )
    return plan(config, BUDGET, page_size=page_size, kv_dtype=kv_dtype).nbytes / (BUDGET * HEADS * LAYERS)


def main() -> None:
    print("| head size | page size | bfloat16 | int8 | int4 | int4 of bfloat16 |")
    print("|---|---|---|---|---|---|")
    for head_size in (64, 128):
        for page_size in (16, 32):
            exact, int8, int4 = (bytes_per_token(head_size, page_size, kv_dtype) for kv_dtype in (None, "int8", "int4"))
            print(f"| {head_size} | {page_size} | {exact:.1f} | {int8:.1f} | {int4:.1f} | {int4 / exact:.1%} |")


if __name__ == "__main__":
    main()

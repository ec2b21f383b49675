"""Cost of one decode step on this machine: RaaSCache after a long chain, beside StaticCache and DynamicCache.

All caches serve one random Llama-shaped model of about 10M parameters, and take turns step by step in one run, so that
a busy machine slows all alike. Medians over the paired steps, and ratios to StaticCache at `max_cache_len = budget`.

    python examples/step_cost.py --budget 1024 --seen 16384
"""

import argparse
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache

from raas_cache import RaaSCache


PROMPT = 64


def build_model(device: str, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1 << 17,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).to(device, dtype).eval()


def fill(model: torch.nn.Module, cache, tokens: torch.Tensor, name: str) -> None:
    """Decode `tokens` `[1, n]` one at a time after a prompt of `PROMPT` tokens: evictions and all."""
    started = time.perf_counter()
    model(tokens[:, :PROMPT], past_key_values=cache)
    for i in range(PROMPT, tokens.shape[1]):
        model(tokens[:, i : i + 1], past_key_values=cache)
    print(f"filled {name} to {tokens.shape[1]} tokens in {time.perf_counter() - started:.0f} s", flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--seen", type=int, default=16384, help="tokens RaaSCache and DynamicCache have seen")
    parser.add_argument("--steps", type=int, default=200, help="paired steps to time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    model = build_model(args.device, dtype)
    tokens = torch.randint(1, 4096, (1, args.seen), device=args.device)

    # (cache, tokens it has seen): StaticCache stops where the timed steps fill it to the brim.
    short = args.budget - args.steps - 2
    caches = {
        f"StaticCache({args.budget})": (StaticCache(config=model.config, max_cache_len=args.budget), short),
        f"RaaSCache({args.budget})": (RaaSCache(args.budget), args.seen),
        f"DynamicCache, {args.seen} seen": (DynamicCache(), args.seen),
    }
    for name, (cache, seen) in caches.items():
        if isinstance(cache, DynamicCache):
            model(tokens[:, :seen], past_key_values=cache)
        else:
            fill(model, cache, tokens[:, :seen], name)

    def step(cache) -> float:
        if args.device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        model(tokens[:, :1], past_key_values=cache)
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    times = {name: [] for name in caches}
    for _ in range(args.steps):
        for name, (cache, _) in caches.items():
            times[name].append(step(cache))

    reference = times[next(iter(caches))]
    print(f"\n{torch.get_num_threads()} threads, {args.dtype}, {args.device}, torch {torch.__version__}")
    print(f"{'cache':28} {'ms/step':>8} {'p10':>7} {'p90':>7} {'ratio':>6}   KV bytes")
    for name, (cache, _) in caches.items():
        spread = statistics.quantiles(times[name], n=10)
        ratio = statistics.median(mine / base for mine, base in zip(times[name], reference, strict=True))
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        median = statistics.median(times[name])
        print(f"{name:28} {median * 1e3:8.2f} {spread[0] * 1e3:7.2f} {spread[-1] * 1e3:7.2f} {ratio:6.2f} {size:10d}")
    print(f"\n{caches[f'RaaSCache({args.budget})'][0]}")


if __name__ == "__main__":
    main()

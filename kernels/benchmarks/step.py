"""Times one layer's decode step: the bare operators of RaaS, with their dispatch, in a RaaSCache, and in a StaticCache.

The bare operators are the functions of the engine itself. A RaaSCache adds the cache and the attention dispatcher, as a
model calls them. The StaticCache of transformers has as many slots as the budget, all of them in use, and its attention
gets the mask that a model gives it. All take turns round by round, in one process. A ratio is the median over the
rounds of the time in a RaaSCache by the time of the line. Needs raas_cache, of this checkout.
"""

import argparse
import importlib
import statistics
import sys
import time
from functools import partial

import torch
from common import HEAD_SIZE, PAGE, ROOT, WARMUP, cold_copies, make_kv, parse


sys.path.insert(0, str(ROOT / "src"))

from transformers import AttentionInterface, LlamaConfig, StaticCache
from transformers.models.llama.modeling_llama import LlamaAttention

import raas_kernels
from raas_cache import RaaSCache


ALPHA = 0.2  # the default of RaaSCache
SHAPES = {"1.5B": (2, 6), "8B": (8, 4)}  # KV heads and query heads of each, as models of these sizes have
BUDGET = 1024
RAAS = "in a RaaSCache"


def draw(shape, tokens, options):
    """Query, key and value of some tokens."""
    heads, group = shape
    counts = heads * group, heads, heads
    return [torch.randn(1, count, tokens, HEAD_SIZE, dtype=options.dtype, device=options.device) for count in counts]


def bare(kv, token, append, attend, stamp):
    query, key, value = token
    append(kv, key, value)
    output, scores = attend(kv, query, HEAD_SIZE**-0.5)
    stamp(kv, scores, ALPHA, None)
    return output


def engine_functions(device):
    """`append`, `attend` and `stamp` of the engine that serves the device, without their dispatch."""
    module = "triton" if raas_kernels.engine(device) == "triton" else "reference"
    found = [importlib.import_module(f"raas_kernels.ops.{name}.{module}") for name in ("append", "attend", "stamp")]
    return [getattr(part, name) for part, name in zip(found, ("append", "attend", "stamp"), strict=True)]


def cached(cache, layer, attention, token, mask=None):
    query, key, value = token
    key, value = cache.update(key, value, layer)
    return AttentionInterface()["sdpa"](attention, query, key, value, mask, scaling=HEAD_SIZE**-0.5)[0]


def full_cache(layers, shape, attention, options):
    """A RaaSCache of `layers` layers whose budget is full: each page that opens recycles another."""
    cache = RaaSCache(budget=BUDGET)
    for layer in range(layers):
        cached(cache, layer, attention, draw(shape, PAGE, options))
    for _ in range(BUDGET + PAGE):
        for layer in range(layers):
            cached(cache, layer, attention, draw(shape, 1, options))
    return cache


def full_static_cache(config, shape, options):
    """A StaticCache without a free slot, and a function that frees the last slot of each layer."""
    cache = StaticCache(config, max_cache_len=BUDGET)
    _, key, value = draw(shape, BUDGET, options)
    for layer in range(config.num_hidden_layers):
        cache.update(key, value, layer)
    return cache, lambda: cache.crop(-1)


def contenders(shape, options):
    """Name -> the calls of one decode step, one for each layer; and a function to call before each step."""
    heads, group = shape
    layers = cold_copies(1, BUDGET, options, heads)
    config = LlamaConfig(
        hidden_size=heads * group * HEAD_SIZE,
        num_attention_heads=heads * group,
        num_key_value_heads=heads,
        head_dim=HEAD_SIZE,
        num_hidden_layers=layers,
    )
    config._attn_implementation = "sdpa"
    attention = LlamaAttention(config, 0).to(options.device, options.dtype).eval()
    token = draw(shape, 1, options)
    own, dispatched = ([make_kv(1, BUDGET, options, heads) for _ in range(layers)] for _ in range(2))
    cache = full_cache(layers, shape, attention, options)
    public = raas_kernels.append, raas_kernels.attend, raas_kernels.stamp
    static, before_step = full_static_cache(config, shape, options)
    mask = torch.ones(1, 1, 1, BUDGET, dtype=torch.bool, device=options.device)
    functions = engine_functions(options.device)
    calls = {
        "bare operators": [partial(bare, kv, token, *functions) for kv in own],
        "with their dispatch": [partial(bare, kv, token, *public) for kv in dispatched],
        RAAS: [partial(cached, cache, layer, attention, token) for layer in range(layers)],
        "in a StaticCache": [partial(cached, static, layer, attention, token, mask) for layer in range(layers)],
    }
    return calls, before_step


def time_layers(calls, device):
    """Seconds a layer of one decode step; on a GPU until the device has finished."""
    start = time.perf_counter()
    for call in calls:
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / len(calls)


def main():
    options = parse(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter))
    with torch.no_grad():
        for size, shape in SHAPES.items():
            calls, before_step = contenders(shape, options)
            rounds = []
            for _ in range(WARMUP + options.repeats):
                before_step()
                rounds.append({name: time_layers(layers, options.device) for name, layers in calls.items()})
            for name in calls:
                times = [times[name] for times in rounds[WARMUP:]]
                ratio = statistics.median(times[RAAS] / times[name] for times in rounds[WARMUP:])
                print(f"{size:5} {name:24} {statistics.median(times) * 1e6:10.1f} us   RaaSCache / this {ratio:5.2f}")


if __name__ == "__main__":
    main()

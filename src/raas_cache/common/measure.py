"""Measurements: bytes and evictions of a cache, and the confidence interval of a share."""

import math

from transformers import Cache

from ..cache.paged_cache import PagedCache


def kv_nbytes(cache: Cache) -> int:
    """Bytes of keys and values that a cache has allocated: a paged cache, or a cache of transformers."""
    if isinstance(cache, PagedCache):
        return cache.nbytes
    buffers = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(buffer.nbytes for buffer in buffers if buffer is not None)


def evictions(cache: Cache) -> int:
    """Pages that each row has evicted so far, over all layers and KV heads; 0 for a cache without pages."""
    return cache.evictions if isinstance(cache, PagedCache) else 0


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share."""
    z, share = 1.959964, successes / trials
    middle = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, (middle - spread) / (1 + z * z / trials)), min(1.0, (middle + spread) / (1 + z * z / trials))

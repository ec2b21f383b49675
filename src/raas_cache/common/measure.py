"""Measurements: bytes and evictions of a cache, and the name of a device."""

import torch
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


def device_name(device: torch.device) -> str:
    """Name of the card, or `"CPU"`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"

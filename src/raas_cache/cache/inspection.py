"""Questions about a cache: bytes, tokens held, evictions, and its representation as text and HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .paged_layer import PagedLayer


def nbytes(layers: Iterable[object]) -> int:
    """Bytes of the buffers of keys and values of `layers`, with the scales of 8-bit codes.

    For 4-bit codes, with the bounds that they count from and with the keys of the open pages.
    """
    buffers = []
    for layer in layers:
        # Linear-attention layers have no keys, layers not yet filled have None.
        buffers += [getattr(layer, "keys", None), getattr(layer, "values", None)]
        if isinstance(layer, PagedLayer) and layer.table.kv is not None:
            kv = layer.table.kv
            buffers += [kv.key_scales, kv.value_scales]
            if kv.is_packed:
                buffers += [kv.key_min, kv.key_max, kv.value_min, kv.value_max, kv.open_keys]
    return sum(buffer.nbytes for buffer in buffers if buffer is not None)


def paged_layer(layers: Sequence[object], layer_idx: int) -> PagedLayer:
    """The layer `layer_idx`.

    Raises:
        ValueError: there is no such layer, or it holds no pages.
    """
    if not 0 <= layer_idx < len(layers):
        raise ValueError(f"layer_idx={layer_idx} is not a layer of this cache, which has {len(layers)} layers so far.")
    layer = layers[layer_idx]
    if not isinstance(layer, PagedLayer) or layer.table.kv is None:
        raise ValueError(
            f"layer_idx={layer_idx} is a {type(layer).__name__} without pages: it is not paged, or has no tokens yet."
        )
    return layer


def seen_tokens(layers: Sequence[PagedLayer]) -> torch.Tensor:
    """Tokens that each row has seen, int64 `[batch]`; empty if no layer holds pages."""
    if not layers:
        return torch.zeros(0, dtype=torch.int64)
    return torch.from_numpy(layers[0].table.counts.seen.copy()).to(layers[0].table.device)


def summary(layers: Sequence[PagedLayer]) -> str:
    """The part of the cache's `repr` about tokens held, tokens seen and evicted pages."""
    held = max((int((layer.engine.kv.bias == 0).sum(-1).max()) for layer in layers), default=0)
    seen = layers[0].table.length if layers else 0
    evicted = sum(int(layer.table.evicted.sum()) * layer.table.num_heads for layer in layers)
    return f"held={held}, seen={seen}, evicted={evicted} pages"

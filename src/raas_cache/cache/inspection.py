"""Questions about a cache: bytes, tokens held, evictions, and its representation as text and HTML."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from ..engine.layer_settings import LayerSettings
from ..engine.policy import Policy
from .head_groups import HeadGroupsLayer
from .paged_layer import PagedLayer, holding_pages


def nbytes(layers: Iterable[object]) -> int:
    """Bytes of the buffers of keys and values of `layers`, with the scales of 8-bit codes.

    For 4-bit codes, with the bounds that they count from and with the keys of the open pages.
    """
    buffers = []
    for layer in layers:
        for part in layer.parts if isinstance(layer, PagedLayer) else [layer]:
            # Linear-attention layers have no keys, layers not yet filled have None.
            buffers += [getattr(part, "keys", None), getattr(part, "values", None)]
            if isinstance(part, PagedLayer) and part.table.kv is not None:
                kv = part.table.kv
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


def resident_positions(layers: Sequence[object], layer_idx: int) -> torch.Tensor:
    """See `PagedCache.resident_positions`."""
    return _by_head(layers, layer_idx, lambda part: part.engine.kv.positions.long().masked_fill(_hidden(part), -1))


def resident_tokens(layers: Sequence[object], layer_idx: int) -> torch.Tensor:
    """See `PagedCache.resident_tokens`."""
    return _by_head(layers, layer_idx, lambda part: (~_hidden(part)).sum(-1))


def evicted_pages(layers: Sequence[object], layer_idx: int) -> torch.Tensor:
    """See `PagedCache.evicted_pages`."""

    def evicted(part: PagedLayer) -> torch.Tensor:
        table = part.table
        return torch.from_numpy(table.evicted)[:, None].expand(-1, table.num_heads).to(table.device)

    return _by_head(layers, layer_idx, evicted)


def _hidden(part: PagedLayer) -> torch.Tensor:
    """Which slots hold no visible token, `[batch, kv_heads, slots]` bool."""
    return part.engine.kv.bias != 0


def _by_head(layers: Sequence[object], layer_idx: int, function: Callable[[PagedLayer], torch.Tensor]) -> torch.Tensor:
    """`function` of a paged layer, `[batch, kv_heads, ...]`. Groups of KV heads are joined, and filled up with -1."""
    layer = paged_layer(layers, layer_idx)
    if not isinstance(layer, HeadGroupsLayer):
        return function(layer)
    results = [function(part) for part in layer.parts]
    if results[0].ndim == 3:
        longest = max(result.shape[2] for result in results)
        results = [torch.nn.functional.pad(result, (0, longest - result.shape[2]), value=-1) for result in results]
    heads = [head for group in layer.head_groups for head in group]
    return torch.cat(results, 1)[:, sorted(range(len(heads)), key=heads.__getitem__)]


def seen_tokens(layers: Sequence[object]) -> torch.Tensor:
    """See `PagedCache.seen_tokens`; empty if no layer holds pages."""
    paged = holding_pages(layers)
    if not paged:
        return torch.zeros(0, dtype=torch.int64)
    return torch.from_numpy(paged[0].table.counts.lengths).to(paged[0].table.device)


def evictions(layers: Sequence[object]) -> int:
    """See `PagedCache.evictions`."""
    return sum(int(layer.table.evicted.max()) * layer.table.num_heads for layer in holding_pages(layers))


def is_over_budget(layers: Sequence[object]) -> bool:
    """See `PagedCache.is_over_budget`."""
    return any(layer.table.is_over_budget for layer in holding_pages(layers))


def text(name: str, budget: object, policy: Policy | None, layers: Sequence[object]) -> str:
    """The `repr` of a cache of the class `name`; `policy` is None if the class says which policy it has."""
    paged = holding_pages(layers)
    held = max((int((layer.engine.kv.bias == 0).sum(-1).max()) for layer in paged), default=0)
    seen = paged[0].table.length if paged else 0
    evicted = sum(int(layer.table.evicted.sum()) * layer.table.num_heads for layer in paged)
    shown = "" if policy is None else f"{policy}, "
    return f"{name}({shown}budget={budget}, held={held}, seen={seen}, evicted={evicted} pages, {nbytes(layers)} bytes)"


def html(name: str, budget: object, settings: LayerSettings, layers: Sequence[object]) -> str:
    """What Jupyter shows of a cache of the class `name`."""
    from ..viz.html import of_cache  # only when a notebook shows the cache

    about = f"{settings.policy}, budget={budget}, page_size={settings.page_size}, prompt={settings.prompt!r}"
    return of_cache(name, f"{about}, {nbytes(layers):,} bytes", layers, is_over_budget(layers))

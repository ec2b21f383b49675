"""Allocate the rows of a model: how many pages a pool has, and the buffers of all layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..cache.paged_cache import PagedCache
from ..cache.paged_layer import PagedLayer
from ..common.upstream import CACHE_ARGUMENT
from ..engine.page_table import PageTable
from ..engine.reserve import reserve
from ..engine.resize import CONTENTS
from .row_plan import DEFAULT_ROWS, usual_row
from .row_store import SPARE, RowStore


@dataclass(frozen=True)
class _Example:
    """Key and value of one token of a table, `[1, kv_heads, 1, head_dim]`."""

    key: torch.Tensor
    value: torch.Tensor


@torch.no_grad()
def rows_of(
    model: PreTrainedModel, cache: PagedCache, max_rows: int | None, memory: int | None
) -> tuple[RowStore, int]:
    """Allocate rows with the settings of an empty cache.

    The model reads one token with the cache, which shows the sizes of all keys and values, and refuses a model or a
    setting that pages cannot serve.

    Args:
        max_rows: largest number of requests at once; None for as many usual rows as `memory` holds.
        memory: bytes of all pools; None for `max_rows` usual rows. A usual row holds the budget.

    Returns:
        The rows, and the largest number of requests at once.

    Raises:
        ValueError: `memory` holds no row; or the model or a setting cannot be served.
    """
    # 1. One token, to learn the sizes of keys and values, and the rotary embedding if the method needs it.
    model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), **{CACHE_ARGUMENT: cache})
    layers = {index: layer for index, layer in enumerate(cache.layers) if isinstance(layer, PagedLayer)}
    parts = [part for layer in layers.values() for part in layer.parts]
    examples = []
    for part in parts:
        if part.engine.is_latent:
            raise ValueError(
                f"{type(model).__name__} caches a latent (MLA), which continuous batching does not support: call "
                "generate with a padded batch and past_key_values=RaaSCache(...)."
            )
        key, value = part.table.states()
        examples.append(_Example(key[:, :, :1].clone(), value[:, :, :1].clone()))
    rotations = [part.engine.rotation for part in parts]
    for layer in layers.values():
        layer.reset()
    for part, rotation in zip(parts, rotations, strict=True):
        part.engine.rotation = rotation
    # 2. Pages of each pool.
    tables = [part.table for part in parts]
    usual = [usual_row(table) for table in tables]
    row_bytes = sum(
        pages * _page_bytes(table, example) for pages, table, example in zip(usual, tables, examples, strict=True)
    )
    rows = max_rows or (DEFAULT_ROWS if memory is None else int(memory // row_bytes))
    scale = rows if memory is None else memory / row_bytes
    if rows < 1 or scale < 1:
        raise ValueError(
            f"memory={memory:,} bytes hold no row: one row with this budget takes {row_bytes:,} bytes. Raise memory, "
            "or lower the budget."
        )
    # 3. Buffers. The first row and a page are spare, for the padding of a CUDA graph.
    for table, example, pages in zip(tables, examples, usual, strict=True):
        table.use_pool(int(scale * pages) + 2)  # with the block that holds nothing, and the spare page
        table.allocate(example.key, example.value, rows + 1)
        table.resize(pages)
        reserve(table, SPARE, 1)
        table.is_empty = False  # so no forward is the first one, whose output the model itself would compute
    return RowStore(layers, rows + 1, model.device), rows


def _page_bytes(table: PageTable, example: _Example) -> int:
    """Bytes of keys and values of one page of all KV heads."""
    trial = PageTable(table.settings)
    trial.use_pool(2)
    trial.allocate(example.key, example.value, 1)
    assert trial.kv is not None
    contents: list[torch.Tensor | None] = [getattr(trial.kv, name) for name in CONTENTS]
    return sum(buffer.nbytes for buffer in contents if buffer is not None) // 2

"""Forwards that touch only some rows of a cache, so that sequences can start and end at different steps."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch

from ..engine.forward import ForwardGuard
from ..engine.layer_engine import LayerEngine
from ..engine.row_counts import Rows
from .paged_layer import PagedLayer
from .settings import whole_number


class TouchedRows:
    """The rows that the forwards inside `PagedCache.admit` or `PagedCache.on_rows` touch.

    Args:
        indices: the row indices.
        batch_size: number of rows to allocate if the cache is empty.
        admits: whether the rows are empty, so that the first forward is their prompt.
    """

    def __init__(self, indices: Sequence[int], batch_size: int, admits: bool):
        self.indices, self.batch_size = list(indices), batch_size
        self._admitting = admits
        self._prepared: dict[int, LayerEngine] = {}  # by their `id`
        self._on_device: dict[torch.device, Rows] = {}

    @classmethod
    def checked(
        cls, rows: int | Sequence[int], batch_size: int | None, admits: bool, layers: list[PagedLayer]
    ) -> TouchedRows:
        """Check the arguments of `PagedCache.admit` or `PagedCache.on_rows`.

        Args:
            layers: the paged layers of the cache that have buffers.

        Raises:
            TypeError, ValueError: `rows` are not rows of the cache, or `batch_size` is not its number of rows.
        """
        held = layers[0].table.batch_size if layers else None
        if held is not None and batch_size not in (None, held):
            raise ValueError(f"batch_size={batch_size}: the cache already has {held} rows. Do not pass batch_size.")
        if held is None and not admits:
            raise ValueError(f"rows={rows}: the cache is empty. Call cache.admit(rows, batch_size=...) first.")
        batch = held if batch_size is None else whole_number("batch_size", batch_size)
        indices = checked_rows(rows, batch)
        return cls(indices, batch or max(indices) + 1, admits)

    def prepare(self, engine: LayerEngine, device: torch.device) -> None:
        """Tell a layer which rows its next forward touches, and whether this is the first forward of these rows."""
        if device not in self._on_device:
            self._on_device[device] = Rows.from_list(self.indices, device)
        engine.set_rows(self._on_device[device])
        engine.batch_size = self.batch_size
        if self._admitting and id(engine) not in self._prepared:
            engine.admits = True
        self._prepared[id(engine)] = engine

    def leave(self, before: TouchedRows | None) -> None:
        """Make the next forwards of the layers touch the rows `before`; None for all rows."""
        for engine in self._prepared.values():
            engine.set_rows(None)
            engine.admits = False
            if before is not None and engine.table.kv is not None:
                before.prepare(engine, engine.table.device)

    def check_layers(self, layers: Iterable[object]) -> None:
        """Raise a ValueError if a layer is not paged: the rows of other layers all have the same length."""
        for index, layer in enumerate(layers):
            if not isinstance(layer, PagedLayer):
                raise ValueError(
                    f"rows={self.indices}: layer {index} of this model uses a {type(layer).__name__}, whose rows "
                    "must have the same length. Run all rows of the batch in one forward, padded on the left."
                )


def checked_rows(rows: int | Sequence[int], batch_size: int | None) -> list[int]:
    """`rows` as a list of indices.

    Args:
        rows: a row index or several; integers of NumPy and torch are accepted, too.
        batch_size: number of rows of the cache; None if the cache is empty.

    Raises:
        TypeError: `rows` is something else.
        ValueError: `rows` is empty, or a row is out of range or named twice.
    """
    given = rows.tolist() if isinstance(rows, torch.Tensor) else rows
    listed = list(given) if isinstance(given, Iterable) else [given]
    if not all(hasattr(row, "__index__") and not isinstance(row, bool) for row in listed):
        raise TypeError(f"rows={rows!r} must be an int, or a list of ints.")
    indices = [operator.index(row) for row in listed]
    if not indices or len(set(indices)) < len(indices):
        raise ValueError(f"rows={rows} must be one row index, or several different row indices.")
    if min(indices) < 0 or (batch_size is not None and max(indices) >= batch_size):
        raise ValueError(
            f"rows={rows} must not be negative."
            if batch_size is None
            else f"rows={rows} must lie between 0 and {batch_size - 1}: the cache has {batch_size} rows."
        )
    return indices


def release_rows(rows: int | Sequence[int], layers: list[PagedLayer], guard: ForwardGuard) -> None:
    """Empty `rows` in all `layers`, see `PagedCache.release_rows`.

    Args:
        layers: the paged layers that have buffers.
        guard: marks the cache as unusable if an exception stops the release.
    """
    if not layers:
        raise ValueError(f"rows={rows}: the cache is empty, so there is no row to release.")
    indices = checked_rows(rows, layers[0].table.batch_size)
    with guard.all_or_none():
        for layer in layers:
            layer.engine.release_rows(Rows.from_list(indices, layer.table.device))

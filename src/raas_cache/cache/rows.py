"""Forwards that touch some rows of a cache only, so that sequences can begin and end at different steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..engine.layer_engine import LayerEngine
from ..engine.row_counts import Rows
from .paged_layer import PagedLayer
from .settings import whole_number


class TouchedRows:
    """The rows that the forwards of a context touch.

    Args:
        indices: the rows.
        batch_size: rows to make room for, where the cache is empty.
        admits: whether the rows hold nothing, and the first forward is their prompt.
    """

    def __init__(self, indices: Sequence[int], batch_size: int, admits: bool):
        self.indices, self.batch_size = list(indices), batch_size
        self._admitting = admits
        self._admitted: set[int] = set()
        self._on_device: dict[torch.device, Rows] = {}

    def prepare(self, engine: LayerEngine, device: torch.device) -> None:
        """Tell a layer which rows the next forward touches; an admitted layer's next forward is not its first."""
        if device not in self._on_device:
            self._on_device[device] = Rows.of(self.indices, device)
        engine.set_rows(self._on_device[device])
        engine.batch_size = self.batch_size
        if self._admitting and id(engine) not in self._admitted:
            self._admitted.add(id(engine))
            engine.admits = True

    def check_layers(self, layers: Iterable[object]) -> None:
        """Raise a ValueError if a layer is not paged: only pages have rows of their own."""
        for index, layer in enumerate(layers):
            if not isinstance(layer, PagedLayer):
                raise ValueError(
                    f"rows={self.indices}: layer {index} of this model keeps a {type(layer).__name__}, whose rows all "
                    "move in step. Give all rows of the batch one forward, padded on the left."
                )


def checked_rows(rows: int | Sequence[int], batch_size: int) -> list[int]:
    """`rows` as a list of indices into a batch of `batch_size` rows.

    Raises:
        TypeError, ValueError: it is something else, or an index is out of range or there twice.
    """
    indices = [rows] if isinstance(rows, int) else list(rows)
    if not indices or len(set(indices)) < len(indices):
        raise ValueError(f"rows={rows} must be one row, or several different rows.")
    for index in indices:
        if whole_number("rows", index + 1) > batch_size:
            raise ValueError(f"rows={rows} must lie between 0 and {batch_size - 1}: the cache has {batch_size} rows.")
    return indices

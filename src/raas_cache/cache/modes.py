"""What the user has asked a cache to do beyond plain forwards. A layer learns it when it receives its next tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache

from ..engine.forward import ForwardGuard
from .paged_layer import PagedLayer, holding_pages
from .past_mask import PastMask
from .rows import TouchedRows, release_rows


if TYPE_CHECKING:
    from ..tracing.recording import Recording
    from .paged_layer import AnyLayer


class Modes:
    """The modes of a cache.

    Attributes:
        reads_prefill: whether every token is prefill, see `PagedCache.prefilling`.
        preallocates: whether the next forward allocates the whole budget, see `PagedCache.preallocate`.
        records_past: whether forwards note what they overwrite, see `PagedCache.activate_past_recording`.
        recording: receives scores and priorities, see `raas_cache.record`; None if the cache is not recorded.
        rows: the rows that forwards touch, see `PagedCache.on_rows`; None for all rows.
        past_mask: the last mask of these rows.
    """

    def __init__(self) -> None:
        self.reads_prefill = self.preallocates = False
        self.recording: Recording | None = None
        self.rows: TouchedRows | None = None
        self.forget()

    def forget(self) -> None:
        """End the modes that belong to a sequence."""
        self.records_past = False
        self.past_mask = PastMask()
        self._not_offloaded: int | None = None

    @property
    def forbid_compilation(self) -> bool:
        """Whether a decode step does what a compiled step cannot do."""
        return self.records_past or self.recording is not None or self.reads_prefill

    def tell(self, layer: PagedLayer, layer_idx: int, device: torch.device) -> None:
        """Tell a layer the modes, before it receives tokens on `device`."""
        for part in layer.parts:
            part.engine.reads_prefill, part.table.preallocates = self.reads_prefill, self.preallocates
        if self.recording is not None and layer.trace is None:
            layer.trace = self.recording.trace_of(layer_idx)
        if self.rows is not None:
            for part in layer.parts:
                self.rows.prepare(part.engine, device)

    def tell_new(self, layers: Iterable[AnyLayer]) -> None:
        """Make new layers note what they overwrite, if the other layers do."""
        for layer in layers:
            if self.records_past and hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def observe(self, recording: Recording | None, layers: Iterable[AnyLayer]) -> None:
        """Start or end a recording, see `PagedCache.observe`."""
        if recording is not None and self.recording is not None:
            raise ValueError("cache is already recorded by another raas_cache.record: leave that with block first.")
        self.recording = recording
        for layer in layers:
            if isinstance(layer, PagedLayer):
                layer.trace = None  # `tell` gives each layer its own

    def due_to_offload(self, layer_idx: int, layer: AnyLayer) -> list[int]:
        """The layers to move to the CPU when the model has received the keys of `layer`, see `PagedCache.offload`."""
        due: int | None = layer_idx
        if isinstance(layer, PagedLayer):
            due, self._not_offloaded = self._not_offloaded, layer_idx
        return [] if due is None or due == self._not_offloaded else [due]

    def check_past_recording(self) -> None:
        """Raise a ValueError if forwards touch some rows only, which cannot be taken back."""
        if self.rows is not None:
            raise ValueError(
                f"rows={self.rows.indices}: forwards that touch some rows only cannot be taken back. Leave out "
                "assistant_model / prompt_lookup_num_tokens inside cache.on_rows and cache.admit."
            )

    def end_past_recording(self, layers: Iterable[AnyLayer]) -> None:
        """See `PagedCache.deactivate_past_recording`."""
        self.records_past = False
        for layer in layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False

    @contextmanager
    def prefilling(self, reads_prefill: bool, cache: Cache) -> Iterator[None]:
        """Inside this context, `reads_prefill` has this value; afterwards the old value, also in the cache's layers.

        The cache may get its layers inside the context, so they are looked up at its end.
        """
        before, self.reads_prefill = self.reads_prefill, reads_prefill
        try:
            yield
        finally:
            self.reads_prefill = before
            for layer in holding_pages(cache.layers):
                layer.engine.reads_prefill = before

    @contextmanager
    def touching(
        self,
        rows: int | Sequence[int],
        batch_size: int | None,
        layers: list[AnyLayer],
        guard: ForwardGuard,
        admits: bool,
    ) -> Iterator[None]:
        """Inside this context, forwards touch `rows` only, see `PagedCache.on_rows` and `PagedCache.admit`.

        Args:
            layers: the layers of the cache. Layers that are created inside learn the rows with their first tokens.
            guard: marks the cache as unusable if an exception stops the release of the rows.
            admits: whether the earlier tokens of the rows are dropped.
        """
        if self.records_past or self.recording is not None:
            raise ValueError(
                f"rows={rows}: rollback and raas_cache.record need all rows in every forward. Call "
                "cache.deactivate_past_recording() first, and leave the record block."
            )
        paged = holding_pages(layers)
        touched = TouchedRows.checked(rows, batch_size, admits, paged)
        touched.check_layers(layers)
        if admits and paged:
            release_rows(touched.indices, paged, guard)
        self.rows, before = touched, self.rows
        self.past_mask = PastMask()  # the next masks cover these rows only
        try:
            for layer in paged:
                touched.prepare(layer.engine, layer.table.device)
            yield
        finally:
            self.rows, self.past_mask = before, PastMask()
            touched.leave(before)

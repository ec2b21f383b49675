"""Apply an attention mask to tokens that are in the cache already.

A 2-d mask covers all tokens of the sequence, earlier and new. transformers cuts it to the tokens that `update` returns,
which are the new tokens only. The mask offset that the cache returns therefore has the cache as attribute, and the
registered mask functions pass the whole mask to this cache (see `attention.masks.mask_dispatcher`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import torch

import raas_kernels

from ..engine.hide import check_same_length
from ..engine.traced import is_capturing
from .model_probe import MEND


if TYPE_CHECKING:
    from .paged_layer import PagedLayer

AnyOffset = TypeVar("AnyOffset", int, torch.Tensor)


class TakesMasks(Protocol):
    """A cache that applies a mask to its tokens; see `PagedCache.apply_mask`."""

    def apply_mask(self, mask: torch.Tensor | None, seen: int, new: int) -> None: ...


class MaskOffset(int):
    """Number of tokens seen, as the offset of a mask, with the cache as attribute."""

    paged_cache: TakesMasks


def tagged(offset: AnyOffset, cache: TakesMasks) -> AnyOffset | MaskOffset:
    """The offset of a mask (an int, or a 0-d tensor under `torch.compile`) with `cache` as attribute `paged_cache`."""
    if (torch.compiler.is_compiling() or is_capturing()) and not torch.is_tensor(offset):
        return offset  # a compiled first forward: there are no earlier tokens
    tag = offset if torch.is_tensor(offset) else MaskOffset(offset)
    tag.paged_cache = cache  # type: ignore[attr-defined]
    return tag


class PastMask:
    """The last mask that was applied to the layers. If the next mask says the same, it only costs a comparison."""

    def __init__(self) -> None:
        self._known: torch.Tensor | None = None  # [batch, tokens] bool, on the CPU
        self._token = object()  # is the `known_mask` of the layers whose bias agrees with `_known`

    def apply(self, mask: torch.Tensor | None, seen: int | torch.Tensor, new: int, layers: list[PagedLayer]) -> None:
        """Show and hide the tokens of `layers` as `mask` says.

        On a CPU, nothing happens if the last mask said the same. On a GPU the mask is always applied, because a
        comparison would make the host wait for the device.

        Args:
            mask: `[rows, tokens]` bool, False where a token is hidden, for the rows that the forward touches. None
                changes nothing.
            seen: number of tokens before this forward.
            new: number of tokens of this forward.
            layers: the paged layers that have buffers.

        Raises:
            ValueError: the mask has fewer tokens than the sequence, shows left padding, or hides tokens of rows that
                started at different steps.
        """
        if not layers:
            self.learn(mask, new)
            return
        table, rows = layers[0].table, layers[0].engine.rows
        batch = table.batch_size if rows is None else len(rows.on_host)
        if mask is None or mask.shape[0] not in (1, batch):  # `update` refuses another batch
            return
        if isinstance(seen, int):
            check_mask_length(mask, seen, new)
            check_same_length(mask[:, : seen + new], table, rows)
            if new > 1 or mask.device.type == "cpu":
                padding = table.counts.padding
                check_padding(mask, padding if rows is None else padding[rows.on_host])
            if new > 1:
                for layer in layers:
                    if layer.engine.is_latent:  # its tokens are stored before its attention call brings the mask
                        layer.engine.announced = mask[:, seen : seen + new].expand(batch, -1).to(layer.table.device)
            if mask.device.type == "cpu":
                layers = self._stale(mask, seen, new, layers)
        if rows is not None and seen == 0:  # these rows are empty
            self.learn(mask, new)
            return
        if rows is not None:
            for layer in layers:
                known = layer.engine.known_mask
                layer.engine.show(mask.to(layer.table.device))
                layer.engine.known_mask = known
            return
        devices: dict[torch.device, list[PagedLayer]] = {}
        for layer in layers:
            devices.setdefault(layer.table.device, []).append(layer)
        for device, group in devices.items():
            raas_kernels.show([layer.engine.kv for layer in group], mask.to(device).expand(batch, -1))

    def _stale(self, mask: torch.Tensor, seen: int, new: int, layers: list[PagedLayer]) -> list[PagedLayer]:
        """The layers to which `mask` must be applied. Remembers `mask` as the last mask."""
        known, self._known = self._known, mask[:, : seen + new].clone()
        if known is None or known.shape[1] < seen or not torch.equal(known[:, :seen], mask[:, :seen]):
            self._token = object()
        stale = [layer for layer in layers if layer.engine.known_mask is not self._token]
        for layer in stale:
            layer.engine.known_mask = self._token
        return stale

    def learn(self, mask: torch.Tensor | None, new: int) -> None:
        """Remember the mask of the first forward, whose tokens are hidden when they are stored."""
        self._known = None if mask is None or mask.device.type != "cpu" else mask[:, :new].clone()


def check_mask_length(attention_mask: torch.Tensor, seen: int, new: int) -> None:
    """Refuse a 2-d mask that is too short: transformers would hide the newest tokens.

    Args:
        attention_mask: `[batch, tokens]`, True or 1 where a token is visible.
        seen: tokens that the cache has seen.
        new: tokens of this forward.

    Raises:
        ValueError: the mask has fewer than `seen + new` tokens.
    """
    if attention_mask.shape[1] >= seen + new:
        return
    raise ValueError(
        f"attention_mask of shape {tuple(attention_mask.shape)} is too short: the cache has seen {seen} tokens and "
        f"{new} tokens are new, so the mask needs {seen + new} columns, from the first token of the sequence on. "
        f"{MEND}"
    )


def check_padding(attention_mask: torch.Tensor, padding: np.ndarray) -> None:
    """Refuse a mask that shows left padding, which is not stored.

    Args:
        attention_mask: `[batch, tokens]`, True or 1 where a token is visible.
        padding: `[batch]`, tokens of left padding of each row.

    Raises:
        ValueError: the mask shows such a token.
    """
    longest = int(padding.max(initial=0))
    if not longest:
        return
    is_padding = torch.arange(longest) < torch.from_numpy(padding)[:, None]
    if bool((attention_mask[:, :longest].bool().cpu() & is_padding).any()):
        raise ValueError(
            f"attention_mask shows tokens that an earlier mask hid as left padding (up to {longest} in a row). A paged "
            "cache does not store padding. Hide these tokens again, or call cache.reset() and pass the whole sequence."
        )

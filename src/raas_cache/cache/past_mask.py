"""What an attention mask says of tokens that are held already, brought into the layers' pages.

A 2-d mask speaks of every token of the sequence: the past and the new ones. transformers cuts it down to the tokens
that the cache says it returns, the new ones here. So the offset that the cache hands out for its masks carries the
cache, and the registered mask functions give the whole mask to it (see `attention.masks.mask_dispatcher`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import torch

import raas_kernels

from .model_probe import MEND


if TYPE_CHECKING:
    from .paged_layer import PagedLayer

AnyOffset = TypeVar("AnyOffset", int, torch.Tensor)


class TakesMasks(Protocol):
    """A cache that brings a mask to the tokens that it holds; see `PagedCache.apply_mask`."""

    def apply_mask(self, mask: torch.Tensor | None, seen: int, new: int) -> None: ...


class MaskOffset(int):
    """Tokens seen, as the offset of a mask; it knows the cache that holds them."""

    paged_cache: TakesMasks


def tagged(offset: AnyOffset, cache: TakesMasks) -> AnyOffset | MaskOffset:
    """The offset of a mask, with `cache` as attribute `paged_cache`: an int, or a 0-d tensor inside `torch.compile`."""
    if torch.compiler.is_compiling() and not torch.is_tensor(offset):
        return offset  # of a first forward that is compiled: there is no past
    tag = offset if torch.is_tensor(offset) else MaskOffset(offset)
    tag.paged_cache = cache  # type: ignore[attr-defined]  # of a tensor
    return tag


class PastMask:
    """The mask that the layers' view of the past agrees with, so that a mask that says the same costs a comparison."""

    def __init__(self) -> None:
        self._known: torch.Tensor | None = None  # [batch, tokens] bool, on the CPU
        self._token = object()  # what layers whose bias agrees with it carry as `known_mask`

    def apply(self, mask: torch.Tensor | None, seen: int | torch.Tensor, new: int, layers: list[PagedLayer]) -> None:
        """Let `layers` show and hide the tokens that they hold as `mask` says; None says nothing.

        On a CPU nothing is done if it says what it said before. On a GPU it is written in any case: to compare would
        make the host wait for the device.

        Args:
            mask: `[rows, tokens]` bool, False where a token is hidden; of the rows that the forward touches.
            seen: tokens before this forward.
            new: tokens of this forward.
            layers: the paged layers that hold tokens.

        Raises:
            ValueError: the mask has fewer tokens than the sequence.
        """
        table, rows = layers[0].table, layers[0].engine.rows
        batch = table.batch_size if rows is None else len(rows.on_host)
        if mask is None or mask.shape[0] not in (1, batch):  # `update` refuses another batch
            return
        if isinstance(seen, int):
            check_mask_length(mask, seen, new)
            if new > 1 or mask.device.type == "cpu":
                padding = table.counts.padding
                check_padding(mask, padding if rows is None else padding[rows.on_host])
            if mask.device.type == "cpu":
                layers = self._stale(mask, seen, new, layers)
        if rows is not None and seen == 0:  # nothing is held of these rows
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
        """The layers whose view of the past is not that of `mask`; from now on `mask` is what is known."""
        known, self._known = self._known, mask[:, : seen + new].clone()
        if known is None or known.shape[1] < seen or not torch.equal(known[:, :seen], mask[:, :seen]):
            self._token = object()
        stale = [layer for layer in layers if layer.engine.known_mask is not self._token]
        for layer in stale:
            layer.engine.known_mask = self._token
        return stale

    def learn(self, mask: torch.Tensor | None, new: int) -> None:
        """Take note of the mask of the first forward, whose tokens go into the store as it says."""
        self._known = None if mask is None or mask.device.type != "cpu" else mask[:, :new].clone()


def check_mask_length(attention_mask: torch.Tensor, seen: int, new: int) -> None:
    """Refuse a 2-d mask that does not reach to the last new token: transformers would hide the newest tokens.

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
    """Refuse a mask that shows left padding, which is not held.

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

"""Read attention masks: which new tokens they hide, and which tokens in the cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..engine.attention_inputs import Seen
from ..engine.forward_base import Forward
from ..engine.hide import check_same_length
from ..engine.prefill import count_leading
from ..engine.traced import is_capturing


def seen_by_new_tokens(mask: torch.Tensor | None, new: int, forward: Forward) -> Seen | None:
    """Read from the mask of a forward which new tokens are visible, and which new tokens each new token sees.

    Args:
        mask: `[rows, tokens]`, or `[rows, 1, new, tokens]` bool or additive; `tokens` are the new tokens, or all tokens
            of the sequence. The part about earlier tokens is applied to the layer.
        new: number of new tokens.

    Returns:
        See `Seen`. There is no `among` in a first forward, whose attention the model computes. None if the mask hides
        nothing.

    Raises:
        ValueError: the mask has another length, or is a bias; or it hides a past token from some new tokens only.
    """
    if mask is None:
        return None
    if new == 1 and not forward.is_first:
        if mask.ndim == 2:
            return {"visible": mask[:, -1:].bool()}
        if mask.shape[-1] != 1:
            mask = _split_past(mask, new, forward)
        visible = _visible_generated(mask)
        return None if visible is None else {"visible": visible}
    # All layers of a forward get the same tensor, so the result is kept as an attribute. `_version` changes if somebody
    # writes to the tensor.
    key = (None if mask.is_inference() else mask._version), new, forward.is_first
    known = getattr(mask, "seen_by_new_tokens", None)
    if known is not None and key[0] is not None and known[0] == key:
        seen: Seen = known[1]
        return seen
    if mask.ndim == 4 and mask.shape[-1] != new:
        return _read(_split_past(mask, new, forward), new, forward.is_first)
    seen = _read(mask, new, forward.is_first)
    if not (torch.compiler.is_compiling() or is_capturing()):
        mask.seen_by_new_tokens = key, seen  # type: ignore[attr-defined]
    return seen


def _read(mask: torch.Tensor, new: int, is_first: bool) -> Seen:
    if mask.ndim == 2:
        visible = mask[:, -new:].bool()
        return {"visible": visible, "leading": count_leading(visible)}
    allowed = _allowed(mask)
    if mask.dtype != torch.bool and not bool((allowed | (mask < -1e4)).all()):
        raise ValueError(
            "attention_mask adds more than visible (0) and hidden (a large negative number) to the attention. Such a "
            "bias depends on the slot of a token, which a paged cache changes. Use a DynamicCache for this model."
        )
    # A token is visible if the last token sees it. The last token may not see all tokens (packed or branching prompts,
    # images): then a token is visible if it sees itself. A padding token does not see itself, or it sees all tokens,
    # also the last one, because some masks keep its softmax finite in this way.
    visible = allowed[:, 0, -1] | (allowed[:, 0].diagonal(dim1=1, dim2=2) & ~allowed[:, 0, :, -1])
    seen: Seen = {"visible": visible, "leading": count_leading(visible)}
    if not is_first:
        causal = visible[:, None, None] & allowed.new_ones(new, new).tril()
        if not torch.equal(allowed, causal.expand_as(allowed)):
            seen["among"] = allowed[:, 0].expand(-1, new, new)
    return seen


def _split_past(mask: torch.Tensor, new: int, forward: Forward) -> torch.Tensor:
    """Apply the part of a 4-d mask about earlier tokens to the layer. Returns the part about the new tokens."""
    seen = None if torch.compiler.is_compiling() or is_capturing() else forward.seen_before
    if seen is None or mask.shape[-1] != seen + new or mask.shape[1] != 1:
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)} covers {mask.shape[-1]} keys, but the sequence has {seen} "
            f"old and {new} new tokens: pass a 2-d mask of ones and zeros for all tokens, or no mask."
        )
    past, rest = _allowed(mask[:, 0, :, :seen]), mask[..., seen:]
    if new > 1 and not bool((past == past[:, -1:]).all(-1).logical_or(~_allowed(rest)[:, 0].any(-1)).all()):
        raise ValueError(
            "attention_mask hides a past token from some new tokens but not from all: a paged cache has one visibility "
            "bit per token. Pass a 2-d mask of ones and zeros, or pass the tokens in separate forwards."
        )
    if seen:
        check_same_length(past[:, -1], forward.layer.table, forward.layer.rows)
        forward.layer.show(past[:, -1])
    return rest


def _allowed(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype == torch.bool else mask == 0


def _visible_generated(mask: torch.Tensor) -> torch.Tensor | None:
    """`[rows, 1]` bool from the 4-d mask of one token; None if it is known to be visible in all rows."""
    # No check for a bias here, because it would make the host wait for the device. The prefill has checked for it.
    if mask.is_cuda or torch.compiler.is_compiling() or is_capturing():
        return _allowed(mask)[:, 0, -1]
    # All layers of a step get the same tensor, so the result is kept as an attribute, with the version of the tensor.
    version = None if mask.is_inference() else mask._version
    known = getattr(mask, "visible_generated", None)
    if version is None or known is None or known[0] != version:
        visible = _allowed(mask)[:, 0, -1]
        known = version, None if visible.all() else visible
        mask.visible_generated = known  # type: ignore[attr-defined]
    return known[1]


def mask_dispatcher(original: Callable[..., Any]) -> Callable[..., Any]:
    """A mask function that first passes the whole 2-d mask to a paged cache, for the tokens that the cache holds.

    `original` then makes the mask of the new tokens only, because only the cache knows which slot holds which token.
    """

    @functools.wraps(original)
    def paged_mask(*args: Any, **kwargs: Any) -> Any:
        cache = getattr(kwargs.get("kv_offset"), "paged_cache", None)
        if cache is not None:
            cache.apply_mask(kwargs.get("attention_mask"), kwargs["kv_offset"], kwargs["q_length"])
        return original(*args, **kwargs)

    paged_mask.original = original  # type: ignore[attr-defined]
    return paged_mask

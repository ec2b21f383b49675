"""The registered attention functions: the hand-off from a paged cache to its attention.

`Cache.update` never sees the query and an attention function never sees the cache. So `update` returns a key that
carries its layer as the attribute `paged_layer`, and the functions registered here read it. Keys without it go to the
original function, untouched.
"""

import functools
from collections.abc import Callable

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


DISPATCHED = ("sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")
# What changes the softmax or its inputs in a way the paged attention does not: ignored, each would give wrong text.
UNSUPPORTED = ("softcap", "s_aux", "position_bias", "sliding_window", "dropout", "output_attentions")


def dispatcher(dense: Callable) -> Callable:
    """An attention function that serves keys from a paged cache, and hands every other key to `dense`."""

    @functools.wraps(dense)
    def paged_attention_forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        layer = getattr(key, "paged_layer", None)
        if layer is None:
            return dense(module, query, key, value, attention_mask, *args, **kwargs)
        _refuse_unsupported(module, kwargs)
        visible = _visible_new_tokens(attention_mask, layer.new, check_causal=not layer.is_first_forward)
        layer.admit(visible)
        if layer.is_first_forward:
            return dense(module, query, key, value, attention_mask, *args, **kwargs)
        scaling = kwargs.get("scaling")
        output = layer.attend(query, query.shape[-1] ** -0.5 if scaling is None else float(scaling))
        return output.transpose(1, 2).contiguous(), None

    paged_attention_forward.dense = dense
    return paged_attention_forward


def _refuse_unsupported(module: torch.nn.Module, kwargs: dict) -> None:
    for name in UNSUPPORTED:
        value = kwargs.get(name)
        if value is None or (isinstance(value, (bool, int, float)) and not value):
            continue
        mends = {
            "sliding_window": "pass config=model.config to the cache: its window layers then keep their own cache",
            "dropout": "call model.eval() first: a KV cache is for inference",
            "output_attentions": "leave it out: evicted tokens have no attention weight to return",
        }
        shown = value if isinstance(value, (bool, int, float)) else type(value).__name__
        raise ValueError(
            f"{type(module).__name__} calls its attention with {name}={shown}, which the paged attention does not "
            f"compute: {mends.get(name, 'use a DynamicCache for this model')}."
        )


def _visible_new_tokens(mask: torch.Tensor | None, new: int, check_causal: bool) -> torch.Tensor | None:
    """`[batch, new]` bool, False for padding, from the mask of the new tokens (4-d bool or additive, or 2-d)."""
    if mask is None:
        return None
    if mask.ndim == 2:
        return mask[:, -new:].bool()
    if mask.shape[-1] != new:
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)} spans {mask.shape[-1]} keys where {new} tokens are new: what "
            "is visible of the past is the cache's own affair. Pass a 2-d mask of ones and zeros, or none."
        )
    allowed = mask if mask.dtype == torch.bool else mask == 0
    visible = allowed[:, 0, -1]
    causal = visible[:, None, None] & allowed.new_ones(new, new).tril()
    if check_causal and new > 1 and not torch.equal(allowed, causal.expand_as(allowed)):
        raise ValueError(
            "attention_mask is not causal among the new tokens: after the first forward the paged attention is causal. "
            "Pass a 2-d mask of ones and zeros, or put such tokens into the first forward."
        )
    return visible


def register() -> None:
    """Make the default attention implementations serve paged caches; done once on import, harmless to repeat.

    Registers `"raas"`, and wraps `"sdpa"` and the flash entries in a dispatcher that looks for a paged cache's key
    and otherwise calls the original. All through transformers' public registries.
    """
    interface = AttentionInterface()
    AttentionInterface.register("raas", dispatcher(sdpa_attention_forward))
    AttentionMaskInterface.register("raas", sdpa_mask)
    for name in DISPATCHED:
        if name in interface and not hasattr(interface[name], "dense"):
            AttentionInterface.register(name, dispatcher(interface[name]))


def unregister() -> None:
    """Put the original functions back; `attn_implementation="raas"` stays available."""
    interface = AttentionInterface()
    for name in DISPATCHED:
        if name in interface and hasattr(interface[name], "dense"):
            AttentionInterface.register(name, interface[name].dense)

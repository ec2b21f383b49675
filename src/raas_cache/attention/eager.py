"""Attention without a paged cache: the model's own eager function, and `attn_implementation="raas"`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward


AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
_EAGER: dict[type[torch.nn.Module], AttentionFunction] = {}


def _find_eager(attention: type[torch.nn.Module]) -> AttentionFunction:
    """The eager function of the model's file, which the class passes to `AttentionInterface.get_interface`.

    transformers 5.17 to 5.24 has no registry entry for eager, so the function is found by its name in the code.
    """
    for cls in attention.__mro__:
        for method in vars(cls).values():
            function = inspect.unwrap(method) if callable(method) else None
            if not inspect.isfunction(function):
                continue
            for name in function.__code__.co_names:
                if name.endswith("eager_attention_forward"):
                    eager: AttentionFunction = function.__globals__[name]
                    return eager
    raise RuntimeError(
        "attn_implementation='eager' needs a function eager_attention_forward in the model's file, and "
        f"{attention.__module__}.{attention.__qualname__} has none: call raas_cache.unregister() to use this model "
        "without a paged cache."
    )


def eager_attention_forward(
    module: torch.nn.Module, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The function that `attn_implementation="eager"` runs by default: the one of the model's file."""
    attention = type(module)
    if attention not in _EAGER:
        _EAGER[attention] = _find_eager(attention)
    return _EAGER[attention](module, *args, **kwargs)


def raas_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """sdpa, or the model's own eager function if the softmax has a softcap or sinks, which sdpa does not support."""
    if kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)
    new, held = query.shape[2], key.shape[2]
    if attention_mask is None:  # sdpa's mask function returns no mask if it is only causal
        attention_mask = torch.ones(new, held, dtype=torch.bool, device=query.device).tril(held - new)[None, None]
    if attention_mask.dtype == torch.bool:
        hidden = torch.finfo(query.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill_(~attention_mask, hidden)
    return eager_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)

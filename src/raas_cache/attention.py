"""The registered attention functions: the hand-off from a paged cache to its attention.

`Cache.update` never sees the query and an attention function never sees the cache. So `update` returns a key and a
value that carry their layer as the attribute `paged_layer`, and the functions registered here read it. Keys without it
go to the original function, untouched.
"""

import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .layer import PagedLayer


DISPATCHED = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")
# What changes the softmax or its inputs in a way the paged attention does not: ignored, each would give wrong text.
UNSUPPORTED = ("position_bias", "sliding_window", "dropout", "output_attentions")
AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class _Expected(threading.local):
    """The layer that updated last in this thread, until its attention is called: a latent cannot carry it (MLA)."""

    reference: weakref.ref[PagedLayer] | None = None

    def get(self) -> PagedLayer | None:
        return None if self.reference is None else self.reference()


_expected = _Expected()


def expect(layer: PagedLayer) -> None:
    """Tell the attention function which layer the next call is for, should the key lose its tag on the way."""
    if layer.is_latent or layer.is_first_forward:
        _expected.reference = weakref.ref(layer)


def _latent_layer(module: torch.nn.Module) -> PagedLayer | None:
    """The paged layer behind an untagged key, if the module expands a cached latent (MLA: DeepSeek-V2 and its kin)."""
    # Only MLA's own expansion is known to map each token by itself; any other change of the key stays refused.
    layer = _expected.get() if hasattr(module, "expand_kv") else None
    if layer is None or not layer.awaits_attention:
        return None
    if not layer.is_latent:
        layer.expect_latent()
    return layer


def dispatcher(dense: AttentionFunction) -> AttentionFunction:
    """An attention function that serves keys from a paged cache, and hands every other key to `dense`."""
    # transformers' sdpa leaves these out where a model gives them, so that is what equals it.
    extras = () if dense is sdpa_attention_forward else ("softcap", "s_aux")

    @functools.wraps(dense)
    def paged_attention_forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        layer: PagedLayer | None = getattr(key, "paged_layer", None)
        if layer is None:
            layer = _latent_layer(module)
        elif getattr(value, "paged_layer", None) is not layer:
            raise ValueError(
                f"{type(module).__name__} changes its values between cache and attention, and the cache would not know "
                "how: use a DynamicCache for this model."
            )
        if layer is None:
            return dense(module, query, key, value, attention_mask, *args, **kwargs)
        if layer.on_module is not None:
            settled = layer.on_module(module, key, value)
            layer.on_module = None
            if settled is not layer:  # a window or the like, which has taken the tokens over
                layer.awaits_attention = False
                # Other layers may share this key.
                key.paged_layer = value.paged_layer = None  # type: ignore[attr-defined]
                return dense(module, query, key, value, attention_mask, *args, **kwargs)
        _refuse_unsupported(module, kwargs, is_input=layer.new > 1 or layer.is_first_forward)
        if layer.awaits_attention:  # not where a layer that shares the KV of another reads it once more
            _require_self_attention(module, query, key, layer)
            layer.admit(_visible_new_tokens(attention_mask, query.shape[2], is_first=layer.is_first_forward))
        scaling = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        softcap, sinks = (kwargs.get(name) if name in extras else None for name in ("softcap", "s_aux"))
        if layer.is_first_forward:
            _expected.reference = None
            attended = dense(module, query, key, value, attention_mask, *args, **kwargs)
            layer.attend_first(query, (key, value), scale=scale, softcap=softcap, sinks=sinks)
            return attended
        output = layer.attend(query, scale, softcap, sinks, expanded=(key, value) if layer.is_latent else None)
        return output.transpose(1, 2).contiguous(), None

    paged_attention_forward.dense = dense  # type: ignore[attr-defined]
    return paged_attention_forward


def _refuse_unsupported(module: torch.nn.Module, kwargs: dict[str, Any], is_input: bool) -> None:
    if is_input:  # a config is slow to ask, and the same at every decode step
        kwargs = {"output_attentions": getattr(getattr(module, "config", None), "output_attentions", False), **kwargs}
    for name in UNSUPPORTED:
        value = kwargs.get(name)
        if value is None or (isinstance(value, (bool, int, float)) and not value):
            continue
        mends = {
            "sliding_window": "pass config=model.config to the cache, or use a DynamicCache if it names no window here",
            "dropout": "call model.eval() first: a KV cache is for inference",
            "output_attentions": "leave it out: evicted tokens have no attention weight to return",
        }
        shown = value if isinstance(value, (bool, int, float)) else type(value).__name__
        raise ValueError(
            f"{type(module).__name__} calls its attention with {name}={shown}, which the paged attention does not "
            f"compute: {mends.get(name, 'use a DynamicCache for this model')}."
        )


def _require_self_attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, layer: PagedLayer) -> None:
    if query.shape[2] != key.shape[2] and not layer.is_latent:
        raise ValueError(
            f"{type(module).__name__} reads {key.shape[2]} new keys with {query.shape[2]} new queries: a paged cache "
            "serves self-attention, not attention to an image or an encoder. Use a DynamicCache for this model."
        )


def _visible_new_tokens(mask: torch.Tensor | None, new: int, is_first: bool) -> torch.Tensor | None:
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
    if new == 1 and not is_first:
        return _visible_generated(mask)
    allowed = _allowed(mask)
    if mask.dtype != torch.bool and not bool((allowed | (mask < -1e4)).all()):
        raise ValueError(
            "attention_mask adds more than visible (0) and hidden (a large negative number) to the attention: such a "
            "bias goes by where a token stands, which a paged cache changes. Use a DynamicCache for this model."
        )
    visible = allowed[:, 0, -1]
    if is_first:
        # The last token need not see all others (packed or branching prompts). A padding token does not see itself, or
        # sees everything, the last token too, which some masks do to keep its softmax finite.
        visible = visible | (allowed[:, 0].diagonal(dim1=1, dim2=2) & ~allowed[:, 0, :, -1])
    causal = visible[:, None, None] & allowed.new_ones(new, new).tril()
    if not is_first and not torch.equal(allowed, causal.expand_as(allowed)):
        raise ValueError(
            "attention_mask is not causal among the new tokens: after the first forward the paged attention is causal. "
            "Pass a 2-d mask of ones and zeros, or put such tokens into the first forward."
        )
    return visible


def _allowed(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype == torch.bool else mask == 0


def _visible_generated(mask: torch.Tensor) -> torch.Tensor | None:
    """`[batch, 1]` bool from the 4-d mask of one token, None where it is known that nothing is padding."""
    # What the mask adds is not checked: that would make the host wait for the device. A bias shows at prefill already.
    if mask.is_cuda or torch.compiler.is_compiling():
        return _allowed(mask)[:, 0, -1]
    # All layers of a step get the one mask: only the first looks. A mask written to since is another.
    version = None if mask.is_inference() else mask._version
    known = getattr(mask, "visible_generated", None)
    if version is None or known is None or known[0] != version:
        visible = _allowed(mask)[:, 0, -1]
        known = version, None if visible.all() else visible
        mask.visible_generated = known  # type: ignore[attr-defined]
    return known[1]


_EAGER: dict[type[torch.nn.Module], AttentionFunction] = {}


def _find_eager(attention: type[torch.nn.Module]) -> AttentionFunction:
    """The modeling file's own eager function, as the class hands it to `AttentionInterface.get_interface`."""
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
        f"raas_cache serves attn_implementation='eager' by the model's own eager_attention_forward, and finds none in "
        f"{attention.__module__}.{attention.__qualname__}: call raas_cache.unregister() to use this model without it."
    )


def eager_attention_forward(
    module: torch.nn.Module, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `attn_implementation="eager"` runs where nothing is registered under that name."""
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
    """sdpa; the model's own eager function where the softmax has a cap or sinks, which sdpa has not."""
    if kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)
    new, held = query.shape[2], key.shape[2]
    if attention_mask is None:  # sdpa's mask function leaves out a mask that is only causal
        attention_mask = torch.ones(new, held, dtype=torch.bool, device=query.device).tril(held - new)[None, None]
    if attention_mask.dtype == torch.bool:
        hidden = torch.finfo(query.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill_(~attention_mask, hidden)
    return eager_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)


def register() -> None:
    """Register `"raas"` and wrap the default attention functions, see `raas_cache.register`; harmless to repeat."""
    interface = AttentionInterface()
    AttentionInterface.register("raas", dispatcher(raas_attention_forward))
    AttentionMaskInterface.register("raas", sdpa_mask)
    for name in DISPATCHED:
        dense = interface.get(name, eager_attention_forward if name == "eager" else None)
        if dense is not None and not hasattr(dense, "dense"):
            AttentionInterface.register(name, dispatcher(dense))


def unregister() -> None:
    """Put the original functions back; `attn_implementation="raas"` stays available."""
    interface = AttentionInterface()
    for name in DISPATCHED:
        dense = getattr(interface.get(name), "dense", None)
        if dense is eager_attention_forward:
            # The registry has no public way to take an entry out, and by default has none for eager.
            del AttentionInterface._global_mapping[name]
        elif dense is not None:
            AttentionInterface.register(name, dense)

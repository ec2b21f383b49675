"""The attention functions that are registered with transformers: they connect a query with the pages of its layer.

`Cache.update` never receives the query, and an attention function never receives the cache. `update` therefore returns
a key and a value with their forward as attribute `paged_forward`, and the functions here call its `attend`. A key
without this attribute goes to the original function unchanged.
"""

import functools
import threading
import weakref
from contextlib import nullcontext
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..engine.attention_inputs import Softmax
from ..engine.forward_base import Forward
from .eager import AttentionFunction, eager_attention_forward, raas_attention_forward
from .masks import mask_dispatcher, seen_by_new_tokens


DISPATCHED = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")
OWN_CACHE_FOR_ENCODER = "EncoderDecoderCache(RaaSCache(...), DynamicCache())"
# Arguments that change the softmax in a way that the paged attention does not support. If it ignored them, the text
# would be wrong.
UNSUPPORTED = ("position_bias", "sliding_window", "dropout", "output_attentions")


class _Expected(threading.local):
    """The newest forward of this thread whose attention call may get a key without the attribute (MLA)."""

    reference: weakref.ref[Forward] | None = None

    def get(self) -> Forward | None:
        return None if self.reference is None else self.reference()


_expected = _Expected()


def expect(forward: Forward) -> None:
    """Remember the forward of the next attention call, in case its key has lost the attribute `paged_forward`."""
    _expected.reference = weakref.ref(forward)


def _latent_forward(module: torch.nn.Module) -> Forward | None:
    """The forward of a key without attribute, if the module expands a cached latent (MLA: DeepSeek-V2 and others).

    `expand_kv` is a method of the MLA attention modules of transformers 5.17 to 5.24.
    """
    # The expansion of MLA maps each token by itself. Any other module that changes its keys is refused.
    forward = _expected.get() if hasattr(module, "expand_kv") else None
    if forward is None or not forward.awaits_attention:
        return None
    if not forward.layer.is_latent:
        forward.layer.expect_latent()
    return forward


def dispatcher(dense: AttentionFunction) -> AttentionFunction:
    """An attention function that serves keys of a paged cache, and passes every other key to `dense`."""
    # sdpa of transformers 5.17 to 5.24 ignores the softcap and sinks of a model. To equal it, ignore them here, too.
    has_extras = dense is not sdpa_attention_forward

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
        forward: Forward = getattr(key, "paged_forward", None) or _latent_forward(module)  # type: ignore[assignment]
        if forward is None:
            return dense(module, query, key, value, attention_mask, *args, **kwargs)
        try:
            if not forward.layer.is_latent and getattr(value, "paged_forward", None) is not forward:
                raise ValueError(
                    f"{type(module).__name__} changes its values between cache and attention, which a paged cache "
                    "cannot do: use a DynamicCache for this model."
                )
            layer = forward.layer
            if layer.on_module is not None:
                stays, layer.on_module = layer.on_module(module, key, value), None
                if not stays:  # a layer of transformers, such as a window, took the tokens
                    forward.awaits_attention, layer.pending = False, None
                    # Other layers may share this key.
                    key.paged_forward = value.paged_forward = None  # type: ignore[attr-defined]
                    return dense(module, query, key, value, attention_mask, *args, **kwargs)
            # 1. Refuse arguments that would give wrong text.
            _refuse_unsupported(module, kwargs, is_prefill=forward.new > 1 or forward.is_first)
            seen = None
            if forward.awaits_attention:  # otherwise a layer that shares the KV of another layer reads it again
                if query.shape[2] != key.shape[2] and not layer.is_latent:
                    raise ValueError(_not_self_attention(module, query, key))
                # 2. Read the mask of the new tokens.
                if attention_mask is not None:
                    seen = seen_by_new_tokens(attention_mask, query.shape[2], forward)
            scaling = kwargs.get("scaling")
            softmax: Softmax = {
                "scale": query.shape[-1] ** -0.5 if scaling is None else float(scaling),
                "softcap": kwargs.get("softcap") if has_extras else None,
                "sinks": kwargs.get("s_aux") if has_extras else None,
            }
            expanded = (key, value) if layer.is_latent else None
            # 3. A first forward attends to its own tokens only: the model's own attention computes the output.
            attended = None
            if forward.is_first:
                _expected.reference = None
                attended = dense(module, query, key, value, attention_mask, *args, **kwargs)
            # 4. Store the tokens, attend, and rank the pages, in the model's dtypes and without gradients.
            has_gradients, device = torch.is_grad_enabled(), query.device.type
            has_autocast = not query.is_meta and torch.is_autocast_enabled(device)  # torch has no autocast for meta
            if has_gradients or has_autocast:
                with torch.no_grad(), torch.autocast(device, enabled=False) if has_autocast else nullcontext():
                    output = forward.attend(query, softmax, seen, expanded)
            else:
                output = forward.attend(query, softmax, seen, expanded)
            if attended is not None:
                return attended
            assert output is not None
            if has_gradients and not torch.compiler.is_compiling():
                output = _NoGradient.apply(output, query, key, value)  # type: ignore[no-untyped-call]
            return output.transpose(1, 2).contiguous(), None
        except BaseException:
            forward.stop()
            raise

    paged_attention_forward.dense = dense  # type: ignore[attr-defined]
    return paged_attention_forward


class _NoGradient(torch.autograd.Function):
    """Identity that raises an error in the backward pass, because the keys in the cache have no gradient."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise RuntimeError(
            "A paged cache stores keys and values without gradients, so this step has no gradient. Generate under "
            "torch.no_grad(). To train, call the model with use_cache=False on the whole sequence."
        )


def _refuse_unsupported(module: torch.nn.Module, kwargs: dict[str, Any], is_prefill: bool) -> None:
    if is_prefill:  # the look-up is slow, and the result does not change between decode steps
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


def _not_self_attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor) -> str:
    return (
        f"{type(module).__name__} reads {key.shape[2]} new keys with {query.shape[2]} new queries: a paged cache "
        "serves self-attention, not attention to an image or an encoder. If the model has an encoder, pass "
        f"past_key_values={OWN_CACHE_FOR_ENCODER}; otherwise use a DynamicCache for this model."
    )


def register() -> None:
    """Register `"raas"` and wrap the default attention and mask functions, see `raas_cache.register`."""
    interface = AttentionInterface()
    AttentionInterface.register("raas", dispatcher(raas_attention_forward))
    masks = AttentionMaskInterface()
    AttentionMaskInterface.register("raas", mask_dispatcher(sdpa_mask))
    for name in DISPATCHED:
        mask = masks.get(name)
        if mask is not None and not hasattr(mask, "original"):
            AttentionMaskInterface.register(name, mask_dispatcher(mask))
        dense = interface.get(name, eager_attention_forward if name == "eager" else None)
        if dense is not None and not hasattr(dense, "dense"):
            AttentionInterface.register(name, dispatcher(dense))


def unregister() -> None:
    """Put the original functions back; `attn_implementation="raas"` stays available."""
    interface, masks = AttentionInterface(), AttentionMaskInterface()
    for name in DISPATCHED:
        mask = getattr(masks.get(name), "original", None)
        if mask is not None:
            AttentionMaskInterface.register(name, mask)
        dense = getattr(interface.get(name), "dense", None)
        if dense is eager_attention_forward:
            # transformers 5.17 to 5.24 has no entry for eager by default, and no public way to remove an entry.
            del AttentionInterface._global_mapping[name]
        elif dense is not None:
            AttentionInterface.register(name, dense)

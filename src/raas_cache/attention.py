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
from .model_code import OWN_CACHE_FOR_ENCODER


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
        is_new, layer.awaits_attention = layer.awaits_attention, False
        _refuse_unsupported(module, kwargs, is_input=layer.new > 1 or layer.is_first_forward)
        visible = among = None
        if is_new:  # not where a layer that shares the KV of another reads it once more
            _require_self_attention(module, query, key, layer)
            visible, among = _seen_by_new_tokens(attention_mask, query.shape[2], layer)
        scaling = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        softcap, sinks = (kwargs.get(name) if name in extras else None for name in ("softcap", "s_aux"))
        attended = None
        if layer.is_first_forward:
            _expected.reference = None
            attended = dense(module, query, key, value, attention_mask, *args, **kwargs)

        def read_pages() -> torch.Tensor | None:
            if is_new:
                layer.admit(visible, among)
            if attended is None:
                return layer.attend(query, scale, softcap, sinks, expanded=(key, value) if layer.is_latent else None)
            layer.attend_first(query, (key, value), scale=scale, softcap=softcap, sinks=sinks)
            return None

        # The pages hold what the model gave them, in its dtypes, and no gradients.
        has_gradients, device = torch.is_grad_enabled(), query.device.type
        read = torch.no_grad()(read_pages) if has_gradients else read_pages
        if not query.is_meta and torch.is_autocast_enabled(device):  # of the meta device torch cannot tell
            with torch.autocast(device, enabled=False):
                output = read()
        else:
            output = read()
        if attended is not None:
            return attended
        assert output is not None
        if has_gradients and not torch.compiler.is_compiling():
            output = _NoGradient.apply(output, query, key, value)  # type: ignore[no-untyped-call]
        return output.transpose(1, 2).contiguous(), None

    paged_attention_forward.dense = dense  # type: ignore[attr-defined]
    return paged_attention_forward


class _NoGradient(torch.autograd.Function):
    """Passes the attention of a step on, and refuses to be differentiated: the keys in the cache have no graph."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise RuntimeError(
            "A paged cache holds keys and values without their gradients, so this step has none. Generate under "
            "torch.no_grad(); to train, call the model with use_cache=False on the whole sequence."
        )


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
            "serves self-attention, not attention to an image or an encoder. If the model has an encoder, pass "
            f"past_key_values={OWN_CACHE_FOR_ENCODER}; otherwise use a DynamicCache for this model."
        )


def _seen_by_new_tokens(
    mask: torch.Tensor | None, new: int, layer: PagedLayer
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Which new tokens are visible, and which of them each one sees, from the mask of a forward.

    Args:
        mask: 2-d, or 4-d and bool or additive. If it spans the past as well, that part is applied to `layer`.

    Returns:
        `[batch, new]` bool, False for a hidden token; `[batch, new, new]` bool, None where it is causal, or where the
        model attends by itself.
    """
    if mask is None:
        return None, None
    is_first = layer.is_first_forward
    if mask.ndim == 2:
        return mask[:, -new:].bool(), None
    if mask.shape[-1] != new:
        mask = _split_past(mask, new, layer)
    if new == 1 and not is_first:
        return _visible_generated(mask), None
    allowed = _allowed(mask)
    if mask.dtype != torch.bool and not bool((allowed | (mask < -1e4)).all()):
        raise ValueError(
            "attention_mask adds more than visible (0) and hidden (a large negative number) to the attention: such a "
            "bias goes by where a token stands, which a paged cache changes. Use a DynamicCache for this model."
        )
    # The last token need not see all others (packed or branching prompts, images). A padding token does not see itself,
    # or sees everything, the last token too, which some masks do to keep its softmax finite.
    visible = allowed[:, 0, -1] | (allowed[:, 0].diagonal(dim1=1, dim2=2) & ~allowed[:, 0, :, -1])
    if is_first:
        return visible, None
    causal = visible[:, None, None] & allowed.new_ones(new, new).tril()
    return visible, None if torch.equal(allowed, causal.expand_as(allowed)) else allowed[:, 0].expand(-1, new, new)


def _split_past(mask: torch.Tensor, new: int, layer: PagedLayer) -> torch.Tensor:
    """The part of a 4-d mask that is about the new tokens; what it says of the past goes to `layer`."""
    seen = None if torch.compiler.is_compiling() else layer.seen_before
    if seen is None or mask.shape[-1] != seen + new or mask.shape[1] != 1:
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)} spans {mask.shape[-1]} keys, and the sequence has {seen} and "
            f"{new} new tokens: pass a 2-d mask of ones and zeros for all of them, or none."
        )
    past, rest = _allowed(mask[:, 0, :, :seen]), mask[..., seen:]
    if new > 1 and not bool((past == past[:, -1:]).all(-1).logical_or(~_allowed(rest)[:, 0].any(-1)).all()):
        raise ValueError(
            "attention_mask hides some of the past from one new token and not from another: a paged cache shows all of "
            "them the same. Pass a 2-d mask of ones and zeros, or give the tokens one forward each."
        )
    if seen:
        layer.show(past[:, -1].expand(layer.batch_size, -1))
    return rest


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


def mask_dispatcher(original: Callable[..., Any]) -> Callable[..., Any]:
    """A mask function that first tells a paged cache what the whole 2-d mask says of the tokens that it holds.

    `original` makes the mask of the new tokens: of the past, only the cache knows which slots hold which tokens.
    """

    @functools.wraps(original)
    def paged_mask(*args: Any, **kwargs: Any) -> Any:
        cache = getattr(kwargs.get("kv_offset"), "paged_cache", None)
        if cache is not None:
            cache.apply_mask(kwargs.get("attention_mask"), kwargs["kv_offset"], kwargs["q_length"])
        return original(*args, **kwargs)

    paged_mask.original = original  # type: ignore[attr-defined]
    return paged_mask


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
            # The registry has no public way to take an entry out, and by default has none for eager.
            del AttentionInterface._global_mapping[name]
        elif dense is not None:
            AttentionInterface.register(name, dense)

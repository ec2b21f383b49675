"""All code of a cache that looks into a model or into a stack frame.

transformers (5.17 to 5.24) passes neither the model nor the calling method to a cache, but some decisions of the cache
depend on them. Each function says what it needs. It can be removed when the oldest supported release of transformers
passes this to the cache.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterable, Sequence
from types import CodeType, FrameType
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache

from ..attention.dispatch import OWN_CACHE_FOR_ENCODER
from ..engine.forward_base import INTERRUPTED
from ..engine.rotation import Rotation
from ..engine.traced import is_capturing


AnyModule = TypeVar("AnyModule", bound=torch.nn.Module)
# Devices on which `generate` compiles its decode step by itself, as GenerationMixin._valid_auto_compile_criteria of
# transformers 5.17 to 5.24 says.
COMPILED_DEVICES = ("cuda", "xpu", "neuron", "tpu")
MODULE_CALLS = (torch.nn.Module._call_impl.__code__, torch.nn.Module._wrapped_call_impl.__code__)
LIMIT = "original_max_position_embeddings"
MEND = (
    "If this is the next turn of a conversation, its text differs from the text that the cache has seen (for example "
    "because a chat template drops earlier thinking): call raas_cache.rewind(cache, held_ids, new_ids) first, or "
    "cache.reset()."
)


def _frames() -> list[FrameType]:
    """The frames of the module call that uses the cache, and those of transformers around it; the innermost first.

    Only `f_locals` of these frames is read. Before Python 3.13, `f_locals` is a copy that the frame keeps until its
    function returns. In a function of the user, this copy would keep a cache alive after `del cache`. In a function of
    this module it would contain the frame itself: a reference cycle.
    """
    frames, outermost = [], 0
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_globals is not globals():
            frames.append(frame)
            if frame.f_code in MODULE_CALLS:
                outermost = len(frames)
        frame = frame.f_back
    return frames[:outermost] + [frame for frame in frames[outermost:] if _is_of_transformers(frame)]


def _is_of_transformers(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).split(".")[0] == "transformers"


def calling_module(kind: type[AnyModule]) -> AnyModule | None:
    """The innermost module of class `kind` on the stack: the module that calls the cache; None if there is none.

    Needed because `Cache.update` and `Cache.get_mask_sizes` do not receive the module (transformers 5.17 to 5.24).
    """
    for frame in _frames():
        caller = frame.f_locals.get("self")
        if isinstance(caller, kind) and isinstance(getattr(caller, "config", None), PreTrainedConfig):
            return caller
    return None


def rotation_of_caller(layer_idx: int, head_dim: int, device: torch.device) -> Rotation:
    """The rotary embedding of layer `layer_idx` of the model that calls the cache.

    A cache receives keys that are rotated already, and neither the model nor its rotary embedding (transformers 5.17 to
    5.24). This asks the model to rotate the unit vectors by one position.

    Raises:
        ValueError: the model has no rotary embedding, or its form is not known.
    """
    model = calling_module(PreTrainedModel)
    rotary = getattr(model, "rotary_emb", None)
    rotate = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
    if model is None or rotary is None or rotate is None:
        raise ValueError(_about_rotation(model, "has no rotary embedding that the cache can find"))
    unit = torch.eye(head_dim, dtype=torch.float64, device=device)[None, None]  # [1, 1, tokens, head_dim]
    position = torch.ones(1, head_dim, dtype=torch.long, device=device)
    types = getattr(model.config, "layer_types", None)
    has_types = "layer_type" in inspect.signature(type(rotary).forward).parameters
    arguments = (types[layer_idx],) if types is not None and has_types else ()
    try:
        with torch.no_grad():
            images = rotate(unit, unit, *rotary(unit, position, *arguments))[0]
        return Rotation.from_matrix(images[0, 0].mT)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(_about_rotation(model, "has a rotary embedding of an unknown form")) from error


def _about_rotation(model: PreTrainedModel | None, what: str) -> str:
    return (
        f"{'the caller' if model is None else type(model).__name__} {what}, and triattention computes scores from the "
        "rotation of keys: use another method, such as RaaSCache."
    )


def is_asked_by_generate() -> bool:
    """Whether the caller is `generate`, when it decides whether to compile (transformers 5.17 to 5.24)."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(4):  # there may be properties of the cache between, or of an EncoderDecoderCache around it
        if frame is not None and frame.f_code.co_name == "_valid_auto_compile_criteria":
            return True
        frame = frame.f_back if frame is not None else None
    return False


def refuse_unread(cache: Cache, is_repeated: bool) -> None:
    """Refuse to continue after a layer whose attention function did not read its pages.

    Args:
        is_repeated: whether a new forward of the model has begun since. Usually the next layer of the same forward
            notices the fault; then the last forward was interrupted, unless the model has only one layer.

    Raises:
        RuntimeError: always. The message names the model's attention, or says that the forward was interrupted.
    """
    config = getattr(calling_module(torch.nn.Module), "config", None)
    is_only_layer = getattr(config, "num_hidden_layers", None) == 1 and not cache.get_seq_length()
    if is_repeated and not is_only_layer:
        raise RuntimeError(INTERRUPTED)
    implementation = "in use" if config is None else repr(config._attn_implementation)
    raise RuntimeError(
        f"The attention implementation {implementation} did not read the paged cache, so its output "
        'would be wrong. Call model.set_attn_implementation("raas") (or "sdpa") and generate again with a new '
        "cache. A model whose attention bypasses transformers' attention interface, or that changes its keys "
        "between cache and attention, needs a DynamicCache."
    )


def generate_compiles(device: torch.device) -> bool | None:
    """Whether `generate` compiles its decode step on `device`; None if the caller is not `generate`.

    Reads `disable_compile` and `compile_config` of the generation config on the stack (transformers 5.17 to 5.24).
    """
    for frame in _frames():
        settings = frame.f_locals.get("generation_config")
        if isinstance(settings, GenerationConfig):
            if settings.disable_compile:
                return False
            compile_config = settings.compile_config
            is_forced = compile_config is not None and bool(compile_config._compile_all_devices)
            return device.type in COMPILED_DEVICES or is_forced
    return None


def can_compile(model: PreTrainedModel, implementations: Sequence[str]) -> bool:
    """Whether transformers can compile a decode step of `model` whose attention serves paged caches.

    `_can_compile_fullgraph` is private, and the only place that says so (transformers 5.17 to 5.24).

    Args:
        implementations: names of attention implementations that serve paged caches, beside `"raas"`.
    """
    return bool(model._can_compile_fullgraph) and model.config._attn_implementation in (*implementations, "raas")


def check_generate_step(cache: Cache) -> None:
    """Refuse a step of `generate` that would read old tokens again, or that shows that the model ignored the cache.

    Reads the arguments of `prepare_inputs_for_generation` on the stack. This public method is the only place where
    `generate` says which tokens are new (transformers 5.17 to 5.24). If the caller is another method, nothing happens.

    Raises:
        ValueError: `generate` runs with `use_cache=False`; its text has no more tokens than the cache has seen; or the
            model has run without storing anything in the cache.
    """
    step = _asking_step()
    if step is None:
        return
    if step["kwargs"].get("use_cache") is False:
        raise ValueError(
            "use_cache=False was given together with a cache: every step would store the whole text again. Remove "
            "use_cache=False, also from the generation config, or do not pass a cache."
        )
    new = step.get("next_sequence_length")
    if new is None:
        return
    if new < 1:
        seen = cache.get_seq_length()
        raise ValueError(
            f"input_ids has {seen + new} tokens, and the cache has seen {seen}: there is no new token to read, "
            f"so transformers would read old tokens again. {MEND}"
        )
    if new == 1 and not step.get("is_first_iteration", True) and not _holds_anything(cache.layers):
        raise ValueError(
            f"{type(step['self']).__name__} has read its prompt without storing anything in the cache: this model "
            "has no keys and values, or stores them elsewhere. Do not pass a cache."
        )


def _asking_step() -> dict[str, Any] | None:
    """The arguments of `prepare_inputs_for_generation`, if it reads a property of the cache; otherwise None."""
    frame = inspect.currentframe()
    for _ in range(5):
        frame = frame.f_back if frame is not None else None
        if frame is not None and frame.f_code.co_name == "prepare_inputs_for_generation":
            arguments = frame.f_locals
            return arguments if {"self", "kwargs"} <= set(arguments) else None
    return None


def _holds_anything(layers: Iterable[object]) -> bool:
    """Whether a layer has received tokens. A layer without `is_initialized` (linear attention) counts as filled."""
    return any(getattr(layer, "is_initialized", True) for layer in layers)


def check_checkpointing() -> None:
    """Refuse a model that trains with gradient checkpointing: transformers 5.17 to 5.24 then ignores the cache.

    Raises:
        ValueError: the model that calls the cache is such a model, and gradients are enabled.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    model = calling_module(PreTrainedModel)
    if model is None or not model.training:
        return
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is in training mode with gradient checkpointing, and transformers then ignores "
            "the cache: call model.eval() first, or run the model under torch.no_grad()."
        )


def length_to_tell(seen: int, caller: FrameType) -> int:
    """The result of `get_seq_length`: the tokens seen, or a larger number for a model that would drop the cache.

    Phi-3, PhiMoE and Phi-4-multimodal (transformers 5.17 to 5.24) drop the cache in `prepare_inputs_for_generation` if
    the text has more than `config.original_max_position_embeddings` tokens and the cache has seen at most this number,
    because RoPE may change at this length. The rest of the generation would use a `DynamicCache`. If the cache is empty
    or RoPE does not change, dropping is not necessary. The model then gets its limit plus one, and only compares it.

    Args:
        seen: number of tokens that the cache has seen.
        caller: the frame that calls `get_seq_length`.

    Raises:
        ValueError: RoPE changes, so the keys in the cache are wrong, and the model would drop the cache.
    """
    if not _drops_cache(caller.f_code):
        return seen
    model = caller.f_locals["self"]
    limit = getattr(model.config, LIMIT)
    if seen > limit:
        return seen
    if seen and _rope_changes(model, limit):
        raise ValueError(_about_limit(model, f"the cache holds {seen} tokens, and the text is longer now"))
    return int(limit) + 1


def check_caller(cache: Cache, new: int) -> None:
    """Refuse a model that would misuse the cache, before prefill tokens are stored.

    Reads the arguments of the model and of `generate` on the stack, because `Cache.update` does not receive them
    (transformers 5.17 to 5.24).

    Args:
        cache: the cache whose `update` was called.
        new: number of prefill tokens.

    Raises:
        ValueError: the model attends to an encoder or an image without a separate cache, or `generate` may reach the
            length at which the model drops the cache (see `length_to_tell`).
    """
    if torch.compiler.is_compiling() or is_capturing():
        return
    attends_to_encoder = is_wrapped = False
    seen = cache.get_seq_length() if cache.layers else 0
    for frame in _frames():
        names = frame.f_locals
        if names.get("cross_attention_states") is not None:
            raise ValueError(
                "This model stores the keys of an image in a layer of the cache, and reads them directly from its "
                "buffers: use a DynamicCache for this model, or pass no image."
            )
        attends_to_encoder |= names.get("encoder_hidden_states") is not None
        is_wrapped |= any(
            isinstance(value, EncoderDecoderCache) and value.self_attention_cache is cache for value in names.values()
        )
        settings, model, ids = (names.get(name) for name in ("generation_config", "self", "input_ids"))
        if isinstance(settings, GenerationConfig) and isinstance(model, PreTrainedModel):
            if isinstance(ids, torch.Tensor) and ids.shape[1] == seen + new:
                _check_length(model, seen + new, settings.max_length)
            break
    if attends_to_encoder and not is_wrapped:
        raise ValueError(
            "This model attends to an encoder and to the text so far. A paged cache is for the text. The keys of the "
            f"encoder need a separate cache: past_key_values={OWN_CACHE_FOR_ENCODER}."
        )


def _check_length(model: PreTrainedModel, length: int, max_length: int | None) -> None:
    prepare = type(model).prepare_inputs_for_generation  # type: ignore[attr-defined]  # it generates
    if max_length is None or not _drops_cache(inspect.unwrap(prepare).__code__):
        return
    limit = getattr(model.config, LIMIT, None)  # PhiMoE has it only with longrope
    # The model does not read the last token that it generates.
    if limit is not None and length <= limit < max_length - 1 and _rope_changes(model, limit):
        raise ValueError(_about_limit(model, f"this generation may come to {max_length} tokens"))


def _drops_cache(code: CodeType) -> bool:
    """Whether `code` is the method that drops the cache at the limit: it uses `original_max_position_embeddings`."""
    return code.co_name == "prepare_inputs_for_generation" and LIMIT in code.co_names


def _rope_changes(model: PreTrainedModel, limit: int) -> bool:
    """Whether the rotary embedding of a token changes if the text has more than `limit` tokens."""
    rotary = next((module for module in model.modules() if hasattr(module, "original_inv_freq")), None)
    if rotary is None:
        return True
    rotary = copy.deepcopy(rotary)  # some modules store the length of the text
    like = torch.zeros(1, device=next(rotary.buffers()).device)
    within, beyond = (rotary(like, torch.tensor([[1, last]], device=like.device)) for last in (limit - 1, limit))
    return not all(torch.equal(short[:, 0], long[:, 0]) for short, long in zip(within, beyond, strict=True))


def _about_limit(model: PreTrainedModel, what: str) -> str:
    return (
        f"{type(model).__name__} drops its cache, and goes on with a DynamicCache, when the text has more than "
        f"config.{LIMIT}={getattr(model.config, LIMIT)} tokens, because its RoPE changes there: {what}. Keep prompt "
        "and new tokens within the limit, or load the model with one RoPE for all lengths: "
        "config.rope_parameters['short_factor'] = config.rope_parameters['long_factor'] before from_pretrained."
    )


def indexer_error(layer_idx: int) -> ValueError:
    """The error for a layer with an indexer (DeepSeek Sparse Attention)."""
    return ValueError(
        f"Layer {layer_idx} of this model selects tokens with an indexer over the whole sequence, which a budget "
        "cannot bound: use a DynamicCache for this model."
    )

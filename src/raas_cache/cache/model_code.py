"""What a model's own code does with the cache that it was given.

Most models hand it on from layer to layer. Two kinds do not: Phi-3 and its relatives drop the cache in the middle of a
generation, and a model that attends to an encoder lets two attentions write to the one cache. The `Cache` API names
neither the model nor the method that calls, so both are read off the stack.
"""

import copy
import inspect
from types import CodeType, FrameType

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache

from ..attention.dispatch import OWN_CACHE_FOR_ENCODER


LIMIT = "original_max_position_embeddings"


def length_to_tell(seen: int, caller: FrameType) -> int:
    """What `get_seq_length` answers: the tokens seen, unless the model would drop the cache for it without need.

    Phi-3, PhiMoE and Phi-4-multimodal drop the cache in `prepare_inputs_for_generation` when the text has more than
    `config.original_max_position_embeddings` tokens and the cache has seen no more than that, because RoPE may change
    there. The rest of the generation would run on a `DynamicCache`. If the cache is empty, or RoPE does not change,
    nothing has to be computed anew, so the model is told one token more than its limit. It only compares the number.

    Args:
        seen: tokens that the cache has seen.
        caller: the frame that asks.

    Raises:
        ValueError: the model would drop the cache, and rightly: its RoPE changes, so what the cache holds is void.
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


def check_caller(cache: Cache, seen: int, new: int, frame: FrameType | None) -> None:
    """Before input is stored: refuse what the calling model would do to the cache later, or without a word.

    Args:
        cache: the cache that is called.
        seen: tokens that it has seen.
        new: tokens of input that come.
        frame: where to begin to look for the model and for `generate`.

    Raises:
        ValueError: the model attends to an encoder or an image and has no cache for that, or `generate` may come to the
            length at which the model drops the cache (see `length_to_tell`).
    """
    attends_to_encoder = is_wrapped = False
    while frame is not None:
        names = frame.f_locals
        if names.get("cross_attention_states") is not None:
            raise ValueError(
                "This model keeps the keys of an image in a layer of the same cache, and reads them there by itself: "
                "use a DynamicCache for this model, or leave out the image."
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
        frame = frame.f_back
    if attends_to_encoder and not is_wrapped:
        raise ValueError(
            "This model attends to an encoder beside the text so far. A paged cache holds the text; what the encoder "
            f"gave needs a cache of its own: past_key_values={OWN_CACHE_FOR_ENCODER}."
        )


def _check_length(model: PreTrainedModel, length: int, max_length: int | None) -> None:
    prepare = type(model).prepare_inputs_for_generation  # type: ignore[attr-defined]  # it generates
    if max_length is None or not _drops_cache(inspect.unwrap(prepare).__code__):
        return
    limit = getattr(model.config, LIMIT, None)  # PhiMoE has one only beside longrope
    # The last token is generated and not read.
    if limit is not None and length <= limit < max_length - 1 and _rope_changes(model, limit):
        raise ValueError(_about_limit(model, f"this generation may come to {max_length} tokens"))


def _drops_cache(code: CodeType) -> bool:
    """Whether this is the method that drops the cache at the limit."""
    return code.co_name == "prepare_inputs_for_generation" and LIMIT in code.co_names


def _rope_changes(model: PreTrainedModel, limit: int) -> bool:
    """Whether a token is rotated otherwise in a text of more than `limit` tokens."""
    rotary = next((module for module in model.modules() if hasattr(module, "original_inv_freq")), None)
    if rotary is None:
        return True
    rotary = copy.deepcopy(rotary)  # some remember how long a text was
    like = torch.zeros(1, device=next(rotary.buffers()).device)
    within, beyond = (rotary(like, torch.tensor([[1, last]], device=like.device)) for last in (limit - 1, limit))
    return not all(torch.equal(one[:, 0], other[:, 0]) for one, other in zip(within, beyond, strict=True))


def _about_limit(model: PreTrainedModel, what: str) -> str:
    return (
        f"{type(model).__name__} drops its cache, and goes on with a DynamicCache, when the text has more than "
        f"config.{LIMIT}={getattr(model.config, LIMIT)} tokens, because its RoPE changes there: {what}. Keep prompt "
        "and new tokens within the limit, or load the model with one RoPE for all lengths: "
        "config.rope_parameters['short_factor'] = config.rope_parameters['long_factor'] before from_pretrained."
    )

"""What transformers would do with a cache without a word, and wrongly: each is refused here before anything is stored.

The cache calls `check_generate_step` and `check_checkpointing` when it is asked something on the way, and
`check_mask_length` when a mask function gives it the 2-d mask.
"""

import inspect
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache


MEND = (
    "If this is the next turn of a conversation, its text differs from what the cache has seen (a chat template drops "
    "earlier thinking, for example): call raas_cache.rewind(cache, held_ids, new_ids) first, or cache.reset()."
)


def check_generate_step(cache: Cache) -> None:
    """Refuse a step of `generate` that would feed the cache tokens it has seen, or that shows that it got none.

    Reads the arguments of the `prepare_inputs_for_generation` (public, and the one place where `generate` says which
    tokens of its text are new) that is asking the cache at this moment; does nothing if something else asks.

    Raises:
        ValueError: `generate` runs with `use_cache=False`; its text is no longer than what the cache has seen; or the
            model has run without putting anything into the cache.
    """
    step = _asking_step()
    if step is None:
        return
    if step["kwargs"].get("use_cache") is False:
        raise ValueError(
            "use_cache=False was given together with a cache: every step would put the whole text into the cache once "
            "more. Leave out use_cache=False, also in the generation config, or leave out the cache."
        )
    new = step.get("next_sequence_length")
    if new is None:
        return
    if new < 1:
        seen = cache.get_seq_length()
        raise ValueError(
            f"input_ids has {seen + new} tokens, and the cache has seen {seen}: there is no new token to read, and "
            f"transformers would read old ones again. {MEND}"
        )
    if new == 1 and not step.get("is_first_iteration", True) and not _holds_anything(cache.layers):
        raise ValueError(
            f"{type(step['self']).__name__} has read its prompt and put nothing into the cache: this model keeps no "
            "keys and values, or keeps them elsewhere. Leave out the cache."
        )


def _asking_step() -> dict[str, Any] | None:
    """The arguments of the `prepare_inputs_for_generation` that asks a property of the cache, or of one around it."""
    frame = inspect.currentframe()
    for _ in range(5):
        frame = frame.f_back if frame is not None else None
        if frame is not None and frame.f_code.co_name == "prepare_inputs_for_generation":
            arguments = frame.f_locals
            return arguments if {"self", "kwargs"} <= arguments.keys() else None
    return None


def _holds_anything(layers: Iterable[object]) -> bool:
    """Whether a layer was ever filled; one that does not say so (linear attention) counts as filled."""
    return any(getattr(layer, "is_initialized", True) for layer in layers)


def check_checkpointing(model: torch.nn.Module | None) -> None:
    """Refuse a model that trains with gradient checkpointing: transformers then runs its layers without the cache.

    Raises:
        ValueError: `model` is such a model, and gradients are enabled.
    """
    if model is None or not model.training or not torch.is_grad_enabled():
        return
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is in training mode with gradient checkpointing, where transformers leaves out "
            "the cache: call model.eval() first, or run the model under torch.no_grad()."
        )


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
        f"attention_mask of shape {tuple(attention_mask.shape)} ends before the new tokens do: the cache has seen "
        f"{seen} tokens and {new} are new, so the mask needs {seen + new}, from the first token of the sequence on. "
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
            f"attention_mask shows tokens that it hid as left padding when they came (up to {longest} in a row): a "
            "paged cache does not hold them. Hide them again, or call cache.reset() and give it the whole sequence."
        )

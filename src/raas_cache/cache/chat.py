"""The next turn of a conversation whose text is not simply longer: the cache goes back to what both texts share."""

import warnings

import torch

from .paged_cache import PagedCache
from .paged_layer import PagedLayer


def rewind(cache: PagedCache, held_ids: torch.Tensor, new_ids: torch.Tensor) -> int:
    """Make a cache forget all that comes after the beginning that two texts share, so that `generate` reads the rest.

    A chat template that drops earlier thinking gives each turn a text that the cache has not seen in this form:
    `generate` compares lengths only, and would take what is held for the beginning of the new text. Call this before
    each turn. The cache is then as if it had seen the shared beginning and no more, or an earlier part of it:

    - It goes back to any place if nothing was generated after it. So thinking, and the answer behind it, can always be
      taken back, whatever was evicted meanwhile; the answer is read again as input.
    - It goes back to a place among generated tokens only if these were recorded (`activate_past_recording`), and
      otherwise to the input before them.
    - With `prompt="evict"`, with linear attention, and with a sliding window that is full and was not recorded, it
      cannot go back at all: it is emptied, and a warning says so.

    Args:
        cache: a `RaaSCache` or another paged cache.
        held_ids: `[batch, tokens]`, the token ids that the cache has seen, padding included; more may follow. What
            `generate` returned last is right.
        new_ids: `[batch, tokens]`, the token ids of the whole new text, which goes to `generate` next. All rows go
            back to the same place, so a batch keeps what every row shares with its new text.

    Returns:
        Tokens that the cache still counts as seen; 0 if it is empty now.

    Raises:
        TypeError: `cache` is not a paged one.
        ValueError: `held_ids` or `new_ids` has another number of dimensions or rows, or `held_ids` fewer tokens than
            the cache has seen.

    Example:

    ```python
    >>> out = model.generate(**inputs, past_key_values=cache)
    >>> inputs = tokenizer.apply_chat_template(messages, **options)
    >>> rewind(cache, out, inputs["input_ids"])
    >>> out = model.generate(**inputs, past_key_values=cache)
    ```
    """
    if not isinstance(cache, PagedCache):
        raise TypeError(f"cache={cache!r} must be a RaaSCache or another paged cache.")
    _check_ids(cache, held_ids, new_ids)
    seen, tokens = _seen(cache), new_ids.shape[1]
    shared = _shared(held_ids[:, :seen], new_ids)
    if shared == seen < tokens:
        return seen
    # A token that is read alone counts as a generated one, so two are left to read where the cache goes back anyway.
    shared = min(shared, tokens - 2)
    place = _nearest_place(cache, shared)
    if place and _go_back(cache, place):
        return place
    if shared > 0:
        warnings.warn(
            f"The cache cannot go back to the {shared} tokens that both texts share, so it was emptied: the next call "
            f"reads all {tokens} tokens of new_ids.",
            stacklevel=2,
        )
    cache.reset()
    return 0


def _check_ids(cache: PagedCache, held_ids: torch.Tensor, new_ids: torch.Tensor) -> None:
    for name, ids in (("held_ids", held_ids), ("new_ids", new_ids)):
        if ids.ndim != 2:
            raise ValueError(f"{name} of shape {tuple(ids.shape)} must be token ids of shape [batch, tokens].")
    layers = [layer for layer in cache.layers if isinstance(layer, PagedLayer) and layer.is_initialized]
    cached = {layer.table.batch_size for layer in layers}
    if len({*cached, held_ids.shape[0], new_ids.shape[0]}) > 1:
        raise ValueError(
            f"held_ids has {held_ids.shape[0]} rows, new_ids has {new_ids.shape[0]} rows, and the cache has "
            f"{max(cached, default=0)} rows: all three must be equal. With beam search or num_return_sequences, the "
            "cache has one row for each returned sequence."
        )
    if held_ids.shape[1] < _seen(cache):
        raise ValueError(
            f"held_ids has {held_ids.shape[1]} tokens, but the cache has seen {_seen(cache)}: pass prompt and "
            "generated tokens together, as generate returned them."
        )


def _seen(cache: PagedCache) -> int:
    """Tokens that the paged layers have seen; a cache whose layers are all windows has no other count."""
    paged = [layer for layer in cache.layers if isinstance(layer, PagedLayer)]
    return paged[0].table.length if paged else int(cache.get_seq_length())


def _shared(held: torch.Tensor, new: torch.Tensor) -> int:
    """Tokens from the beginning on that are equal in all rows."""
    length = min(held.shape[1], new.shape[1])
    equal = (held[:, :length] == new[:, :length].to(held.device)).all(0)
    return int(equal.long().cumprod(0).sum())


def _nearest_place(cache: PagedCache, shared: int) -> int:
    """The last place, at or before `shared`, to which the paged layers can go back; 0 if there is none."""
    for layer in cache.layers:
        if isinstance(layer, PagedLayer) and not _is_recorded(layer, shared):
            shared = min(shared, _leading_input(layer))
    return max(shared, 0)


def _is_recorded(layer: PagedLayer, place: int) -> bool:
    """Whether `crop` can take the layer back to the first `place` tokens."""
    try:
        layer.check_crop(place - layer.table.length)
    except RuntimeError:
        return False
    return True


def _leading_input(layer: PagedLayer) -> int:
    """Tokens of input before the first generated one."""
    kv, counts = layer.table.kv, layer.table.counts
    if layer.settings.prompt == "evict" or kv is None:
        return 0
    # All rows began to decode at one step: the first row tells.
    padding, prefilled = int(counts.padding[0]), int(counts.prefilled[0])
    positions = kv.positions[0, 0, :prefilled]
    in_place = positions == torch.arange(padding, padding + prefilled, device=positions.device)
    return padding + int(in_place.long().cumprod(0).sum())


def _go_back(cache: PagedCache, place: int) -> bool:
    """Go back to the first `place` tokens; False if a layer cannot, when others may have gone already."""
    if not all(layer.is_croppable for layer in cache.layers):
        return False
    tokens_to_remove = place - _seen(cache)
    try:
        for layer in cache.layers:
            if isinstance(layer, PagedLayer) and not _is_recorded(layer, place):
                layer.drop_decoded(place)
            else:
                layer.crop(tokens_to_remove)  # type: ignore[union-attr]  # transformers calls it so, too
    except RuntimeError:  # a window that is full and was not recorded
        return False
    return True

"""`rewind`: take tokens back for the next turn of a conversation, to the common prefix of both texts."""

import warnings

import torch

from .paged_cache import PagedCache
from .paged_layer import PagedLayer


def rewind(cache: PagedCache, held_ids: torch.Tensor, new_ids: torch.Tensor) -> int:
    """Take back all tokens after the common prefix of two texts, so that `generate` reads the rest of the new text.

    If a chat template drops earlier thinking, the text of the next turn does not start with the text that the cache has
    seen. `generate` only compares lengths, and would not notice. Call this before each turn. The cache is then as if it
    had seen the common prefix only, or a part of it:

    - It can go back to any position in the prompt or a user's turn, if no token before it was generated. Thinking, and
      the answer after it, can thus always be taken back, whatever was evicted. The model then reads the answer again.
    - It can go back to a position among generated tokens only after `activate_past_recording`. Otherwise it goes back
      to the end of the prefill before these tokens.
    - It cannot go back with `prompt="evict"`, with linear attention, and with a sliding window that is full and was not
      recorded. The cache is then emptied, with a warning.

    Args:
        cache: a `RaaSCache` or another paged cache.
        held_ids: `[batch, tokens]`, the token ids that the cache has seen, including padding. More ids may follow: pass
            what `generate` returned last.
        new_ids: `[batch, tokens]`, the token ids of the whole new text, which you will pass to `generate`. All rows go
            back to the same position: the shortest common prefix of all rows.

    Returns:
        Number of tokens that the cache still counts as seen; 0 if it is empty.

    Raises:
        TypeError: `cache` is not a paged cache.
        ValueError: `held_ids` or `new_ids` has another number of dimensions or rows than the cache, or `held_ids` has
            fewer tokens than the cache has seen.

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
    # A forward of one token counts as a decode step, so at least two tokens must be left to read.
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
    """Number of tokens that the paged layers have seen; without paged layers, what transformers counts."""
    paged = [layer for layer in cache.layers if isinstance(layer, PagedLayer)]
    return paged[0].table.length if paged else int(cache.get_seq_length())


def _shared(held: torch.Tensor, new: torch.Tensor) -> int:
    """Length of the common prefix of `held` and `new` `[batch, tokens]`, the shortest of all rows."""
    length = min(held.shape[1], new.shape[1])
    equal = (held[:, :length] == new[:, :length].to(held.device)).all(0)
    return int(equal.long().cumprod(0).sum())


def _nearest_place(cache: PagedCache, shared: int) -> int:
    """The last position up to `shared` to which all paged layers can go back; 0 if there is none."""
    for layer in cache.layers:
        if isinstance(layer, PagedLayer) and not _is_recorded(layer, shared):
            shared = min(shared, _leading_prefill(layer))
    return max(shared, 0)


def _is_recorded(layer: PagedLayer, place: int) -> bool:
    """Whether `crop` can take the layer back to the first `place` tokens."""
    try:
        layer.check_crop(place - layer.table.length)
    except RuntimeError:
        return False
    return True


def _leading_prefill(layer: PagedLayer) -> int:
    """Number of prefill tokens before the first decode token, with left padding."""
    kv, counts = layer.table.kv, layer.table.counts
    if layer.settings.prompt == "evict" or kv is None:
        return 0
    # `generate` starts to decode in all rows at the same step, so the first row is enough.
    padding, prefilled = int(counts.padding[0]), int(counts.prefilled[0])
    positions = kv.positions[0, 0, :prefilled]
    in_place = positions == torch.arange(padding, padding + prefilled, device=positions.device)
    return padding + int(in_place.long().cumprod(0).sum())


def _go_back(cache: PagedCache, place: int) -> bool:
    """Go back to the first `place` tokens. Returns False if a layer cannot; other layers may then have changed."""
    if not all(layer.is_croppable for layer in cache.layers):
        return False
    tokens_to_remove = place - _seen(cache)
    try:
        for layer in cache.layers:
            if isinstance(layer, PagedLayer) and not _is_recorded(layer, place):
                layer.drop_decoded(place)
            else:
                layer.crop(tokens_to_remove)  # type: ignore[union-attr]  # as transformers calls it
    except RuntimeError:  # a window that is full and was not recorded
        return False
    return True

"""`register` and `unregister`: what importing this package changes in transformers, and how to undo it."""

import functools
from collections.abc import Callable
from typing import Any

from transformers import EncoderDecoderCache, GenerationMixin

from .attention import dispatch
from .cache.paged_cache import PagedCache


def _refusing_a_cache(generate_batch: Callable[..., Any]) -> Callable[..., Any]:
    """`generate_batch` that refuses a paged cache. The function of transformers 5.17 to 5.24 ignores it silently."""

    @functools.wraps(generate_batch)
    def checked_generate_batch(*args: Any, **kwargs: Any) -> Any:
        for name, value in kwargs.items():
            decoder = value.self_attention_cache if isinstance(value, EncoderDecoderCache) else value
            if isinstance(decoder, PagedCache):
                raise ValueError(
                    f"{name}={value!r}: generate_batch (continuous batching) uses its own dense cache and would "
                    "ignore this cache. Call generate with a padded batch instead, without "
                    "cache_implementation='paged', or do not pass a cache."
                )
        return generate_batch(*args, **kwargs)

    return checked_generate_batch


_generate_batch = GenerationMixin.generate_batch
_checked_generate_batch = _refusing_a_cache(_generate_batch)


def register() -> None:
    """Make transformers serve paged caches. The import of the package calls this; a second call changes nothing.

    It uses the public registries of transformers. It registers the attention implementation `"raas"`. It wraps
    `"eager"`, `"sdpa"` and the flash entries in a function that serves keys of a paged cache, and calls the original
    function for all other keys. It wraps their mask functions, so that a mask of earlier tokens reaches the cache. The
    public method `generate_batch` of `GenerationMixin` has no registry: it is wrapped, too, to refuse a paged cache.
    """
    dispatch.register()
    if GenerationMixin.generate_batch is _generate_batch:
        GenerationMixin.generate_batch = _checked_generate_batch  # type: ignore[method-assign]


def unregister() -> None:
    """Put the original functions back; `attn_implementation="raas"` stays available."""
    dispatch.unregister()
    if GenerationMixin.generate_batch is _checked_generate_batch:
        GenerationMixin.generate_batch = _generate_batch  # type: ignore[method-assign]

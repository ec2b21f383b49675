"""`register` and `unregister`: what importing this package changes in transformers, and how to undo it."""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

from transformers import EncoderDecoderCache, GenerationMixin

from .attention import dispatch
from .cache.paged_cache import PagedCache


def _serving_rows(generate_batch: Callable[..., Any]) -> Callable[..., Any]:
    """`generate_batch` that serves a paged cache. The function of transformers 5.17 to 5.24 ignores it silently."""
    parameters = inspect.signature(generate_batch)

    @functools.wraps(generate_batch)
    def generate_batch_in_rows(self: Any, *args: Any, **kwargs: Any) -> Any:
        caches = {name: value for name, value in kwargs.items() if _is_paged(value)}
        given = parameters.bind(self, *args, **{key: value for key, value in kwargs.items() if key not in caches})
        config = given.arguments.get("generation_config")
        if not caches:
            use = getattr(getattr(self, "_cached_continuous_batching_manager", None), "use", None)
            if config is not None and use is not None:  # rows, see `raas_cache.continuous`
                use(config)
            return generate_batch(self, *args, **kwargs)
        (name, cache), *_ = caches.items()
        if not isinstance(cache, PagedCache) or cache.get_seq_length():
            what = "is not empty" if isinstance(cache, PagedCache) else "is for a model with an encoder"
            raise ValueError(
                f"{name}={cache!r} {what}: generate_batch takes the settings of an empty cache for the rows of its "
                "requests. Pass a new cache, or call generate with a padded batch."
            )
        from .serving.continuous import manager_for
        from .serving.row_plan import DEFAULT_ROWS

        rows = max(1, min(DEFAULT_ROWS, len(given.arguments["inputs"])))
        batching = given.arguments.get("continuous_batching_config")
        with manager_for(self, copy.deepcopy(cache), rows, generation_config=config, batching=batching):
            return generate_batch(*given.args, **given.kwargs)

    return generate_batch_in_rows


def _is_paged(value: object) -> bool:
    return isinstance(value.self_attention_cache if isinstance(value, EncoderDecoderCache) else value, PagedCache)


_generate_batch = GenerationMixin.generate_batch
_generate_batch_in_rows = _serving_rows(_generate_batch)


def register() -> None:
    """Make transformers serve paged caches. The import of the package calls this; a second call changes nothing.

    It uses the public registries of transformers. It registers the attention implementation `"raas"`. It wraps
    `"eager"`, `"sdpa"` and the flash entries in a function that serves keys of a paged cache, and calls the original
    function for all other keys. It wraps their mask functions, so that a mask of earlier tokens reaches the cache. The
    public method `generate_batch` of `GenerationMixin` has no registry: it is wrapped, too, to serve a paged cache.
    """
    dispatch.register()
    if GenerationMixin.generate_batch is _generate_batch:
        GenerationMixin.generate_batch = _generate_batch_in_rows  # type: ignore[method-assign]


def unregister() -> None:
    """Put the original functions back; `attn_implementation="raas"` stays available."""
    dispatch.unregister()
    if GenerationMixin.generate_batch is _generate_batch_in_rows:
        GenerationMixin.generate_batch = _generate_batch  # type: ignore[method-assign]

"""Looking inside a cache while it is used."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..cache.paged_cache import PagedCache
from .recording import Recording


@contextmanager
def record(
    cache: PagedCache, *, layers: Sequence[int] | None = None, heads: Sequence[int] | None = None
) -> Iterator[Recording]:
    """While the context lasts, take down what the pages of `cache` score, and when they are stamped and evicted.

    Tokens are the same with and without. A step that is recorded is not compiled, waits for the device and keeps
    12 bytes for each page, KV head and row: over long chains choose layers and heads. A cache that is reset begins its
    recording anew; a copy of it goes on with a copy. What a prompt scores during its own forward is not known.

    Args:
        cache: a `RaaSCache`, or another of the paged caches; empty, or in the midst of a sequence.
        layers: indices of the layers to record; None for all that have pages.
        heads: indices of the KV heads to record in each; None for all.

    Raises:
        TypeError: `cache` is not a paged one.
        ValueError: `cache` is being recorded already, `layers` or `heads` are no indices; when recording begins,
            that a layer has no such head.

    Example:

    ```python
    >>> cache = RaaSCache(budget=1024)
    >>> with record(cache, layers=[1]) as recording:
    ...     out = model.generate(**inputs, past_key_values=cache)
    >>> recording.to_pandas()
    ```
    """
    if not isinstance(cache, PagedCache):
        raise TypeError(f"cache={cache!r} must be a RaaSCache or another paged cache; for all that is, DenseCache.")
    for name, indices in (("layers", layers), ("heads", heads)):
        if indices is not None and (not indices or any(type(i) is not int or i < 0 for i in indices)):
            raise ValueError(f"{name}={indices!r} must be indices such as [0, 1], or None for all.")
    settings, wanted = cache.settings, (layers, heads)
    recording = Recording(repr(settings.policy), cache.budget, settings.page_size, settings.prompt, wanted=wanted)
    cache.observe(recording)
    try:
        yield recording
    finally:
        cache.observe(None)

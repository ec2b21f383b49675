"""`record`: trace the pages of a cache while it is used."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..cache.paged_cache import PagedCache
from .recording import Recording


@contextmanager
def record(
    cache: PagedCache, *, layers: Sequence[int] | None = None, heads: Sequence[int] | None = None
) -> Iterator[Recording]:
    """Trace the scores, timestamps and evictions of the pages of `cache` inside a `with` block.

    The generated tokens are the same as without `record`. A recorded step is not compiled, waits for the device, and
    stores 12 bytes for each page, KV head and row, so choose layers and heads for long chains. If the cache is reset,
    its recording starts again. A copy of the cache continues with a copy of the recording. The scores of a prompt
    during its own prefill are not recorded.

    Args:
        cache: a `RaaSCache` or another paged cache, empty or in the middle of a sequence.
        layers: indices of the layers to record; None for all paged layers.
        heads: indices of the KV heads to record in each layer; None for all.

    Raises:
        TypeError: `cache` is not a paged cache.
        ValueError: `cache` is being recorded already, the KV heads of a recorded layer have different shares, or
            `layers` or `heads` are not indices. If a layer has no such head, the first recorded step raises the error.

    Example:

    ```python
    >>> cache = RaaSCache(budget=1024)
    >>> with record(cache, layers=[1]) as recording:
    ...     out = model.generate(**inputs, past_key_values=cache)
    >>> recording.to_pandas()
    ```
    """
    if not isinstance(cache, PagedCache):
        raise TypeError(f"cache={cache!r} must be a RaaSCache or another paged cache. DenseCache keeps everything.")
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

"""`continuous`: continuous batching with rows of fixed memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig, PreTrainedModel

from ..cache.paged_cache import PagedCache
from ..methods.registry import from_name


if TYPE_CHECKING:
    from transformers import ContinuousBatchingConfig

    from ..cache.settings import Budget
    from .manager import RowManager


CHUNK = 512
"""Largest number of tokens of one forward: longer prompts are read in chunks while other requests decode."""


def continuous(
    model: PreTrainedModel,
    budget: Budget,
    *,
    method: str = "raas",
    max_rows: int | None = None,
    memory: int | None = None,
    generation_config: GenerationConfig | None = None,
    batching: ContinuousBatchingConfig | None = None,
    seed: int = 0,
    **options: Any,
) -> RowManager:
    """Give a model rows of fixed memory for continuous batching.

    Afterwards `model.generate_batch(prompts, ...)` runs in these rows. A request gets a row and all pages that it can
    ever need when it is admitted; it waits in the queue until then. So no request is interrupted, and memory cannot
    run out, however long the answers are. Each request gives the tokens that it gives alone.

    Args:
        model: any decoder that transformers batches continuously (full attention and sliding windows).
        budget: number of tokens that each row, layer and KV head holds, including the prompt, see `PagedCache`.
        method: a name of `list_methods()`.
        max_rows: largest number of requests at once; by default as many as `memory` holds, or 32.
        memory: bytes for keys and values of the paged layers; by default `max_rows` times the bytes of a row with this
            budget. A request with a longer prompt than the budget takes more, one with a short answer less.
        generation_config: as for `generate`; by default the model's. It decides whether and how tokens are drawn.
        batching: transformers' configuration. These of its settings are used: `max_batch_tokens` (default 512),
            `use_cuda_graph` (False switches the CUDA graph of decode steps off), `return_logprobs`, `max_queue_size`
            and `per_request_processors`.
        seed: seed of the draws.
        options: arguments of the method and of `PagedCache`.

    Returns:
        The manager. It is a context manager; `close()` releases the memory.

    Raises:
        ImportError: transformers is older than 5.24.
        TypeError, ValueError: an argument is out of range or refused by the method; the model already has a manager;
            or it has layers that are not served.

    Example:

    ```python
    >>> with raas_cache.continuous(model, budget=1024, max_rows=64):
    ...     outputs = model.generate_batch(prompts, max_new_tokens=32_000)
    ```
    """
    cache = from_name(method, budget, config=model.config.get_text_config(), **options)
    return manager_for(model, cache, max_rows, memory, generation_config, batching, seed)


def manager_for(
    model: PreTrainedModel,
    cache: PagedCache,
    max_rows: int | None = None,
    memory: int | None = None,
    generation_config: GenerationConfig | None = None,
    batching: ContinuousBatchingConfig | None = None,
    seed: int = 0,
) -> RowManager:
    """As `continuous`, with the settings of an empty cache, whose layers the rows take over."""
    from .manager import RowManager
    from .rows_of_model import rows_of
    from .upstream import ContinuousBatchingConfig

    for name, value in (("max_rows", max_rows), ("memory", memory)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be positive.")
    if getattr(model, "_cached_continuous_batching_manager", None) is not None:
        raise ValueError(
            "model already has a manager of continuous batching: close it first, with manager.close() or "
            "model.destroy_cached_continuous_batching_manager()."
        )
    given = batching or ContinuousBatchingConfig()
    store, rows = rows_of(model, cache, max_rows, memory)
    manager = RowManager(
        model,
        store,
        rows,
        generation_config or model.generation_config,
        ContinuousBatchingConfig(
            page_size=max(4, store.page_size),
            num_blocks=1,
            max_batch_tokens=max(rows, given.max_batch_tokens or CHUNK),
            max_requests_per_batch=rows,
            allow_block_sharing=False,
            use_async_batching=False,
            use_cuda_graph=False if given.use_cuda_graph is False else None,
            return_logprobs=given.return_logprobs,
            auto_switch_to_flash=False,
            max_queue_size=given.max_queue_size,
            per_request_processors=given.per_request_processors,
        ),
        seed,
    )
    model._cached_continuous_batching_manager = manager  # type: ignore[assignment]
    return manager

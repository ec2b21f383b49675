"""The manager of continuous batching with rows: transformers' manager, with its loop, queues and outputs."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from .draws import Draws
from .row_cache import RowCache
from .row_plan import need
from .row_runner import RowRunner
from .row_scheduler import RowScheduler
from .row_store import RowStore
from .upstream import (
    SLIDING_ATTENTION,
    ContinuousBatchingConfig,
    ContinuousBatchingLogitsProcessorList,
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
)


class RowManager(ContinuousBatchingManager):
    """Runs requests in rows of fixed memory. `raas_cache.continuous` creates it.

    It is transformers' manager: `start`, `stop`, `add_request`, `add_requests`, `get_result`, `request_id_iter`,
    `cancel_request` and `pause` work as documented there, and `model.generate_batch` uses it until it is closed.

    Args:
        model: the model.
        store: the rows of its layers with full attention.
        rows: largest number of requests at once.
        generation_config: as for `generate`, for all requests.
        batching: transformers' configuration of continuous batching.
        seed: seed of the draws of all requests that have no seed of their own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        store: RowStore,
        rows: int,
        generation_config: GenerationConfig,
        batching: ContinuousBatchingConfig,
        seed: int,
    ):
        super().__init__(model, generation_config, batching)  # type: ignore[arg-type]
        config, settings = model.config.get_text_config(), self.continuous_batching_config
        self._has_windows = SLIDING_ATTENTION in (getattr(config, "layer_types", None) or ())
        # Decode steps run from a CUDA graph, which needs a block table. transformers has none for windows.
        has_graph = model.device.type == "cuda" and not self._has_windows and batching.use_cuda_graph is not False
        settings.max_blocks_per_request, settings.use_cuda_graph = int(has_graph), (False, has_graph)
        settings.max_requests_per_batch = self.max_rows = rows
        max_tokens: int = settings.max_batch_tokens  # type: ignore[assignment]  # `continuous` sets it
        self.draws = Draws(rows, seed, model.device)
        self.cache = RowCache(store, config, rows, max_tokens, has_graph, model.dtype, self.draws)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values. They are allocated once, and do not grow.

        The page tables (positions, priorities and so on, about 2 % of these bytes) have room for the longest request.
        """
        return self.cache.nbytes

    @property
    def waiting(self) -> int:
        """Number of requests that have not begun: they wait for a row or for pages."""
        processor = self.batch_processor
        return self.input_queue.qsize() + (0 if processor is None else len(processor.scheduler.waiting_requests))

    def add_request(  # type: ignore[override]
        self, input_ids: list[int], request_id: str | None = None, seed: int | None = None, **options: Any
    ) -> str | None:
        """Add a request to the queue, see `ContinuousBatchingManager.add_request` of transformers.

        Args:
            input_ids: token ids of the prompt.
            request_id: name of the request; chosen by default.
            seed: seed of its draws. A request with the same prompt and seed draws the same tokens in any batch. By
                default it follows from the seed of the manager and from `request_id`.
            options: `max_new_tokens`, `streaming`, `eos_token_id` and others, as in transformers.

        Raises:
            ValueError: the prompt is empty, has a token that the model does not know, or needs more pages than there
                are; or the method never evicts, and the request has no `max_new_tokens`.
        """
        ids = [int(token) for token in input_ids]
        vocabulary: int = self.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        if not ids:
            raise ValueError(f"input_ids={input_ids} is empty: a request needs a prompt of one token or more.")
        if min(ids) < 0 or max(ids) >= vocabulary:
            unknown = next(token for token in ids if not 0 <= token < vocabulary)
            raise ValueError(f"input_ids has token {unknown}, but the model's vocabulary is 0 to {vocabulary - 1}.")
        limit = options.get("max_new_tokens")
        limit = self.generation_config.max_new_tokens if limit is None else limit
        needed = need(self.cache.store.tables, len(ids), limit)
        if not self.cache.store.fits(needed):
            raise ValueError(
                f"input_ids has {len(ids):,} tokens, which need {max(needed):,} pages of "
                f"{self.cache.store.page_size} tokens. That is more than all rows have: shorten the prompt, or create "
                "the rows with a larger max_rows, memory or budget."
            )
        if seed is not None:
            if request_id is None:
                with self._request_lock:
                    request_id = f"req_{self._request_counter}"
                    self._request_counter += 1
            self.draws.seeds[request_id] = int(seed)
        added: str | None = super().add_request(ids, request_id=request_id, **options)
        return added

    def use(self, generation_config: GenerationConfig) -> None:
        """Use another generation config for all later requests.

        Raises:
            RuntimeError: the loop is running.
        """
        if generation_config == self.generation_config:
            return
        if self.is_running():
            raise RuntimeError(
                "generation_config differs from that of the requests that are running: wait for them, or call "
                "manager.stop() first."
            )
        settings = self.continuous_batching_config
        self.generation_config = generation_config
        self.num_return_sequences = generation_config.num_return_sequences or 1
        self.logit_processor = ContinuousBatchingLogitsProcessorList(
            self.model._get_logits_processor(generation_config),
            settings.per_request_processors,
            settings.drop_unsupported_processors,
        )
        self.batch_processor = None

    def start(self) -> None:
        """Start the loop.

        Raises:
            RuntimeError: an error ended the loop before. Some layers may then have stored tokens that others have not.
        """
        error = self.background_thread_status.fatal_error
        if error is not None:
            raise RuntimeError(
                "The rows cannot be used after an error ended the generation loop: call manager.close(), and create "
                "new ones with raas_cache.continuous."
            ) from error
        super().start()

    def stop(
        self,
        block: bool = True,
        timeout: float | None = None,
        keep_for_next_session: bool = True,
        hard_stop: bool = False,
    ) -> None:
        """Stop the loop. The rows stay, so that `start` and `generate_batch` can use them again, until `close`."""
        if self._generation_thread is not None:
            super().stop(block, timeout, True, hard_stop)

    def destroy(self) -> None:
        """Stop the loop, as `stop`. transformers calls this after each `generate_batch`."""
        self.stop()

    def close(self) -> None:
        """Stop the loop, release the memory, and give the model back its own continuous batching."""
        self.stop(hard_stop=True)
        super().destroy()
        self.batch_processor = None
        vars(self.model).pop("_cached_continuous_batching_manager", None)
        vars(self).pop("cache", None)

    def __enter__(self) -> RowManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        """The batch processor, with rows as its cache. It stays as long as the manager."""
        if self.batch_processor is not None:
            self.batch_processor.reset()
            return self.batch_processor
        settings, device = self.continuous_batching_config, torch.device(self.model.device)
        processor = ContinuousBatchProcessor(
            cache=self.cache,
            config=self.model.config.get_text_config(),
            generation_config=self.generation_config,
            continuous_batching_config=settings,
            logit_processor=self.logit_processor,
            input_queue=self.input_queue,
            cancel_queue=self.cancel_queue,
            output_router=self.output_router,
            background_thread_status=self.background_thread_status,
            model_device=device,
            model_dtype=self.model.dtype,
            scheduler=RowScheduler(self.cache, 0.0, self.max_rows),
            distributed_helper=self.distributed_helper,
        )
        inputs = processor.inputs_and_outputs
        if not self._has_windows:
            inputs.attention_mask = None  # type: ignore[union-attr]  # rows need no mask
        processor.model_runner = RowRunner(
            self.draws,
            logit_processor=self.logit_processor,
            cb_config=settings,
            cache=self.cache,
            inputs_and_outputs=inputs,
            do_sample=processor.do_sample,
            return_logprobs=processor.return_logprobs,
        )
        return processor

"""The server of `raas-cache serve`: transformers' own server, whose requests run in rows of fixed memory."""

from __future__ import annotations

from typing import Any

import uvicorn
from fastapi import FastAPI
from transformers import ContinuousBatchingConfig, PreTrainedModel, PreTrainedTokenizerBase, TemperatureLogitsWarper

from ...cache.settings import Budget
from ..continuous import CHUNK, continuous
from ..manager import RowManager
from .connection import EndWithClient
from .errors import answer_errors
from .generation import RowGeneration
from .handlers import RowChat, RowCompletion, RowResponses
from .metrics import REJECTED, Metrics
from .sampling import TemperatureOrGreedy, with_every_parameter
from .upstream_server import (
    CBGenerateManager,
    ContinuousBatchingTemperatureLogitsWarper,
    GenerationState,
    ModelManager,
    SystemOneHandler,
    TranscriptionHandler,
    build_server,
)


ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health", "/metrics")
GRACE = 10
"""Seconds that running requests have after Ctrl-C or SIGTERM."""


class OneModel(ModelManager):
    """transformers' manager of models, with one model that is loaded already.

    Args:
        name: the name that clients give.
        model: the model.
        tokenizer: its tokenizer.
        rows: the rows of the model, which are closed when the server ends.
    """

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: RowManager):
        self._loaded, self._rows = (model, tokenizer), rows
        super().__init__(force_model=name)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """The name as it is: transformers would add a revision."""
        return model_id

    def _load_model(self, *_: Any, **__: Any) -> PreTrainedModel:
        return self._loaded[0]

    def _load_processor(self, *_: Any, **__: Any) -> Any:
        return self._loaded[1]

    def shutdown(self) -> None:
        """Release the rows. The server calls this when it ends."""
        super().shutdown()
        self._rows.close()


class RowState(GenerationState):
    """transformers' state of the generation, with rows for all requests."""

    def __init__(self, generation: RowGeneration):
        super().__init__(continuous_batching=True)
        self.generation = self._cb_manager = generation

    def get_manager(self, model_id: str, use_cb: bool = False) -> CBGenerateManager:
        """The manager of all requests."""
        return self.generation


def build_app(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    budget: Budget,
    *,
    method: str = "raas",
    max_rows: int | None = None,
    memory: int | None = None,
    max_queue: int = 256,
    max_batch_tokens: int = CHUNK,
    **options: Any,
) -> FastAPI:
    """Create the server of a model, with OpenAI's API.

    Args:
        model: the model.
        tokenizer: its tokenizer, a fast one.
        name: the name of the model that clients give.
        budget: number of tokens that each row, layer and KV head holds, see `raas_cache.continuous`.
        method: a name of `list_methods()`.
        max_rows: largest number of requests at once, see `raas_cache.continuous`.
        memory: bytes for keys and values, see `raas_cache.continuous`.
        max_queue: largest number of waiting requests. More are refused with status 429.
        max_batch_tokens: largest number of tokens of one forward.
        options: arguments of the method and of `PagedCache`.

    Returns:
        An ASGI application. `app.state.manager` is the `RowManager`, which runs until the application ends.

    Raises:
        ImportError: transformers is older than 5.24.
        TypeError, ValueError: an argument is out of range or refused by the method; or the model has layers that are
            not served.
    """
    if getattr(tokenizer, "_tokenizer", None) is None:
        raise ValueError(f"tokenizer: {type(tokenizer).__name__} is not a fast tokenizer, which the server needs.")
    # 1. Rows, in which each request has its own temperature, top_p, top_k and seed.
    manager = continuous(
        model,
        budget,
        method=method,
        max_rows=max_rows,
        memory=memory,
        generation_config=with_every_parameter(model.generation_config),
        batching=ContinuousBatchingConfig(max_batch_tokens=max_batch_tokens, per_request_processors=True),
        **options,
    )
    processors = manager.logit_processor.logits_processor
    for index, processor in enumerate(processors):
        if isinstance(processor, ContinuousBatchingTemperatureLogitsWarper):
            processors[index] = TemperatureOrGreedy(TemperatureLogitsWarper(processor.temperature))
    # 2. transformers' server.
    metrics = Metrics(manager)
    generation = RowGeneration(manager, metrics, max_queue)
    models, state = OneModel(name, model, tokenizer, manager), RowState(generation)
    app: FastAPI = build_server(
        models,
        RowChat(models, state),
        RowCompletion(models, state),
        RowResponses(models, state),
        TranscriptionHandler(models, state),
        SystemOneHandler(models, state),
        state,
    )
    # 3. What it lacks, and without the routes that one model in rows does not serve.
    app.add_route("/metrics", metrics.respond)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") in ROUTES]
    app.add_middleware(EndWithClient, end=generation.end)
    answer_errors(app, lambda: metrics.outcomes.update([REJECTED]))
    app.state.manager = manager
    manager.start()
    return app


def server_of(app: FastAPI, host: str, port: int) -> uvicorn.Server:
    """The HTTP server of an application: `run()` runs it until Ctrl-C or SIGTERM."""
    return uvicorn.Server(uvicorn.Config(app, host=host, port=port, timeout_graceful_shutdown=GRACE))

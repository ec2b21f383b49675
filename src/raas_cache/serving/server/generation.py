"""What transformers' server asks for a generation: requests in rows, with their own sampling and stop strings."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from ..manager import RowManager
from ..upstream import GenerationOutput
from .errors import refused
from .metrics import CANCELLED, FAILED, FINISHED, Metrics
from .sampling import Sampling
from .stop_text import StopText
from .upstream_server import CBGenerateManager, CBStreamer, _StreamError


RETRY_AFTER = 1
"""Seconds after which a client may try again when the queue is full."""


class RowGeneration(CBGenerateManager):
    """Generates for all requests of a server. It hands each request to transformers' own class, with a `Submission`.

    `generation_config.sampling` is the `Sampling` of a request, `generation_config.stop_strings` are its stop strings,
    and `generation_config.prompt_field` is the name of the parameter that has the prompt, for error messages.

    Args:
        manager: the manager of the rows, which runs.
        metrics: counts how requests end.
        max_queue: largest number of waiting requests.
    """

    def __init__(self, manager: RowManager, metrics: Metrics, max_queue: int):
        super().__init__()
        self._cb = manager
        manager.output_router.output_queue = Nowhere()
        self.manager, self.metrics, self.max_queue = manager, metrics, max_queue
        self.running: set[str] = set()

    def generate_streaming(
        self,
        model: PreTrainedModel,
        processor: Any,
        inputs: dict[str, Any],
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], CBStreamer]:
        """See `CBGenerateManager.generate_streaming`."""
        submission = Submission(self, gen_config)
        pieces: asyncio.Queue[Any]
        streamer: Any
        pieces, streamer = submission.upstream.generate_streaming(
            model, processor, inputs, gen_config, request_id, response_parser
        )
        if gen_config.stop_strings:
            streamer._queue = StopText(gen_config.stop_strings, pieces, lambda: self.end(request_id, FINISHED))
        return pieces, streamer

    async def generate_non_streaming(
        self,
        model: PreTrainedModel,
        processor: Any,
        inputs: dict[str, Any],
        gen_config: Any,
        request_id: str,
    ) -> tuple[str, int, list[int]]:
        """See `CBGenerateManager.generate_non_streaming`. The text ends before a stop string, and so do the tokens."""
        submission = Submission(self, gen_config)
        if not gen_config.stop_strings:
            plain: tuple[str, int, list[int]] = await submission.upstream.generate_non_streaming(
                model, processor, inputs, gen_config, request_id
            )
            return plain
        streamer: Any
        pieces, streamer = submission.upstream.generate_streaming(model, processor, inputs, gen_config, request_id)
        stopping = StopText(gen_config.stop_strings, pieces, lambda: self.end(request_id, FINISHED))
        streamer._queue = stopping
        text = ""
        while (item := await pieces.get()) is not None:
            if isinstance(item, _StreamError):
                raise RuntimeError(item.msg)
            text += item
        tokens = submission.output.generated_tokens
        if stopping.is_found:
            tokens = _tokens_of(text, tokens, processor)
        return text, len(inputs["input_ids"]), tokens

    def end(self, request_id: str, outcome: str = CANCELLED) -> None:
        """End a request. Its row is free at the next step. Nothing happens if it has ended already."""
        if request_id in self.running:
            self.running.remove(request_id)
            self.metrics.outcomes[outcome] += 1
            self.manager.output_router.result_handlers.pop(request_id, None)
            self.manager.cancel_request(request_id)


class Submission:
    """The manager as transformers' `CBGenerateManager` sees it, for one request.

    Args:
        generation: where the request runs.
        gen_config: the generation config of the request.

    Attributes:
        upstream: transformers' class, which uses this object as its manager.
        output: the newest output.
    """

    output: GenerationOutput

    def __init__(self, generation: RowGeneration, gen_config: Any):
        self.generation, self.gen_config = generation, gen_config
        self.background_thread_status = generation.manager.background_thread_status
        self.upstream = CBGenerateManager()
        self.upstream._cb = self  # type: ignore[assignment]
        self._callback: Callable[[GenerationOutput], None]

    def register_result_handler(self, request_id: str, callback: Callable[[GenerationOutput], None]) -> None:
        """Receive the outputs. transformers calls this before or after `add_request`."""
        self._callback = callback

    def add_request(self, input_ids: list[int], request_id: str, **options: Any) -> str:
        """Add the request to the queue.

        Raises:
            HTTPException: the queue is full (429), the prompt can never run (400), or the server ends (503).
        """
        generation, manager = self.generation, self.generation.manager
        if manager.waiting >= generation.max_queue:
            raise refused(
                f"{manager.waiting} requests are waiting, and the queue holds {generation.max_queue}: try again later.",
                status=429,
                headers={"Retry-After": str(RETRY_AFTER)},
            )
        sampling: Sampling = self.gen_config.sampling
        generation.running.add(request_id)
        manager.register_result_handler(request_id, self._deliver)
        try:
            added = manager.add_request(input_ids, request_id=request_id, **options, **sampling.as_arguments())
        except ValueError as error:
            self._withdraw(request_id)
            field = self.gen_config.prompt_field
            raise refused(str(error).replace("input_ids", field), field) from None
        if added is None:
            self._withdraw(request_id)
            raise refused("The server ends and takes no more requests: try again later.", status=503)
        return added

    def cancel_request(self, request_id: str) -> None:
        """End the request, because its client is gone."""
        self.generation.end(request_id)

    def _withdraw(self, request_id: str) -> None:
        self.generation.running.discard(request_id)
        self.generation.manager.output_router.result_handlers.pop(request_id, None)

    def _deliver(self, output: GenerationOutput) -> None:
        """Pass an output on. It arrives in the event loop, so after `register_result_handler`."""
        self.output = output
        if output.is_finished() and output.request_id in self.generation.running:
            self.generation.running.remove(output.request_id)
            self.generation.metrics.outcomes[FINISHED if output.error is None else FAILED] += 1
        self._callback(output)


class Nowhere(queue.Queue[GenerationOutput]):
    """Where transformers puts outputs that nobody waits for: those of a request that has just been ended."""

    def put(self, item: GenerationOutput, block: bool = True, timeout: float | None = None) -> None:
        """Drop an output."""


def _tokens_of(text: str, tokens: list[int], tokenizer: Any) -> list[int]:
    """Cut generated tokens so that they decode to `text`, with which their text begins."""
    length = len(tokens)
    while length and not text.startswith(tokenizer.decode(tokens[:length], skip_special_tokens=True)):
        length -= 1
    rest = text[len(tokenizer.decode(tokens[:length], skip_special_tokens=True)) :]
    return tokens[:length] + list(tokenizer.encode(rest, add_special_tokens=False))

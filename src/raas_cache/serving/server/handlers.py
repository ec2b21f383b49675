"""transformers' handlers of the three endpoints, with checked parameters and each request's own sampling."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from transformers import GenerationConfig, PreTrainedTokenizerBase

from .errors import refused
from .request_fields import Chat, Completion, Fields, Responses, check
from .sampling import Sampling
from .upstream_server import BaseHandler, ChatCompletionHandler, CompletionHandler, ResponseHandler


TEMPLATE_ARGUMENTS = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys()
"""What configures the tokenizer instead of the template. The server sets these."""


class Checked(BaseHandler):
    """A handler that refuses what it cannot serve.

    Attributes:
        fields: the parameters of the endpoint.
        prompt_field: the parameter with the prompt.
    """

    fields: ClassVar[type[Fields]]
    prompt_field: ClassVar[str]

    def _validate_request(self, body: dict[str, Any]) -> None:
        """Check the parameters of a request, which transformers does first."""
        check(self.fields, body)
        name = self.model_manager.force_model
        if body.get("model", name) != name:
            raise refused(f"model={body['model']!r} is not served here: use {name!r}.", "model", status=404)

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        """The generation config of a request, with the attributes that `RowGeneration` reads."""
        # transformers would give these three to all requests.
        shared = {name: value for name, value in body.items() if name not in ("temperature", "top_p", "seed")}
        config: Any = super()._build_generation_config(shared, model_generation_config, use_cb)
        config.sampling = Sampling.of(body, model_generation_config)
        config.prompt_field = self.prompt_field
        stop = body.get("stop")
        config.stop_strings = [stop] if isinstance(stop, str) else stop
        built: GenerationConfig = config
        return built


class NeedsTemplate(Checked):
    """A handler of conversations."""

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        reserved = sorted(TEMPLATE_ARGUMENTS & body.get("chat_template_kwargs", {}).keys())
        if reserved:
            raise refused(
                f"chat_template_kwargs has {reserved[0]!r}, which is no variable of a chat template: remove it.",
                "chat_template_kwargs",
            )
        _, _, tokenizer = self._resolve_model(body)
        if not tokenizer.chat_template:
            raise refused(
                f"{self.prompt_field} cannot be served, because this model has no chat template: use /v1/completions "
                "with a prompt.",
                self.prompt_field,
            )


class RowChat(NeedsTemplate, ChatCompletionHandler):
    """`/v1/chat/completions`."""

    fields = Chat
    prompt_field = "messages"


class RowCompletion(Checked, CompletionHandler):
    """`/v1/completions`."""

    fields = Completion
    prompt_field = "prompt"


class RowResponses(NeedsTemplate, ResponseHandler):
    """`/v1/responses`."""

    fields = Responses
    prompt_field = "input"

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        items = body["input"]
        if isinstance(items, list) and items[0].get("type", "message") in ("function_call", "function_call_output"):
            raise refused("input must begin with a message: add the message before the call.", "input")
        body.setdefault("stream", False)  # as OpenAI's API; transformers would stream

"""The names of transformers' own server that `raas-cache serve` needs. No other file imports them.

They are the names of transformers 5.24, and importing them needs FastAPI and openai.
"""

from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import (
    X_REQUEST_ID,
    BaseHandler,
    CBGenerateManager,
    CBStreamer,
    CBWorkerDeadError,
    GenerationState,
    _StreamError,
)
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
    ContinuousBatchingTemperatureLogitsWarper,
)


__all__ = [
    "X_REQUEST_ID",
    "BaseHandler",
    "CBGenerateManager",
    "CBStreamer",
    "CBWorkerDeadError",
    "ChatCompletionHandler",
    "CompletionHandler",
    "ContinuousBatchingLogitsProcessorList",
    "ContinuousBatchingTemperatureLogitsWarper",
    "GenerationState",
    "ModelManager",
    "ResponseHandler",
    "SystemOneHandler",
    "TranscriptionHandler",
    "_StreamError",
    "build_server",
]

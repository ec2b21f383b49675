"""Everything that the rows of a run depend on. A folder of rows stores these values, or fingerprints of large values.

Prompts and gold answers are not included, because each row stores them itself.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import raas_kernels

from ..engine.policy import Policy
from ..methods.registry import CACHES, POLICIES
from .decoding import Decoder
from .settings import DYNAMIC, Setting
from .tasks import hash_of


CHUNK = 1 << 28
"""Bytes of weights that are copied to the CPU at once."""
_IN_ROWS = ("attention", "cache", "common", "engine", "methods", "sizing", "tracing")
"""Folders of this package whose code can change the content of a row."""
_NOT_IN_ROWS = ("arguments.py", "extras.py", "parse_methods.py", "plan.py", "reporting.py", "statistics.py")
"""Files in these folders that cannot change a row."""


def of_run(decoder: Decoder) -> dict[str, Any]:
    """Everything that the rows of a decoder depend on, except prompt, gold answer and setting. JSON values only.

    The number of samples and the batch size are left out: a row does not depend on them.
    """
    decoding = decoder.decoding
    top = (decoding.top_p, decoding.top_k) if decoding.temperature else (None, None)  # greedy rows depend on neither
    return {
        "task": decoder.task.name,
        "seed": decoding.seed,
        "max_new_tokens": decoder.limit,
        "temperature": decoding.temperature,
        **dict(zip(("top_p", "top_k"), top, strict=True)),
        "eos_token_id": decoder.generation_config.eos_token_id,
        **of_model(decoder.model, decoder.tokenizer),
    }


def of_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Everything that a forward of the model depends on, except its tokens and its cache. JSON values only."""
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": of_weights(model),
        "config": of_config(model),
        "tokenizer": of_tokenizer(tokenizer),
        "attention": model.config._attn_implementation,
        "kernels": raas_kernels.engine(model.device),
        "device": model.device.type,
        "raas_cache": of_package(),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def of_weights(model: PreTrainedModel) -> str:
    """Fingerprint of the names, dtypes, shapes and bytes of all weights and saved buffers."""
    state = model.state_dict()
    if any(value.is_meta for value in state.values() if isinstance(value, torch.Tensor)):
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        state = get_state_dict_offloaded_model(model)
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        for tensor in _plain_tensors(value):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            for chunk in tensor.detach().reshape(-1).view(torch.uint8).split(CHUNK):
                digest.update(chunk.cpu().numpy().data)
    return digest.hexdigest()[:16]


def _plain_tensors(value: Any) -> Iterator[torch.Tensor]:
    """The plain tensors inside a value. A tensor subclass, such as a quantized weight, may contain several."""
    if not isinstance(value, torch.Tensor):
        return
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        for name in names:
            yield from _plain_tensors(getattr(value, name))
    else:
        yield value


def of_config(model: PreTrainedModel) -> str:
    """Fingerprint of the model's config. Does not depend on the path of the model."""

    def without_place(value: Any) -> Any:
        if isinstance(value, dict):
            places = ("_name_or_path", "transformers_version")
            return {name: without_place(entry) for name, entry in value.items() if name not in places}
        return value

    config = without_place(json.loads(model.config.to_json_string(use_diff=False)))
    return hash_of(json.dumps(config, sort_keys=True))


def of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Fingerprint of encoding and decoding. Chat templates are left out, because the prompts contain their effect."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    for name in ("truncation", "padding"):  # settings of the last call, not of the tokenizer
        parts.pop(name, None)
    parts["special"] = sorted(tokenizer.all_special_tokens)
    parts["clean_up"] = getattr(tokenizer, "clean_up_tokenization_spaces", None)
    parts["class"] = type(tokenizer).__name__
    return hash_of(json.dumps(parts, sort_keys=True))


@cache
def of_package() -> str:
    """The version of this package, and a fingerprint of its code, which can change between two versions."""
    ours, kernels = Path(__file__).parents[1], Path(raas_kernels.__file__).parent
    paths = [
        *ours.glob("*.py"),
        *(path for folder in _IN_ROWS for path in (ours / folder).glob("*.py") if path.name not in _NOT_IN_ROWS),
        *(ours / "eval" / name for name in ("decoding.py", "sampling.py")),
        *kernels.rglob("*.py"),
        *kernels.rglob("*.json"),
    ]
    code = hash_of("".join(f"{path.name}\n{path.read_text(encoding='utf-8')}" for path in sorted(paths)))
    try:
        return f"{version('raas-cache')}, code {code}"
    except PackageNotFoundError:  # importable, but not installed
        return f"code {code}"


def of_methods(settings: Sequence[Setting]) -> dict[str, str]:
    """Fingerprints of what the settings name: policies that are not part of this package, and files with shares."""
    names = {setting.method for setting in settings} - CACHES.keys() - {DYNAMIC}
    shares = {path for setting in settings if isinstance(path := setting.options.get("shares"), str)}
    return {
        **{name: _of_policy(POLICIES[name]) for name in sorted(names)},
        **{f"shares={path}": hash_of(Path(path).read_text(encoding="utf-8")) for path in sorted(shares)},
    }


@cache
def _of_policy(policy: type[Policy]) -> str:
    classes = [cls for cls in policy.__mro__ if not cls.__module__.startswith("raas_cache.") and cls is not object]
    try:
        return hash_of("".join(inspect.getsource(cls) for cls in classes if cls.__module__ != "abc"))
    except (OSError, TypeError):  # the class is not in a file, so it may differ from the class of an earlier run
        return uuid4().hex

"""Looks into the model that uses a cache, where transformers does not hand it over: stack frames and configs.

`Cache.update` and `Cache.is_compileable` are told nothing of their model, and what they decide depends on it.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import TypeVar

import torch
from transformers import GenerationConfig, PreTrainedConfig


AnyModule = TypeVar("AnyModule", bound=torch.nn.Module)
# Where `generate` compiles its decode step by itself: GenerationMixin._valid_auto_compile_criteria of 5.17 to 5.24.
COMPILED_DEVICES = ("cuda", "xpu", "neuron", "tpu")


def _callers() -> FrameType | None:
    # Not this module's own frames: a snapshot of a frame's locals that holds the frame itself would be a cycle, and
    # keep the cache and its buffers alive until the garbage collector runs.
    return sys._getframe(2)


def calling_module(kind: type[AnyModule]) -> AnyModule | None:
    """The innermost module of a transformers model, of class `kind`, that is calling the cache."""
    frame = _callers()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, kind) and isinstance(getattr(caller, "config", None), PreTrainedConfig):
            return caller
        frame = frame.f_back
    return None


def is_asked_by_generate() -> bool:
    """Whether `generate` is asking, at its beginning, if it may compile: the one place where it looks for that."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(3):  # a property of the cache, or of one around it, may stand between
        if frame is not None and frame.f_code.co_name == "_valid_auto_compile_criteria":
            return True
        frame = frame.f_back if frame is not None else None
    return False


def generate_compiles(device: torch.device) -> bool | None:
    """Whether the `generate` that is calling compiles its decode step on `device`; None if none is calling."""
    frame = _callers()
    while frame is not None:
        settings = frame.f_locals.get("generation_config")
        if isinstance(settings, GenerationConfig):
            if settings.disable_compile:
                return False
            compile_config = settings.compile_config
            is_forced = compile_config is not None and bool(compile_config._compile_all_devices)
            return device.type in COMPILED_DEVICES or is_forced
        frame = frame.f_back
    return None

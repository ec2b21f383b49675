"""Chooses the engine of each call: Triton for CUDA tensors, torch for all others, or what `RAAS_KERNELS` says."""

import functools
import importlib
import os
from types import ModuleType

import torch


@functools.cache
def _load(name: str, device_type: str) -> ModuleType:
    if name == "torch":
        return importlib.import_module("raas_kernels.reference")
    if name != "triton":
        raise ValueError(f"RAAS_KERNELS={name!r} is not an engine: set it to 'torch' or 'triton', or unset it.")
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"RAAS_KERNELS='triton' was asked for tensors on {device_type!r}: Triton runs there only in its "
            "interpreter. Set TRITON_INTERPRET=1, move the model to a CUDA device, or set RAAS_KERNELS='torch'."
        )
    return importlib.import_module("raas_kernels.fused")


def engine(device: torch.device) -> ModuleType:
    """The module whose `append`, `attend`, `page_bounds` and `stamp` serve tensors on `device`.

    Raises:
        ValueError: `RAAS_KERNELS` names no engine, or one that cannot run on `device`.
    """
    default = "triton" if device.type == "cuda" else "torch"
    return _load(os.environ.get("RAAS_KERNELS", default), device.type)


def append(keys, *args, **kwargs):
    """See `raas_kernels.reference.append`."""
    return engine(keys.device).append(keys, *args, **kwargs)


def attend(query, *args, **kwargs):
    """See `raas_kernels.reference.attend`."""
    return engine(query.device).attend(query, *args, **kwargs)


def page_bounds(query, *args, **kwargs):
    """See `raas_kernels.reference.page_bounds`."""
    return engine(query.device).page_bounds(query, *args, **kwargs)


def stamp(priority, *args, **kwargs):
    """See `raas_kernels.reference.stamp`."""
    return engine(priority.device).stamp(priority, *args, **kwargs)

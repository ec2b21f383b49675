"""Chooses the engine of each call: Triton for CUDA tensors, torch for all others, or the one `RAAS_KERNELS` names.

Under `torch.compile`, a call of the torch engine is traced, so that the compiler can fuse it. A call of the Triton
engine is a custom operator `torch.ops.raas_kernels.*`, which breaks no graph and which a CUDA graph can capture.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .paged_kv import PagedKV


if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef


# The Hugging Face Hub loads this package under another name, perhaps beside the installed one. The operators of each
# are in a namespace of their own.
NAMESPACE = __spec__.parent

TENSORS = (
    "keys", "values", "bias", "positions", "priority", "evictable", "open_slot", "clock", "key_scales", "value_scales",
    "key_min", "key_max", "states", "open_keys", "value_min", "value_max", "blocks",
)  # fmt: skip
OPTIONAL = TENSORS[8:]


@functools.cache
def engine(device: torch.device) -> str:
    """The name of the engine that serves tensors on `device`: `"torch"` or `"triton"`, chosen at the first call.

    Raises:
        ValueError: `RAAS_KERNELS` names no engine, or one that cannot run on `device`.
    """
    name = os.environ.get("RAAS_KERNELS", "triton" if device.type == "cuda" else "torch")
    if name not in ("torch", "triton"):
        raise ValueError(f"RAAS_KERNELS={name!r} is not an engine: set it to 'torch' or 'triton', or unset it.")
    if name == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"RAAS_KERNELS='triton' cannot serve tensors on {device.type!r}: there, Triton only runs in its "
            "interpreter. Set TRITON_INTERPRET=1, move the model to a CUDA device, or set RAAS_KERNELS='torch'."
        )
    return name


def implementation(package: str, device: torch.device) -> ModuleType:
    """The module of an operator's `package` that serves tensors on `device`: its `reference` or its `triton`."""
    return _module(package, engine(device))


@functools.cache
def _module(package: str, engine: str) -> ModuleType:
    # Triton is imported at its first use: the torch engine also serves machines that have no Triton.
    return importlib.import_module(f"{package}.{'triton' if engine == 'triton' else 'reference'}")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_traceable(device: torch.device) -> bool:
    """Whether `torch.compile` should trace the operators for tensors on `device`, which the torch engine serves."""
    return engine(device) == "torch"


def flatten(kv: PagedKV) -> list[Tensor | int | None]:
    """The arguments that stand for `kv` in a custom operator, which cannot take a dataclass."""
    return [*(getattr(kv, name) for name in TENSORS), kv.page_size]


def operator(
    arguments: str, returns: str = "()", writes: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Registers a function of a PagedKV as the operator `torch.ops.raas_kernels.<name>`.

    The operator takes `flatten(kv)`, then the function's other arguments by position.

    Args:
        arguments, returns: the schema of the function's other arguments and of its results, as torch writes them.
        writes: the buffers of the PagedKV that the function writes.
    """
    buffers = []
    for index, name in enumerate(TENSORS):
        alias = f"(a{index}!)" if name in writes else ""
        buffers.append(f"Tensor{alias}{'?' if name in OPTIONAL else ''} {name}")
    schema = f"({', '.join(buffers)}, int page_size, {arguments}) -> {returns}"

    def register(function: Callable[..., Any]) -> CustomOpDef:
        def run(*flat: Any) -> Any:
            kv, others = unflatten(flat)
            return function(kv, *others)

        return torch.library.custom_op(
            f"{NAMESPACE}::{function.__name__.strip('_')}", run, mutates_args=writes, schema=schema
        )

    return register


def unflatten(flat: Sequence[Any]) -> tuple[PagedKV, Sequence[Any]]:
    """The PagedKV whose `flatten` is the beginning of an operator's arguments, and the other arguments."""
    tensors, page_size, others = flat[: len(TENSORS)], flat[len(TENSORS)], flat[len(TENSORS) + 1 :]
    return PagedKV(**dict(zip(TENSORS, tensors, strict=True)), page_size=page_size), others

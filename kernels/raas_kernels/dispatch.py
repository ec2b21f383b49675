"""Chooses the engine of each call: Triton for CUDA tensors, torch for all others, or what `RAAS_KERNELS` says.

Under `torch.compile` the calls are custom operators `torch.ops.raas_kernels.*`, which inductor sees around and a CUDA
graph captures; but what the torch engine does in plain torch it sees through, and fuses.
"""

import functools
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import reference, visibility
from .reference import Reduction, Scales
from .visibility import Held


# The Hub loads a kernel as a module of another name, maybe beside this package installed: each has its own operators.
NAMESPACE = __spec__.parent


@functools.cache
def engine(device: torch.device) -> ModuleType:
    """The module whose `append`, `attend`, `page_bounds` and `stamp` serve tensors on `device`; chosen at first use.

    Raises:
        ValueError: `RAAS_KERNELS` names no engine, or one that cannot run on `device`.
    """
    name = os.environ.get("RAAS_KERNELS", "triton" if device.type == "cuda" else "torch")
    if name == "torch":
        return reference
    if name != "triton":
        raise ValueError(f"RAAS_KERNELS={name!r} is not an engine: set it to 'torch' or 'triton', or unset it.")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"RAAS_KERNELS='triton' was asked for tensors on {device.type!r}: Triton runs there only in its "
            "interpreter. Set TRITON_INTERPRET=1, move the model to a CUDA device, or set RAAS_KERNELS='torch'."
        )
    from . import fused  # not sooner: the torch engine serves also where there is no Triton

    return fused


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_traceable(device: torch.device) -> bool:
    return engine(device) is reference


@torch.library.custom_op(
    f"{NAMESPACE}::append",
    mutates_args=(
        "keys", "values", "bias", "positions", "priority", "open_slot", "clock", "minima", "maxima", "key_scales",
        "value_scales",
    ),
)  # fmt: skip
def _append(
    keys: Tensor, values: Tensor, bias: Tensor, positions: Tensor, priority: Tensor, open_slot: Tensor, clock: Tensor,
    key: Tensor, value: Tensor, page_size: int, minima: Tensor | None, maxima: Tensor | None,
    key_scales: Tensor | None, value_scales: Tensor | None, visible: Tensor | None, may_close: bool = False,
) -> None:  # fmt: skip
    scales = None if key_scales is None else (key_scales, value_scales)
    store = keys, values, bias, positions, priority, open_slot, clock
    engine(keys.device).append(*store, key, value, page_size, minima, maxima, scales, visible, may_close)


@torch.library.custom_op(f"{NAMESPACE}::attend", mutates_args=())
def _attend(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float, page_size: int, softcap: float | None,
    sinks: Tensor | None, table: Tensor | None, key_scales: Tensor | None, value_scales: Tensor | None,
    page_score: str, group_score: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    scales = None if key_scales is None else (key_scales, value_scales)
    found: tuple[Tensor, Tensor] = engine(query.device).attend(
        query, keys, values, bias, scale, page_size, softcap, sinks, table, scales, page_score, group_score
    )
    return found


@_attend.register_fake
def _(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float, page_size: int, softcap: float | None,
    sinks: Tensor | None, table: Tensor | None, *_: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    pages = keys.shape[2] // page_size if table is None else table.shape[2]
    accumulate = torch.promote_types(query.dtype, torch.float32)
    output = query.new_empty(*query.shape[:3], values.shape[-1])
    return output, query.new_empty(*keys.shape[:2], pages, dtype=accumulate)


@torch.library.custom_op(f"{NAMESPACE}::page_bounds", mutates_args=())
def _page_bounds(
    query: Tensor, minima: Tensor, maxima: Tensor, bias: Tensor, scale: float, page_size: int, softcap: float | None
) -> Tensor:
    bounds: Tensor = engine(query.device).page_bounds(query, minima, maxima, bias, scale, page_size, softcap)
    return bounds


@_page_bounds.register_fake
def _(query: Tensor, minima: Tensor, *_: object) -> Tensor:
    return query.new_empty(minima.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))


@torch.library.custom_op(f"{NAMESPACE}::stamp", mutates_args=("priority",))
def _stamp(
    priority: Tensor, scores: Tensor, first: Tensor, clock: Tensor, alpha: float | None, top_ratio: float | None
) -> None:
    engine(priority.device).stamp(priority, scores, first, clock, alpha, top_ratio)


def append(
    keys: Tensor, values: Tensor, bias: Tensor, positions: Tensor, priority: Tensor, open_slot: Tensor, clock: Tensor,
    key: Tensor, value: Tensor, page_size: int, minima: Tensor | None = None, maxima: Tensor | None = None,
    scales: Scales | None = None, visible: Tensor | None = None, may_close: bool = False,
) -> None:  # fmt: skip
    """See `raas_kernels.reference.append`."""
    inputs = keys, values, bias, positions, priority, open_slot, clock, key, value, page_size, minima, maxima
    if not torch.compiler.is_compiling():
        engine(keys.device).append(*inputs, scales, visible, may_close)
    elif _is_traceable(keys.device):
        reference.append_in_graph(*inputs, scales, visible, may_close)
    else:
        _append(*inputs, *(scales or (None, None)), visible, may_close)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float, page_size: int,
    softcap: float | None = None, sinks: Tensor | None = None, table: Tensor | None = None,
    scales: Scales | None = None, page_score: Reduction = "max", group_score: Reduction = "max",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `raas_kernels.reference.attend`."""
    inputs = query, keys, values, bias, scale, page_size, softcap, sinks, table
    if torch.compiler.is_compiling() and not _is_traceable(query.device):
        found: tuple[Tensor, Tensor] = _attend(*inputs, *(scales or (None, None)), page_score, group_score)
        return found
    run = reference if torch.compiler.is_compiling() else engine(query.device)
    found = run.attend(*inputs, scales, page_score, group_score)
    return found


def page_bounds(
    query: Tensor, minima: Tensor, maxima: Tensor, bias: Tensor, scale: float, page_size: int,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """See `raas_kernels.reference.page_bounds`."""
    inputs = query, minima, maxima, bias, scale, page_size, softcap
    if torch.compiler.is_compiling():
        bounds: Tensor = (reference.page_bounds if _is_traceable(query.device) else _page_bounds)(*inputs)
    else:
        bounds = engine(query.device).page_bounds(*inputs)
    return bounds


def stamp(
    priority: Tensor, scores: Tensor, first: Tensor, clock: Tensor, alpha: float | None, top_ratio: float | None
) -> None:
    """See `raas_kernels.reference.stamp`."""
    inputs = priority, scores, first, clock, alpha, top_ratio
    if torch.compiler.is_compiling():
        (reference.stamp if _is_traceable(priority.device) else _stamp)(*inputs)
    else:
        engine(priority.device).stamp(*inputs)


def show(layers: Sequence[Held], visible: Tensor) -> None:
    """See `raas_kernels.visibility.show`."""
    if torch.compiler.is_compiling() or engine(visible.device) is reference:
        visibility.show(layers, visible)
        return
    from . import visibility_triton

    visibility_triton.show(layers, visible)

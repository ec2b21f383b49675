"""The attention kernel alone: bytes of K and V per second, compared with a copy and with the best dense kernel."""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice, product, repeat
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedConfig

from raas_kernels import PagedKV, attend

from ..common.reporting import markdown
from .filling import kv_shape
from .steps import WARMUP, Timing


BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
Inputs = tuple[torch.Tensor, ...]
Kernel = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class KernelRow:
    """The measurement of one shape. Times are in milliseconds, bandwidths in bytes per second.

    Args:
        group: query heads per KV head.
        bytes_read: bytes of keys and values of all tokens: `2 * batch * kv_heads * budget * head_dim` elements.
        timing: time of calls of `raas_kernels.attend`, which returns the output and the page scores.
        copy_bandwidth: bandwidth of `copy_` between two large tensors, counting bytes read and bytes written.
        dense: name of the fastest dense attention kernel over the same tokens. It returns no scores.
        dense_timing: time of calls of that kernel.
    """

    batch: int
    kv_heads: int
    group: int
    head_dim: int
    budget: int
    page_size: int
    dtype: str
    bytes_read: int
    timing: Timing
    copy_bandwidth: float
    dense: str
    dense_timing: Timing

    @property
    def bandwidth(self) -> float:
        return 1e3 * self.bytes_read / self.timing.median

    @property
    def share(self) -> float:
        """Bandwidth as a share of the copy bandwidth."""
        return self.bandwidth / self.copy_bandwidth


@torch.no_grad()
def run_kernels(
    config: PreTrainedConfig,
    *,
    batches: Sequence[int],
    budgets: Sequence[int],
    page_size: int,
    repeats: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
) -> list[KernelRow]:
    """Time `raas_kernels.attend` of one layer, for each batch and budget.

    The calls use several buffers in turn, which together do not fit in the last-level cache of the device.

    Args:
        config: config with the numbers of KV heads and query heads, and the head size.
        budgets: numbers of tokens, multiples of `page_size`.
        repeats: timed calls of each kernel, at least 2.

    Raises:
        ValueError: a budget is not a multiple of `page_size`, `page_size` is not a power of two, or a number is too
            small.
    """
    if page_size < 1 or page_size & (page_size - 1):
        raise ValueError(f"page_size={page_size} must be a power of two: try 16.")
    for budget in budgets:
        if budget < 1 or budget % page_size:
            raise ValueError(f"budget={budget} must be whole pages: a multiple of page_size={page_size}.")
    for name, least, value in (("repeats", 2, repeats), ("batch", 1, min(batches))):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}.")
    _, heads, kv_heads, head_dim = kv_shape(config)
    generator = torch.Generator(device).manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=dtype, device=device)
    llc = last_level_cache(device)
    copy_bandwidth = _copy_bandwidth(max(8 * llc, 1 << 28), repeats, device)
    rows = []
    for batch, budget in product(batches, budgets):
        bytes_read = 2 * batch * kv_heads * budget * head_dim * dtype.itemsize
        query = draw(batch, heads, 1, head_dim)
        keys, values = (draw(batch, kv_heads, budget, head_dim) for _ in range(2))
        buffers = [(query, keys.clone(), values.clone()) for _ in range(max(2, -(-4 * llc // bytes_read)))]
        caches = [(query, PagedKV.filled(keys, values, page_size)) for query, keys, values in buffers]
        ours = partial(_attend, scale=head_dim**-0.5)
        turns = cycle(buffers)
        dense = {name: _timing(kernel, turns, repeats) for name, kernel in _dense_kernels(buffers[0]).items()}
        best = min(dense, key=lambda name: dense[name].median)
        rows.append(
            KernelRow(
                batch,
                kv_heads,
                heads // kv_heads,
                head_dim,
                budget,
                page_size,
                str(dtype).removeprefix("torch."),
                bytes_read,
                _timing(ours, cycle(caches), repeats),
                copy_bandwidth,
                best,
                dense[best],
            )
        )
    return rows


def _attend(query: torch.Tensor, kv: PagedKV, scale: float) -> torch.Tensor:
    return attend(kv, query, scale)[0]


def last_level_cache(device: torch.device) -> int:
    """Size in bytes of the largest cache of the device; 64 MiB if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.removesuffix("K")) * 1024 for size in sizes if size.endswith("K")), default=1 << 26)


def _timing(kernel: Callable[..., object], turns: Iterator[tuple[Any, ...]], repeats: int) -> Timing:
    """Time `repeats` calls, each with the next inputs from `turns`, after a few untimed calls."""
    calls = list(islice(turns, WARMUP + repeats))
    device = calls[0][0].device
    if device.type != "cuda":
        times = []
        for inputs in calls:
            started = time.perf_counter()
            kernel(*inputs)
            times.append(1e3 * (time.perf_counter() - started))
        return Timing.of(times[WARMUP:])
    for inputs in calls[:WARMUP]:
        kernel(*inputs)
    torch.cuda.synchronize(device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda._sleep(1_000_000 * repeats)  # the host queues all calls during this sleep, so the device never waits
    for inputs, (start, end) in zip(calls[WARMUP:], events, strict=True):
        start.record()
        kernel(*inputs)
        end.record()
    torch.cuda.synchronize(device)
    return Timing.of([start.elapsed_time(end) for start, end in events])


def _copy_bandwidth(size: int, repeats: int, device: torch.device) -> float:
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    copying = _timing(torch.Tensor.copy_, repeat((target, source)), repeats)
    return 2e3 * size / copying.median


def _dense_kernels(inputs: Inputs) -> dict[str, Kernel]:
    """All dense attention kernels that accept these inputs: query, keys and values.

    Query `[batch, heads, 1, head_dim]`; keys and values `[batch, kv_heads, tokens, head_dim]`.
    """

    def sdpa(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    def packed(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, backend: SDPBackend) -> torch.Tensor:
        # Treat the query heads of a KV head as several queries, so that kernels without GQA read K and V once, too.
        with sdpa_kernel(backend):
            grouped = query.view(*keys.shape[:2], -1, query.shape[-1])
            return scaled_dot_product_attention(grouped, keys, values).view_as(query)

    kernels: dict[str, Kernel] = {}
    for name, backend in BACKENDS.items():
        kernels[f"sdpa {name}"] = partial(sdpa, backend=backend)
        kernels[f"sdpa {name}, packed"] = partial(packed, backend=backend)
    if inputs[0].is_cuda:
        kernels["flex_attention"] = partial(torch.compile(flex_attention, dynamic=False), enable_gqa=True)
    accepting: dict[str, Kernel] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a backend warns why it refuses the inputs
        for name, kernel in kernels.items():
            try:
                kernel(*inputs)
            except Exception:  # a backend raises RuntimeError, a compiler many kinds of errors
                continue
            accepting[name] = kernel
    return accepting


def kernel_table(rows: list[KernelRow]) -> str:
    """A Markdown table with one line per shape."""
    header = [
        "batch x KV heads x group x head", "budget", "page", "dtype", "us (p10 to p90)", "GB/s", "copy GB/s", "share",
        "best dense kernel", "dense us", "ratio",
    ]  # fmt: skip
    lines = [
        [
            f"{row.batch} x {row.kv_heads} x {row.group} x {row.head_dim}",
            f"{row.budget:,}",
            str(row.page_size),
            row.dtype,
            f"{1e3 * row.timing.median:.1f} ({1e3 * row.timing.p10:.1f} to {1e3 * row.timing.p90:.1f})",
            f"{row.bandwidth / 1e9:,.1f}",
            f"{row.copy_bandwidth / 1e9:,.1f}",
            f"{row.share:.0%}",
            row.dense,
            f"{1e3 * row.dense_timing.median:.1f}",
            f"{row.timing.median / row.dense_timing.median:.2f}",
        ]
        for row in rows
    ]
    return markdown(header, lines)

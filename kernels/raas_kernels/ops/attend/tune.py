"""Finds the fastest launch of `attend` for the common shapes on this GPU: `python -m raas_kernels.ops.attend.tune`.

Every shape runs from a CUDA graph, over buffers that do not fit the L2 cache together, as the layers of a model do not.
Query groups up to 16 are padded to the same tile, and the page size changes no load, so that neither needs shapes of
its own. Prints the fastest launch of each shape beside the card's copy bandwidth, and writes configs.json (or `--out`).
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from ...paged_kv import PagedKV
from .configs import CONFIGS_FILE, Config, default_config
from .triton import attend


ROWS = (8, 32, 128, 256)
SLOTS = (1024, 2048, 4096, 8192)
HEAD_SIZES = (128, 64)
GROUP, PAGE = 4, 16
COLD_BYTES = 256 << 20  # several times the L2 cache of an H100
Inputs = tuple[PagedKV, torch.Tensor]


def candidates(rows: int, head_size: int) -> list[Config]:
    """Launches worth a try; the default first."""
    slices = [count for count in (1, 2, 4, 8, 16) if count == 1 or rows * count <= 1024]
    tried = itertools.product((64, 128), (4, 8), (2, 3, 4), (rows * count for count in slices))
    return [default_config(head_size, 2), *itertools.starmap(Config, tried)]


def make_inputs(rows: int, slots: int, head_size: int, dtype: torch.dtype) -> list[Inputs]:
    """Caches of one batch row of `rows` KV heads, and queries; enough of them to be cold."""
    copies = max(2, COLD_BYTES // (rows * slots * head_size * dtype.itemsize * 2))

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device="cuda")

    contents = 1, rows, slots, head_size
    return [
        (PagedKV.filled(draw(*contents), draw(*contents), PAGE), draw(1, rows * GROUP, 1, head_size))
        for _ in range(min(copies, 64))
    ]


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """A function that replays the launches of `run` from a CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def seconds_of(run: Callable[[], object], repeats: int = 3) -> float:
    """Median duration of `run` on the GPU."""
    times: list[float] = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), repeats=10)


def tune(rows: int, slots: int, head_size: int, dtype: torch.dtype) -> tuple[Config, float, float]:
    """The fastest launch for a shape, its seconds a call, and the default launch's seconds a call."""
    inputs = make_inputs(rows, slots, head_size, dtype)
    seconds: dict[Config, float] = {}
    for config in candidates(rows, head_size):

        def run(config: Config = config) -> None:
            for kv, query in inputs:
                attend(kv, query, head_size**-0.5, config=config)

        try:
            seconds.setdefault(config, seconds_of(captured(run)) / len(inputs))
        except triton.runtime.errors.OutOfResources:
            continue
    best = min(seconds, key=lambda config: seconds[config])
    return best, seconds[best], next(iter(seconds.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=CONFIGS_FILE)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here to tune for.")
    dtype, bandwidth = torch.bfloat16, copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copies {bandwidth / 1e9:.0f} GB/s", flush=True)
    shapes = []
    for head_size, rows, slots in itertools.product(HEAD_SIZES, ROWS, SLOTS):
        config, seconds, default = tune(rows, slots, head_size, dtype)
        share = rows * slots * head_size * dtype.itemsize * 2 / seconds / bandwidth
        print(f"{head_size=} {rows=} {slots=}: {seconds * 1e6:.1f} us, {share:.0%} of copying, "
              f"default {default * 1e6:.1f} us; {config}", flush=True)  # fmt: skip
        shape = {"head_size": head_size, "itemsize": dtype.itemsize, "rows": rows, "slots": slots}
        shapes.append({**shape, "config": asdict(config)})
        write(args.out, shapes)  # after every shape, because a run may be cut off


def write(path: Path, shapes: list[dict[str, Any]]) -> None:
    lines = ",\n".join("    " + json.dumps(shape) for shape in shapes)
    device = f'"device": "{torch.cuda.get_device_name()}", "capability": {list(torch.cuda.get_device_capability())}'
    path.write_text(f'{{\n  {device},\n  "shapes": [\n{lines}\n  ]\n}}\n')


if __name__ == "__main__":
    main()

"""What the benchmarks share: caches of a usual shape, timing, and the comparison of two commits.

Each script times one operator, for several cases, on a GPU where there is one and otherwise on the CPU:

    python kernels/benchmarks/attend.py                     this checkout
    python kernels/benchmarks/attend.py --base main         this checkout beside the commit `main`, with ratios

With `--base`, the script of that commit runs on the package of that commit, in a temporary git worktree. The two
commits take turns, each time in a process of its own, so that a busy machine slows both down.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "kernels"))  # the operators of this checkout, whatever is installed

from raas_kernels import PagedKV, pack_page, pack_values, quantize  # noqa: E402


PAGE, HEADS, GROUP, HEAD_SIZE = 16, 8, 4, 128
WARMUP = 5
COLD_BYTES = {"cuda": 256 << 20, "cpu": 64 << 20}  # more than the last cache level of the processor
Case = tuple[str, Callable[[], Callable[[], object]]]
"""A name, and a function that prepares the case and returns the call to time."""


def make_kv(
    batch: int, budget: int, options: argparse.Namespace, heads: int = HEADS, bounds: bool = False, states: bool = False
) -> PagedKV:
    """A cache that is full of visible tokens.

    Args:
        heads: KV heads.
        bounds, states: whether the cache has key_min and key_max, and numbers of a policy.
    """
    shape = batch, heads, budget, HEAD_SIZE
    keys, values = (torch.randn(shape, dtype=options.dtype, device=options.device) for _ in range(2))
    kv = PagedKV.filled(keys, values, PAGE)
    if bounds:
        pages = keys.unflatten(2, (-1, PAGE))
        kv.key_min, kv.key_max = pages.amin(3), pages.amax(3)
    if states:
        kv.states = torch.zeros(batch, heads, kv.num_pages, 2, dtype=torch.float64, device=options.device)
    return kv


def encode(kv: PagedKV, code: torch.dtype) -> None:
    """Replace the keys and values of `make_kv` by codes: int8, float8_e4m3fn, or uint8 for 4 bits."""
    if code != torch.uint8:
        kv.keys, kv.key_scales = quantize(kv.keys, code)
        kv.values, kv.value_scales = quantize(kv.values, code)
        return
    pages = kv.keys.unflatten(2, (-1, PAGE))
    codes, kv.key_min, kv.key_max = pack_page(pages, torch.zeros_like(pages[..., 0], dtype=torch.bool))
    kv.keys, kv.open_keys = codes.flatten(2, 3), pages[:, :, -1].contiguous()
    kv.values, kv.value_min, kv.value_max = pack_values(kv.values)


def move_to_blocks(kv: PagedKV) -> None:
    """Move the pages of `make_kv` to shuffled blocks, as in a server (`PagedKV.blocks`)."""
    batch, pages, device = len(kv.bias), kv.num_pages, kv.bias.device
    block = 1 + torch.randperm(batch * pages, device=device)
    for name in ("keys", "values", "key_scales", "value_scales", "value_min", "value_max"):
        rows = getattr(kv, name)
        if rows is not None:
            by_page = rows.unflatten(2, (-1, PAGE)).transpose(1, 2).flatten(0, 1)  # [B * P, H, S, ...]
            pool = rows.new_zeros(1 + batch * pages, *by_page.shape[1:])
            pool[block] = by_page
            setattr(kv, name, pool)
    kv.blocks = block.view(batch, pages).int()


def make_query(batch: int, options: argparse.Namespace) -> torch.Tensor:
    return torch.randn(batch, HEADS * GROUP, 1, HEAD_SIZE, dtype=options.dtype, device=options.device)


def cold_copies(batch: int, budget: int, options: argparse.Namespace, heads: int = HEADS) -> int:
    """How many caches it takes that each is out of the processor's cache when its turn comes, as a model's layers."""
    size = 2 * batch * heads * budget * HEAD_SIZE * options.dtype.itemsize
    return max(2, COLD_BYTES[options.device.type] // size)


def in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A call that makes the next of `calls` each time."""
    turns = cycle(calls)
    return lambda: next(turns)()


def seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median duration of a call: on a GPU the device's time, otherwise the wall clock."""
    for _ in range(WARMUP):
        call()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000 * repeats)  # the host queues the calls meanwhile, so that the device never waits
    for start_event, end_event in events:
        start_event.record()
        call()
        end_event.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def main(script: str, description: str, make_cases: Callable[[argparse.Namespace], list[Case]]) -> None:
    """The command line of a benchmark.

    Args:
        script: its `__file__`.
        make_cases: returns the cases for the options: `device`, `dtype`, `repeats`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", metavar="REF", help="a commit, branch or tag to compare this checkout with")
    parser.add_argument("--rounds", type=int, default=3, help="with --base, how often the two commits take turns")
    parser.add_argument("--json", action="store_true", help="print the seconds of each case as JSON")
    options = parse(parser)
    if options.base is not None:
        _print_comparison(Path(script).resolve(), options)
        return
    found: dict[str, float] = {}
    with torch.no_grad():
        for name, prepare in make_cases(options):
            found[name] = seconds(prepare(), options.repeats, options.device)
            if not options.json:
                print(f"{name:48} {found[name] * 1e6:10.1f} us", flush=True)
    if options.json:
        print(json.dumps(found))


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line's options: the parser's own, and `device`, `dtype`, `repeats` and `threads`."""
    parser.add_argument("--device", type=torch.device, help="default: cuda where there is a GPU, otherwise cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU")
    parser.add_argument("--repeats", type=int, default=100, help="calls to time of each case")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    options = parser.parse_args()
    if options.device is None:
        options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = options.dtype or ("bfloat16" if options.device.type == "cuda" else "float32")
    options.dtype = getattr(torch, name)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return options


def _print_comparison(script: Path, options: argparse.Namespace) -> None:
    """Run `script` here and at `options.base` in turn, and print each case's medians and their ratio."""
    arguments = [f"--device={options.device}", f"--dtype={str(options.dtype).removeprefix('torch.')}", "--json"]
    arguments += [f"--repeats={options.repeats}", f"--threads={options.threads}"]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        added = subprocess.run(
            ["git", "-C", ROOT, "worktree", "add", "--detach", tree, options.base], capture_output=True, text=True
        )
        if added.returncode:
            sys.exit(f"--base {options.base!r} is no commit of this repository: {added.stderr.strip()}")
        try:
            base = tree / script.relative_to(ROOT)
            if not base.exists():
                sys.exit(f"--base {options.base!r} has no {script.relative_to(ROOT)}: name a commit that has it.")
            rounds = [[_run(path, arguments) for path in (script, base)] for _ in range(options.rounds)]
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)
    print(f"{'case':48} {'here':>13} {options.base[:12]:>13} {'ratio':>7}")
    for case in rounds[0][0]:
        if case not in rounds[0][1]:
            print(f"{case:48} {'':13} {'no such case':>13}")
            continue
        here, there = (statistics.median(found[side][case] for found in rounds) for side in (0, 1))
        print(f"{case:48} {here * 1e6:10.1f} us {there * 1e6:10.1f} us {here / there:7.2f}")


def _run(script: Path, arguments: list[str]) -> dict[str, float]:
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{script} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout)
    return found

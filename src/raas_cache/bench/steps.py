"""Time decode steps of one model with different caches, which take turns step by step."""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from ..common.measure import kv_nbytes
from ..common.upstream import CACHE_ARGUMENT
from .filling import Filler, new_cache, policy_of
from .peer import Peer


DYNAMIC, STATIC_SEEN, STATIC_BUDGET = BASELINES = "dynamic", "StaticCache(seen)", "StaticCache(budget)"
KVPRESS = "kvpress"
MODES = ("eager", "compiled")
WARMUP = 3
"""Untimed first steps of each copy: compilation, and the runs that record a CUDA graph."""
ONE_COPY = 1 << 30
"""From this size in bytes, one copy of a cache is enough: keys and values do not fit in the processor's cache."""


@dataclass(frozen=True)
class Grid:
    """The measurements to make. Each combination of `seen`, `batches`, `budgets` and `modes` is a cell.

    Args:
        methods: names that `from_name` accepts, with options after colons, as in `raas:alpha=0.1`. `BASELINES` are
            always timed and need not be named.
        seen: numbers of tokens that the caches have seen before the first step.
        batches: numbers of rows.
        budgets: numbers of tokens that each row, layer and KV head holds.
        modes: `"eager"` or `"compiled"`. In `"compiled"`, caches that cannot be compiled run eagerly.
        page_size: tokens per page.
        steps: timed steps per method.
        copies: caches per method and cell. They are used in turn, so that keys and values of the last step are not in
            the processor's cache. A cache above `ONE_COPY` bytes has a single copy.
        seed: seed of all random numbers.

    Raises:
        ValueError: a method or mode is unknown, or a number is out of range.
    """

    methods: tuple[str, ...]
    seen: tuple[int, ...]
    batches: tuple[int, ...] = (1,)
    budgets: tuple[int, ...] = (1024,)
    modes: tuple[str, ...] = MODES[:1]
    page_size: int = 16
    steps: int = 40
    copies: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if KVPRESS in self.methods:
            raise ValueError(
                "method='kvpress' runs on an older transformers than this package: leave it out, and pass the Python "
                "of an environment with kvpress as --peer-python, or as peer=Peer(python) to run."
            )
        methods = tuple(name for name in dict.fromkeys(self.methods) if name not in BASELINES)
        object.__setattr__(self, "methods", methods)
        for method in self.methods:
            new_cache(method, max(self.budgets), page_size=self.page_size)
        for mode in self.modes:
            if mode not in MODES:
                raise ValueError(f"mode={mode!r} is unknown: use one of {', '.join(map(repr, MODES))}.")
        for name, least, values in (
            ("seen", 1, self.seen),
            ("batch", 1, self.batches),
            ("budget", max(2 * self.page_size, self.turns + 1), self.budgets),
            ("steps", 2, [self.steps]),
            ("copies", 1, [self.copies]),
        ):
            for value in values:
                if value < least:
                    why = " (two pages, and more than the steps of a cell)" if name == "budget" else ""
                    raise ValueError(f"{name}={value} must be at least {least}{why}.")

    @property
    def turns(self) -> int:
        """Number of steps of each method in a cell, including the untimed steps."""
        return WARMUP * self.copies + self.steps


@dataclass(frozen=True)
class Case:
    """What a row measures: a method of the grid, one of `BASELINES` or `"kvpress"`, in one cell."""

    method: str
    batch: int
    budget: int
    seen: int
    mode: str


@dataclass(frozen=True)
class Timing:
    """Milliseconds per decode step (one token for every row): median, 10th and 90th percentile, and all steps."""

    median: float
    p10: float
    p90: float
    steps: list[float]

    @classmethod
    def of(cls, steps: list[float]) -> "Timing":
        """The timing of at least two steps."""
        deciles = statistics.quantiles(steps, n=10, method="inclusive")
        return cls(statistics.median(steps), deciles[0], deciles[-1], steps)


@dataclass(frozen=True)
class StepRow:
    """The measurement of one method in one cell.

    Args:
        ran: `"eager"`, `"compiled"` or `"does not fit"`.
        kv_bytes: bytes of keys and values that one cache holds before its first step; an estimate if it does not fit.
        timing: None if the cache does not fit in memory.
        ratios: baseline -> median ratio to the baseline's step in the same turn; None if one of the two does not fit.
    """

    case: Case
    ran: str
    kv_bytes: int
    timing: Timing | None
    ratios: dict[str, float | None]


Forward = Callable[..., object]
Step = Callable[[int, int], float]
"""Arguments: the index of the copy of the cache, and the position of the token. Returns milliseconds."""


@dataclass
class _Contestant:
    """A method in a cell: the number of copies of its cache, the function that runs a step, and the times so far."""

    copies: int
    step: Step
    ran: str
    steps: list[float] = field(default_factory=list)


def free_bytes(device: torch.device) -> int:
    """Bytes that new tensors on `device` can use. On a CPU: `MemAvailable` of Linux, or no limit elsewhere."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), sys.maxsize)


def run(model: PreTrainedModel, grid: Grid, peer: Peer | None = None) -> Iterator[list[StepRow]]:
    """Time every cell of the grid.

    Args:
        peer: is timed in every cell as the method `"kvpress"`.

    Yields:
        The rows of each cell when the cell is complete: `BASELINES`, then the methods.

    Raises:
        ValueError: the process of `peer` has ended.
    """
    if peer is not None:
        peer.build(model, grid.seed)
    for batch, budget in product(grid.batches, grid.budgets):
        filler = Filler(
            model.config,
            batch=batch,
            budget=budget,
            page_size=grid.page_size,
            dtype=model.dtype,
            device=model.device,
            seed=grid.seed,
        )
        for seen, mode in product(grid.seen, grid.modes):
            yield _run_cell(model, grid, filler, seen, mode, peer)
            torch._dynamo.reset()
            gc.collect()
            if model.device.type == "cuda":
                torch.cuda.empty_cache()


def _run_cell(
    model: PreTrainedModel, grid: Grid, filler: Filler, seen: int, mode: str, peer: Peer | None
) -> list[StepRow]:
    tokens = {DYNAMIC: seen, STATIC_SEEN: seen, STATIC_BUDGET: filler.budget}
    tokens |= {method: filler.budget if policy_of(method).evicts else seen for method in grid.methods}
    if peer is not None:
        tokens[KVPRESS] = filler.budget
    needed = {name: filler.nbytes(held) for name, held in tokens.items()}
    copies = {name: 1 if size >= ONE_COPY else grid.copies for name, size in needed.items()}
    fitting = _that_fit(model, {name: copies[name] * size for name, size in needed.items()})

    contestants: dict[str, _Contestant] = {}
    with ExitStack() as stack:
        compiled = _compiled(model, stack) if mode == "compiled" else None
        for name in fitting:
            if name == KVPRESS and peer is not None:
                needed[name] = peer.fill(batch=filler.batch, budget=filler.budget, seen=seen, copies=copies[name])
                contestants[name] = _Contestant(copies[name], peer.step, "eager")
                continue
            caches = [_new_cache(filler, name, seen, -(-grid.turns // copies[name])) for _ in range(copies[name])]
            forward, ran = (compiled, "compiled") if compiled and caches[0].is_compileable else (model, "eager")
            needed[name] = kv_nbytes(caches[0])
            contestants[name] = _Contestant(len(caches), partial(_step, filler, caches, forward), ran)
        # A peer process has its own weights. Read the weights here before each turn, as a step of this process would.
        between = partial(_read_weights, model, filler) if KVPRESS in contestants else None
        _take_turns(list(contestants.values()), grid, seen, between)

    rows = []
    for name, size in needed.items():
        case = Case(name, filler.batch, filler.budget, seen, mode)
        ours = contestants.get(name)
        ratios = {base: _ratio(ours, contestants.get(base)) for base in BASELINES}
        timing = Timing.of(ours.steps) if ours else None
        rows.append(StepRow(case, ours.ran if ours else "does not fit", size, timing, ratios))
    return rows


def _that_fit(model: PreTrainedModel, needed: dict[str, int]) -> list[str]:
    """The caches that fit in memory together, smallest first. A tenth of the memory stays free for the steps."""
    weights = sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))
    room, fitting = 0.9 * (free_bytes(model.device) + weights) - weights, set()
    # If two caches have the same size, StaticCache comes before DynamicCache, because it can be compiled.
    for name, size in sorted(needed.items(), key=lambda item: (item[1], item[0] == DYNAMIC)):
        if size <= room:
            fitting.add(name)
            room -= size
    return [name for name in needed if name in fitting]


def _new_cache(filler: Filler, name: str, seen: int, steps: int) -> Cache:
    """Create and fill the cache of a method or baseline, with room for `steps` more tokens."""
    cache: Cache
    if name == STATIC_SEEN:
        cache = StaticCache(config=filler.config, max_cache_len=seen + steps)
    elif name == STATIC_BUDGET:
        cache, seen = StaticCache(config=filler.config, max_cache_len=filler.budget), min(seen, filler.budget - steps)
    elif name == DYNAMIC:
        cache = DynamicCache(config=filler.config)
    else:
        return filler.paged(name, seen)
    filler.feed(cache, seen)
    return cache


def _compiled(model: PreTrainedModel, stack: ExitStack) -> Forward:
    """Compile the model's forward once for all caches of a cell. Each shape is compiled separately."""
    stack.enter_context(torch._dynamo.config.patch(recompile_limit=64))
    mode = "reduce-overhead" if model.device.type == "cuda" else "default"
    forward = torch.compile(model.forward, fullgraph=True, dynamic=False, mode=mode)

    def step(**inputs: Any) -> object:
        torch.compiler.cudagraph_mark_step_begin()
        return forward(**inputs)

    return step


@torch.no_grad()
def _step(filler: Filler, caches: list[Cache], forward: Forward, copy: int, position: int) -> float:
    """Run a decode step with one copy of a cache. Returns milliseconds, with a synchronized device before and after."""
    device = filler.device
    synchronize: Callable[[], None] = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    token = torch.ones(filler.batch, 1, dtype=torch.int64, device=device)  # [batch, 1]
    inputs = {"input_ids": token, "position_ids": torch.full_like(token, position), CACHE_ARGUMENT: caches[copy]}
    synchronize()
    started = time.perf_counter()
    forward(**inputs)
    synchronize()
    return 1e3 * (time.perf_counter() - started)


@torch.no_grad()
def _read_weights(model: PreTrainedModel, filler: Filler) -> None:
    """Run a forward of one token without a cache."""
    model(input_ids=torch.ones(filler.batch, 1, dtype=torch.int64, device=filler.device), use_cache=False)


def _take_turns(
    contestants: list[_Contestant], grid: Grid, seen: int, between: Callable[[], None] | None = None
) -> None:
    """Run one step of each method in turn, so that other load slows all methods equally. `between` is not timed."""
    for turn in range(grid.turns):
        if between is not None:
            between()
        for contestant in contestants:
            step, copy = divmod(turn, contestant.copies)
            elapsed = contestant.step(copy, seen + step)
            if turn >= WARMUP * grid.copies:
                contestant.steps.append(elapsed)


def _ratio(ours: _Contestant | None, base: _Contestant | None) -> float | None:
    if ours is None or base is None:
        return None
    return statistics.median(mine / theirs for mine, theirs in zip(ours.steps, base.steps, strict=True))

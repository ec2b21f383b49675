"""Times decode steps of one model with different caches, which take turns step by step."""

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
from ..methods.registry import POLICIES, from_name
from .filling import Filler
from .peer import Peer


DENSE, STATIC_SEEN, STATIC_BUDGET = BASELINES = "DynamicCache", "StaticCache(seen)", "StaticCache(budget)"
KVPRESS = "kvpress"
MODES = ("eager", "compiled")
WARMUP = 3
"""Steps of each copy before time counts: compilation, and the runs that record a CUDA graph."""
ONE_COPY = 1 << 30
"""Bytes of K and V from which a cache needs no second copy: a step that reads so much leaves none of it warm."""


@dataclass(frozen=True)
class Plan:
    """What to time: every combination of `seen`, `batches`, `budgets` and `modes` is a cell.

    Args:
        methods: names that `from_name` takes. `BASELINES` are always timed.
        seen: tokens that the caches have seen before their first step.
        batches: rows.
        budgets: tokens to hold for each row, layer and KV head.
        modes: `"eager"`, `"compiled"`: the caches that can be compiled are, the others take their turns eagerly.
        page_size: tokens a page.
        steps: steps to time of each method.
        copies: caches of each method and cell, used in turn, so that none is warm from the step before; above
            `ONE_COPY` bytes there is one.
        seed: of all that is random.

    Raises:
        ValueError: a method or mode is unknown, or a number cannot be.
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
                "method='kvpress' runs on an older transformers than this package: leave it out, and name the Python "
                "of an environment that has kvpress with --peer-python, or as peer=Peer(python) of run."
            )
        for method in self.methods:
            from_name(method, max(self.budgets), page_size=self.page_size)
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
                    why = " (two pages, and more than the steps of one cache)" if name == "budget" else ""
                    raise ValueError(f"{name}={value} must be at least {least}{why}.")
        object.__setattr__(self, "methods", tuple(dict.fromkeys(self.methods)))

    @property
    def turns(self) -> int:
        """Steps of a cell, those before time counts included."""
        return WARMUP * self.copies + self.steps


@dataclass(frozen=True)
class Case:
    """What a row is about: a method of the plan, one of `BASELINES` or `"kvpress"`, in one cell."""

    method: str
    batch: int
    budget: int
    seen: int
    mode: str


@dataclass(frozen=True)
class Timing:
    """Milliseconds of decode steps, each a token for every row: median, 10th and 90th percentile, all in order."""

    median: float
    p10: float
    p90: float
    steps: list[float]

    @classmethod
    def of(cls, steps: list[float]) -> "Timing":
        """Of at least two steps."""
        deciles = statistics.quantiles(steps, n=10, method="inclusive")
        return cls(statistics.median(steps), deciles[0], deciles[-1], steps)


@dataclass(frozen=True)
class Row:
    """What was found.

    Args:
        ran: `"eager"`, `"compiled"` or `"does not fit"`.
        kv_bytes: bytes of K and V that one cache holds before its first step; about what it would hold if it fitted.
        timing: None if it did not fit.
        ratios: baseline -> median of the ratios to its step in the same turn; None where one of the two did not fit.
    """

    case: Case
    ran: str
    kv_bytes: int
    timing: Timing | None
    ratios: dict[str, float | None]


Forward = Callable[..., object]
Step = Callable[[int, int], float]
"""Takes which of the copies of a cache is to step, and the token's position; gives milliseconds."""


@dataclass
class _Contestant:
    """A method in a cell: how many copies of its cache there are, how they step, and the times so far."""

    copies: int
    step: Step
    ran: str
    steps: list[float] = field(default_factory=list)


def free_bytes(device: torch.device) -> int:
    """Bytes that new tensors on `device` can take; on the CPU what Linux calls available, elsewhere no limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), sys.maxsize)


def run(model: PreTrainedModel, plan: Plan, peer: Peer | None = None) -> Iterator[list[Row]]:
    """Time every cell of the plan.

    Args:
        peer: joins every cell as the method `"kvpress"`.

    Yields:
        A cell's rows, as soon as they are there: `BASELINES`, then the methods.

    Raises:
        ValueError: the process of `peer` has ended.
    """
    if peer is not None:
        peer.build(model, plan.seed)
    for batch, budget in product(plan.batches, plan.budgets):
        filler = Filler(
            model.config,
            batch=batch,
            budget=budget,
            page_size=plan.page_size,
            dtype=model.dtype,
            device=model.device,
            seed=plan.seed,
        )
        for seen, mode in product(plan.seen, plan.modes):
            yield _run_cell(model, plan, filler, seen, mode, peer)
            torch._dynamo.reset()
            gc.collect()
            if model.device.type == "cuda":
                torch.cuda.empty_cache()


def _run_cell(model: PreTrainedModel, plan: Plan, filler: Filler, seen: int, mode: str, peer: Peer | None) -> list[Row]:
    tokens = {DENSE: seen, STATIC_SEEN: seen, STATIC_BUDGET: filler.budget}
    tokens |= {method: filler.budget if POLICIES[method].evicts else seen for method in plan.methods}
    if peer is not None:
        tokens[KVPRESS] = filler.budget
    needed = {name: filler.nbytes(held) for name, held in tokens.items()}
    copies = {name: 1 if size >= ONE_COPY else plan.copies for name, size in needed.items()}
    fitting = _that_fit(model, {name: copies[name] * size for name, size in needed.items()})

    contestants: dict[str, _Contestant] = {}
    with ExitStack() as stack:
        compiled = _compiled(model, stack) if mode == "compiled" else None
        for name in fitting:
            if name == KVPRESS and peer is not None:
                needed[name] = peer.fill(batch=filler.batch, budget=filler.budget, seen=seen, copies=copies[name])
                contestants[name] = _Contestant(copies[name], peer.step, "eager")
                continue
            caches = [_new_cache(filler, name, seen, -(-plan.turns // copies[name])) for _ in range(copies[name])]
            forward, ran = (compiled, "compiled") if compiled and caches[0].is_compileable else (model, "eager")
            needed[name] = kv_nbytes(caches[0])
            contestants[name] = _Contestant(len(caches), partial(_step, filler, caches, forward), ran)
        # The process of a peer has weights of its own: what runs next finds those here as if there had been none.
        between = partial(_read_weights, model, filler) if KVPRESS in contestants else None
        _take_turns(list(contestants.values()), plan, seen, between)

    rows = []
    for name, size in needed.items():
        case = Case(name, filler.batch, filler.budget, seen, mode)
        ours = contestants.get(name)
        ratios = {base: _ratio(ours, contestants.get(base)) for base in BASELINES}
        timing = Timing.of(ours.steps) if ours else None
        rows.append(Row(case, ours.ran if ours else "does not fit", size, timing, ratios))
    return rows


def _that_fit(model: PreTrainedModel, needed: dict[str, int]) -> list[str]:
    """Those that have room beside each other, the small ones first, if a tenth of the memory is left to the steps."""
    weights = sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))
    room, fitting = 0.9 * (free_bytes(model.device) + weights) - weights, set()
    # Of two as large, StaticCache goes first: it is the dense cache that is compiled.
    for name, size in sorted(needed.items(), key=lambda item: (item[1], item[0] == DENSE)):
        if size <= room:
            fitting.add(name)
            room -= size
    return [name for name in needed if name in fitting]


def _new_cache(filler: Filler, name: str, seen: int, steps: int) -> Cache:
    """A filled cache of a method or baseline, with room for `steps` more tokens."""
    cache: Cache
    if name == STATIC_SEEN:
        cache = StaticCache(config=filler.config, max_cache_len=seen + steps)
    elif name == STATIC_BUDGET:
        cache, seen = StaticCache(config=filler.config, max_cache_len=filler.budget), min(seen, filler.budget - steps)
    elif name == DENSE:
        cache = DynamicCache(config=filler.config)
    else:
        return filler.paged(name, seen)
    filler.feed(cache, seen)
    return cache


def _compiled(model: PreTrainedModel, stack: ExitStack) -> Forward:
    """The model's forward, compiled once for all caches of a cell: each shape is a specialisation of its own."""
    stack.enter_context(torch._dynamo.config.patch(recompile_limit=64))
    mode = "reduce-overhead" if model.device.type == "cuda" else "default"
    forward = torch.compile(model.forward, fullgraph=True, dynamic=False, mode=mode)

    def step(**inputs: Any) -> object:
        torch.compiler.cudagraph_mark_step_begin()
        return forward(**inputs)

    return step


@torch.no_grad()
def _step(filler: Filler, caches: list[Cache], forward: Forward, copy: int, position: int) -> float:
    """A decode step with one of the caches: milliseconds from an idle device to an idle device."""
    device = filler.device
    synchronize: Callable[[], None] = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    token = torch.ones(filler.batch, 1, dtype=torch.int64, device=device)
    inputs = {"input_ids": token, "position_ids": torch.full_like(token, position), CACHE_ARGUMENT: caches[copy]}
    synchronize()
    started = time.perf_counter()
    forward(**inputs)
    synchronize()
    return 1e3 * (time.perf_counter() - started)


@torch.no_grad()
def _read_weights(model: PreTrainedModel, filler: Filler) -> None:
    """A forward of one token without a cache."""
    model(input_ids=torch.ones(filler.batch, 1, dtype=torch.int64, device=filler.device), use_cache=False)


def _take_turns(
    contestants: list[_Contestant], plan: Plan, seen: int, between: Callable[[], None] | None = None
) -> None:
    """One step of each contestant after the other, so that a busy machine slows all alike; `between` runs untimed."""
    for turn in range(plan.turns):
        if between is not None:
            between()
        for contestant in contestants:
            step, copy = divmod(turn, contestant.copies)
            elapsed = contestant.step(copy, seen + step)
            if turn >= WARMUP * plan.copies:
                contestant.steps.append(elapsed)


def _ratio(ours: _Contestant | None, base: _Contestant | None) -> float | None:
    if ours is None or base is None:
        return None
    return statistics.median(mine / theirs for mine, theirs in zip(ours.steps, base.steps, strict=True))

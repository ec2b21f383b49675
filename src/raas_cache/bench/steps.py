"""Times decode steps of one model with different caches, which take turns step by step."""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from ..measure import kv_nbytes
from ..methods import from_name
from ..policies import POLICIES
from ..upstream import CACHE_ARGUMENT
from .filling import Filler


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
        methods: names that `from_name` takes, and `"kvpress"` (its `DecodingPress`, keys by their norm; it compresses
            every 512 steps), which joins by itself where it can be imported. `BASELINES` are always timed.
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
        ImportError: kvpress is asked for and cannot be imported.
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
        for method in self.methods:
            if method != KVPRESS:
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
        kvpress = _import_kvpress()
        if KVPRESS in self.methods and kvpress is None:
            raise ImportError("method='kvpress' cannot be imported: pip install kvpress, or leave it out.")
        joined = (*self.methods, KVPRESS) if kvpress else self.methods
        object.__setattr__(self, "methods", tuple(dict.fromkeys(joined)))

    @property
    def turns(self) -> int:
        """Steps of a cell, those before time counts included."""
        return WARMUP * self.copies + self.steps


@dataclass(frozen=True)
class Case:
    """What a row is about: a method of the plan or one of `BASELINES`, in one cell."""

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


@dataclass
class _Contestant:
    """A method in a cell: copies of its cache, each with the forward that takes it, and the times so far."""

    caches: list[Cache]
    forwards: list[Forward]
    ran: str
    steps: list[float] = field(default_factory=list)


def free_bytes(device: torch.device) -> int:
    """Bytes that new tensors on `device` can take; on the CPU what Linux calls available, elsewhere no limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), sys.maxsize)


def run(model: PreTrainedModel, plan: Plan) -> Iterator[list[Row]]:
    """Time every cell of the plan.

    Yields:
        A cell's rows, as soon as they are there: `BASELINES`, then the methods.
    """
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
            yield _run_cell(model, plan, filler, seen, mode)
            torch._dynamo.reset()
            gc.collect()
            if model.device.type == "cuda":
                torch.cuda.empty_cache()


def _run_cell(model: PreTrainedModel, plan: Plan, filler: Filler, seen: int, mode: str) -> list[Row]:
    needed = {DENSE: seen, STATIC_SEEN: seen, STATIC_BUDGET: filler.budget}
    for method in plan.methods:
        needed[method] = filler.budget if method == KVPRESS or POLICIES[method].evicts else seen
    needed = {name: filler.nbytes(tokens) for name, tokens in needed.items()}
    copies = {name: 1 if size >= ONE_COPY else plan.copies for name, size in needed.items()}
    fitting = _that_fit(model, {name: copies[name] * size for name, size in needed.items()})

    contestants: dict[str, _Contestant] = {}
    with ExitStack() as stack:
        compiled = _compiled(model, stack) if mode == "compiled" else None
        for name in fitting:
            caches = [_new_cache(filler, name, seen, -(-plan.turns // copies[name])) for _ in range(copies[name])]
            if name == KVPRESS:
                forwards, ran = [_pressed(model, filler.budget, stack) for _ in caches], "eager"
            elif compiled is not None and caches[0].is_compileable:
                forwards, ran = [compiled] * len(caches), "compiled"
            else:
                forwards, ran = [model] * len(caches), "eager"
            needed[name] = kv_nbytes(caches[0])
            contestants[name] = _Contestant(caches, forwards, ran)
        _take_turns(list(contestants.values()), plan, filler, seen)

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
    elif name in (DENSE, KVPRESS):
        cache, seen = DynamicCache(config=filler.config), seen if name == DENSE else min(seen, filler.budget)
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


def _import_kvpress() -> Any:
    """The module, None if it cannot be imported."""
    try:
        import kvpress
    except ImportError:
        return None
    return kvpress


def _pressed(model: PreTrainedModel, budget: int, stack: ExitStack) -> Forward:
    """A twin of the model, of the same weights, with kvpress hooked in: a press counts the steps of one cache."""
    kvpress = _import_kvpress()
    twin = deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})
    stack.enter_context(kvpress.DecodingPress(kvpress.KnormPress(), target_size=budget)(twin))

    def step(position_ids: torch.Tensor, **inputs: Any) -> object:
        # Its hooks ask for `cache_position`, which transformers no longer gives them.
        return twin(position_ids=position_ids, cache_position=position_ids[0], **inputs)

    return step


@torch.no_grad()
def _take_turns(contestants: list[_Contestant], plan: Plan, filler: Filler, seen: int) -> None:
    """One step of each contestant after the other, so that a busy machine slows all alike."""
    device = filler.device
    on_gpu = device.type == "cuda"
    synchronize: Callable[[], None] = partial(torch.cuda.synchronize, device) if on_gpu else lambda: None
    token = torch.ones(filler.batch, 1, dtype=torch.int64, device=device)
    for turn in range(plan.turns):
        for contestant in contestants:
            step, copy = divmod(turn, len(contestant.caches))
            position = torch.full_like(token, seen + step)
            inputs = {"input_ids": token, "position_ids": position, CACHE_ARGUMENT: contestant.caches[copy]}
            synchronize()
            started = time.perf_counter()
            contestant.forwards[copy](**inputs)
            synchronize()
            if turn >= WARMUP * plan.copies:
                contestant.steps.append(1e3 * (time.perf_counter() - started))


def _ratio(ours: _Contestant | None, base: _Contestant | None) -> float | None:
    if ours is None or base is None:
        return None
    return statistics.median(mine / theirs for mine, theirs in zip(ours.steps, base.steps, strict=True))

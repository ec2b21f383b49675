"""Compute how much memory a budget needs and saves, from a model's config alone.

This file contains no formulas for the sizes. It builds the model on the meta device, whose tensors have shapes but no
memory. A forward of one token shows the keys and values of every layer. The caches then store as many such tokens as
requested, and report their sizes in bytes.
"""

from __future__ import annotations

import bisect
import copy
import itertools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch.fx.experimental import _config as meta_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig

from ..cache.paged_layer import PagedLayer
from ..common.measure import kv_nbytes
from ..common.reporting import markdown
from ..common.upstream import CACHE_ARGUMENT
from ..engine.layer_engine import NO_PACKED_LATENT
from ..engine.prefill_forward import Prefill
from ..methods.raas import RaaSCache


if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..cache.settings import Budget


DEFAULT_PROMPT = 256
DEFAULT_TOKENS = 32_768


class SizeOptions(TypedDict, total=False):
    """The options of a paged cache that determine its size; see `PagedCache`."""

    page_size: int
    min_decode_pages: int
    prompt: Literal["pin", "select", "evict"]
    kv_dtype: Literal["int8", "fp8", "int4"] | None


@dataclass(frozen=True)
class Plan:
    """The memory that a budget needs and saves, for all rows of a batch.

    Args:
        nbytes: bytes of keys and values that the cache allocates for decoding, as in its `nbytes`. States of linear
            attention are not counted.
        dynamic_nbytes: bytes of keys and values of a `DynamicCache` at the given number of tokens.
        bytes_per_token: bytes that one token of every row needs in a `DynamicCache`, in the layers that are paged.
        saves_from: sequence length from which on a `DynamicCache` needs more memory than the paged cache.
        decode_tokens: generated tokens that the cache holds beside the prompt, in the layer with the fewest.
        is_over_budget: whether the prompt leaves a layer fewer than `min_decode_pages` pages, so that the cache exceeds
            the budget.
        paged_layers: number of layers that are paged.
        layers: number of layers of the cache. Layers that are not paged keep the bounded cache of transformers.
    """

    nbytes: int
    dynamic_nbytes: int
    bytes_per_token: int
    saves_from: int
    decode_tokens: int
    is_over_budget: bool
    paged_layers: int
    layers: int

    @property
    def ratio(self) -> float:
        """Size of the `DynamicCache` divided by the size of the paged cache."""
        return self.dynamic_nbytes / self.nbytes


def plan(
    config: PreTrainedConfig,
    budget: Budget,
    *,
    batch_size: int = 1,
    prompt_tokens: int = DEFAULT_PROMPT,
    tokens: int = DEFAULT_TOKENS,
    dtype: torch.dtype | None = None,
    **options: Unpack[SizeOptions],
) -> Plan:
    """Compute how much memory `RaaSCache(budget, **options)` needs and saves with a model, from the model's config.

    Args:
        config: config of the model. No weights are needed.
        budget: number of tokens that each row, layer and KV head holds, including the prompt; or a list with one number
            per layer.
        batch_size: number of rows.
        prompt_tokens: number of prompt tokens, including padding.
        tokens: sequence length, including the prompt, for the sizes of the `DynamicCache` and of all sliding windows.
        dtype: dtype of the model; by default the dtype in the config, or bfloat16 if the config has none.
        options: `page_size`, `min_decode_pages`, `prompt` and `kv_dtype`, as in `PagedCache`.

    Raises:
        TypeError, ValueError: an argument is out of range or refused by `RaaSCache`, no layer of the model has full
            attention, or the sizes of its keys and values cannot be determined without weights.

    Example:

    ```python
    >>> plan(AutoConfig.from_pretrained("Qwen/Qwen3-8B"), 2048, batch_size=16, kv_dtype="int8").nbytes
    ```
    """
    return _Model(config, dtype).plan(budget, batch_size, prompt_tokens, tokens, options)


def largest_budget(
    config: PreTrainedConfig,
    nbytes: int,
    *,
    batch_size: int = 1,
    prompt_tokens: int = DEFAULT_PROMPT,
    tokens: int = DEFAULT_TOKENS,
    dtype: torch.dtype | None = None,
    **options: Unpack[SizeOptions],
) -> int:
    """Find the largest budget whose cache needs at most `nbytes` bytes.

    The budget is a multiple of the page size, and not larger than necessary to hold `tokens` tokens. For the other
    arguments see `plan`.

    Raises:
        TypeError, ValueError: as in `plan`, or `nbytes` is too small for the prompt and `min_decode_pages` pages.
    """
    return _Model(config, dtype).largest_budget(nbytes, batch_size, prompt_tokens, tokens, options)


class _Model:
    """A config, and the keys and values `[1, kv_heads, 1, head_dim]` that each layer caches for one token, or None.

    The cache of a looped model has more layers than the config. `places[i]` is the layer of the config that layer `i`
    of the cache belongs to.

    All tensors are on the meta device. For arguments and errors see `plan`.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype | None):
        with _on_meta(config):
            # A copy, because the model changes its config. "batched_mm" experts read no tensor values.
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config),
                dtype=dtype or config.dtype or torch.bfloat16,
                experts_implementation="batched_mm",
                # With None, transformers would ask on the terminal. The user already trusts the code of the config.
                trust_remote_code=type(config).__module__.startswith("transformers_modules."),
            )
        self.config: PreTrainedConfig = model.config
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "No layer of", UserWarning)  # raised as an error below
            cache = RaaSCache(2, page_size=1, min_decode_pages=1, config=self.config)
        if not any(isinstance(layer, PagedLayer) for layer in cache.layers):
            raise ValueError(
                f"config: no layer of this {config.model_type!r} has full attention, so a budget has no effect: use a "
                "DynamicCache for this model."
            )
        for index, layer in enumerate(cache.layers):
            layer.place = index  # type: ignore[union-attr]  # a looped model appends copies, which keep this attribute
        with _on_meta(config):
            model.eval()(torch.zeros(1, 1, dtype=torch.int64), use_cache=True, **{CACHE_ARGUMENT: cache})
        self.places: list[int] = [layer.place for layer in cache.layers]  # type: ignore[union-attr]
        self.token_states = [_first_token(layer) for layer in cache.layers]
        self.has_latent = any(isinstance(layer, PagedLayer) and layer.engine.is_latent for layer in cache.layers)

    def plan(self, budget: Budget, batch_size: int, prompt_tokens: int, tokens: int, options: SizeOptions) -> Plan:
        for name, value in (("batch_size", batch_size), ("prompt_tokens", prompt_tokens)):
            if value < 1:
                raise ValueError(f"{name}={value} must be positive.")
        if "shares" in options:
            raise ValueError(
                "shares: plan takes none. With a mean of 1 they need the bytes of equal shares: leave them out."
            )
        if tokens < prompt_tokens:
            raise ValueError(f"tokens={tokens} includes the prompt: make it at least prompt_tokens={prompt_tokens}.")
        if self.has_latent and options.get("kv_dtype") == "int4":
            raise ValueError(NO_PACKED_LATENT)
        cache, dynamic = RaaSCache(budget, config=self.config, **options), DynamicCache(config=self.config)
        for either in (cache, dynamic):
            either.layers = [copy.deepcopy(either.layers[place]) for place in self.places]
        paged, bytes_per_token = [], 0
        for layer, dynamic_layer, token_states in zip(cache.layers, dynamic.layers, self.token_states, strict=True):
            if token_states is None:
                continue
            _fill(dynamic_layer, token_states, batch_size, tokens)
            if not isinstance(layer, PagedLayer):
                _fill(layer, token_states, batch_size, tokens)
                continue
            layer.table.preallocates = True
            _fill(layer, token_states, batch_size, prompt_tokens)
            forward = layer.engine.pending
            assert isinstance(forward, Prefill)
            forward.store({})
            if forward.competes:  # with prompt="evict"
                forward.evict(None, queries=0)
            paged.append(layer)
            bytes_per_token += batch_size * sum(states.nbytes for states in token_states)
        dynamic_nbytes = kv_nbytes(dynamic)
        windows_nbytes = dynamic_nbytes - tokens * bytes_per_token
        return Plan(
            nbytes=cache.nbytes,
            dynamic_nbytes=dynamic_nbytes,
            bytes_per_token=bytes_per_token,
            saves_from=(cache.nbytes - windows_nbytes) // bytes_per_token + 1,
            decode_tokens=min(int(layer.table.counts.limit[0]) * layer.settings.page_size for layer in paged),
            is_over_budget=cache.is_over_budget,
            paged_layers=len(paged),
            layers=len(cache.layers),
        )

    def largest_budget(
        self, nbytes: int, batch_size: int, prompt_tokens: int, tokens: int, options: SizeOptions
    ) -> int:
        def needed(budget: int) -> int:
            return self.plan(budget, batch_size, prompt_tokens, tokens, options).nbytes

        page_size = RaaSCache(tokens, **options).settings.page_size
        budgets = range(page_size, tokens + page_size, page_size)
        fitting = bisect.bisect_right(budgets, nbytes, key=needed)
        if not fitting:
            raise ValueError(
                f"nbytes={nbytes:,} is too small: with batch_size={batch_size}, a prompt of {prompt_tokens:,} tokens "
                f"and the fewest decode pages need {needed(page_size):,} bytes."
            )
        return budgets[fitting - 1]


def _first_token(layer: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    # Linear attention has no keys. In a layer without tokens, they are None.
    return None if getattr(layer, "keys", None) is None else (layer.keys[:, :, :1], layer.values[:, :, :1])


def _fill(layer: Any, token_states: Sequence[torch.Tensor], batch_size: int, tokens: int) -> None:
    """Store `batch_size` rows of `tokens` tokens in a cache layer."""
    layer.update(*(states.new_empty(batch_size, states.shape[1], tokens, states.shape[3]) for states in token_states))


class _AnyValue(TorchDispatchMode):
    """Return 1 whenever a forward reads a value from a meta tensor. Sizes do not depend on such values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return 1 if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


@contextmanager
def _on_meta(config: PreTrainedConfig) -> Iterator[None]:
    """Create tensors on the meta device. If the model needs tensor values, raise a ValueError."""
    all_nonzero = meta_config.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]
    try:
        with torch.device("meta"), torch.no_grad(), all_nonzero, _AnyValue():  # type: ignore[no-untyped-call]
            yield
    except Exception as error:  # modeling code may raise any error
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"config: this {config.model_type!r} cannot run a token without its weights, so the sizes of its keys and "
            f"values are unknown ({type(error).__name__}: {reason}). If the model generates with a RaaSCache, read "
            "the cache's nbytes after a few tokens."
        ) from error


def table(
    config: PreTrainedConfig,
    *,
    batches: Sequence[int],
    budgets: Sequence[int],
    memory: int,
    prompt_tokens: int,
    tokens: int,
    page_size: int,
    dtype: torch.dtype | None,
) -> str:
    """A Markdown table with one line per batch size, budget and dtype of keys and values.

    Args:
        budgets: if empty, the largest budget that fits in `memory` bytes is used.

    For the other arguments and the errors see `plan` and `largest_budget`.
    """
    model = _Model(config, dtype)
    name = next(str(states[0].dtype) for states in model.token_states if states is not None).removeprefix("torch.")
    ways: list[tuple[str, Literal["int8", "int4"] | None]] = [(name, None), ("int8", "int8")]
    ways += [] if model.has_latent else [("int4", "int4")]
    header = ["batch", "budget", "stored as", "KV", f"dynamic at {tokens:,}", "ratio", "saves from", "decode tokens"]
    lines, is_over_budget = [], False
    for batch_size, budget, (way, kv_dtype) in itertools.product(batches, budgets or (None,), ways):
        options: SizeOptions = {"page_size": page_size, "kv_dtype": kv_dtype}
        if budget is None:
            budget = model.largest_budget(memory, batch_size, prompt_tokens, tokens, options)
        found = model.plan(budget, batch_size, prompt_tokens, tokens, options)
        is_over_budget |= found.is_over_budget
        sizes = [_readable(found.nbytes), _readable(found.dynamic_nbytes), f"{found.ratio:.1f}"]
        room = f"{found.decode_tokens:,}" + " (over budget)" * found.is_over_budget
        lines.append([str(batch_size), f"{budget:,}", way, *sizes, f"{found.saves_from:,}", room])
    per_token = found.bytes_per_token // batch_size
    about = (
        f"{config.model_type}: {found.paged_layers} of {found.layers} layers are paged. They cache {per_token:,} bytes "
        f"per token in {name}. The prompt has {prompt_tokens:,} tokens, a page {page_size}."
    )
    over = "Over budget: the prompt leaves fewer than min_decode_pages pages. The cache holds more: raise the budget."
    return "\n".join([about, "", markdown(header, lines), *["", over] * is_over_budget])


def _readable(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.2f} MB"

"""What a budget takes and saves, before there is a model: sizes of K and V from the config alone.

No formula here repeats what a model or a cache does. The model is built on the meta device, whose tensors have shapes
and no memory, and one token through it shows the K and V of every layer. The caches themselves then take as many such
tokens as asked for, and say how many bytes they would hold.
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
from ..methods.raas import RaaSCache


if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..cache.settings import Budget


DEFAULT_PROMPT = 256
DEFAULT_TOKENS = 32_768


class SizeOptions(TypedDict, total=False):
    """The options of a paged cache on which its size depends; see `PagedCache`."""

    page_size: int
    min_decode_pages: int
    prompt: Literal["pin", "select", "evict"]
    kv_dtype: Literal["int8", "fp8"] | None


@dataclass(frozen=True)
class Plan:
    """What a budget takes and saves, for all rows of a batch.

    Args:
        nbytes: bytes of K and V that the cache has allocated once it decodes: its `nbytes`, which leaves out the
            states of linear attention.
        dense_nbytes: bytes of K and V of a `DynamicCache` at the number of tokens asked for.
        bytes_per_token: bytes that a token of every row takes in the dense cache, in the layers that are paged.
        saves_from: tokens from which on the dense cache is the larger one.
        decode_tokens: generated tokens that are held beside the prompt; of the layer that holds fewest.
        is_over_budget: whether the prompt leaves a layer less than `min_decode_pages`, so that more is held than
            the budget.
        paged_layers: layers that the budget is for.
        layers: all layers of the model's cache; those that are not paged keep the bounded one of transformers.
    """

    nbytes: int
    dense_nbytes: int
    bytes_per_token: int
    saves_from: int
    decode_tokens: int
    is_over_budget: bool
    paged_layers: int
    layers: int

    @property
    def ratio(self) -> float:
        """How many times larger the dense cache is."""
        return self.dense_nbytes / self.nbytes


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
    """What `RaaSCache(budget, **options)` takes and saves with a model, from the model's config alone.

    Args:
        config: the model's. No weights are needed.
        budget: tokens to hold for each row, layer and KV head, the prompt counted in; or a list, an entry a layer.
        batch_size: rows.
        prompt_tokens: tokens of the prompt, padding counted in.
        tokens: tokens seen, the prompt counted in, at which the dense cache and all sliding windows are measured.
        dtype: the model's; by default what the config says, bfloat16 where it says nothing.
        options: `page_size`, `min_decode_pages`, `prompt` and `kv_dtype`, as `PagedCache` takes them.

    Raises:
        TypeError, ValueError: an argument is out of range or refused by `RaaSCache`, no layer of the model has full
            attention, or the sizes of its K and V cannot be known without weights.

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
    """The largest budget whose cache takes at most `nbytes` bytes: whole pages, and no more of them than hold `tokens`.

    The other arguments are those of `plan`.

    Raises:
        TypeError, ValueError: as `plan`, or `nbytes` is too little for the prompt and `min_decode_pages` beside it.
    """
    return _Model(config, dtype).largest_budget(nbytes, batch_size, prompt_tokens, tokens, options)


class _Model:
    """A config, with what each layer caches of a token: K and V `[1, kv_heads, 1, head_dim]`, or None.

    A looped model has more layers in the cache than in its config: `places` says which of these each one is a copy of.

    All tensors are on the meta device. Arguments and errors are those of `plan`.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype | None):
        with _on_meta(config):
            # A copy, for the model writes into it. Of the implementations of experts this one looks at no values.
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config),
                dtype=dtype or config.dtype or torch.bfloat16,
                experts_implementation="batched_mm",
                # None would ask on the terminal. Code that made the config itself has been trusted.
                trust_remote_code=type(config).__module__.startswith("transformers_modules."),
            )
        self.config: PreTrainedConfig = model.config
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "No layer of", UserWarning)  # an error here
            cache = RaaSCache(2, page_size=1, min_decode_pages=1, config=self.config)
        if not any(isinstance(layer, PagedLayer) for layer in cache.layers):
            raise ValueError(
                f"config: no layer of this {config.model_type!r} has full attention, so a budget has no effect: use a "
                "DynamicCache for this model."
            )
        for index, layer in enumerate(cache.layers):
            layer.place = index  # type: ignore[union-attr]  # goes along with the copies that a looped model appends
        with _on_meta(config):
            model.eval()(torch.zeros(1, 1, dtype=torch.int64), use_cache=True, **{CACHE_ARGUMENT: cache})
        self.places: list[int] = [layer.place for layer in cache.layers]  # type: ignore[union-attr]
        self.of_a_token = [_first_token(layer) for layer in cache.layers]

    def plan(self, budget: Budget, batch_size: int, prompt_tokens: int, tokens: int, options: SizeOptions) -> Plan:
        for name, value in (("batch_size", batch_size), ("prompt_tokens", prompt_tokens)):
            if value < 1:
                raise ValueError(f"{name}={value} must be positive.")
        if tokens < prompt_tokens:
            raise ValueError(f"tokens={tokens} counts the prompt in: make it at least prompt_tokens={prompt_tokens}.")
        cache, dense = RaaSCache(budget, config=self.config, **options), DynamicCache(config=self.config)
        for of_model in (cache, dense):
            of_model.layers = [copy.deepcopy(of_model.layers[place]) for place in self.places]
        paged, bytes_per_token = [], 0
        for layer, dense_layer, of_a_token in zip(cache.layers, dense.layers, self.of_a_token, strict=True):
            if of_a_token is None:
                continue
            _fill(dense_layer, of_a_token, batch_size, tokens)
            if not isinstance(layer, PagedLayer):
                _fill(layer, of_a_token, batch_size, tokens)
                continue
            layer.preallocates = True
            _fill(layer, of_a_token, batch_size, prompt_tokens)
            layer.admit(None)
            if layer.holds_input:  # prompt="evict": a prompt that is all stored is cut to the budget
                layer.keep(*layer.candidates())
            paged.append(layer)
            bytes_per_token += batch_size * sum(states.nbytes for states in of_a_token)
        dense_nbytes = kv_nbytes(dense)
        windows_nbytes = dense_nbytes - tokens * bytes_per_token
        return Plan(
            nbytes=cache.nbytes,
            dense_nbytes=dense_nbytes,
            bytes_per_token=bytes_per_token,
            saves_from=(cache.nbytes - windows_nbytes) // bytes_per_token + 1,
            decode_tokens=min(layer.decode_pages * layer.page_size for layer in paged),
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
                f"nbytes={nbytes:,} is too little: with batch_size={batch_size}, a prompt of {prompt_tokens:,} tokens "
                f"and the fewest decode pages beside it take {needed(page_size):,} bytes."
            )
        return budgets[fitting - 1]


def _first_token(layer: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    # Linear attention has no keys, a layer that was not filled has None.
    return None if getattr(layer, "keys", None) is None else (layer.keys[:, :, :1], layer.values[:, :, :1])


def _fill(layer: Any, of_a_token: Sequence[torch.Tensor], batch_size: int, tokens: int) -> None:
    """Have a cache layer take so many rows of so many tokens."""
    layer.update(*(states.new_empty(batch_size, states.shape[1], tokens, states.shape[3]) for states in of_a_token))


class _AnyValue(TorchDispatchMode):
    """Answers what a forward asks meta tensors for, say whether anything is padding: sizes do not depend on it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return 1 if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


@contextmanager
def _on_meta(config: PreTrainedConfig) -> Iterator[None]:
    """Make tensors of shapes without values; what a model cannot do with these raises a ValueError."""
    all_nonzero = meta_config.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]
    try:
        with torch.device("meta"), torch.no_grad(), all_nonzero, _AnyValue():  # type: ignore[no-untyped-call]
            yield
    except Exception as error:  # whatever anyone's modeling code may raise
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"config: a token did not get through this {config.model_type!r} without its weights, so the sizes of its "
            f"K and V are not known ({type(error).__name__}: {reason}). If the model generates with a RaaSCache, read "
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
    """Markdown: a line for each batch size, budget and way to hold K and V.

    Args:
        budgets: if there are none, the largest that `memory` bytes hold.

    The other arguments and the errors are those of `plan` and `largest_budget`.
    """
    model = _Model(config, dtype)
    name = next(str(states[0].dtype) for states in model.of_a_token if states is not None).removeprefix("torch.")
    ways: tuple[tuple[str, Literal["int8"] | None], ...] = ((name, None), ("int8", "int8"))
    header = ["batch", "budget", "held as", "KV", f"dense at {tokens:,}", "ratio", "saves from", "decode tokens"]
    lines, is_over_budget = [], False
    for batch_size, budget, (way, kv_dtype) in itertools.product(batches, budgets or (None,), ways):
        options: SizeOptions = {"page_size": page_size, "kv_dtype": kv_dtype}
        if budget is None:
            budget = model.largest_budget(memory, batch_size, prompt_tokens, tokens, options)
        found = model.plan(budget, batch_size, prompt_tokens, tokens, options)
        is_over_budget |= found.is_over_budget
        sizes = [_readable(found.nbytes), _readable(found.dense_nbytes), f"{found.ratio:.1f}"]
        room = f"{found.decode_tokens:,}" + " (over budget)" * found.is_over_budget
        lines.append([str(batch_size), f"{budget:,}", way, *sizes, f"{found.saves_from:,}", room])
    per_token = found.bytes_per_token // batch_size
    about = (
        f"{config.model_type}: {found.paged_layers} of {found.layers} layers are paged, and cache {per_token:,} bytes "
        f"of a token in {name}. A prompt of {prompt_tokens:,} tokens, pages of {page_size}."
    )
    over = "Over budget: the prompt leaves less than min_decode_pages, which are held all the same: raise the budget."
    return "\n".join([about, "", markdown(header, lines), *["", over] * is_over_budget])


def _readable(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.2f} MB"

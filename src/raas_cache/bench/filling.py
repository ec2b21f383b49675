"""Fill caches as after any number of tokens, with random keys and values and without running the model."""

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from ..cache.paged_cache import PagedCache
from ..cache.paged_layer import PagedLayer
from ..common.parse_methods import parse_method
from ..engine.attention_inputs import Softmax
from ..engine.forward_base import Forward
from ..engine.policy import Policy
from ..engine.rotation import Rotation
from ..methods.registry import POLICIES, from_name


MODELS: dict[str, dict[str, Any]] = {
    "small": {
        "vocab_size": 4096, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64,
    },
    "llama-3-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    },
}  # fmt: skip
"""Shapes of Llama models, by name."""

SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
"""Fields of a config that must be positive, if the config has them."""

PROMPT = 64
"""Prompt length of a filled cache that evicts, if the budget has room for it."""


def read_config(name: str) -> PreTrainedConfig:
    """Read a config: one of `MODELS`, or the result of `AutoConfig.from_pretrained(name)` (a folder, or the Hub).

    Code that comes with the config is never run.

    Raises:
        ValueError: there is no config, transformers cannot read it, or its sizes are impossible.
    """
    if name in MODELS:
        return LlamaConfig(**MODELS[name], max_position_embeddings=1 << 18)
    try:
        # With None, transformers would ask on the terminal whether to run the code that comes with the config.
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=False)
        of_text = config.get_text_config(decoder=True)
        counts = {size: value for size in SIZES if isinstance(value := getattr(of_text, size, None), int)}
        wrong = [f"{size} is {value}" for size, value in counts.items() if value < 1]
        heads, kv_heads = (counts.get(size, 1) for size in ("num_attention_heads", "num_key_value_heads"))
        if not wrong and heads % kv_heads:
            wrong.append(f"{heads} query heads cannot share {kv_heads} KV heads")
        if wrong:
            raise ValueError(wrong[0])
    except Exception as error:  # the Hub client, the JSON and the config raise many kinds of errors
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if "trust_remote_code" in str(error):
            reason = "it needs code of its own, which this command does not run"
        raise ValueError(
            f"model={name!r} must be one of {', '.join(MODELS)}, a folder with the config.json of a model that "
            f"transformers knows, or a name on the Hub ({reason})."
        ) from None
    return config


def load_config(name: str) -> PreTrainedConfig:
    """Like `read_config`, but only for models whose caches can be filled.

    Raises:
        ValueError: there is no such config, no model can be built from it, or a layer has no full attention.
    """
    config = read_config(name)
    try:
        kinds = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
        build_model(copy.deepcopy(config), torch.device("meta"), torch.bfloat16)
    except Exception as error:  # modeling code may raise any error
        reason = f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]
        raise ValueError(
            f"model={name!r} ({config.model_type}) cannot be built from its config ({reason}): use the config of a "
            "model such as Llama, Mistral or Qwen3."
        ) from error
    if kinds != {"DynamicLayer"} or hasattr(config, "kv_lora_rank"):
        raise ValueError(
            f"model={name!r} ({config.model_type}) has layers that do not cache plain keys and values of full "
            "attention: use the config of a model such as Llama, Mistral or Qwen3."
        )
    return config


def kv_shape(config: PreTrainedConfig) -> tuple[int, int, int, int]:
    """Return (layers, query heads, KV heads, head size) of a config whose layers all cache plain keys and values."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return config.num_hidden_layers, heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def build_model(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """Build a model with random weights, directly on its device and in its dtype."""
    torch.manual_seed(seed)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()
    return model


def new_cache(method: str, budget: int, **common: Any) -> PagedCache:
    """Create an empty cache of a method with its options, such as `"raas:alpha=0.1"`.

    Args:
        common: options that the benchmark sets for all methods.

    Raises:
        TypeError, ValueError: the method or an option is invalid, or the method sets an option of all methods.
    """
    name, options = parse_method(method)
    for option in ("page_size", "min_decode_pages", "prompt", "offloading"):
        if option in options:
            raise ValueError(f"method={method!r}: bench times all methods with the same {option!r}: remove it here.")
    return from_name(name, budget, **common, **options)


def policy_of(method: str) -> type[Policy]:
    """The policy class of a method with options."""
    return POLICIES[method.partition(":")[0]]


class Filler:
    """Creates caches of one model that have seen a given number of tokens.

    Args:
        config: config of the model. All layers have full attention.
        batch: number of rows.
        budget: tokens that each row, layer and KV head holds; at least two pages, one for the prompt and one to evict.
        page_size: tokens per page.
        dtype, device: dtype and device of keys and values.
        seed: seed of all random numbers.
    """

    config: PreTrainedConfig
    batch: int
    budget: int
    page_size: int
    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        batch: int,
        budget: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        seed: int = 0,
    ):
        self.config, self.batch, self.budget, self.page_size = config, batch, budget, page_size
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.layers, self.heads, self.kv_heads, self.head_dim = kv_shape(config)
        self._full: dict[str, PagedCache] = {}

    def nbytes(self, tokens: int) -> int:
        """Bytes of keys and values of `tokens` tokens in each row."""
        return tokens * 2 * self.batch * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize

    @torch.no_grad()
    def feed(self, cache: Cache, tokens: int, layers: Iterable[int] | None = None) -> None:
        """One forward of `tokens` random tokens as far as the cache has to do with it, the same for all `layers`."""
        key, value = (self._draw(self.kv_heads, tokens) for _ in range(2))
        for index in range(self.layers) if layers is None else layers:
            # A view for each layer: `update` tags the key and value that it is given.
            handed = cache.update(key.view_as(key), value.view_as(value), index)
            layer = cache.layers[index]
            if not isinstance(layer, PagedLayer):
                continue
            # From here on as the registered attention function.
            forward: Forward = handed[0].paged_forward  # type: ignore[attr-defined]
            query, softmax = (
                self._draw(self.heads, tokens),
                Softmax(scale=self.head_dim**-0.5, softcap=None, sinks=None),
            )
            forward.attend(query, softmax)

    def _draw(self, heads: int, tokens: int) -> torch.Tensor:
        size = (self.batch, heads, tokens, self.head_dim)
        return torch.randn(size, generator=self.generator, dtype=self.dtype, device=self.device)

    def paged(self, method: str, seen: int) -> PagedCache:
        """Create a cache of a method with its options, such as `"raas:alpha=0.1"`, that has seen `seen` tokens.

        A cache that never evicts gets all tokens as one prompt. A cache that evicts decodes after a short prompt, until
        every page is full and some pages have been recycled. Then `fast_forward` sets it forward.
        """
        pages = self.budget // self.page_size
        prompt = min(PROMPT, pages // 2 * self.page_size, seen)
        prompt_pages = -(-prompt // self.page_size)
        room = max(1, pages - prompt_pages)
        options = {"page_size": self.page_size, "min_decode_pages": min(8, room), "config": self.config}
        cache = new_cache(method, self.budget, **options)
        largest = max([1.0, *(max(part.settings.shares) for part in _parts(cache))])
        full = (prompt_pages + math.ceil(room * largest) + 2) * self.page_size
        if method in self._full and seen >= full:
            cache = copy.deepcopy(self._full[method])
        else:
            cache.preallocate()
            for part in _parts(cache):  # without a model, the cache cannot ask for the rotary embedding
                part.engine.rotation = Rotation.standard(self.head_dim, 10_000.0, self.device)
            if not cache.settings.policy.evicts:
                self._feed_alike(cache, [seen])
                return cache
            self._feed_alike(cache, [prompt] + [1] * (min(seen, full) - prompt))
        if seen >= full:
            self._full.setdefault(method, copy.deepcopy(cache))
            fast_forward(cache, (seen - full) // self.page_size)
            for _ in range((seen - full) % self.page_size):
                self.feed(cache, 1)
        return cache

    def _feed_alike(self, cache: PagedCache, forwards: list[int]) -> None:
        """Feed forwards of these lengths to one of the layers with equal settings, and copy it to the others."""
        kinds = [
            (getattr(layer, "head_groups", None), [part.settings for part in layer.parts])
            for layer in cache.layers
            if isinstance(layer, PagedLayer)
        ]
        sources = [kinds.index(kind) for kind in kinds]
        for tokens in forwards:
            self.feed(cache, tokens, sorted(set(sources)))
        for index, source in enumerate(sources):
            if index != source:
                cache.layers[index] = copy.deepcopy(cache.layers[source])


def fast_forward(cache: PagedCache, pages: int) -> None:
    """Set a full cache forward by a number of pages, as if it had decoded more tokens like the tokens that it holds.

    Pinned pages do not change. The positions and priorities of the other pages and the clock increase. This is correct
    for policies whose priority is a time, and for policies that rank all pages again at every step.
    """
    for part in _parts(cache):
        table, kv = part.table, part.engine.kv
        tokens = pages * kv.page_size
        evictable = kv.evictable[:, None].expand(-1, table.num_heads, -1)  # [batch, kv_heads, pages]
        kv.positions += tokens * evictable.repeat_interleave(kv.page_size, -1).int()
        kv.priority += tokens  # empty pages stay at -inf
        table.move_clock(tokens, tokens)


def _parts(cache: PagedCache) -> list[PagedLayer]:
    """The paged layers of a cache; of a layer with groups of KV heads, its parts."""
    return [part for layer in cache.layers if isinstance(layer, PagedLayer) for part in layer.parts]

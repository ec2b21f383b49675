"""Caches as they are after any number of tokens: random K and V, put in without a forward of the model."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from ..cache.paged_cache import PagedCache
from ..cache.paged_layer import PagedLayer
from ..methods.registry import from_name


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
"""Llama shapes by name."""

SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
"""What is counted in a config, if it has it at all."""

PROMPT = 64
"""Tokens of the prompt that a cache which evicts has seen, if the budget has room for them."""


def read_config(name: str) -> PreTrainedConfig:
    """The config of one of `MODELS`, or that `AutoConfig.from_pretrained(name)` finds: in a folder, or on the Hub.

    No code of the model's own is run.

    Raises:
        ValueError: there is none, transformers cannot read it, or no model can have its sizes.
    """
    if name in MODELS:
        return LlamaConfig(**MODELS[name], max_position_embeddings=1 << 18)
    try:
        # False, not None: at None it asks on the terminal whether to run the code that comes with a config.
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=False)
        of_text = config.get_text_config(decoder=True)
        counts = {size: value for size in SIZES if isinstance(value := getattr(of_text, size, None), int)}
        wrong = [f"{size} is {value}" for size, value in counts.items() if value < 1]
        heads, kv_heads = (counts.get(size, 1) for size in ("num_attention_heads", "num_key_value_heads"))
        if not wrong and heads % kv_heads:
            wrong.append(f"{heads} query heads cannot share {kv_heads} KV heads")
        if wrong:
            raise ValueError(wrong[0])
    except Exception as error:  # whatever the Hub client, the JSON and the config's own checks raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if "trust_remote_code" in str(error):
            reason = "this one brings code of its own, which is not run for its config"
        raise ValueError(
            f"model={name!r} must be one of {', '.join(MODELS)}, a folder with the config.json of a model that "
            f"transformers knows, or a name on the Hub ({reason})."
        ) from None
    return config


def load_config(name: str) -> PreTrainedConfig:
    """As `read_config`, for models whose caches can be filled.

    Raises:
        ValueError: there is no such config, no model can be built from it, or a layer has no full attention to fill the
            cache of.
    """
    config = read_config(name)
    try:
        kinds = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
        build_model(copy.deepcopy(config), torch.device("meta"), torch.bfloat16)
    except Exception as error:  # whatever anyone's modeling code may raise
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
    """(layers, query heads, KV heads, head size) of a config whose layers all cache plain keys and values."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return config.num_hidden_layers, heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def build_model(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """A model of random weights, made where and as it is to be: no copy of it in float32 on the host."""
    torch.manual_seed(seed)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()
    return model


class Filler:
    """Makes caches of one model that have seen as many tokens as asked for.

    Args:
        config: the model's; all layers have full attention.
        batch: rows.
        budget: tokens to hold for each row, layer and KV head; at least two pages, one for input and one to evict.
        page_size: tokens a page.
        dtype, device: of K and V.
        seed: of all that is random.
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
        """Bytes of K and V of `tokens` tokens of each row."""
        return tokens * 2 * self.batch * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize

    @torch.no_grad()
    def feed(self, cache: Cache, tokens: int, layers: Iterable[int] | None = None) -> None:
        """One forward of `tokens` random tokens as far as the cache has to do with it, the same for all `layers`.

        A layer that never evicts does without the attention, which would only rank its pages.
        """
        key, value = (self._draw(self.kv_heads, tokens) for _ in range(2))
        for index in range(self.layers) if layers is None else layers:
            is_first = not cache.get_seq_length(index)
            # A view for each layer: `update` tags what it is given with the layer.
            handed = cache.update(key.view_as(key), value.view_as(value), index)
            layer = cache.layers[index]
            if not isinstance(layer, PagedLayer):
                continue
            # From here on as the registered attention function.
            layer.admit(None)
            if not layer.policy.evicts:
                layer.is_busy = False
                continue
            query, scale = self._draw(self.heads, tokens), self.head_dim**-0.5
            if is_first:
                layer.attend_first(query, handed, scale=scale, softcap=None, sinks=None)
            else:
                layer.attend(query, scale)

    def _draw(self, heads: int, tokens: int) -> torch.Tensor:
        size = (self.batch, heads, tokens, self.head_dim)
        return torch.randn(size, generator=self.generator, dtype=self.dtype, device=self.device)

    def paged(self, method: str, seen: int) -> PagedCache:
        """A cache of `from_name(method)` that has seen `seen` tokens.

        One that never evicts gets them as one prompt. One that evicts decodes them after a short prompt, until every
        page is full and some were recycled; the rest of the way is `fast_forward`.
        """
        pages = self.budget // self.page_size
        prompt, full = min(PROMPT, pages // 2 * self.page_size, seen), (pages + 2) * self.page_size
        if method in self._full and seen >= full:
            cache = copy.deepcopy(self._full[method])
        else:
            room = max(1, pages - -(-prompt // self.page_size))
            options = {"page_size": self.page_size, "min_decode_pages": min(8, room), "config": self.config}
            cache = from_name(method, self.budget, **options)
            cache.preallocate()
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
        """Feed so many tokens, forward by forward: to one layer of each policy, and make the others copies of it."""
        policies = [layer.policy for layer in cache.layers if isinstance(layer, PagedLayer)]
        sources = [policies.index(policy) for policy in policies]
        for tokens in forwards:
            self.feed(cache, tokens, sorted(set(sources)))
        for index, source in enumerate(sources):
            if index != source:
                cache.layers[index] = copy.deepcopy(cache.layers[source])


def fast_forward(cache: PagedCache, pages: int) -> None:
    """Put a cache, whose pages are all held, forward by so many pages of tokens, as if they had been like its own.

    What is pinned stays; the evictable pages, their priorities and the clock move on. That serves policies whose
    priority is a time, and those that rank all pages anew at every step.
    """
    for layer in cache.layers:
        if not isinstance(layer, PagedLayer):
            continue
        tokens = pages * layer.page_size
        layer.positions[:, :, layer.pinned_pages * layer.page_size :] += tokens
        layer.priority += tokens  # empty pages stay at -inf
        layer.move_clock(tokens, tokens)

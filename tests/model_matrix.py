"""What RaaSCache does on every architecture: `python -m tests.model_matrix > docs/models.md` writes the table."""

import importlib.metadata
import itertools
import re
import warnings
from dataclasses import dataclass

import torch
from packaging.version import Version
from transformers import DynamicCache

from raas_cache import RaaSCache, from_name
from raas_cache.cache.paged_layer import PagedLayer
from raas_cache.common.measure import kv_nbytes
from raas_cache.sizing.plan import plan

from .architectures import LEFT_OUT, build, names, tiny_config
from .helpers import generate, prompt, resident_set
from .oracle import OracleCache


STEPS = 200
SMALL = {"budget": 48, "page_size": 4, "min_decode_pages": 4, "alpha": 0.1}
# float64 leaves no doubt about a near tie; these have a part that insists on float32.
FLOAT32 = {"inkling2_loop_text", "inkling2_text", "xglm"}
# Their eager attention gives NaN to a padded row in float64: the mask's minimum overflows in a float32 softmax.
FLOAT32_IF_PADDED = {"gemma2", "granite_swa", "granitemoe_swa", "vaultgemma"}
# The experts of transformers 5.17 count their tokens on the CPU, where a plan cannot follow.
UNPLANNED = {"aria_text"}
# Why an architecture is refused, and what the error says. All are refused before a token that could be wrong.
BYPASS = "computes attention in its own code, not through transformers' attention interface"
MIXED = "changes keys or values between cache and attention"
INDEXER = "selects tokens with an indexer over the whole sequence (sparse attention)"
BIASED = "adds a position bias to the attention logits"
UNMASKED = "cannot take the mask of a cache that can be compiled"
ERRORS = {
    BYPASS: "did not read the paged cache",
    MIXED: "did not read the paged cache|changes its values between cache and attention",
    INDEXER: "tokens with an indexer|needs a (DynamicIndexedLayer|DeepseekV4HCACache|MiniMaxM3VLSparseCacheLayer)",
    BIASED: "position_bias=Tensor|adds more than visible",
    UNMASKED: "too many values to unpack",
}
REFUSED = {
    **dict.fromkeys(["big_bird", "bloom", "cpmant", "falcon", "git", "gpt_neo", "gpt_neox_japanese"], BYPASS),
    **dict.fromkeys(["megatron-bert", "mpt", "mvp", "prophetnet", "rembert", "roformer", "trocr", "xglm"], BYPASS),
    **dict.fromkeys(["diffllama", "jetmoe"], MIXED),
    **dict.fromkeys(
        ["axk2", "deepseek_v32", "deepseek_v4", "dots3_note_text", "glm_moe_dsa", "hy_v4", "minimax_m3_vl_text"],
        INDEXER,
    ),
    "qwen4_exp_text": INDEXER,
    **dict.fromkeys(["doge", "inkling_text", "inkling2_loop_text", "inkling2_text"], BIASED),
}
TRANSFORMERS = importlib.metadata.version("transformers")
if Version(TRANSFORMERS) < Version("5.24"):
    REFUSED |= dict.fromkeys(["codegen", "gptj"], BYPASS)
if Version(TRANSFORMERS) < Version("5.23"):
    REFUSED["bloom"] = UNMASKED


@dataclass
class Outcome:
    """What came of one architecture; `refusal` is the error's message, None where the cache serves the model."""

    attention: str
    layers: list[str]
    needs_config: bool = False
    refusal: str | None = None

    @property
    def paged(self) -> int:
        return sum("Paged" in layer for layer in self.layers)


def dtype_of(name: str, padded: bool) -> torch.dtype:
    return torch.float32 if name in FLOAT32 or (padded and name in FLOAT32_IF_PADDED) else torch.float64


def generate_quietly(model, inputs, cache, steps):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a model of windows only has nothing to evict, and says so
        return generate(model, inputs, cache, steps, sample=False)


def full_budget(name: str) -> Outcome:
    """A padded batch, nothing evicted: must equal DynamicCache token for token and its plan in bytes, or be refused."""
    model = build(name, dtype_of(name, padded=True))
    inputs = prompt(2, 12, (5, 0))
    outcome = Outcome(model.config._attn_implementation, [])
    cache = RaaSCache(512)
    try:
        try:
            cache.preallocate()  # a plan is of the whole budget
            tokens = generate_quietly(model, inputs, cache, 40)
        except ValueError as error:
            if "config=model.config" not in str(error):
                raise
            outcome.needs_config = True
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                cache = RaaSCache(512, config=model.config)
            cache.preallocate()
            tokens = generate_quietly(model, inputs, cache, 40)
    except (RuntimeError, ValueError) as error:
        outcome.refusal = str(error)
        return outcome
    outcome.layers = [type(layer).__name__ for layer in cache.layers]
    dynamic = DynamicCache(config=model.config)
    expected = generate_quietly(model, inputs, dynamic, 40)
    assert torch.equal(tokens, expected), f"{name}: other tokens than with DynamicCache"
    if outcome.paged and name not in UNPLANNED:
        # The last of the 40 tokens is not cached.
        of_run = {"batch_size": 2, "prompt_tokens": 12, "tokens": 12 + 39, "dtype": dtype_of(name, padded=True)}
        planned = plan(tiny_config(name), 512, **of_run)
        assert (planned.nbytes, planned.dynamic_nbytes) == (cache.nbytes, kv_nbytes(dynamic)), f"{name}: another plan"
    return outcome


def small_budget(name: str, method: str = "raas", steps: int = STEPS, **changes) -> int:
    """Tokens with evictions: same tokens and residents as the oracle, within the bound; returns pages evicted."""
    model = build(name, dtype_of(name, padded=False))
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # what 5.17 chooses, sdpa, leaves the cap out
    inputs = prompt(1, 12)
    settings = SMALL | changes
    if method != "raas":
        del settings["alpha"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = from_name(method, **settings, config=model.config)
    tokens = generate_quietly(model, inputs, cache, steps)
    original = model.config._attn_implementation
    model.set_attn_implementation("oracle")
    oracle = OracleCache(method=method, **settings, config=model.config)
    expected = generate_quietly(model, inputs, oracle, steps)
    model.set_attn_implementation(original)
    assert torch.equal(tokens, expected), f"{name}: other tokens than the oracle's"
    evicted = 0
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, PagedLayer) or not layer.is_initialized:
            continue
        assert not layer.keys.isnan().any() and not layer.values.isnan().any()
        assert layer.keys.shape[2] <= SMALL["budget"] or layer.settings.grows
        for row, head in itertools.product(range(layer.table.batch_size), range(layer.table.num_heads)):
            assert resident_set(cache, index, row, head) == oracle.resident_set(index, row, head)
            assert cache.evicted_pages(index)[row, head] == oracle.evicted(index, row, head)
        evicted += int(cache.evicted_pages(index).sum())
    return evicted


PAGE = """# Models

`python -m tests.model_matrix > docs/models.md` wrote this page with transformers {version}: {served} of the {built}
architectures that `AutoModelForCausalLM` builds from a tiny random config are served by `RaaSCache(budget=...)`. The
other {refused} are refused with an error that gives the reason, before a wrong token is generated.

- *full budget*: a left-padded batch generates the same tokens as with `DynamicCache`.
- *small budget*: over {steps} tokens at a budget of {budget}, the generated tokens, and the tokens held in every paged
  layer, equal the brute-force oracle. The column also shows how many pages were evicted.
- *paged*: the number of layers with full attention, of all layers. The other layers (sliding windows, chunks, linear
  attention, layers that share the KV of another layer) keep the bounded cache that transformers gives them.
- *config*: the cache must know the layer types before the first attention call:
  `RaaSCache(budget, config=model.config)`. Without `config`, an error says so. All other models accept the argument,
  but do not need it.

| architecture | attention | paged | config | full budget | small budget |
|---|---|---|---|---|---|
{rows}

## Models with an encoder

The cache pages the decoder's self-attention. The keys and values of the encoder need a cache of their own:
`past_key_values=EncoderDecoderCache(RaaSCache(budget=256), DynamicCache())`. BART, Marian and Whisper are tested this
way, with evictions, against the brute-force oracle. T5 and similar models are refused, because their attention adds a
position bias.

## Phi-3 beyond its first context length

Phi-3, PhiMoE and Phi-4-multimodal drop any cache when the text becomes longer than
`original_max_position_embeddings`. The paged cache is kept if RoPE does not change at this length. If RoPE changes,
[an error says what to do](troubleshooting.md#drops-its-cache-and-goes-on-with-a-dynamiccache). No other model in
transformers drops its cache.

## Refused

| architecture | because it |
|---|---|
{refusals}

## Not tried

| architecture | why |
|---|---|
{left_out}
"""


def main() -> None:
    rows, refusals = [], []
    for name in names():
        outcome = full_budget(name)
        if outcome.refusal is not None:
            assert re.search(ERRORS[REFUSED[name]], outcome.refusal), (name, outcome.refusal)
            refusals.append(f"| {name} | {REFUSED[name]} |")
            continue
        paged = f"{outcome.paged} of {len(outcome.layers)}"
        evicted = small_budget(name)
        small = f"equal, {evicted} evicted" if evicted else "equal, nothing to evict"
        needs_config = "needed" if outcome.needs_config else ""
        rows.append(f"| {name} | {outcome.attention} | {paged} | {needs_config} | equal | {small} |")
    left_out = "\n".join(f"| {name} | {reason} |" for name, reason in LEFT_OUT.items())
    print(
        PAGE.format(
            version=TRANSFORMERS, served=len(rows), built=len(rows) + len(refusals), refused=len(refusals), steps=STEPS,
            budget=SMALL["budget"], rows="\n".join(rows), refusals="\n".join(refusals), left_out=left_out,
        ),
        end="",
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

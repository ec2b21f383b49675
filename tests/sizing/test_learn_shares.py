"""Shares of KV heads: their costs against loops over every query and window, and what `learn_shares` leaves behind."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, MistralConfig

from raas_cache import RaaSCache, from_name, learn_shares, pretrained, read
from raas_cache.eval.chains import problems
from raas_cache.sizing import learn_shares as learning

from .. import architectures
from ..helpers import generate, prompt, tiny_model


PROMPT, LENGTH, PAGE = 10, 47, 4
WINDOWS = [2, 3, 4, 6, 10]
BUDGET = 28
"""Seven pages: three for the prompt, and four of the ten pages of the chain."""


def ids_of(rows=1, length=LENGTH, seed=0):
    return prompt(rows, length, seed=seed)["input_ids"]


def built(name):
    if name == "llama":
        return tiny_model(layers=2)
    architectures.require(name)
    return architectures.build(name, torch.float64)


def observed(model, ids):
    """For each layer: its attention module, the arguments of its call, its output `[T, heads * D]`, and gradient."""
    calls, hooks = {}, []
    for index, layer in enumerate(model.model.layers):
        module = layer.self_attn

        def arguments(module, args, kwargs, index=index):
            calls[index] = [module, args, kwargs]

        def output(module, args, index=index):
            args[0].retain_grad()
            calls[index].append(args[0])

        hooks.append(module.register_forward_pre_hook(arguments, with_kwargs=True))
        hooks.append(module.o_proj.register_forward_pre_hook(output))
    logits = model(ids, use_cache=False).logits[0, PROMPT - 1 : -1]
    cross_entropy(logits, ids[0, PROMPT:], reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    return calls


def costs_by_hand(model, ids, window):
    """For each layer, the cost `[heads of keys]` of a window of pages: the attention is called with a smaller mask."""
    length = ids.shape[1]
    mask = torch.full((1, 1, length, length), float("-inf"), dtype=torch.float64)
    for query in range(length):
        for token in range(query + 1):
            pages_back = (query - PROMPT) // PAGE - (token - PROMPT) // PAGE
            if token < PROMPT or pages_back < window:
                mask[0, 0, query, token] = 0
    found = {}
    for index, (module, args, kwargs, output) in observed(model, ids).items():
        outputs = []
        hook = module.o_proj.register_forward_pre_hook(lambda _, args, outputs=outputs: outputs.append(args[0]))
        with torch.no_grad():
            module(*args, **{**kwargs, "attention_mask": mask})
        hook.remove()
        heads = model.config.num_attention_heads
        change, gradient = ((t[0].unflatten(-1, (heads, -1))) for t in (outputs[0] - output.detach(), output.grad))
        group = getattr(module, "num_key_value_groups", 1)
        costs = torch.zeros(heads // group, dtype=torch.float64)
        for query in range(PROMPT, length):
            for head in range(len(costs)):
                own = slice(head * group, (head + 1) * group)
                costs[head] += (change[query, own] * gradient[query, own]).sum() ** 2
        found[index] = costs
    return found


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("llama", {0, 1}),
        ("gemma3_text", {1}),  # a sliding window in layer 0
        ("gemma2", {1}),  # soft-capped logits, too
        ("gpt_oss", {1}),  # attention sinks, too
        ("deepseek_v3", {0, 1}),  # latent attention (MLA)
    ],
)
def test_costs_are_those_of_a_smaller_mask(name, layers):
    model, ids = built(name), ids_of()
    model.set_attn_implementation("eager")
    costs = learning._costs_of(model, ids, PROMPT, PAGE, WINDOWS)
    assert set(costs) == layers
    for place, window in enumerate(WINDOWS):
        by_hand = costs_by_hand(model, ids, window)
        for layer in layers:
            expected = by_hand[layer].sum(0, keepdim=True) if name == "deepseek_v3" else by_hand[layer]
            torch.testing.assert_close(costs[layer][:, place], expected, rtol=5e-3, atol=1e-9)
    for cost in costs.values():
        assert (cost[:, -1] == 0).all(), "a window of the whole chain changes nothing"
        assert (cost[:, 0] > 0).all()


def test_blocks_of_queries_give_the_same(monkeypatch):
    model, ids = tiny_model(), ids_of()
    whole = learning._costs_of(model, ids, PROMPT, PAGE, WINDOWS)
    monkeypatch.setattr(learning, "BLOCK", 7)
    for layer, cost in learning._costs_of(model, ids, PROMPT, PAGE, WINDOWS).items():
        torch.testing.assert_close(cost, whole[layer], rtol=1e-5, atol=0)


def test_predictions_are_softened_where_the_model_is_sure():
    targets = torch.arange(8)
    unsure, sure = 2 * torch.eye(8), 60 * torch.eye(8)
    assert learning._loss(unsure, targets) == cross_entropy(unsure, targets, reduction="sum")
    assert cross_entropy(sure, targets) == 0
    softened = learning._loss(sure, targets) / 8
    assert learning.LEAST_LOSS <= softened < 2 * learning.LEAST_LOSS
    # The smallest power of 1.25 that reaches the loss.
    losses = [cross_entropy(sure / 1.25**power, targets).item() for power in range(30)]
    assert softened.item() == pytest.approx(next(loss for loss in losses if loss >= learning.LEAST_LOSS))


def test_windows_reach_from_two_pages_to_the_whole_text():
    assert learning._window_sizes(15) == [2, 3, 4, 5, 7, 9, 12, 15]
    assert learning._window_sizes(2) == [2]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss", "deepseek_v3", "falcon_h1", "gemma3n_text"])
def test_the_cache_takes_the_shares(name):
    model = built(name)
    shares = learn_shares(model, ids_of(2), PROMPT, BUDGET, page_size=PAGE)
    assert len(shares) == len(DynamicCache(config=model.config).layers)
    cache = RaaSCache(BUDGET, shares=shares, page_size=PAGE, min_decode_pages=1, config=model.config)
    generate(model, prompt(1, PROMPT), cache, 40)
    assert cache.evictions > 0
    if name in ("deepseek_v3", "falcon_h1"):
        assert all(len(set(layer)) == 1 for layer in shares), "this kind of layer cannot have several shares"


@pytest.mark.parametrize("sizes", [1, 2, 4])
def test_shares_keep_the_total_and_the_number_of_sizes(sizes):
    model = tiny_model(heads=8, kv_heads=4, layers=3)
    shares = learn_shares(model, ids_of(2, 90), PROMPT, 44, page_size=PAGE, sizes=sizes)
    assert [len(layer) for layer in shares] == [4, 4, 4]
    assert all(1 <= len(set(layer)) <= sizes for layer in shares)
    pages = [share * 8 for layer in shares for share in layer]  # the budget leaves 8 pages beside the prompt
    assert all(abs(count - round(count)) < 0.01 and count > 1.99 for count in pages)
    assert 12 * 8 - 12 < sum(pages) < 12 * 8 + 0.01
    assert len({share for layer in shares for share in layer}) > 1


def test_each_row_may_have_its_own_prompt():
    model, rows = tiny_model(), ids_of(2)
    prompts = [PROMPT, 6]
    costs = [
        learning._costs_of(model, row[None], count, PAGE, WINDOWS) for row, count in zip(rows, prompts, strict=True)
    ]
    noted = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            learning, "deal_out", lambda windows, curves, pages: noted.append(curves) or dict.fromkeys(curves, 4)
        )
        patch.setattr(learning, "_window_sizes", lambda _: WINDOWS)
        learn_shares(model, rows, prompts, BUDGET, page_size=PAGE)
    for (layer, head), curve in noted[0].items():
        assert curve == pytest.approx((costs[0][layer] + costs[1][layer])[head].tolist())


def state_of(model):
    return (
        model.config._attn_implementation,
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad for parameter in model.parameters()],
        AttentionInterface._global_mapping.keys(),
        AttentionMaskInterface._global_mapping.keys(),
        len(model.get_input_embeddings()._forward_hooks),
    )


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_leaves_the_model_as_it_was(implementation):
    model = tiny_model()
    model.set_attn_implementation(implementation)
    list(model.parameters())[1].requires_grad_(False)
    before, expected = state_of(model), model(ids_of()).logits
    learn_shares(model, ids_of(), PROMPT, BUDGET, page_size=PAGE)
    assert state_of(model) == before
    assert torch.equal(model(ids_of()).logits, expected)

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    hook = model.model.layers[1].register_forward_hook(stop)
    with pytest.raises(Stop):
        learn_shares(model, ids_of(), PROMPT, BUDGET, page_size=PAGE)
    hook.remove()
    assert state_of(model) == before


def test_frozen_models_and_other_integers():
    model = tiny_model()
    expected = learn_shares(model, ids_of(), PROMPT, BUDGET, page_size=PAGE)
    assert learn_shares(model, ids_of().int(), PROMPT, BUDGET, page_size=PAGE) == expected
    with torch.no_grad():
        assert learn_shares(model.requires_grad_(False), ids_of(), PROMPT, BUDGET, page_size=PAGE) == expected
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"budget": 16}, ValueError, "budget=16 leaves fewer than 2 pages of 4 tokens beside a prompt of 10 tokens"),
        ({"budget": 48}, ValueError, "budget=48 evicts nothing from rows of 47 tokens"),
        ({"budget": 2.5}, TypeError, r"budget=2\.5 must be an int"),
        ({"prompt": 0}, ValueError, "prompt=0 must be positive"),
        ({"prompt": 47}, ValueError, "prompt=47 must be less than the 47 tokens of a row of ids"),
        ({"prompt": [4, 5]}, ValueError, r"prompt=\[4, 5\] has 2 entries, but ids has 1 rows"),
        ({"page_size": 6}, ValueError, "page_size=6 must be a power of two"),
        ({"sizes": 0}, ValueError, "sizes=0 must be positive"),
        ({"ids": ids_of()[0]}, ValueError, r"ids has the shape \(47,\): give token ids \[rows, tokens\]"),
    ],
)
def test_refusals(change, error, says):
    arguments = {"ids": ids_of(), "prompt": PROMPT, "budget": BUDGET, "page_size": PAGE, **change}
    with pytest.raises(error, match=says):
        learn_shares(tiny_model(), **arguments)


def test_models_without_full_attention_are_refused():
    model = tiny_model(cls=MistralConfig, sliding_window=8)
    with pytest.raises(ValueError, match="model=MistralForCausalLM has no layer with full attention"):
        learn_shares(model, ids_of(), PROMPT, BUDGET, page_size=PAGE)


@pytest.mark.parametrize("method", ["raas", "window"])
def test_learnt_shares_keep_more_of_a_chain(method):
    """On chains that were not learnt from, at the same bytes. The model is sure of every token: see `LEAST_LOSS`."""
    model, tokenizer = pretrained("chain_reasoner")

    def texts(count, **choice):
        sample = problems(count, 50, **choice)
        ids = tokenizer([f"{problem.prompt} {problem.chain}" for problem in sample], return_tensors="pt")["input_ids"]
        return ids, len(tokenizer(sample[0].prompt)["input_ids"])

    ids, prompt_tokens = texts(6, seed=0, split="train")
    by_head = learn_shares(model, ids, prompt_tokens, 384, page_size=4)
    fresh, prompt_tokens = texts(8, seed=3)
    caches = [from_name(method, 384, page_size=4, shares=shares) for shares in (None, by_head)]
    equal, learnt = (read(model, fresh, prompt_tokens, cache).mean().item() for cache in caches)
    assert caches[1].nbytes <= caches[0].nbytes
    assert learnt < equal / 2

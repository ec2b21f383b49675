"""Learn from a text how many decode pages each KV head needs: few heads attend far back, most attend nearby."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy, pad
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionLayer
from transformers.masking_utils import sdpa_mask

from raas_kernels.ops.attend.reference import cap, softmax

from ..attention.eager import raas_attention_forward
from ..cache.settings import checked_page_size, whole_number
from .deal_out import deal_out, merged


OBSERVED = "raas_observed"  # name of the attention function that keeps what the curves need
MIN_PAGES = 2  # decode pages of every head: the open page and the page before it
BLOCK = 256  # queries whose attention weights are in memory at once
LEAST_LOSS = 0.1
"""If the mean loss of a text is smaller, in nats per token, its predictions are softened. See `_loss`."""


@dataclass
class Observed:
    """The attention call of one layer for a text of T tokens.

    Shapes: query `[1, heads, T, Dk]`, key `[1, kv_heads, T, Dk]`, value `[1, kv_heads, T, Dv]`, output
    `[1, T, heads, Dv]`.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    scale: float
    softcap: float | None
    sinks: torch.Tensor | None
    is_latent: bool


def learn_shares(
    model: PreTrainedModel,
    ids: torch.Tensor,
    prompt: int | Sequence[int],
    budget: int,
    *,
    page_size: int = 16,
    sizes: int = 2,
) -> list[list[float]]:
    """Learn a share of the decode pages for each KV head, for `RaaSCache(budget, shares=shares)`.

    The total memory is that of equal shares. The model reads the text once, forward and backward, row by row. For each
    KV head and for windows of several lengths, this gives the change of the head's output if it could only read the
    prompt and the window. The mean of (change * gradient of the loss)^2 is the head's cost (the diagonal of an
    empirical Fisher matrix, which predicts the loss to second order). Pages then go to the heads whose cost they reduce
    most, under the assumption that the costs of the heads add up. Where the model is nearly sure of the whole text, its
    predictions are softened, because their gradients would be nearly 0. The paper of RaaS has one budget for all heads.

    Args:
        model: the model that will use the shares. Its gradients are not changed.
        ids: `[rows, tokens]` int64, texts that are typical for the task, without padding: prompts, each with a chain of
            thought. A text should be longer than the budget.
        prompt: number of prompt tokens at the start of each row, or a list with one number per row. They are pinned.
        budget: number of tokens that a KV head holds on average, including the prompt.
        page_size: as in the cache that will use the shares.
        sizes: number of different shares within a layer, at least 1. With 1, all KV heads of a layer have the same
            share. Each further size costs one more attention call per layer in a decode step.

    Returns:
        For each layer of the model, one share per KV head. The mean over the layers with full attention is at most 1.
        The list of another layer, or of a layer that caches a latent (MLA), has one entry.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range; or the text is not longer than the
            budget; or no layer of the model has full attention.

    Example:

    ```python
    >>> shares = learn_shares(model, ids, prompt=128, budget=768)
    >>> out = model.generate(**inputs, past_key_values=RaaSCache(768, shares=shares))
    ```
    """
    # 1. Check the arguments, and compute the number of pages to deal out.
    size, sizes = checked_page_size(page_size), whole_number("sizes", sizes)
    if ids.ndim != 2 or not len(ids):
        raise ValueError(f"ids has the shape {tuple(ids.shape)}: give token ids [rows, tokens].")
    prompts = list(prompt) if isinstance(prompt, Sequence) else [prompt] * len(ids)
    if len(prompts) != len(ids):
        raise ValueError(f"prompt={prompt} has {len(prompts)} entries, but ids has {len(ids)} rows: give one per row.")
    prompts = [whole_number("prompt", tokens) for tokens in prompts]
    if max(prompts) >= ids.shape[1]:
        raise ValueError(f"prompt={max(prompts)} must be less than the {ids.shape[1]} tokens of a row of ids.")
    prompt_pages = [-(-tokens // size) for tokens in prompts]
    pages_each = whole_number("budget", budget) // size - max(prompt_pages)
    most = ids.shape[1] // size - min(prompt_pages)  # decode pages of the longest chain
    if pages_each < MIN_PAGES:
        raise ValueError(
            f"budget={budget} leaves fewer than {MIN_PAGES} pages of {size} tokens beside a prompt of {max(prompts)} "
            "tokens: raise it."
        )
    if most <= pages_each:
        raise ValueError(
            f"budget={budget} evicts nothing from rows of {ids.shape[1]} tokens, so there is nothing to learn: use "
            "longer texts or a smaller budget."
        )
    windows = _window_sizes(most)

    # 2. The cost of each window, for each layer and KV head, summed over the texts: [kv_heads, windows].
    costs: dict[int, torch.Tensor] = {}
    for row, tokens in zip(ids, prompts, strict=True):
        for layer, cost in _costs_of(model, row[None], tokens, size, windows).items():
            costs[layer] = cost if layer not in costs else costs[layer] + cost
    if not costs:
        raise ValueError(
            f"model={type(model).__name__} has no layer with full attention, so there is nothing to share."
        )

    # 3. Deal out the pages, and let the heads of a layer share few sizes.
    curves = {(layer, head): cost[head].tolist() for layer, cost in costs.items() for head in range(len(cost))}
    dealt = deal_out(windows, curves, pages_each * len(curves))
    shares = []
    for layer, cached in enumerate(DynamicCache(config=model.config).layers):
        pages = [pages_each]
        if layer in costs:
            heads = range(len(costs[layer]))
            most_sizes = 1 if isinstance(cached, LinearAttentionLayer) else sizes  # the layer has both kinds
            pages = merged(
                windows, [curves[layer, head] for head in heads], [dealt[layer, head] for head in heads], most_sizes
            )
        shares.append([round(count / pages_each, 4) for count in pages])
    return shares


def _window_sizes(most: int) -> list[int]:
    """Numbers of pages to try, in steps of about a third: 2, 3, 4, 6, 8, 11, 15 ... `most`."""
    sizes = [min(MIN_PAGES, most)]
    while sizes[-1] < most:
        sizes.append(min(most, max(sizes[-1] + 1, round(sizes[-1] * 4 / 3))))
    return sizes


def _costs_of(
    model: PreTrainedModel, ids: torch.Tensor, prompt: int, page_size: int, windows: Sequence[int]
) -> dict[int, torch.Tensor]:
    """For each layer with full attention, the cost of each window size `[kv_heads, windows]` over one text `[1, T]`."""
    observed: dict[int, Observed] = {}
    with _observing(model, observed), torch.enable_grad():
        logits = model(ids, use_cache=False).logits[0, prompt - 1 : -1]
        if not observed:
            return {}
        loss = _loss(logits.float(), ids[0, prompt:].long())
        gradients = torch.autograd.grad(loss, [call.output for call in observed.values()])
    del logits, loss
    return {
        layer: _curve(call, gradient[0], prompt, page_size, windows)
        for (layer, call), gradient in zip(observed.items(), gradients, strict=True)
    }


def _loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The summed loss of predictions `[tokens, vocabulary]`, softened if the model is nearly sure of all tokens.

    Where a model is sure of a token, the gradient of the plain loss is nearly 0, even if the prediction would be wrong
    without a distant token. So the logits are divided by the smallest temperature that gives `LEAST_LOSS`.
    """
    temperature = 1.0
    while cross_entropy(logits.detach() / temperature, targets) < LEAST_LOSS:
        temperature *= 1.25
    return cross_entropy(logits / temperature, targets, reduction="sum")


@contextmanager
def _observing(model: PreTrainedModel, observed: dict[int, Observed]) -> Iterator[None]:
    """Inside this context, `observed` receives each full-attention call, and the parameters need no gradient."""

    def observe(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, weights = raas_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)
        layer = getattr(module, "layer_idx", None)
        shares_kv = getattr(module, "is_kv_shared_layer", False)
        if layer is not None and not kwargs.get("sliding_window") and not shares_kv:
            scaling = kwargs.get("scaling")
            scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
            inputs = query.detach(), key.detach(), value.detach()
            softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
            observed[layer] = Observed(*inputs, output, scale, softcap, sinks, hasattr(module, "expand_kv"))
        return output, weights

    before = model.config._attn_implementation
    needed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hook = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    AttentionInterface.register(OBSERVED, observe)
    AttentionMaskInterface.register(OBSERVED, sdpa_mask)
    try:
        for parameter in needed:
            parameter.requires_grad_(False)
        model.set_attn_implementation(OBSERVED)
        yield
    finally:
        model.set_attn_implementation(before)
        hook.remove()
        for parameter in needed:
            parameter.requires_grad_(True)
        del AttentionInterface._global_mapping[OBSERVED]  # transformers 5.17 to 5.24 has no public way to remove it
        del AttentionMaskInterface._global_mapping[OBSERVED]


def _curve(call: Observed, gradient: torch.Tensor, prompt: int, page_size: int, windows: Sequence[int]) -> torch.Tensor:
    """The cost of each window size of each KV head, `[kv_heads, windows]` float64 on the CPU; one head for a latent.

    Args:
        gradient: `[T, heads, Dv]`, gradient of the loss with respect to the output.
    """
    key, value = call.key[0].float(), call.value[0].float()  # [kv_heads, T, D]
    kv_heads, length, _ = key.shape
    query = call.query[0].float().unflatten(0, (kv_heads, -1))  # [kv_heads, group, T, Dk]
    output = call.output.detach()[0].float().transpose(0, 1).unflatten(0, (kv_heads, -1))  # [kv_heads, group, T, Dv]
    gradient = gradient.float().transpose(0, 1).unflatten(0, (kv_heads, -1))
    # An attention sink takes a part of the weight; 0 without one.
    sinks = None if call.sinks is None else call.sinks.float().view(kv_heads, -1, 1, 1)  # [kv_heads, group, 1, 1]
    token = torch.arange(length, device=key.device)
    tries = torch.tensor(list(windows), device=key.device)
    costs = torch.zeros(kv_heads, len(windows), dtype=torch.float64)
    for start in range(prompt, length, BLOCK):
        block = token[start : start + BLOCK]
        # The pages that a window leaves out: chain pages up to `last_gone`, counted from 0; none if it is negative.
        last_gone = ((block - prompt) // page_size)[:, None] - tries  # [block, windows]
        for head in range(kv_heads):  # one head at a time bounds the memory
            # 1. Weights [group, block, T], and what each token adds to output . gradient.
            logits = query[head, :, block] @ key[head].T * call.scale
            logits = cap(logits, call.softcap).masked_fill_(token > block[:, None], float("-inf"))
            weights = softmax(logits, None if sinks is None else sinks[head])
            effects = weights * (gradient[head, :, block] @ value[head].T)
            # 2. The sums over the pages that each window leaves out, [group, block, windows].
            gone, gone_effect = (_until(states, prompt, page_size, last_gone) for states in (weights, effects))
            # 3. The change of output . gradient. The weights of the other tokens grow by the factor 1 / (1 - gone).
            whole = (output[head, :, block] * gradient[head, :, block]).sum(-1, keepdim=True)  # [group, block, 1]
            change = ((whole - gone_effect) / (1 - gone).clamp(min=1e-6) - whole).sum(0)  # [block, windows]
            costs[head] += change.double().square().sum(0).cpu()
    return costs.sum(0, keepdim=True) if call.is_latent else costs


def _until(states: torch.Tensor, prompt: int, page_size: int, last: torch.Tensor) -> torch.Tensor:
    """Sums of `states` `[group, block, T]` over the chain's pages up to page `last` `[block, windows]`, inclusive."""
    chain = states[..., prompt:]
    pages = pad(chain, (0, -chain.shape[-1] % page_size)).unflatten(-1, (-1, page_size)).sum(-1).cumsum(-1)
    index = last.clamp(min=0).expand(len(states), -1, -1)
    sums: torch.Tensor = pages.gather(-1, index).masked_fill(last < 0, 0)
    return sums

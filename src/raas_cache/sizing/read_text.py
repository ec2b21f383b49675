"""Read a given text token by token through a cache, as if the model had generated it."""

from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import cross_entropy, pad
from transformers import Cache, PreTrainedModel

from ..common.upstream import CACHE_ARGUMENT


@torch.no_grad()
def steps(
    model: PreTrainedModel,
    ids: torch.Tensor,
    prompt: int,
    cache: Cache,
    attention_mask: torch.Tensor | None = None,
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Iterator[torch.Tensor]:
    """Yield the logits `[batch, vocabulary]` for each token after the prompt.

    Args:
        model, ids, prompt, cache, attention_mask: as in `read`.
        decode: runs the tokens after the prompt instead of `model`, such as a `CapturedStep`. It gets token ids
            `[batch, 1]` and returns logits `[batch, vocabulary]`. It gets no mask: the layers of the cache must not
            hold padding.
    """
    for end in range(prompt, ids.shape[1]):
        new = ids[:, :end] if end == prompt else ids[:, end - 1 : end]
        inputs = {"logits_to_keep": 1, CACHE_ARGUMENT: cache}
        if decode is not None and end > prompt:
            yield decode(new)
            continue
        mask = None if attention_mask is None else pad(attention_mask, (0, end - prompt), value=1)
        yield model(new, attention_mask=mask, **inputs).logits[:, -1]


def read(
    model: PreTrainedModel,
    ids: torch.Tensor,
    prompt: int,
    cache: Cache,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Measure how well a model predicts a given text with `cache`, and thus what a cache costs, without sampling.

    The model reads the prompt in one forward, and the text after it token by token, as in `generate`. It does not read
    the last token. If two caches read the same text, they can be compared step by step (see `raas_cache.viz.regret`).

    Args:
        ids: `[batch, tokens]` int64, prompt and text.
        prompt: number of prompt tokens, including padding.
        cache: an empty cache.
        attention_mask: `[batch, prompt]`, 0 for left padding; None if there is no padding.

    Returns:
        `[batch, tokens - prompt]` float32, the negative log-likelihood of each token after the prompt, in nats.

    Raises:
        ValueError: there is no token in the prompt, or no token after it.

    Example:

    ```python
    >>> out = model.generate(**inputs, max_new_tokens=500)
    >>> read(model, out, inputs["input_ids"].shape[1], RaaSCache(budget=256)).mean()
    ```
    """
    if not 0 < prompt < ids.shape[1]:
        raise ValueError(f"prompt={prompt} must be less than the {ids.shape[1]} tokens of ids, and at least 1.")
    targets = ids[:, prompt:].unbind(1)
    logits = steps(model, ids, prompt, cache, attention_mask)
    pairs = zip(logits, targets, strict=True)
    losses = [cross_entropy(predicted.float(), target, reduction="none") for predicted, target in pairs]  # [batch] each
    return torch.stack(losses, 1)

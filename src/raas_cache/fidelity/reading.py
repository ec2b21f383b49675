"""Read a batch of texts with all caches at the same time, and compare each cache with `DynamicCache`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad as pad_mask
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..cache.paged_cache import PagedCache
from ..common.captured_step import CapturedStep, can_capture
from ..common.measure import kv_nbytes
from ..common.upstream import CACHE_ARGUMENT
from ..eval.settings import Setting
from ..sizing.read_text import steps
from .texts import Ids


PARTS = 4
"""Number of equal parts of the chain for the table by position."""
EDGES = (16, 64, 256, 1024)
"""Largest distance of each group of tokens, except of the last two groups."""
REFERENCE_TOKENS = 32
"""Tokens per forward with `DynamicCache`, whose logits must fit into memory."""
DISTANCES = ("1 to 16", "17 to 64", "65 to 256", "257 to 1,024", "over 1,024", "first use")
"""Tokens since the last earlier occurrence of the same token, in prompt or chain."""


@dataclass(frozen=True)
class Reading:
    """What a cache did to one text.

    Args:
        cells: `[PARTS, len(DISTANCES), 4]` float64: for each part of the chain and each distance, the number of tokens,
            and the sums of their loss, of KL(dynamic || method), and of the tokens whose most likely prediction is that
            of `dynamic`. Loss and KL are in nats.
        kv_bytes: bytes of keys and values that the cache held for the batch at the end, divided by its rows.
        over_budget: whether the prompt left fewer decode pages than `min_decode_pages`.
    """

    cells: torch.Tensor
    kv_bytes: int
    over_budget: bool


class SideBySide:
    """Reads texts whose chains have the same length, token by token, with several caches.

    All caches take a step before any cache takes the next one, so few logits are in memory. Shorter prompts are padded
    on the left.

    Args:
        settings: the caches that read beside `DynamicCache`.
        pad: id of the padding token.

    Attributes:
        caches: `DynamicCache`, and then the cache of each setting.
        targets: `[chain, rows]` int64, the token that each step predicts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        texts: Sequence[Ids],
        settings: Sequence[Setting],
        pad: int,
    ):
        # 1. The batch: prompts padded on the left.
        prompt = max(len(text.prompt) for text in texts)
        padding = [prompt - len(text.prompt) for text in texts]
        rows = [[pad] * empty + [*text.prompt, *text.chain] for empty, text in zip(padding, texts, strict=True)]
        ids = torch.tensor(rows, device=model.device)  # [rows, prompt + chain]
        places = torch.arange(prompt, device=model.device)
        mask = (places >= torch.tensor(padding, device=model.device)[:, None]).long() if any(padding) else None
        self.targets: torch.Tensor = ids[:, prompt:].T

        # 2. One generator of logits for each cache.
        dense = DynamicCache(config=model.config)
        bounded = [setting.new_cache(model.config) for setting in settings]
        self.caches: list[Cache] = [dense, *bounded]
        self._readers = [
            _reference(model, ids, prompt, dense, mask),
            *(steps(model, ids, prompt, cache, mask, _decode(model, cache)) for cache in bounded),
        ]

    def __iter__(self) -> Iterator[Iterator[torch.Tensor]]:
        """For each token of the chain, the logits `[rows, vocabulary]` of each cache.

        Take the logits of all caches in each step, and use them in this step: the next step may overwrite them.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "budget=.* leaves", UserWarning)  # see `is_over_budget` below
            for _ in self.targets:
                yield (next(reader) for reader in self._readers)

    def kv_bytes(self, cache: Cache) -> int:
        """Bytes of keys and values that a cache holds, divided by the rows."""
        return kv_nbytes(cache) // self.targets.shape[1]


def is_over_budget(cache: Cache) -> bool:
    """Whether the prompt left fewer decode pages than `min_decode_pages`."""
    return isinstance(cache, PagedCache) and cache.is_over_budget


@torch.no_grad()
def read_batch(
    model: PreTrainedModel,
    texts: Sequence[Ids],
    settings: Sequence[Setting],
    pad: int,
    on_token: Callable[[], object] = lambda: None,
) -> list[list[Reading]]:
    """Read texts with the caches of all settings side by side, and compare each cache with `DynamicCache`.

    Args:
        model, texts, settings, pad: as in `SideBySide`.
        on_token: called after each token.

    Returns:
        For `DynamicCache` and then for each setting, the readings of the texts.
    """
    # 1. Compare the logits of each step. Those of the first cache are the reference.
    batch = SideBySide(model, texts, settings, pad)
    shape = (len(batch.caches), 3, len(texts), len(batch.targets))
    found = torch.empty(shape, dtype=torch.float64, device=model.device)
    for step, (target, of_caches) in enumerate(zip(batch.targets, batch, strict=True)):
        reference = log_probabilities(next(of_caches))  # [rows, vocabulary]
        found[0, :, :, step] = _compare(reference, reference, target)
        for number, logits in enumerate(of_caches, 1):
            found[number, :, :, step] = _compare(reference, log_probabilities(logits), target)
        on_token()

    # 2. Sums over the tokens of each cell.
    cells = [_cells(text, found[:, :, row].cpu()) for row, text in enumerate(texts)]
    return [
        [Reading(of_row[number], batch.kv_bytes(cache), is_over_budget(cache)) for of_row in cells]
        for number, cache in enumerate(batch.caches)
    ]


def _reference(
    model: PreTrainedModel, ids: torch.Tensor, prompt: int, cache: DynamicCache, mask: torch.Tensor | None
) -> Iterator[torch.Tensor]:
    """The logits of `steps`, from forwards of `REFERENCE_TOKENS` tokens, because a cache that evicts nothing allows it.

    A layer with a recurrent state gets one token per forward, because not every model can continue such a state with
    several tokens.
    """
    # 1. The prompt.
    held = {CACHE_ARGUMENT: cache}
    yield model(ids[:, :prompt], attention_mask=mask, logits_to_keep=1, **held).logits[:, -1]
    is_attention = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    tokens = REFERENCE_TOKENS if is_attention else 1

    # 2. The chain without its last token, which predicts nothing.
    for chunk in ids[:, prompt:-1].split(tokens, 1) if ids.shape[1] - prompt > 1 else ():
        if mask is not None:
            mask = pad_mask(mask, (0, chunk.shape[1]), value=1)
        logits = model(chunk, attention_mask=mask, logits_to_keep=chunk.shape[1], **held).logits
        yield from logits.unbind(1)


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """`[rows, vocabulary]`, at least in float32."""
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)


def _compare(reference: torch.Tensor, ours: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`[3, rows]`: loss, KL(reference || ours), and whether the most likely tokens are the same."""
    loss = -ours.gather(-1, target[:, None])[:, 0]
    # A vocabulary may contain tokens whose logit is -inf. They have no share in the sum.
    kl = torch.where(reference.isinf(), 0, reference.exp() * (reference - ours)).sum(-1)
    return torch.stack([loss, kl, reference.argmax(-1).eq(ours.argmax(-1)).to(loss.dtype)]).double()


def _decode(model: PreTrainedModel, cache: Cache) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The decode step as a CUDA graph if that is possible, otherwise None."""
    return CapturedStep(model, cache) if can_capture(cache, model) else None


def _cells(text: Ids, found: torch.Tensor) -> torch.Tensor:
    """Sums over the tokens of each cell, `[caches, PARTS, len(DISTANCES), 4]`.

    Args:
        found: `[caches, 3, chain]`: loss, KL and agreement of each token.
    """
    chain = len(text.chain)
    part = torch.arange(chain) * PARTS // chain
    cell = part * len(DISTANCES) + torch.tensor(distance_groups(text))  # [chain]
    values = torch.cat([torch.ones_like(found[:, :1]), found], 1)  # [caches, 4, chain]
    sums = values.new_zeros(*values.shape[:2], PARTS * len(DISTANCES)).index_add_(2, cell, values)
    return sums.view(*values.shape[:2], PARTS, len(DISTANCES)).permute(0, 2, 3, 1)


def distance_groups(text: Ids) -> list[int]:
    """For each token of the chain, the index in `DISTANCES` of its distance to the last earlier occurrence."""
    last: dict[int, int] = {}
    groups = []
    for place, token in enumerate((*text.prompt, *text.chain)):
        distance = place - last[token] if token in last else None
        last[token] = place
        first, beyond = len(DISTANCES) - 1, len(EDGES)
        groups.append(
            first if distance is None else next((group for group, edge in enumerate(EDGES) if distance <= edge), beyond)
        )
    return groups[len(text.prompt) :]

"""Read a batch of a probe with all caches side by side, and mark each recall."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..eval.settings import Setting
from ..fidelity.reading import SideBySide, is_over_budget, log_probabilities
from .tokens import ProbeSource


@dataclass(frozen=True)
class RecallReading:
    """What a cache did to the recalls of one text.

    Args:
        correct: for each recall, whether its value is the most likely of the candidates.
        loss: for each recall, the negative log-likelihood of the value's first token, in nats.
        kv_bytes: bytes of keys and values that the cache held for the batch at the end, divided by its rows.
        over_budget: whether the prompt left fewer decode pages than `min_decode_pages`.
    """

    correct: list[bool]
    loss: list[float]
    kv_bytes: int
    over_budget: bool


@torch.no_grad()
def read_recalls(
    model: PreTrainedModel,
    sources: Sequence[ProbeSource],
    settings: Sequence[Setting],
    pad: int,
    on_token: Callable[[], object] = lambda: None,
) -> list[list[RecallReading]]:
    """Read texts of one probe with the caches of all settings side by side.

    Args:
        model, settings, pad: as in `fidelity.reading.SideBySide`.
        on_token: called after each token.

    Returns:
        For `DynamicCache` and then for each setting, the readings of the texts.
    """
    batch = SideBySide(model, [source.ids for source in sources], settings, pad)
    candidates = torch.tensor(sources[0].candidates, device=model.device)  # [values]
    correct: list[list[list[bool]]] = [[[] for _ in sources] for _ in batch.caches]
    loss: list[list[list[float]]] = [[[] for _ in sources] for _ in batch.caches]
    value_at = [{recall.place: recall.value for recall in source.recalls} for source in sources]
    for step, of_caches in enumerate(batch):
        rows = [row for row, values in enumerate(value_at) if step in values]  # rows that recall a value now
        values = torch.tensor([value_at[row][step] for row in rows], dtype=torch.long, device=model.device)
        for number, logits in enumerate(of_caches):
            if not rows:
                continue
            found = log_probabilities(logits[rows])[:, candidates]  # [recalls, values]
            is_best = (found.argmax(1) == values).tolist()
            losses = (-found.gather(1, values[:, None])[:, 0]).tolist()
            for row, best, lost in zip(rows, is_best, losses, strict=True):
                correct[number][row].append(best)
                loss[number][row].append(lost)
        on_token()
    return [
        [
            RecallReading(correct[number][row], loss[number][row], batch.kv_bytes(cache), is_over_budget(cache))
            for row in range(len(sources))
        ]
        for number, cache in enumerate(batch.caches)
    ]

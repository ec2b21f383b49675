"""What each token gives, against a computation by hand on a tiny model."""

import pytest
import torch
from transformers import DynamicCache, MistralConfig

from raas_cache import from_name
from raas_cache.common.captured_step import CapturedStep
from raas_cache.eval import Setting
from raas_cache.fidelity import reading
from raas_cache.fidelity.reading import DISTANCES, EDGES, PARTS, distance_groups, read_batch
from raas_cache.fidelity.texts import Ids

from ..helpers import VOCAB, tiny_model


SMALL = {"page_size": 4, "min_decode_pages": 1}
RAAS = Setting("raas", 24, SMALL)
WINDOW = Setting("streaming_llm", 24, {**SMALL, "prompt": "pin"})
LARGE = Setting("raas", 256, SMALL)


def random_ids(prompt, chain, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (prompt + chain,), generator=generator).tolist()
    return Ids(tuple(ids[:prompt]), tuple(ids[prompt:]))


def by_hand(model, text, cache):
    """Log-probabilities of each token of the chain, `[chain, vocabulary]`, with one forward per token."""
    ids, found = [*text.prompt, *text.chain], []
    with torch.no_grad():
        for end in range(len(text.prompt), len(ids)):
            new = ids[:end] if not found else ids[end - 1 : end]
            logits = model(torch.tensor([new]), past_key_values=cache).logits[0, -1]
            found.append((logits - logits.exp().sum().log()).tolist())
    return torch.tensor(found, dtype=torch.float64)


def test_loss_kl_and_agreement_by_hand():
    model, text = tiny_model(), random_ids(9, 48)
    dense = by_hand(model, text, DynamicCache())
    ours = by_hand(model, text, from_name("raas", 24, config=model.config, **SMALL))
    (dynamic,), (raas,) = read_batch(model, [text], [RAAS], pad=0)
    target = torch.tensor(text.chain)[:, None]
    for found, expected in ((dynamic, dense), (raas, ours)):
        assert found.cells[..., 0].sum() == 48
        assert found.cells[..., 1].sum() == pytest.approx(-expected.gather(1, target).sum().item())
        kl = (dense.exp() * (dense - expected)).sum().item()
        assert found.cells[..., 2].sum() == pytest.approx(kl, abs=1e-9)
        assert found.cells[..., 3].sum() == (dense.argmax(1) == expected.argmax(1)).sum()
    assert raas.cells[..., 2].sum() > 0.1, "something was evicted"
    assert 0 < raas.cells[..., 3].sum() < 48


def test_nothing_evicted_is_dynamic():
    model, text = tiny_model(), random_ids(9, 48)
    (dynamic,), (large,) = read_batch(model, [text], [LARGE], pad=0)
    assert torch.allclose(large.cells, dynamic.cells, atol=1e-9)
    assert (large.cells[..., 3] == large.cells[..., 0]).all()
    assert large.kv_bytes > 0 and not large.over_budget


def test_cells_by_hand():
    """Cell by cell: the part of the chain, and the tokens since the last use."""
    model, text = tiny_model(), random_ids(9, 40, seed=3)
    _, (raas,) = read_batch(model, [text], [RAAS], pad=0)
    ours = by_hand(model, text, from_name("raas", 24, config=model.config, **SMALL))
    ids = [*text.prompt, *text.chain]
    expected = torch.zeros(PARTS, len(DISTANCES), 2, dtype=torch.float64)
    for place, token in enumerate(text.chain):
        before = [past for past in range(9 + place) if ids[past] == token]
        distance = 9 + place - before[-1] if before else None
        group = len(DISTANCES) - 1 if distance is None else sum(distance > edge for edge in EDGES)
        expected[place // 10, group] += torch.tensor([1.0, -ours[place, token].item()])
    assert (expected[..., 0] > 0).sum() > PARTS
    assert torch.allclose(raas.cells[..., :2], expected)


def test_distances():
    text = Ids((5, 7), (5, 5, 9, *range(100, 117), 9, *range(200, 264), 9, 7))
    groups = [DISTANCES[group] for group in distance_groups(text)]
    assert groups[:3] == ["1 to 16", "1 to 16", "first use"]
    assert groups[20] == "17 to 64" and groups[-2] == "65 to 256" and groups[-1] == "65 to 256"
    assert distance_groups(Ids((1,), (2,) * 1100 + (1,)))[-1] == DISTANCES.index("over 1,024")


def test_a_padded_row_is_as_alone():
    model = tiny_model()
    texts = [random_ids(12, 40), random_ids(5, 40, seed=1), random_ids(9, 40, seed=2)]
    together = read_batch(model, texts, [RAAS, WINDOW], pad=0)
    for place, text in enumerate(texts):
        for of_cache, alone in zip(together, read_batch(model, [text], [RAAS, WINDOW], pad=0), strict=True):
            assert torch.allclose(of_cache[place].cells, alone[0].cells, atol=1e-6)


def test_captured_steps_are_as_eager_steps(monkeypatch):
    """A captured step gets no mask, which a cache without padding does not need."""
    model = tiny_model()
    texts = [random_ids(12, 24), random_ids(5, 24, seed=1)]
    quest = Setting("quest", 24, {"page_size": 4})
    expected = read_batch(model, texts, [RAAS, quest, WINDOW], 0)
    calls = []

    class Eager(CapturedStep):  # a CPU has no CUDA graphs
        def __call__(self, input_ids):
            calls.append(self.cache)
            return self._forward(input_ids)

    monkeypatch.setattr(reading, "CapturedStep", Eager)
    monkeypatch.setattr(reading, "can_capture", lambda cache, model: cache.settings.policy.evicts)
    found = read_batch(model, texts, [RAAS, quest, WINDOW], 0)
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.allclose(one.cells, other.cells, atol=1e-9)
    # Quest and DynamicCache grow, so their steps are not captured. The prompt and the last token are no such steps.
    assert len(calls) == 2 * 23 and len(set(map(id, calls))) == 2


@pytest.mark.parametrize("options", [{}, {"cls": MistralConfig, "sliding_window": 8}], ids=["full", "sliding"])
def test_the_reference_is_one_forward_over_the_text(options):
    """Also in a chain of several chunks, and with sliding windows."""
    model = tiny_model(**options)
    text = random_ids(7, 2 * reading.REFERENCE_TOKENS + 5)
    (found,), *_ = read_batch(model, [text], [], pad=0)
    ids = torch.tensor([[*text.prompt, *text.chain]])
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, 6:-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 7:], reduction="sum")
    assert found.cells[..., 1].sum().item() == pytest.approx(expected.item(), abs=1e-9)


def test_over_budget_is_noted_and_not_warned_of():
    model, text = tiny_model(), random_ids(20, 16)
    _, (reading,) = read_batch(model, [text], [Setting("raas", 16, SMALL)], pad=0)
    assert reading.over_budget

"""The recalls of a tiny model, against forwards by hand."""

import pytest
import torch

from raas_cache import from_name, pretrained
from raas_cache.eval import Setting
from raas_cache.probes import PROBES
from raas_cache.probes.reading import read_recalls
from raas_cache.probes.tokens import probe_sources

from .tiny import model_of


SMALL = {"page_size": 4, "min_decode_pages": 1}
RAAS = Setting("raas", 48, SMALL)
LARGE = Setting("window", 512, SMALL)


@pytest.fixture(scope="module", params=PROBES)
def sources(request, tokenizer):
    return probe_sources(request.param, tokenizer, 180 if request.param != "needle" else 320, 2, seed=1)


def marked(source, logits):
    """Correctness and loss of each recall, from logits `[chain, vocabulary]` of the tokens of the chain."""
    correct, loss = [], []
    for recall in source.recalls:
        of_values = [logits[recall.place, token].item() for token in source.candidates]
        correct.append(of_values.index(max(of_values)) == recall.value)
        target = logits[recall.place, source.ids.chain[recall.place]]
        loss.append((logits[recall.place].exp().sum().log() - target).item())
    return correct, loss


@torch.no_grad()
def test_dynamic_is_one_forward(model, sources):
    (dynamic,) = read_recalls(model, sources, [], pad=0)
    assert len(dynamic) == 2
    for source, found in zip(sources, dynamic, strict=True):
        ids = torch.tensor([[*source.ids.prompt, *source.ids.chain]])
        correct, loss = marked(source, model(ids, use_cache=False).logits[0, len(source.ids.prompt) - 1 : -1])
        assert found.correct == correct and found.loss == pytest.approx(loss)
        assert not found.over_budget


@torch.no_grad()
def test_a_bounded_cache_is_forwards_by_hand(model, sources):
    _, raas, large = read_recalls(model, sources, [RAAS, LARGE], pad=0)
    for source, found in zip(sources, raas, strict=True):
        cache, rows = from_name("raas", 48, config=model.config, **SMALL), []
        ids = torch.tensor([[*source.ids.prompt, *source.ids.chain]])
        prompt = len(source.ids.prompt)
        for end in range(prompt, ids.shape[1]):
            start = end - 1 if rows else 0
            rows.append(model(ids[:, start:end], past_key_values=cache).logits[0, -1])
        correct, loss = marked(source, torch.stack(rows))
        assert found.correct == correct and found.loss == pytest.approx(loss)
        assert cache.evictions > 0 and found.kv_bytes == cache.nbytes

    # A cache that evicts nothing is dynamic, and a cache that evicts is not.
    (dynamic,) = read_recalls(model, sources, [], pad=0)
    for one, wide, narrow in zip(dynamic, large, raas, strict=True):
        assert wide.loss == pytest.approx(one.loss) and wide.correct == one.correct
        assert narrow.loss != pytest.approx(one.loss, abs=1e-3)


def test_texts_of_a_batch_are_as_alone(model, sources):
    steps = []
    together = read_recalls(model, sources, [RAAS], pad=0, on_token=lambda: steps.append(1))
    assert len(steps) == len(sources[0].ids.chain)
    for place, source in enumerate(sources):
        for of_cache, alone in zip(together, read_recalls(model, [source], [RAAS], pad=0), strict=True):
            assert of_cache[place].loss == pytest.approx(alone[0].loss, abs=1e-6)
            assert of_cache[place].correct == alone[0].correct


def test_over_budget_is_noted_and_not_warned_of(model, sources):
    _, (first, _) = read_recalls(model, sources, [Setting("raas", 8, SMALL)], pad=0)
    assert first.over_budget


def test_a_model_that_copies_recalls_everything(tokenizer, sources):
    """The rate of a model whose logits are the next token: the marking takes the candidates in their order."""

    class Copying(torch.nn.Module):
        """Predicts the token that follows in the texts."""

        config, device = model_of(tokenizer).config, torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.read = 0

        def forward(self, ids, logits_to_keep, **inputs):
            logits = torch.zeros(len(sources), ids.shape[1], len(tokenizer))
            self.read += ids.shape[1]
            for row, source in enumerate(sources):
                following = [*source.ids.prompt, *source.ids.chain][self.read - ids.shape[1] + 1 : self.read + 1]
                logits[row, range(ids.shape[1]), following] = 50.0
            return type("Output", (), {"logits": logits[:, -logits_to_keep:]})()

    (dynamic,) = read_recalls(Copying(), sources, [], pad=0)
    assert all(all(one.correct) and max(one.loss) < 1e-6 for one in dynamic)


@pytest.fixture(scope="module")
def smollm2():
    return pretrained("smollm2")


@torch.no_grad()
@pytest.mark.parametrize("name", PROBES)
def test_smollm2_is_far_above_chance(name, smollm2):
    """With its own tokenizer, in which a digit and the space in front of it are two tokens."""
    its_model, its_tokenizer = smollm2
    correct = []
    for source in probe_sources(name, its_tokenizer, 512, 3, seed=0):
        ids = torch.tensor([[*source.ids.prompt, *source.ids.chain]])
        correct += marked(source, its_model(ids, use_cache=False).logits[0, len(source.ids.prompt) - 1 : -1])[0]
    assert len(correct) > 20 and sum(correct) / len(correct) >= 0.6 > 5 * PROBES[name].chance

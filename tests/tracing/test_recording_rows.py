"""A recording follows its cache: crops, beams, further turns, resets and copies."""

import copy
import io

import numpy as np
import pytest
import torch

from raas_cache import RaaSCache, record

from ..helpers import generate, prompt, resident_set, tiny_model
from .recorded import SMALL, assert_same, one_by_one


pytestmark = pytest.mark.filterwarnings("ignore:budget=")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_what_was_taken_back_is_forgotten(model):
    """After assisted decoding, the recording is that of plain decoding."""
    cache, firsts = RaaSCache(**SMALL, alpha=0.1), []
    crop = cache.crop

    def noting(tokens_to_remove):
        crop(tokens_to_remove)
        firsts.append(cache.get_seq_length())

    cache.crop = noting
    with record(cache) as recording:
        options = {"prompt_lookup_num_tokens": 6, "max_matching_ngram_size": 1}
        tokens = generate(model, prompt(1, 12), cache, 120, sample=False, **options)
    plain = RaaSCache(**SMALL, alpha=0.1)
    with record(plain) as expected:
        for _ in one_by_one(model, tokens[:, : cache.get_seq_length()], plain, start=firsts[0]):
            pass
    assert_same(recording, expected)
    assert len(firsts) > 20


def test_a_beam_comes_with_its_own_past(model, monkeypatch):
    """The recording of a search is that of reading the tokens of each beam as it stands at the end."""
    cache, plain = (RaaSCache(**SMALL, alpha=0.1) for _ in range(2))
    forward, reorder, seen, moved = model.forward, cache.reorder_cache, [], []

    def noting_forward(input_ids=None, **kwargs):
        seen.append(input_ids)
        return forward(input_ids=input_ids, **kwargs)

    def noting_reorder(rows):
        reorder(rows)
        seen[:] = [torch.cat(seen, 1)[rows]]
        moved.append((rows != torch.arange(3)).any().item())

    monkeypatch.setattr(model, "forward", noting_forward)
    monkeypatch.setattr(cache, "reorder_cache", noting_reorder)
    with record(cache) as recording:
        generate(model, prompt(1, 12), cache, 80, sample=False, num_beams=3)
    monkeypatch.undo()
    with record(plain) as expected:
        for _ in one_by_one(model, torch.cat(seen, 1), plain, start=12):
            pass
    assert_same(recording, expected)
    assert sum(moved) > 10


def test_a_chat_goes_on(model):
    """A later turn is pinned: its tokens belong to no page that can go."""
    tokens = prompt(1, 150, seed=4)["input_ids"]
    cache = RaaSCache(**SMALL, alpha=0.1)
    with record(cache) as recording:
        for _ in one_by_one(model, tokens[:, :61], cache, start=13):
            pass
        with torch.no_grad():
            model(tokens[:, 61:72], past_key_values=cache)
            for position in range(72, 150):
                model(tokens[:, position : position + 1], past_key_values=cache)
    pages, history = recording.pages_of_tokens(0), recording.history(0, 1)
    gone = {**dict(zip(history.first.tolist(), history.evicted.tolist(), strict=True)), -1: np.nan}
    assert (pages[61:72] == -1).all() and (pages[13:61] >= 13).all()
    assert {token for token in range(150) if np.isnan(gone[pages[token]])} == resident_set(cache, 0, 0, 1)


def test_begun_in_the_midst(model):
    tokens = prompt(1, 150, seed=4)["input_ids"]
    cache = RaaSCache(**SMALL, alpha=0.1)
    assert list(one_by_one(model, tokens[:, :100], cache, start=12)) == list(range(11, 100))
    with record(cache) as recording, torch.no_grad():
        for position in range(100, 150):
            model(tokens[:, position : position + 1], past_key_values=cache)
    pages, history = recording.pages_of_tokens(1), recording.history(1, 0)
    gone = dict(zip(history.first.tolist(), history.evicted.tolist(), strict=True))
    assert -2 in pages
    assert {token for token in range(150) if np.isnan(gone.get(pages[token], 0))} == resident_set(cache, 1, 0, 0)
    assert history.steps.tolist() == list(range(100, 150))


def test_begun_after_a_turn_inside_a_page(model):
    """Pages have gaps: page 6 has the tokens 6, 7, 13, 14, and the last page of the prompt the tokens 4, 5, 8, 9."""
    tokens, cache = prompt(1, 40, seed=4)["input_ids"], RaaSCache(**SMALL, alpha=0.1)
    with torch.no_grad():
        for forward in tokens[:, :14].split([6, 1, 1, 5, 1], 1):
            model(forward, past_key_values=cache)
        with record(cache) as recording:
            for token in tokens[:, 14:].split(1, 1):
                model(token, past_key_values=cache)
    expected = [0] * 4 + [4] * 2 + [6] * 2 + [4] * 2 + [10] * 3 + [6] * 2
    assert recording.pages_of_tokens(0)[:15].tolist() == expected
    positions = cache.layers[0].engine.kv.positions[0, 0].unflatten(0, (-1, 4)).tolist()
    assert [4, 5, 8, 9] in positions and [6, 7, 13, 14] in positions


@pytest.mark.parametrize("mode", ["pin", "evict"])
def test_rows_of_other_padding_have_other_pages(model, mode):
    batch, cache = prompt(2, 14, padding=(0, 6)), RaaSCache(**SMALL, prompt=mode)
    with record(cache) as recording:
        generate(model, batch, cache, 20, sample=False)
        cache.reorder_cache(torch.tensor([1, 0, 1]))
    starts = [[0, 4, 8, 12], [6, 10]]
    for row, source in enumerate([1, 0, 1]):
        pages = recording.pages_of_tokens(0, row)[:14].tolist()
        padding = (0, 6)[source]
        assert pages == [-2] * padding + [start for start in starts[source] for _ in range(4)][: 14 - padding]
        assert set(pages[padding:]) <= set(recording.history(0, 0, row).first.tolist())
    with pytest.raises(ValueError, match="row=3: the batch has 3 rows"):
        recording.pages_of_tokens(0, 3)


def test_resetting_begins_anew_and_a_copy_has_a_copy(model):
    cache = RaaSCache(**SMALL)
    with record(cache) as recording:
        generate(model, prompt(1, 14), cache, 30)
        copied = copy.deepcopy(cache)
        buffer = io.BytesIO()
        torch.save(cache, buffer)
        cache.reset()
        assert not recording.layers[0].entries
        generate(model, prompt(1, 14), cache, 10)
    assert len(recording.history(0, 0).steps) == 9
    assert len(copied.layers[0].trace.calls()) == 29

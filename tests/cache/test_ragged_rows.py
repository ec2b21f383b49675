"""Rows of one forward that started at different steps: what a mask says of them, and what a free row counts."""

import pytest
import torch

from ..helpers import tiny_model
from .alone import PAGE, settings_of
from .shared_rows import SharedRows


@pytest.fixture
def started():
    """A cache of two rows, one free, and its model; whatever is refused, it stays usable."""
    shared = SharedRows(tiny_model(layers=1), settings_of("raas", "pin"), 2).admit({0: 7}).steps(3, [0])
    yield shared
    shared.steps(2, [0]).admit({1: 4}).steps(7 * PAGE).check(evicts=(0, 1))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dimensions", [2, 4])
def test_a_mask_that_hides_tokens_of_ragged_rows_is_refused(started, dimensions, implementation):
    """Its columns would stand for other tokens in each row."""
    started.model.set_attn_implementation(implementation)
    started.admit({1: 4})
    mask = torch.ones(2, 11, dtype=torch.long)
    shown, hidden = mask, mask.clone()
    hidden[1, 2] = 0
    if dimensions == 4:
        shown, hidden = (torch.where(given[:, None, None] > 0, 0.0, -torch.inf) for given in (shown, hidden))
    says = r"attention_mask hides tokens, but its rows have seen 10, 4 tokens.*inside cache\.on_rows"
    token, positions = torch.ones(2, 1, dtype=torch.long), started.cache.seen_tokens[:, None]
    with torch.no_grad():
        with pytest.raises(ValueError, match=says):
            started.model(token, attention_mask=hidden, position_ids=positions, past_key_values=started.cache)
        if dimensions == 4:  # the attention call was refused, so the forward is over for good
            started.cache.reset()
            started.alone.clear()
            started.admit({0: 7})
            return
        logits = started.model(
            token, attention_mask=shown, position_ids=positions, past_key_values=started.cache
        ).logits
    for row, alone in started.alone.items():
        started.compare(logits[row], row, alone.read(token[row]).logits[-1])


def test_a_free_row_has_seen_nothing(started):
    assert started.cache.seen_tokens.tolist() == [10, 0]
    started.steps(3)  # over all rows, the free one too
    assert started.cache.seen_tokens.tolist() == [13, 0]
    started.admit({1: 4}).release(0).steps(5)
    assert started.cache.seen_tokens.tolist() == [0, 9] and started.cache.get_seq_length() == 9
    started.admit({0: 3})

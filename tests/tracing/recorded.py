"""What the tests of recordings share."""

import numpy as np
import torch


SMALL = {"budget": 48, "page_size": 4, "min_decode_pages": 5}
NEVER_PADDING = {"suppress_tokens": [0]}


def one_by_one(model, tokens, cache, start):
    """Read `tokens` through `cache`, the first `start` at once; yields the index of the newest token."""
    with torch.no_grad():
        for end in range(start, tokens.shape[1] + 1):
            model(tokens[:, :end] if end == start else tokens[:, end - 1 : end], past_key_values=cache)
            yield end - 1


def assert_same(one, other):
    """Two recordings of the same forwards."""
    assert one.layers.keys() == other.layers.keys()
    for layer in one.layers:
        pairs = zip(one.layers[layer].calls(), other.layers[layer].calls(), strict=True)
        for ours, theirs in pairs:
            assert (ours.step, ours.page) == (theirs.step, theirs.page)
            for name in ("first", "priority", "resident"):
                np.testing.assert_array_equal(*([getattr(f, name)] for f in (ours, theirs)), err_msg=name)
            np.testing.assert_allclose(ours.score, theirs.score, rtol=1e-5, atol=1e-6)

"""Requests in rows against the brute-force oracle, which holds every token and looks at what would be resident."""

import pytest
import torch

from ..helpers import tiny_model
from ..oracle import OracleCache
from .alone import OPTIONS, answers, requests, rows


@pytest.mark.parametrize(
    ("method", "options"), [("raas", {"alpha": 0.1}), ("raas", {"prompt": "evict"}), ("h2o", {}), ("tova", {})], ids=str
)
def test_requests_give_what_the_oracle_gives(method, options):
    model, asked = tiny_model(), requests(5, longest=30, new=25, seed=7)
    with rows(model, chunk=8, method=method, **options) as manager:
        found = answers(manager, asked)
    model.set_attn_implementation("oracle")
    for (prompt, new), tokens in zip(asked, found, strict=True):
        oracle = OracleCache(32, method=method, **{**OPTIONS, **options})
        output = model.generate(
            torch.tensor([prompt]), past_key_values=oracle, max_new_tokens=new, do_sample=False, pad_token_id=0
        )
        assert tokens == output[0, len(prompt) :].tolist()

"""Every architecture of transformers that builds from a tiny config: served exactly, or refused with the reason."""

import itertools
import re

import pytest
from packaging.version import Version
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..architectures import ARCHITECTURES, LEFT_OUT, names
from ..model_matrix import ERRORS, REFUSED, TRANSFORMERS, full_budget, small_budget


OTHER_METHODS = {
    "h2o": {"prompt": "evict"},
    "quest": {"dense_layers": 0},
    "raas": {"prompt": "select", "alpha": None, "top_ratio": 0.3, "min_decode_pages": 2},
    "rkv": {"prompt": "evict"},
    "tova": {"prompt": "pin"},
    "streaming_llm": {},
    "gkv": {"prompt": "evict"},
    "lazy_eviction": {"alpha": 0.3, "recent_tokens": 4},
    "vase": {"protected_ratio": 0.3},
    "window": {},
    "random": {"recent_tokens": 4},
}


def test_enough_architectures():
    served = set(names()) - set(REFUSED)
    assert len(served) >= 120 and not set(names()) & set(LEFT_OUT)


@pytest.mark.skipif(Version(TRANSFORMERS).release[:2] != (5, 24), reason="the list is that of transformers 5.24")
def test_every_architecture_is_listed():
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) == set(ARCHITECTURES) | set(LEFT_OUT)


@pytest.mark.parametrize("name", names())
def test_full_budget_equals_dynamic_cache_or_is_refused(name):
    refusal = full_budget(name).refusal
    if name in REFUSED:
        assert refusal and re.search(ERRORS[REFUSED[name]], refusal)
    else:
        assert refusal is None


@pytest.mark.parametrize("name", [name for name in names() if name not in REFUSED])
def test_small_budget_equals_the_oracle(name):
    small_budget(name)


@pytest.mark.parametrize(
    ("name", "method"),
    [*zip((name for name in names() if name not in REFUSED), itertools.cycle(OTHER_METHODS), strict=False)],
)
def test_another_method_equals_the_oracle(name, method):
    """In a rotation: each method meets two dozen architectures."""
    if (name, method) == ("dory", "vase"):
        method = (
            "h2o"  # a looped model copies its layers with the seeds of their draws; the oracle draws by layer index
        )
    small_budget(name, method, steps=60, **OTHER_METHODS[method])


@pytest.mark.parametrize("name", ["youtu", "gemma2", "gpt_oss", "gemma3n_text", "falcon_h1"])
@pytest.mark.parametrize(
    "settings",
    [
        {"scoring": "minmax"},
        {"scoring": "minmax", "granularity": "layer", "alpha": 0.05},
        {"granularity": "layer"},
        {"alpha": None, "top_ratio": 0.4},
    ],
    ids=str,
)
def test_every_setting_on_every_kind_of_attention(name, settings):
    """A latent, a cap, sinks, shared KV, linear attention beside full: scores as the oracle has them."""
    assert small_budget(name, **settings) >= 80

"""Methods by name, a user's own, budgets by layer; and that to add a method takes a file and a line."""

import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import raas_cache
from raas_cache import PagedCache, Policy, RaaSCache, from_name, list_methods, register_policy
from raas_cache.methods.raas import RaaSPolicy

from ..helpers import generate, prompt, resident_set, tiny_model


ROOT = Path(__file__).parents[2]
NEW_METHOD = """
from dataclasses import dataclass
from ..engine.policy import Pages, Policy
from .registry import register_policy

@register_policy("newest")
@dataclass(frozen=True)
class NewestPolicy(Policy):
    def on_scores(self, pages: Pages) -> None:
        pass
"""
USE = """
import torch
from raas_cache import from_name, list_methods
from tests.helpers import generate, prompt, tiny_model
cache = from_name("newest", 52, page_size=4)
generate(tiny_model(), prompt(), cache, 60)
print("newest" in list_methods(), cache.evicted_pages(0)[0, 0].item())
"""


def code_of(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def test_the_page_on_new_methods_runs(capsys):
    blocks = code_of("new-method.md")
    assert len(blocks) == 3 and len(blocks[0].splitlines()) <= 30
    names = {"model": tiny_model(), "inputs": prompt(2, 30, (7, 0))}
    for block in blocks:
        exec(compile(block, "docs/new-method.md", "exec"), names)
    assert "FadingAttention(half_life=50.0)" in capsys.readouterr().out
    assert isinstance(from_name("fading", 64, half_life=7.0), names["FadingCache"])
    assert names["out"].shape == (2, 430) and names["cache"].evicted_pages(1).min() > 20
    assert "fading" in list_methods()
    # It is neither a window nor the cache of another half-life.
    held = resident_set(names["cache"], 1, 0, 0)
    assert min(t for t in held if t >= 30) < 430 - 256
    other = from_name("fading", budget=256, half_life=5.0, page_size=4, prompt="pin")
    generate(names["model"], names["inputs"], other, 400)
    assert resident_set(other, 1, 0, 0) != held


def test_a_method_more_takes_a_file_and_a_line(tmp_path):
    source = shutil.copytree(ROOT / "src" / "raas_cache", tmp_path / "raas_cache")
    (source / "methods" / "newest.py").write_text(NEW_METHOD)
    with (source / "methods" / "__init__.py").open("a") as file:
        file.write("from .newest import NewestPolicy as NewestPolicy\n")
    path = {"PYTHONPATH": f"{tmp_path}:{ROOT / 'kernels'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, env=path, cwd=tmp_path)
    assert result.stdout == "True 7\n", result.stderr


def test_each_method_is_one_short_file():
    folder = ROOT / "src" / "raas_cache" / "methods"
    files = {path.stem: len(path.read_text().splitlines()) for path in folder.glob("*.py")}
    assert set(list_methods()) == files.keys() - {"__init__", "registry"}
    lines = (folder / "__init__.py").read_text().splitlines()
    for name in list_methods():
        assert sum(f".{name} " in line for line in lines) == 1
        assert files[name] < 110, name


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "message"),
    [
        ("qest", {}, ValueError, "name='qest' is not a method: did you mean 'quest'?"),
        ("xyz", {}, ValueError, "name='xyz' is not a method: use one of dense, "),
        ("h2o", {"recent_ratio": 1.5}, ValueError, r"recent_ratio=1.5 must lie in \[0, 1\]"),
        ("random", {"recent_tokens": -1}, ValueError, "recent_tokens=-1 must be 0 or more: try 64"),
        ("random", {"recent_tokens": 0.5}, TypeError, "recent_tokens=0.5 must be an int, not float"),
        ("random", {"seed": -1}, ValueError, r"seed=-1 must lie in \[0, 2\*\*32\)"),
        ("gkv", {"decay": 2}, ValueError, r"decay=2 must lie in \[0, 1\]: try 0.8"),
        ("gkv", {"importance_weight": 2}, ValueError, r"importance_weight=2 must lie in \[0, 1\]: try 0.1"),
        ("lazy_eviction", {"alpha": 1}, ValueError, r"alpha=1 must lie in \(0, 1\)"),
        ("lazy_eviction", {"recent_tokens": -1}, ValueError, "recent_tokens=-1 must be 0 or more: try 64"),
        ("vase", {"protected_ratio": -0.1}, ValueError, r"protected_ratio=-0.1 must lie in \[0, 1\]"),
        ("vase", {"seed": 1 << 32}, ValueError, r"seed=4294967296 must lie in \[0, 2\*\*32\)"),
        ("rkv", {"importance_weight": -1}, ValueError, r"importance_weight=-1 must lie in \[0, 1\]"),
        ("quest", {"dense_layers": -1}, ValueError, "dense_layers=-1 must be 0 or more"),
        ("quest", {"prompt": "evict"}, ValueError, "prompt='evict' is not supported by QuestPolicy.* 'select', 'pin'"),
        ("dense", {"prompt": "select"}, ValueError, "prompt='select' is not supported by DensePolicy"),
        ("raas", {"prompt": "keep"}, ValueError, "prompt='keep' is unknown: use one of 'pin', 'select', 'evict'"),
        ("raas", {"kv_dtype": "int2"}, ValueError, "kv_dtype='int2' is unknown: use one of None, 'int8', 'fp8'"),
        ("raas", {"top_ratio": "0.5"}, TypeError, "top_ratio='0.5' must be a number, not str"),
        ("raas", {"budget": [64, 0]}, ValueError, "budget=0 must be positive"),
        ("raas", {"budget": []}, ValueError, "budget=.. must be an int, or a list with one int per layer"),
        ("h2o", {"alpha": 0.1}, TypeError, "alpha"),
    ],
    ids=str,
)
def test_bad_arguments(name, kwargs, error, message):
    with pytest.raises(error, match=message):
        from_name(name, **{"budget": 64, **kwargs})


def test_what_never_evicts_does_not_warn_of_a_long_prompt():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`past_key_values`", FutureWarning)
        for name in ("dense", "quest"):
            generate(tiny_model(), prompt(2, 40), from_name(name, 16), 3)


def test_a_policy_that_is_none():
    with pytest.raises(TypeError, match="policy='raas' must be a raas_cache"):
        PagedCache(64, policy="raas")
    with pytest.raises(TypeError, match=r"policy=.* must be a subclass of raas_cache.Policy"):
        register_policy("mine")(dict)


def test_a_name_belongs_to_one_policy():
    with pytest.raises(ValueError, match="name='raas' belongs to RaaSPolicy already: choose another name"):
        register_policy("raas")(type("Other", (Policy,), {}))
    assert register_policy("raas")(RaaSPolicy) is RaaSPolicy


def test_evicted_input_is_not_taken_back():
    cache = from_name("h2o", 64, page_size=4)
    with pytest.raises(ValueError, match=r"prompt='evict' evicts prompt tokens.*use prompt='pin' or 'select'"):
        generate(tiny_model(), prompt(), cache, 10, sample=False, prompt_lookup_num_tokens=3)
    cache = from_name("h2o", 64, page_size=4)
    generate(tiny_model(), prompt(), cache, 10)
    with pytest.raises(RuntimeError, match="can take back only 0 tokens"):
        cache.crop(-1)


class TestBudgetsByLayer:
    def test_each_layer_has_its_own(self):
        cache = RaaSCache([96, 48], page_size=4, min_decode_pages=7)
        generate(tiny_model(), prompt(), cache, 120)
        assert [cache.resident_positions(layer).shape[2] for layer in (0, 1)] == [96, 48]
        assert cache.evicted_pages(0).max() < cache.evicted_pages(1).min()
        assert repr(cache).startswith("RaaSCache(budget=(96, 48), held=")

    def test_too_few_of_them(self):
        with pytest.raises(ValueError, match=r"budget=\(96,\) has 1 entries, but the model has a layer 1"):
            generate(tiny_model(), prompt(), RaaSCache([96], page_size=4), 10)


def test_public_names_are_documented():
    for name in raas_cache.__all__:
        assert getattr(raas_cache, name).__doc__, name

"""What a notebook shows of a cache."""

import pytest

from raas_cache import DenseCache, RaaSCache
from raas_cache.viz import html

from ..architectures import build
from ..helpers import generate, prompt, tiny_model
from .by_hand import Pieces


pytestmark = pytest.mark.filterwarnings("ignore:budget=")


def card(cache):
    shown = cache._repr_html_()
    Pieces(shown)
    return shown


def widths(shown):
    """Widths of the bars' parts, in %."""
    return [float(part.partition("%")[0]) for part in shown.split("width:")[1:] if "%" in part[:6]]


def test_a_cache_at_a_glance():
    model, cache = tiny_model(), RaaSCache(48, page_size=4, min_decode_pages=5)
    assert card(cache).endswith(">empty</div>") and "budget=48, page_size=4" in card(cache)
    generate(model, prompt(2, 14), cache, 60)
    shown = card(cache)
    assert f"{cache.nbytes:,} bytes" in shown and "RaaSPolicy(alpha=0.2" in shown
    assert "layers 0 to 1: 45 of 73 tokens held, budget 48" in shown
    assert f"{cache.evicted_pages(0)[0, 0]} evicted by each KV head in each of 2 rows" in shown
    assert all(said in shown for said in ("4 pinned", "8 evictable", "0 free"))
    assert widths(shown) == [33.3, 66.7, 0]
    assert "over budget" not in shown


def test_budgets_by_layer_have_a_bar_each():
    cache = RaaSCache([48, 96], page_size=4, min_decode_pages=5)
    generate(tiny_model(), prompt(1, 14), cache, 60)
    shown = card(cache)
    assert "layer 0: 45 of 73 tokens held, budget 48" in shown and "layer 1: 73 of 73 tokens held, budget 96" in shown
    assert "budget=(48, 96)" in shown and widths(shown) == [16.7, 33.3, 0, 16.7, 62.5, 20.8]


def test_what_bounds_nothing_or_is_exceeded_says_so():
    dense, over = DenseCache(48, page_size=4), RaaSCache(16, page_size=4)
    for cache in (dense, over):
        generate(tiny_model(), prompt(1, 34), cache, 40)
    assert "73 of 73 tokens held; pages" in card(dense) and "over budget" not in card(dense)
    assert "<b>over budget</b>: the prompt leaves fewer than min_decode_pages pages" in card(over)


def test_layers_without_pages_are_named():
    model = build("gemma3_text")
    cache = RaaSCache(48, page_size=4, config=model.config)
    assert "DynamicSlidingWindowLayer, no pages" in card(cache) and "PagedLayer, no pages" in card(cache)
    generate(model, prompt(1, 14), cache, 60)
    shown = card(cache)
    assert "layer 0: DynamicSlidingWindowLayer, no pages" in shown and "layer 1: 45 of 73 tokens held" in shown


def test_names_are_escaped():
    piece = html.Piece("<script>", 1, False, '"><script>')
    shown = html.of_text([piece], [], "<all>")
    assert "<script>" not in shown and "<all>" not in shown

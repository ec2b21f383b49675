"""What the figures of a recording hold, artist by artist."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest


pytest.importorskip("matplotlib")
from matplotlib import colormaps, pyplot
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.patches import StepPatch

from raas_cache import RaaSCache, Recording, record, viz
from raas_cache.methods.raas import DEFAULT_ALPHA

from ..helpers import generate, prompt, tiny_model
from .by_hand import HELD, PLACE, SCORES, Words, recording_of


pytestmark = pytest.mark.filterwarnings("ignore:budget=")


def image(figure):
    """The picture of a waterfall."""
    (found,) = (artist for artist in figure.axes[0].collections if isinstance(artist, QuadMesh))
    return found


def mesh(figure):
    """The edges of its columns and rows, and scores, NaN where nothing is drawn."""
    found = image(figure)
    corners = found.get_coordinates()
    return corners[0, :, 0], corners[:, 0, 1], np.ma.filled(found.get_array().astype(float), np.nan)


def bars(container):
    """`(left, bottom, right, top)` of each bar."""
    return [patch.get_bbox().extents.tolist() for patch in container]


def segments(axis, label):
    """`(start, end)` of each line of the collection of that label, None for that which has none."""
    every = (one for one in axis.collections if isinstance(one, LineCollection))
    (found,) = (one for one in every if (None if one.get_label().startswith("_") else one.get_label()) == label)
    return [tuple(map(tuple, segment)) for segment in found.get_segments()]


def lines(axis):
    """Label -> (xs, ys)."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()}


def texts(axis):
    return [(text.get_text().strip(), text.get_position()) for text in axis.texts]


def test_a_waterfall_by_hand(by_hand):
    figure = viz.waterfall(by_hand, **PLACE)
    columns, rows, scores = mesh(figure)
    assert columns.tolist() == [0, 2, 3, 5, 7, 9, 11] and rows.tolist() == list(range(3, 12))
    expected = np.full((8, 6), np.nan)
    for at, held in enumerate(HELD):
        for page in held:
            expected[at, [0, 2, 3, 5, 7, 9].index(page)] = SCORES.get((at + 3, page), 0)
    np.testing.assert_array_equal(scores, expected)
    axis, bar = figure.axes
    assert sorted(bars(axis.containers[0])) == [[3, 9, 5, 11], [5, 7, 7, 11]], "evicted, to the end"
    assert axis.containers[0][0].get_hatch() and axis.containers[0].get_label() == "evicted"
    assert segments(axis, None) == [((0, 3), (0, 11)), ((3, 3), (3, 11))]
    assert texts(axis) == [("pinned prompt", (0, 1.01))]
    assert axis.get_xlim() == (0, 11) and axis.get_ylim() == (11, 3), "time runs down"
    assert "tokens" in axis.get_xlabel() and "token" in axis.get_ylabel() and "(0 to 1)" in bar.get_ylabel()
    assert figure.get_suptitle() == "Score of each page: layer 1, KV head 0\nRaaSPolicy(), budget=8, page_size=2"


def test_shades_are_monotone_and_zero_is_not_blank(by_hand):
    shades = image(viz.waterfall(by_hand, **PLACE, alpha=0.125)).to_rgba(np.array([0, 0.01, 0.125, 0.5, 1]))
    assert (shades[:, 0] == shades[:, 1]).all() and (np.diff(shades[:, 0]) < 0).all()
    assert shades[0, 0] == pytest.approx(0.92, abs=0.01) and shades[2, 0] == pytest.approx(0.46, abs=0.01)
    assert shades[-1, 0] == 0


def test_a_waterfall_of_a_chain(embedded):
    """Each cell is the highest score of its steps, over what was held of its page."""
    recording, *_ = embedded
    history = recording.history(**PLACE)
    columns, rows, scores = mesh(viz.waterfall(recording, **PLACE))
    assert columns[:-1].tolist() == history.first.tolist() and columns[-1] == rows[-1] == history.steps[-1] + 1
    assert len(rows) == -(-len(history.steps) // 3) + 1
    for at, (top, bottom) in enumerate(pairwise(rows)):
        of_cell = (history.steps >= top) & (history.steps < bottom)
        expected = [
            max(history.score[of_cell, page][history.held[of_cell, page]], default=np.nan)
            for page in range(len(history.first))
        ]
        np.testing.assert_array_equal(scores[at], expected)


@pytest.mark.parametrize(("step", "page"), [(3, 0), (619, 617), (1002, 997), (1002, 0), (500, 498)])
def test_the_use_of_a_single_step_is_seen_however_long_the_recording(step, page):
    held = [list(range(now)) for now in range(3, 1003)]
    recording = recording_of(held, {(step, page): 0.75}, page_size=1)
    columns, rows, scores = mesh(viz.waterfall(recording, **PLACE))
    assert max(scores.shape) <= viz.figures.CELLS and (columns[-1], rows[-1]) == (1002, 1003)
    (((row, column)),) = np.argwhere(scores == 0.75)
    assert columns[column] <= page < columns[column + 1] and rows[row] <= step < rows[row + 1]
    assert np.nansum(scores) == 0.75 and np.isfinite(scores[-1]).all() and np.isnan(scores[0, -1])


def test_pages_that_went_before_the_recording_leave_a_gap():
    recording = recording_of([[0, 2, 40, 42]] * 2, {(42, 2): 0.5}, start=42)
    columns, _, scores = mesh(viz.waterfall(recording, **PLACE))
    assert columns.tolist() == [0, 2, 4, 40, 42, 44]
    np.testing.assert_array_equal(scores[0], [0, 0.5, np.nan, 0, 0])
    assert bars(viz.lifetimes(recording, **PLACE).axes[0].containers[0]) == [[2, 2, 44, 4]]


def test_lifetimes_by_hand(by_hand):
    figure = viz.lifetimes(by_hand, **PLACE)
    axis, scale = figure.axes
    lives = {0: [0, 0, 11, 2], 3: [3, 3, 9, 5], 7: [7, 7, 11, 9]}
    assert bars(axis.containers[0]) == list(lives.values())
    colours = [colormaps["cividis"]((used - 3) / 7) for used in (10, 8, 7)]
    assert [patch.get_facecolor() for patch in axis.containers[0]] == colours
    assert segments(axis, "never scored 0.2") == [((2, 2.5), (11, 2.5)), ((5, 6), (7, 6)), ((9, 10), (11, 10))]
    assert segments(axis, "evicted") == [((9, 3), (9, 5)), ((7, 5), (7, 7))]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["never scored 0.2", "evicted"]
    assert texts(axis) == [("pinned prompt", (11, 0))] and axis.get_ylim() == (11, 0)
    assert "step" in axis.get_xlabel() and "tokens" in axis.get_ylabel() and "0.2 or more" in scale.get_ylabel()
    at_an_eighth = viz.lifetimes(by_hand, **PLACE, alpha=0.125).axes[0]
    assert bars(at_an_eighth.containers[0])[2] == [5, 5, 7, 7], "page 5 scored 0.125"


def test_lifetimes_of_a_chain(embedded):
    recording, *_ = embedded
    history = recording.history(**PLACE)
    axis = viz.lifetimes(recording, **PLACE).axes[0]
    drawn = {bottom: (left, right) for left, bottom, right, _ in bars(axis.containers[0])}
    drawn |= {left: (left, right) for (left, _), (right, _) in segments(axis, f"never scored {DEFAULT_ALPHA}")}
    end = history.steps[-1] + 1
    for page, (first, evicted) in enumerate(zip(history.first.tolist(), history.evicted.tolist(), strict=True)):
        left, right = drawn[first]
        assert left == first and right == (end if np.isnan(evicted) else evicted)
        held = history.steps[history.held[:, page]]
        assert right == held[-1] + 1
    assert len(drawn) == len(history.first)
    assert len(segments(axis, "evicted")) == np.isfinite(history.evicted).sum() > 50
    assert len(axis.containers[0]) == np.isfinite(history.last_use(DEFAULT_ALPHA)).sum()


def test_occupancy_by_layer():
    """Layers that hold alike share a line; its looks tell it from the others in grey, too."""
    budgets = [48, 48, 48, 64, 48, 48]
    model, cache = tiny_model(layers=6), RaaSCache(budgets, page_size=4, min_decode_pages=2)
    with record(cache) as recording:
        generate(model, prompt(2, 14, padding=(0, 6)), cache, 90, suppress_tokens=[0])
    figure = viz.occupancy(recording, row=1)
    (axis,) = figure.axes
    drawn = lines(axis)
    assert drawn.keys() == {"everything", "layers 0 to 2, 4, 5", "layer 3"}
    assert drawn["everything"] == ([0, 103], [0, 103])
    for label, layer in (("layers 0 to 2, 4, 5", 4), ("layer 3", 3)):
        histories = [recording.history(layer, head, 1) for head in range(2)]
        expected = np.mean([history.resident for history in histories], 0).tolist()
        assert drawn[label] == ((histories[0].steps + 1).tolist(), expected)
        assert expected[-1] == cache.resident_tokens(layer)[1].float().mean()
    assert segments(axis, "budget") == [((0, 48), (103, 48)), ((0, 64), (103, 64))]
    looks = {(line.get_marker(), line.get_linestyle()) for line in axis.get_lines()}
    assert len(looks) == 3
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("tokens seen", "tokens held") and "row 1" in figure.get_suptitle()
    assert len(figure.legends[0].get_texts()) == 4


def test_lost_mass_by_hand(by_hand, dense_by_hand):
    lost = viz.lost_mass(by_hand, dense_by_hand, **PLACE)
    assert lost.steps.tolist() == [7, 8, 9, 10] and lost.by_step.tolist() == [0.25, 0, 0.625, 0.0625]
    assert lost.pages.tolist() == [3, 5] and lost.by_page.tolist() == [0.5, 0.4375]
    assert lost.share == 0.9375 / 4
    figure = viz.regret(by_hand, dense_by_hand, **PLACE)
    said = "23.4% of its attention over the 4 steps after the first eviction fell on evicted pages"
    assert figure.get_suptitle().splitlines()[:2] == ["Lost attention: layer 1, KV head 0", said]
    above, below = figure.axes
    (steps,) = (patch for patch in above.patches if isinstance(patch, StepPatch))
    assert steps.get_data().values.tolist() == lost.by_step.tolist()
    assert steps.get_data().edges.tolist() == [7, 8, 9, 10, 11]
    assert bars(below.containers[0]) == [[3, 0, 5, 0.5], [5, 0, 7, 0.4375]]
    for axis in figure.axes:
        assert axis.get_xlim() == (0, 11) and "token" in axis.get_xlabel() and "attention" in axis.get_ylabel()


def test_lost_mass_of_a_chain(embedded):
    recording, dense, _ = embedded
    lost = viz.lost_mass(recording, dense, **PLACE)
    history, whole = recording.history(**PLACE), dense.history(**PLACE)
    by_page = dict.fromkeys(history.first[np.isfinite(history.evicted)].tolist(), 0.0)
    for step, share in zip(lost.steps.tolist(), lost.by_step.tolist(), strict=True):
        held = set(history.first[history.held[history.steps == step][0]].tolist())
        at = whole.steps.tolist().index(step)
        masses = zip(whole.first.tolist(), whole.score[at].tolist(), strict=True)
        gone = {page: mass for page, mass in masses if page <= step and page not in held}
        assert share == pytest.approx(sum(gone.values()), abs=1e-5)
        for page, mass in gone.items():
            by_page[page] += mass
    np.testing.assert_allclose(lost.by_page, list(by_page.values()), atol=1e-4)
    assert lost.pages.tolist() == list(by_page) and 0.1 < lost.share < 0.2
    assert lost.steps[0] == np.nanmin(history.evicted)


def test_nothing_evicted_is_nothing_lost(dense_by_hand):
    lost = viz.lost_mass(dense_by_hand, dense_by_hand, **PLACE)
    assert lost.share == 0 and not lost.steps.size and not lost.pages.size
    figure = viz.regret(dense_by_hand, dense_by_hand, **PLACE)
    assert "No page was evicted" in figure.get_suptitle()
    figure.draw_without_rendering()
    waterfall = viz.waterfall(dense_by_hand, **PLACE).axes[0]
    assert not waterfall.containers and waterfall.get_legend() is None


def test_what_cannot_be_compared_is_refused(by_hand, dense_by_hand):
    mend = r"read the same ids after the same prompt through DenseCache\(budget, page_size=2\)"
    others = {
        r"dense is a recording of RaaSPolicy\(\) with page_size=2": by_hand,
        r"dense is a recording of DensePolicy\(\) with page_size=4": recording_of(
            HELD, page_size=4, method="DensePolicy()"
        ),
        "dense lacks 2 steps of the recording, the first at 9": recording_of(HELD[:6], method="DensePolicy()"),
        "dense lacks 1 pages of the recording, the first at 5": recording_of([[0, 2, 3]] * 8, method="DensePolicy()"),
    }
    for said, dense in others.items():
        for function in (viz.lost_mass, viz.regret):
            with pytest.raises(ValueError, match=f"{said}: {mend}"):
                function(by_hand, dense, **PLACE)


FIGURES = {
    "waterfall": viz.waterfall, "lifetimes": viz.lifetimes,
    "lost_mass": lambda recording, **place: viz.lost_mass(recording, recording, **place),
    "tokens": lambda recording, **place: viz.tokens(recording, Words(), range(11), **place),
}  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_what_was_not_recorded_is_refused(dense_by_hand, name):
    for wrong, said in (({"layer": 0}, r"only the layers \[1\]"), ({"head": 1}, "head=1"), ({"row": 2}, "1 rows")):
        with pytest.raises(ValueError, match=said):
            FIGURES[name](dense_by_hand, **{**PLACE, **wrong})


def test_an_empty_recording_is_refused():
    empty = Recording("RaaSPolicy()", 8, 2, "pin")
    for draw in (viz.occupancy, lambda recording: viz.tokens(recording, Words(), range(11))):
        with pytest.raises(ValueError, match=r"recording is empty: generate inside `with record\(cache\)"):
            draw(empty)


@pytest.mark.parametrize("draw", [viz.waterfall, viz.lifetimes])
def test_alpha_is_a_share(by_hand, draw):
    for alpha in (0, 1, -0.5):
        with pytest.raises(ValueError, match=f"alpha={alpha} must lie in"):
            draw(by_hand, **PLACE, alpha=alpha)
    with pytest.raises(TypeError, match="alpha='high' must be a number"):
        draw(by_hand, **PLACE, alpha="high")


def drawn(recording, dense):
    figures = [viz.waterfall(recording, **PLACE), viz.lifetimes(recording, **PLACE), viz.occupancy(recording)]
    return [*figures, viz.regret(recording, dense, **PLACE)]


def test_figures_are_returned_and_not_shown(embedded, tmp_path):
    for figure in drawn(*embedded[:2]):
        figure.savefig(tmp_path / "figure.png")
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert not pyplot.get_fignums()


def test_a_recording_that_was_saved_shows_the_same(embedded, tokenizer, tmp_path):
    recording, dense, ids = embedded
    for name, one in (("recording", recording), ("dense", dense)):
        one.save(tmp_path / name)
    loaded, loaded_dense = Recording.load(tmp_path / "recording"), Recording.load(tmp_path / "dense")
    for one, other in zip(mesh(viz.waterfall(recording, **PLACE)), mesh(viz.waterfall(loaded, **PLACE)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert viz.tokens(loaded, tokenizer, ids) == viz.tokens(recording, tokenizer, ids)
    assert viz.lost_mass(loaded, loaded_dense, **PLACE).share == viz.lost_mass(recording, dense, **PLACE).share
    assert len(drawn(loaded, loaded_dense)) == 4


@pytest.mark.parametrize("name", ["pin", "evict"])
def test_a_prompt_that_competes(name):
    model, cache = tiny_model(), RaaSCache(48, page_size=4, min_decode_pages=2, prompt=name)
    with record(cache) as recording:
        out = generate(model, prompt(1, 34), cache, 60)
    figure = viz.waterfall(recording, **PLACE)
    assert [position[0] for _, position in texts(figure.axes[0])] == [0]
    edges = [x for (x, _), _ in segments(figure.axes[0], None)]
    assert edges == [0, 34 if name == "pin" else 4], "all of the prompt, or the sink"
    shown = viz.tokens(recording, Words(), out[0])
    before, since = shown.split("Since then")
    assert 'title="token 33:' in before and 'title="token 34:' in since
    assert ("<del" in before.partition("Before")[2]) == (name == "evict")


def test_without_matplotlib_the_extra_is_named(monkeypatch, by_hand, dense_by_hand):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (viz.waterfall, viz.lifetimes, lambda one, **_: viz.occupancy(one)):
        with pytest.raises(ImportError, match=r"Plots need matplotlib: pip install raas-cache\[viz\]"):
            draw(by_hand, **PLACE)
    with pytest.raises(ImportError, match=r"pip install raas-cache\[viz\]"):
        viz.regret(by_hand, dense_by_hand, **PLACE)
    assert viz.lost_mass(by_hand, dense_by_hand, **PLACE).share and viz.tokens(by_hand, Words(), range(11))


def test_importing_needs_no_matplotlib():
    code = "import sys; sys.modules.update(matplotlib=None); import raas_cache.viz"
    subprocess.run([sys.executable, "-c", code], check=True)

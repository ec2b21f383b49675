"""`raas-cache plot`: what the figures hold, point by point, and what is written where."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest


pytest.importorskip("matplotlib")
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex

from raas_cache.bench import report
from raas_cache.bench.steps import Case, StepRow, Timing
from raas_cache.common import reporting
from raas_cache.eval.plots import NARROW, figures, plot
from raas_cache.eval.results import Summary, Tally
from raas_cache.eval.settings import Setting
from raas_cache.methods.raas import DEFAULT_ALPHA

from ..helpers import refused
from .rows import ROW


BUDGETS = (256, 512, 1024, 2048)


def summary(method, budget=None, correct=50, truncated=0, tokens=1000.0, rows=100, **options):
    setting = Setting(method, budget, options)
    tallies = (Tally(1, 1),) * correct + (Tally(1, 0),) * (rows - correct)
    return Summary(
        setting, tallies, majority=correct / rows, truncated=truncated, over_budget=0, prompt_tokens=9.0,
        mean_tokens=tokens, tokens_per_second=1.0, kv_bytes=1, mean_kv_bytes=1.0, evictions=0.0, devices=("CPU",),
    )  # fmt: skip


def row(index, method, budget=None, correct=True, **options):
    return replace(
        ROW, index=index, method=method, budget=budget, options=options, correct=correct, prompt_tokens=9,
        tokens=90 + index,
    )  # fmt: skip


def lines(axis):
    """Label -> (xs, ys) of each line with a legend entry."""
    found = {line.get_label(): line for line in axis.get_lines()}
    return {
        label: (list(line.get_xdata()), list(line.get_ydata()))
        for label, line in found.items()
        if not label.startswith("_")
    }


def bars(axis):
    """Colour -> (x, low, high) of each interval."""
    collections = [found for found in axis.collections if isinstance(found, LineCollection)]
    return {
        to_hex(found.get_color()[0]): [(x, low, high) for (x, low), (_, high) in found.get_segments()]
        for found in collections
    }


def colours(axis):
    return {line.get_label(): to_hex(line.get_color()) for line in axis.get_lines()}


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def ticks(axis):
    return dict(zip(axis.get_xticks(), (label.get_text() for label in axis.get_xticklabels()), strict=True))


def test_accuracy_against_budget_with_intervals():
    found = [
        summary("raas", 1024, correct=80),
        summary("raas", 256, correct=0),
        summary("quest", 256, correct=70),
        summary("quest", 1024, correct=100),
        summary("dynamic", correct=90),
    ]
    figure = figures(found)["accuracy"]
    (axis,) = figure.axes
    drawn = lines(axis)
    assert drawn["raas"] == ([256, 1024], [0.0, 0.8]) and drawn["quest"] == ([256, 1024], [0.7, 1.0])
    assert drawn["dynamic"][1] == [0.9, 0.9] and legend(figure) == ["dynamic", "raas", "quest"]
    for label, ones in (("raas", found[1::-1]), ("quest", found[2:4])):
        expected = [(one.setting.budget, *one.interval) for one in ones]
        np.testing.assert_allclose(bars(axis)[colours(axis)[label]], expected, rtol=0, atol=1e-12)
    band = axis.patches[0].get_extents().transformed(axis.transData.inverted())
    assert (band.y0, band.y1) == pytest.approx(found[-1].interval)


def test_what_is_drawn_aside_stands_in_order_around_its_place():
    figure = figures([summary(method, 256) for method in ("h2o", "tova", "raas")])["accuracy"]
    (axis,) = figure.axes
    figure.draw_without_rendering()
    place = axis.transData.transform((256, 0.5))[0]
    shown = [line.get_transform().transform((256, 0.5))[0] for line in axis.get_lines()]
    assert shown[1] == pytest.approx(place) and shown[0] < place < shown[2]
    drawn = [found.get_transform().transform((256, 0.5))[0] for found in axis.collections]
    assert drawn == pytest.approx(shown), "a bar goes with its point"


@pytest.mark.parametrize(
    ("budgets", "scale"), [((256, 512), "linear"), ((256, 1024), "linear"), (BUDGETS, "log"), ((256,), "linear")]
)
@pytest.mark.parametrize("name", ["accuracy", "chain_length"])
def test_ticks_are_the_budgets(name, budgets, scale):
    (axis,) = figures([summary("raas", budget) for budget in budgets])[name].axes
    assert axis.get_xscale() == scale
    assert ticks(axis) == {budget: f"{budget:,}" for budget in budgets} and not len(axis.get_xticks(minor=True))


def test_chain_length_shows_who_was_stopped():
    found = [
        summary("dynamic", tokens=800, truncated=10),
        summary("h2o", 256, tokens=1900, truncated=51),
        summary("h2o", 512, tokens=1500, truncated=50),
    ]
    figure = figures(found)["chain_length"]
    (axis,) = figure.axes
    drawn = lines(axis)
    assert drawn["h2o"] == ([256, 512], [1900, 1500]) and drawn["dynamic"][1] == [800, 800]
    hollow = [line for line in axis.get_lines() if line.get_markerfacecolor() == "white" and len(line.get_xdata())]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in hollow] == [([256], [1900])]
    assert to_hex(hollow[0].get_color()) == colours(axis)["h2o"]
    assert legend(figure)[:2] == ["dynamic", "h2o"] and legend(figure)[2].startswith("hollow")


def test_dense_can_be_stopped_too():
    (axis,) = figures([summary("dynamic", truncated=60), summary("raas", 256)])["chain_length"].axes
    (line,) = (line for line in axis.get_lines() if line.get_label() == "dynamic")
    assert line.get_markerfacecolor() == "white"


def test_nothing_is_hollow_where_most_came_to_their_end():
    figure = figures([summary("dynamic"), summary("raas", 256, truncated=50)])["chain_length"]
    assert legend(figure) == ["dynamic", "raas"]


@pytest.mark.parametrize("budgets", [(256,), BUDGETS])
def test_an_ablation_includes_the_default(budgets):
    found = [summary("raas", budget, correct=60, page_size=4) for budget in budgets]
    found += [
        summary("raas", budget, correct=int(100 * alpha), page_size=4, alpha=alpha)
        for budget in budgets
        for alpha in (0.5, 1e-4)
    ]
    drawn = figures(found)
    assert drawn.keys() == {"accuracy", "chain_length", "ablation_alpha"}
    figure = drawn["ablation_alpha"]
    (axis,) = figure.axes
    expected = ([1e-4, DEFAULT_ALPHA, 0.5], [0.0, 0.6, 0.5])
    assert lines(axis) == {f"{budget:,}": expected for budget in budgets}
    assert legend(figure) == [f"{budget:,}" for budget in budgets]
    assert axis.get_xscale() == "log" and ticks(axis) == {1e-4: "0.0001", 0.2: "0.2", 0.5: "0.5"}
    assert axis.get_title() == "raas" and axis.get_xlabel() == "alpha (attention weight)"
    intervals = bars(axis)[colours(axis)["256"]]
    assert intervals[1] == pytest.approx((DEFAULT_ALPHA, *found[0].interval))


def test_other_stamping_rules_are_no_point_of_alpha():
    found = [summary("raas", 256), summary("raas", 256, alpha=0.1)]
    found += [summary("raas", 256, correct=20, top_ratio=ratio) for ratio in (0.3, 0.5)]
    drawn = figures(found)
    assert lines(*drawn["ablation_alpha"].axes)["256"][0] == [0.1, DEFAULT_ALPHA]
    assert lines(*drawn["ablation_top_ratio"].axes)["256"] == ([0.3, 0.5], [0.2, 0.2])


def test_the_same_value_named_or_not_is_no_ablation():
    found = [summary("raas", 256), summary("raas", 256, alpha=DEFAULT_ALPHA), summary("h2o", 256, prompt="evict")]
    assert figures(found).keys() == {"accuracy", "chain_length"}


def test_common_options_are_said_once():
    common = {"page_size": 4, "min_decode_pages": 1}
    found = [summary(method, budget, **common) for method in ("raas", "h2o") for budget in BUDGETS]
    found += [summary("raas", 256, correct=30, **{**common, "page_size": size}) for size in (16, 8)]
    found += [summary("raas", budget, **common, alpha=0.5) for budget in (256, 512)]
    drawn = figures([*found, summary("dynamic")], title="math500, a model")
    assert drawn.keys() == {"accuracy", "chain_length", "ablation_page_size", "ablation_alpha"}
    for name in ("accuracy", "chain_length"):
        assert legend(drawn[name]) == ["dynamic", "raas", "h2o", "raas:alpha=0.5"], "page sizes have one budget"
        assert drawn[name].get_suptitle() == (
            "math500, a model, 100 problems\nunless said otherwise: min_decode_pages=1, page_size=4"
        )
    (axis,) = drawn["ablation_page_size"].axes
    assert lines(axis) == {"256": ([4, 8, 16], [0.5, 0.3, 0.3])} and axis.get_xscale() == "linear"
    (axis,) = drawn["ablation_alpha"].axes
    assert lines(axis).keys() == {"256", "512"} and axis.get_title() == "raas"


def test_an_option_that_some_do_not_name_is_not_common():
    found = [summary(method, budget, page_size=4) for method in ("raas", "h2o") for budget in BUDGETS]
    figure = figures([*found, *(summary("raas", budget) for budget in BUDGETS)])["accuracy"]
    assert legend(figure) == ["raas:page_size=4", "h2o:page_size=4", "raas"]


def test_words_are_categories_and_methods_panels():
    found = [summary("tova", 256, correct=10), summary("tova", 256, correct=40, prompt="pin")]
    found += [summary("raas", 256, correct=60), summary("raas", 256, correct=20, prompt="evict")]
    found += [summary("quest", 256, prompt="pin")]
    axes = figures(found)["ablation_prompt"].axes
    assert [axis.get_title() for axis in axes] == ["tova", "raas"]
    assert [lines(axis)["256"] for axis in axes] == [([0, 1], [0.1, 0.4]), ([0, 1], [0.2, 0.6])]
    for axis in axes:
        assert ticks(axis) == {0: "evict", 1: "pin"}
        assert {line.get_linestyle() for line in axis.get_lines()} == {"None"}, "there is nothing between words"


@pytest.mark.parametrize(
    ("option", "value", "default"),
    [("granularity", "layer", "head"), ("scoring", "minmax", "exact"), ("kv_dtype", "int8", "None")],
)
def test_defaults_of_words(option, value, default):
    (axis,) = figures([summary("raas", 256), summary("raas", 256, **{option: value})])[f"ablation_{option}"].axes
    assert ticks(axis) == {0: default, 1: value}


def test_wide_options_from_0_up_keep_their_0():
    found = [summary("quest", 256, dense_layers=layers) for layers in (0, 4, 256)]
    figure = figures(found)["ablation_dense_layers"]
    (axis,) = figure.axes
    assert lines(axis)["256"][0] == [0, 4, 256] and axis.get_xscale() == "symlog"
    figure.draw_without_rendering()


def test_more_panels_than_a_line_holds():
    found = [
        summary(method, 256, **options)
        for method in ("streaming_llm", "h2o", "tova", "rkv")
        for options in ({}, {"prompt": "pin"})
    ]
    figure = figures(found)["ablation_prompt"]
    assert len(figure.axes) == 4
    assert [bool(axis.get_ylabel()) for axis in figure.axes] == [True, False, False, True]


def test_up_to_nine_methods_have_colours_of_their_own_and_more_have_dashes():
    several = [summary("raas", budget, alpha=alpha / 50) for alpha in range(1, 21) for budget in (256, 512)]
    (axis,) = figures([summary("dynamic"), *several])["accuracy"].axes
    looks = [(to_hex(line.get_color()), line.get_marker(), line.get_linestyle()) for line in axis.get_lines()]
    assert len(looks) == len(set(looks)) == 21
    assert len({colour for colour, _, _ in looks[:9]}) == len({marker for _, marker, _ in looks[:9]}) == 9


def test_the_legend_hides_nothing():
    several = [summary("raas", budget, alpha=alpha / 50) for alpha in range(1, 26) for budget in (256, 512)]
    for found in (several, [summary("raas", 256), summary("dynamic")]):
        figure = figures(found, title="a data set of a rather long name, " * 3)["accuracy"]
        figure.draw_without_rendering()
        box = figure.legends[0].get_window_extent()
        assert box.y0 >= 0 and box.x1 <= figure.bbox.x1
        assert box.x0 >= figure.axes[0].bbox.x1 and box.x0 >= figure._suptitle.get_window_extent().x1


def test_narrow_figures_hide_nothing_and_have_the_same_points():
    found = [summary("raas", budget, alpha=alpha) for alpha in (0.1, 0.3) for budget in BUDGETS]
    found += [summary("quest", 256, dense_layers=layers) for layers in (0, 4)]
    found += [summary(method, 256, alpha=alpha) for method in ("lazy", "other") for alpha in (0.1, 0.3)]
    wide = figures([*found, summary("dynamic")], "a data set of a rather long name, " * 3)
    narrow = figures([*found, summary("dynamic")], "a data set of a rather long name, " * 3, NARROW)
    assert narrow.keys() == wide.keys() >= {"accuracy", "chain_length", "ablation_alpha", "ablation_dense_layers"}
    for name, figure in narrow.items():
        figure.draw_without_rendering()
        assert figure.get_figwidth() == 3.6
        assert [lines(axis) for axis in figure.axes] == [lines(axis) for axis in wide[name].axes]
        texts = [label for axis in figure.axes for label in (axis.xaxis.label, axis.yaxis.label, axis.title)]
        boxes = [one.get_window_extent() for one in [*texts, figure._suptitle, *figure.legends]]
        for box in boxes:
            assert 0 <= box.x0 <= box.x1 <= figure.bbox.x1 and 0 <= box.y0 <= box.y1 <= figure.bbox.y1, name
        (legend_box,) = (one.get_window_extent() for one in figure.legends)
        assert legend_box.y1 <= min(axis.xaxis.label.get_window_extent().y0 for axis in figure.axes)
        assert len({round(axis.get_position().x0, 3) for axis in figure.axes}) == 1, "panels stand below each other"


@pytest.mark.parametrize(
    "found",
    [
        [summary("dynamic")],
        [summary("raas", 256)],
        [summary("raas", 256), summary("dynamic")],
        [summary("raas", 256, alpha=0.1), summary("raas", 256, alpha=0.3), summary("dynamic")],
    ],
)
def test_one_budget_or_none(found, tmp_path):
    drawn = figures(found)
    assert len(lines(*drawn["accuracy"].axes)) == len(found)
    report.save(drawn, tmp_path)


def test_budgets_by_layer_stand_at_their_mean():
    found = [*(summary("raas", budget) for budget in BUDGETS), summary("raas", (300, 500), correct=70)]
    found.append(summary("raas", (300, 500), alpha=0.1))
    drawn = figures(found)
    assert drawn.keys() == {"accuracy", "chain_length"}
    (axis,) = drawn["accuracy"].axes
    assert lines(axis)["raas, by layer"] == ([400], [0.7]) and ticks(axis)[400] == "400"


def test_how_many_problems_is_said():
    drawn = figures([summary("raas", 256, rows=1200), summary("h2o", 256, rows=60)])
    assert drawn["accuracy"].get_suptitle() == "60 to 1,200 problems"


@pytest.fixture
def folder(tmp_path):
    rows = [row(index, "dynamic", correct=index < 3) for index in range(4)]
    rows += [row(index, "raas", budget, correct=index < 1) for budget in (256, 512) for index in range(4)]
    rows += [row(index, "raas", 256, alpha=0.5) for index in range(4)]
    (tmp_path / "rows-0.jsonl").write_text("".join(one.to_json() for one in rows[:5]))
    (tmp_path / "rows-1.jsonl").write_text("".join(one.to_json() for one in rows[5:]) + '{"index": 4, "promp')
    (tmp_path / "settings.json").write_text(json.dumps({"task": "chains-40", "model": "models/embedded"}))
    return tmp_path


@pytest.fixture
def bench_rows():
    timing = Timing.of([1.0, 2.0, 4.0])
    return [
        StepRow(Case("raas", 1, 64, seen, "eager"), "eager", 640, timing, {"DynamicCache": 0.5}) for seen in (64, 128)
    ] + [StepRow(Case("quest", 1, 64, 128, "eager"), "does not fit", 6400, None, {"DynamicCache": None})]


EVALUATED, BENCHED = ("accuracy", "chain_length", "ablation_alpha"), ("ms_per_token", "kv_bytes")


def test_bench_rows_come_back(bench_rows, tmp_path):
    report.write_json(tmp_path / "bench.json", {"device": "CPU"}, bench_rows)
    assert [asdict(one) for one in report.read_json(tmp_path / "bench.json")] == [asdict(one) for one in bench_rows]


def test_png_and_svg_are_written_beside_the_data(folder, bench_rows):
    names = [f"{name}.{kind}" for name in EVALUATED for kind in ("png", "svg")]
    assert plot(folder) == [folder / name for name in names]
    report.write_json(folder / "bench.json", {}, bench_rows)
    paths = plot(folder)
    assert paths == [folder / name for name in names] + [folder / f"{n}.{k}" for n in BENCHED for k in ("png", "svg")]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")


def test_bench_alone_is_enough(bench_rows, tmp_path):
    report.write_json(tmp_path / "bench.json", {}, bench_rows)
    assert {path.stem for path in plot(tmp_path)} == set(BENCHED)


def test_the_same_data_give_the_same_bytes(folder, bench_rows):
    report.write_json(folder / "bench.json", {}, bench_rows)
    first = {path: path.read_bytes() for path in plot(folder)}
    assert {path: path.read_bytes() for path in plot(folder)} == first
    # Nor do they hang on the process.
    code = "import sys; from pathlib import Path; from raas_cache.eval.plots import plot; plot(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
    assert {path: path.read_bytes() for path in first} == first


def test_titles_tell_task_and_model(folder, monkeypatch):
    drawn = {}
    monkeypatch.setattr(reporting, "save", lambda figures, folder: drawn.update(figures))
    plot(folder)
    assert {figure.get_suptitle() for figure in drawn.values()} == {"chains-40, embedded, 4 problems"}


def command(folder):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from raas_cache.cli import app

    return CliRunner().invoke(app, ["plot", str(folder)])


def test_command_prints_what_it_wrote(folder):
    result = command(folder)
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == [str(folder / f"{name}.{kind}") for name in EVALUATED for kind in ("png", "svg")]


@pytest.mark.parametrize("name", ["", "missing"])
def test_nothing_to_plot_is_one_line_and_exit_code_2(name, tmp_path):
    error = refused(command(tmp_path / name))
    assert f"'{tmp_path / name}' contains no results: run raas-cache eval --out {tmp_path / name} first" in error
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_extra_is_named(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = command(folder)
    assert result.exit_code == 2 and "pip install raas-cache[viz]" in result.output


def test_importing_needs_no_matplotlib():
    code = "import sys; sys.modules.update(matplotlib=None); import raas_cache.eval.plots"
    subprocess.run([sys.executable, "-c", code], check=True)

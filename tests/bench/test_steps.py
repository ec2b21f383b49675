"""Decode steps timed in turns, and what is written of them."""

import json
import statistics
import sys
from dataclasses import asdict

import pytest
import torch

from raas_cache.bench import report, steps
from raas_cache.bench.steps import BASELINES, Grid, run
from raas_cache.common.upstream import CACHE_ARGUMENT

from .tiny import BUDGET, CPU, PAGE, TOKEN_BYTES


def test_a_cell_has_the_baselines_and_the_methods(rows):
    methods = [*BASELINES, "raas", "quest"]
    assert [row.case.method for row in rows] == methods * 2
    assert [row.case.seen for row in rows] == [40] * 5 + [256] * 5
    assert {row.ran for row in rows} == {"eager"}
    size = {row.case.method: row.kv_bytes for row in rows if row.case.seen == 256}
    # 2 copies, each with 3 + 5 / 2 turns to go.
    assert size["dynamic"] == 256 * TOKEN_BYTES and size["StaticCache(seen)"] == (256 + 6) * TOKEN_BYTES
    assert size["StaticCache(budget)"] == size["raas"] == BUDGET * TOKEN_BYTES
    assert size["quest"] > size["dynamic"]


def test_ratios_are_those_of_the_steps_in_the_json(rows, tmp_path):
    report.write_json(tmp_path / "deep" / "bench.json", {"model": "tiny"}, rows)
    loaded = json.loads((tmp_path / "deep" / "bench.json").read_text())
    assert loaded["model"] == "tiny" and loaded["rows"] == [asdict(row) for row in rows]
    for row in loaded["rows"]:
        cell = {
            other["case"]["method"]: other["timing"]["steps"]
            for other in loaded["rows"]
            if other["case"]["seen"] == row["case"]["seen"]
        }
        ours = row["timing"]["steps"]
        assert len(ours) == 5 and min(ours) > 0
        assert row["timing"]["median"] == statistics.median(ours)
        assert min(ours) <= row["timing"]["p10"] <= row["timing"]["median"] <= row["timing"]["p90"] <= max(ours)
        assert set(row["ratios"]) == set(BASELINES)
        for base in BASELINES:
            expected = statistics.median(a / b for a, b in zip(ours, cell[base], strict=True))
            assert row["ratios"][base] == pytest.approx(expected)


def test_table_has_a_line_a_row(rows):
    header, rule, *lines = report.table(rows).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, rule, *lines)]
    assert len({len(line) for line in cells}) == 1
    for row, line in zip(rows, cells[2:], strict=True):
        found = dict(zip(cells[0], line, strict=True))
        assert found["method"] == row.case.method and found["seen"] == str(row.case.seen) and found["ran"] == "eager"
        assert found["ms/token (p10 to p90)"].startswith(f"{row.timing.median:.2f} (")
        assert found["/ StaticCache(seen)"] == f"{row.ratios['StaticCache(seen)']:.2f}"
        assert found["KV bytes"] == f"{row.kv_bytes:,}"


def test_plots_show_the_rows(rows, tmp_path):
    pytest.importorskip("matplotlib")
    figures = report.figures(rows)
    wanted = {"ms_per_token": lambda row: row.timing.median, "kv_bytes": lambda row: row.kv_bytes}
    assert figures.keys() == wanted.keys()
    for name, figure in figures.items():
        (axis,) = figure.axes
        assert axis.get_xscale() == "log" and "tokens seen" in axis.get_xlabel() and axis.get_ylabel()
        lines = {line.get_label(): line for line in axis.get_lines()}
        assert lines.keys() == {row.case.method for row in rows}
        assert len({line.get_color() for line in lines.values()}) == len(lines)
        assert len({line.get_marker() for line in lines.values()}) == len(lines)
        for method, line in lines.items():
            ours = [row for row in rows if row.case.method == method]
            assert line.get_xdata().tolist() == [40, 256]
            assert line.get_ydata().tolist() == [wanted[name](row) for row in ours]
    paths = report.plot(rows, tmp_path)
    assert sorted(path.name for path in paths) == [f"{name}.{end}" for name in sorted(wanted) for end in ("png", "svg")]
    assert all(path.stat().st_size > 1000 for path in paths)


def test_caches_take_turns_at_the_right_positions(model):
    calls = []

    def note(_, __, kwargs):
        calls.append((id(kwargs[CACHE_ARGUMENT]), kwargs["position_ids"].tolist(), kwargs["input_ids"].shape))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    grid = Grid(("raas",), (100,), batches=(3,), budgets=(BUDGET,), page_size=PAGE, steps=4, copies=2)
    try:
        list(run(model, grid))
    finally:
        hook.remove()
    names, turns = 4, steps.WARMUP * 2 + 4
    assert len(calls) == names * turns
    for name in range(names):
        ours = calls[name::names]
        ids = [cache for cache, _, _ in ours]
        assert len(set(ids)) == 2 and ids == ids[:2] * (turns // 2), "two caches, in turn"
        assert [position for _, position, _ in ours] == [[[100 + turn // 2]] * 3 for turn in range(turns)]
        assert {shape for _, _, shape in ours} == {(3, 1)}


def test_baselines_need_not_be_named_and_have_one_row():
    assert Grid(("dynamic", "raas", "raas"), (40,)).methods == ("raas",)


def test_large_caches_have_one_copy(model, monkeypatch):
    monkeypatch.setattr(steps, "ONE_COPY", 100 * TOKEN_BYTES)
    caches = set()
    hook = model.register_forward_pre_hook(lambda _, __, kwargs: caches.add(kwargs[CACHE_ARGUMENT]), with_kwargs=True)
    (rows,) = run(model, Grid(("raas",), (100,), budgets=(BUDGET,), page_size=PAGE, steps=2))
    hook.remove()
    assert sorted(type(cache).__name__ for cache in caches) == [
        "DynamicCache", "RaaSCache", "RaaSCache", "StaticCache", "StaticCache", "StaticCache"
    ]  # fmt: skip
    assert {len(row.timing.steps) for row in rows} == {2}


def test_compiled_cells_compile_what_can_be(model, monkeypatch):
    calls, compile_ = [], torch.compile

    def without_inductor(function, **options):
        calls.append(options)
        return compile_(function, backend="eager", fullgraph=options["fullgraph"], dynamic=options["dynamic"])

    monkeypatch.setattr(torch, "compile", without_inductor)
    grid = Grid(("quest",), (40,), budgets=(BUDGET,), modes=("compiled",), page_size=PAGE, steps=2)
    (rows,) = run(model, grid)
    assert calls == [{"fullgraph": True, "dynamic": False, "mode": "default"}], "one for all caches"
    ran = {row.case.method: row.ran for row in rows}
    assert ran == {
        "dynamic": "eager", "StaticCache(seen)": "compiled", "StaticCache(budget)": "compiled", "quest": "eager"
    }  # fmt: skip


def test_what_does_not_fit_is_left_out_and_said(model, monkeypatch, rows):
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    # Two copies of 64 tokens for each of two caches; not two of 500 more.
    room = (2 * 2 * BUDGET + 200) * TOKEN_BYTES
    monkeypatch.setattr(steps, "free_bytes", lambda device: (room + weights) / 0.9 - weights + 1)
    (cell,) = run(model, Grid(("raas", "quest"), (500,), budgets=(BUDGET,), page_size=PAGE, steps=2))
    ran = {row.case.method: row.ran for row in cell}
    large = {"dynamic", "StaticCache(seen)", "quest"}
    assert ran == {**dict.fromkeys(large, "does not fit"), "StaticCache(budget)": "eager", "raas": "eager"}
    for row in cell:
        if row.case.method in large:
            assert row.timing is None and row.kv_bytes == 500 * TOKEN_BYTES
            assert set(row.ratios.values()) == {None}
        else:
            assert row.ratios["dynamic"] is None and row.ratios["StaticCache(budget)"] > 0
    assert f"| does not fit | - | - | - | - | {500 * TOKEN_BYTES:,} |" in report.table(cell)
    pytest.importorskip("matplotlib")
    lines = report.figures(rows + cell)["kv_bytes"].axes[0].get_lines()
    assert {line.get_label(): len(line.get_xdata()) for line in lines} == {
        "dynamic": 2, "StaticCache(seen)": 2, "StaticCache(budget)": 3, "raas": 3, "quest": 2
    }  # fmt: skip


def test_what_fits_fits_beside_the_weights_with_a_tenth_to_spare(model, monkeypatch):
    free, weights = 1_000_000, sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    monkeypatch.setattr(steps, "free_bytes", lambda device: free)
    room = int(0.9 * (free + weights) - weights)
    for needed, fitting in (
        ({"large": room + 1}, []),
        ({"large": room}, ["large"]),
        ({"large": room - 100, "small": 99}, ["large", "small"]),
        ({"large": room - 100, "small": 101, "tiny": 3}, ["small", "tiny"]),
    ):
        assert steps._that_fit(model, needed) == fitting


def test_free_memory_of_this_machine():
    free = steps.free_bytes(CPU)
    assert free > 1 << 20
    if sys.platform == "linux":
        assert free < 1 << 50

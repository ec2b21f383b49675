"""`raas-cache bench`: caches filled without a model, decode steps timed in turns, and what is written of them."""

import copy
import json
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch
from transformers import LlamaConfig

import raas_kernels
from raas_cache import list_methods
from raas_cache.bench import filling, kernels, report, steps
from raas_cache.bench.filling import Filler, build_model, fast_forward, load_config
from raas_cache.bench.kernels import kernel_table, run_kernels
from raas_cache.bench.steps import BASELINES, Plan, run
from raas_cache.common.upstream import CACHE_ARGUMENT
from raas_cache.methods.registry import POLICIES


CPU = torch.device("cpu")
BUDGET, PAGE, LAYERS = 64, 4, 2
TOKEN_BYTES = 2 * LAYERS * 2 * 16 * 4  # K and V, layers, KV heads, head size, float32
CONFIG = {
    "vocab_size": 32, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1 << 17,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return build_model(LlamaConfig(**CONFIG), CPU, torch.float32)


@pytest.fixture(scope="module")
def rows(model):
    plan = Plan(("raas", "quest"), (40, 256), budgets=(BUDGET,), page_size=PAGE, steps=5)
    return [row for cell in run(model, plan) for row in cell]


@pytest.fixture
def config_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **CONFIG}))
    return tmp_path


def filler(layers=LAYERS, page_size=PAGE, seed=0):
    options = {"batch": 2, "budget": BUDGET, "dtype": torch.float32, "device": CPU}
    return Filler(LlamaConfig(**{**CONFIG, "num_hidden_layers": layers}), page_size=page_size, seed=seed, **options)


def held(cache, layer, row, head):
    positions = cache.resident_positions(layer)[row, head]
    return positions[positions >= 0].tolist()


@pytest.mark.parametrize("method", list_methods())
@pytest.mark.parametrize("seen", [1, 50, 998, 100_000])
def test_filled_caches_have_seen_the_tokens_and_decode_on(model, method, seen):
    if not POLICIES[method].evicts:
        seen = min(seen, 998)
    cache = filler().paged(method, seen)

    def check(now):
        assert all(layer.get_seq_length() == now for layer in cache.layers)
        for layer in range(LAYERS):
            for row, head in ((0, 0), (1, 1)):
                positions = held(cache, layer, row, head)
                assert len(positions) == len(set(positions))
                assert {0, now - 1} <= set(positions) <= set(range(now)), "the prompt's first page, the newest token"
                if not POLICIES[method].evicts:
                    assert len(positions) == now
                elif now >= BUDGET + 2 * PAGE:
                    assert BUDGET - PAGE < len(positions) <= BUDGET

    check(seen)
    evicted = [cache.evicted_pages(layer) for layer in range(LAYERS)]
    with torch.no_grad():
        for step in range(3 * PAGE):
            position = torch.full((2, 1), seen + step)
            model(input_ids=torch.ones_like(position), past_key_values=cache, position_ids=position)
    check(seen + 3 * PAGE)
    if POLICIES[method].evicts and seen >= BUDGET + 2 * PAGE:
        for layer in range(LAYERS):
            assert torch.equal(cache.evicted_pages(layer), evicted[layer] + 3)


def test_the_newest_tokens_are_resident():
    for method in ("raas", "streaming_llm"):
        cache = filler().paged(method, 998)
        # 998 = 249 pages and two tokens, in an open page.
        assert set(held(cache, 0, 0, 0)) >= set(range(996 - PAGE, 998)), method
    assert set(held(cache, 0, 0, 0)) == {0, 1, 2, 3, *range(998 + 2 - BUDGET + PAGE, 998)}, "all but the sink is new"


def test_fast_forward_is_where_streaming_really_gets_to():
    """Its evictions do not depend on what the tokens are, so the long way can be gone too."""
    quick, slow = filler().paged("streaming_llm", 470), filler().paged("streaming_llm", 70)
    for _ in range(400):
        filler().feed(slow, 1)
    assert sorted(held(quick, 1, 1, 1)) == sorted(held(slow, 1, 1, 1))
    for ours, theirs in zip(quick.layers, slow.layers, strict=True):
        assert torch.equal(ours.clock, theirs.clock)
        assert torch.equal(ours.priority.sort(-1).values, theirs.priority.sort(-1).values)
        assert (ours.seen, ours.decoded, ours.evicted) == (theirs.seen, theirs.decoded, theirs.evicted)


@pytest.mark.parametrize("method", ["raas", "h2o", "tova"])
def test_fast_forward_changes_when_but_not_what(method):
    here = filler().paged(method, 90)
    there = copy.deepcopy(here)
    fast_forward(there, 25)
    for cache in (here, there):
        source = filler(seed=7)
        for _ in range(5 * PAGE):
            source.feed(cache, 1)
    for one, other in zip(here.layers, there.layers, strict=True):
        assert torch.equal(one.keys, other.keys), "other pages were evicted"
        pinned = one.pinned_pages * PAGE
        assert torch.equal(one.positions[..., :pinned], other.positions[..., :pinned])
        assert torch.equal(one.positions[..., pinned:] + 25 * PAGE, other.positions[..., pinned:])
        assert other.evicted == one.evicted + 25


def test_what_was_filled_once_serves_all_lengths():
    source = filler()
    caches = {seen: source.paged("raas", seen) for seen in (998, 30, 251, 998 + PAGE)}
    source.feed(caches[251], 1)
    assert {seen: cache.get_seq_length() for seen, cache in caches.items()} == {998: 998, 30: 30, 251: 252, 1002: 1002}
    keys = [caches[seen].layers[0].keys for seen in (251, 998, 1002)]
    assert len({key.data_ptr() for key in keys}) == 3
    assert [max(held(caches[seen], 0, 0, 0)) for seen in (251, 998, 1002)] == [251, 997, 1001]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("page_size", [1, 16, 32])
def test_the_prompt_leaves_room_in_small_budgets(page_size):
    for method in ("raas", "h2o"):
        cache = filler(page_size=page_size).paged(method, 998)
        assert BUDGET - page_size < cache.resident_tokens(0).max() <= BUDGET
        assert cache.nbytes == 2 * BUDGET * TOKEN_BYTES
        assert cache.evicted_pages(0).min() > 0


def test_layers_of_one_policy_are_copies_apart():
    cache = filler().paged("raas", 998)
    one, other = cache.layers
    assert torch.equal(one.keys, other.keys) and one.keys.data_ptr() != other.keys.data_ptr()
    quest = filler(layers=4).paged("quest", 100)
    assert [layer.policy.name for layer in quest.layers] == ["dense", "dense", "quest", "quest"]
    assert [layer.has_bounds for layer in quest.layers] == [False, False, True, True]


def test_a_cell_has_the_baselines_and_the_methods(rows):
    methods = [*BASELINES, "raas", "quest"]
    assert [row.case.method for row in rows] == methods * 2
    assert [row.case.seen for row in rows] == [40] * 5 + [256] * 5
    assert {row.ran for row in rows} == {"eager"}
    size = {row.case.method: row.kv_bytes for row in rows if row.case.seen == 256}
    # 2 copies, each with 3 + 5 / 2 turns to go.
    assert size["DynamicCache"] == 256 * TOKEN_BYTES and size["StaticCache(seen)"] == (256 + 6) * TOKEN_BYTES
    assert size["StaticCache(budget)"] == size["raas"] == BUDGET * TOKEN_BYTES
    assert size["quest"] > size["DynamicCache"]


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
    plan = Plan(("raas",), (100,), batches=(3,), budgets=(BUDGET,), page_size=PAGE, steps=4, copies=2)
    try:
        list(run(model, plan))
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


def test_large_caches_have_one_copy(model, monkeypatch):
    monkeypatch.setattr(steps, "ONE_COPY", 100 * TOKEN_BYTES)
    caches = set()
    hook = model.register_forward_pre_hook(lambda _, __, kwargs: caches.add(kwargs[CACHE_ARGUMENT]), with_kwargs=True)
    (rows,) = run(model, Plan(("raas",), (100,), budgets=(BUDGET,), page_size=PAGE, steps=2))
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
    plan = Plan(("quest",), (40,), budgets=(BUDGET,), modes=("compiled",), page_size=PAGE, steps=2)
    (rows,) = run(model, plan)
    assert calls == [{"fullgraph": True, "dynamic": False, "mode": "default"}], "one for all caches"
    ran = {row.case.method: row.ran for row in rows}
    assert ran == {
        "DynamicCache": "eager", "StaticCache(seen)": "compiled", "StaticCache(budget)": "compiled", "quest": "eager"
    }  # fmt: skip


def test_what_does_not_fit_is_left_out_and_said(model, monkeypatch, rows):
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    # Two copies of 64 tokens for each of two caches; not two of 500 more.
    room = (2 * 2 * BUDGET + 200) * TOKEN_BYTES
    monkeypatch.setattr(steps, "free_bytes", lambda device: (room + weights) / 0.9 - weights + 1)
    (cell,) = run(model, Plan(("raas", "quest"), (500,), budgets=(BUDGET,), page_size=PAGE, steps=2))
    ran = {row.case.method: row.ran for row in cell}
    large = {"DynamicCache", "StaticCache(seen)", "quest"}
    assert ran == {**dict.fromkeys(large, "does not fit"), "StaticCache(budget)": "eager", "raas": "eager"}
    for row in cell:
        if row.case.method in large:
            assert row.timing is None and row.kv_bytes == 500 * TOKEN_BYTES
            assert set(row.ratios.values()) == {None}
        else:
            assert row.ratios["DynamicCache"] is None and row.ratios["StaticCache(budget)"] > 0
    assert f"| does not fit | - | - | - | - | {500 * TOKEN_BYTES:,} |" in report.table(cell)
    pytest.importorskip("matplotlib")
    lines = report.figures(rows + cell)["kv_bytes"].axes[0].get_lines()
    assert {line.get_label(): len(line.get_xdata()) for line in lines} == {
        "DynamicCache": 2, "StaticCache(seen)": 2, "StaticCache(budget)": 3, "raas": 3, "quest": 2
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_are_built_in_their_dtype(dtype, config_folder):
    built = build_model(load_config(str(config_folder)), CPU, dtype)
    assert built.dtype == dtype and not built.training
    assert {parameter.dtype for parameter in built.parameters()} == {dtype}
    assert torch.equal(built.lm_head.weight, build_model(load_config(str(config_folder)), CPU, dtype).lm_head.weight)


def test_named_models():
    assert filling.kv_shape(load_config("small")) == (6, 6, 2, 64)
    assert filling.kv_shape(load_config("llama-3-8b")) == (32, 32, 8, 128)
    with torch.device("meta"):
        big = build_model(load_config("llama-3-8b"), torch.device("meta"), torch.bfloat16)
    assert sum(parameter.numel() for parameter in big.parameters()) == 8_030_261_248


def test_kernel_rows():
    config = LlamaConfig(**CONFIG)
    options = {"batches": [1, 2], "budgets": [64, 128], "page_size": 4, "repeats": 3, "dtype": torch.float32}
    rows = run_kernels(config, **options, device=CPU)
    assert [(row.batch, row.budget) for row in rows] == [(1, 64), (1, 128), (2, 64), (2, 128)]
    for row in rows:
        assert row.bytes_read == 2 * row.batch * 2 * row.budget * 16 * 4
        assert len(row.timing.steps) == len(row.dense_timing.steps) == 3
        assert row.bandwidth == pytest.approx(row.bytes_read / (row.timing.median / 1e3))
        assert row.share == pytest.approx(row.bandwidth / row.copy_bandwidth) and 0 < row.share < 10
        assert 1e8 < row.copy_bandwidth < 1e14
    header, _, *lines = kernel_table(rows).splitlines()
    assert len(lines) == 4 and "share" in header
    assert f"{rows[0].share:.0%}" in lines[0] and rows[0].dense in lines[0]
    for wrong, message in (
        ({"budgets": [64, 66]}, "budget=66 must be whole pages"),
        ({"budgets": [0]}, "budget=0 must be whole pages"),
        ({"page_size": 6}, "page_size=6 must be a power of two"),
        ({"repeats": 1}, "repeats=1 must be at least 2"),
        ({"batches": [0]}, "batch=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            run_kernels(config, **{**options, **wrong}, device=CPU)


def test_the_best_dense_kernel_is_the_fastest(monkeypatch):
    slow, quick = lambda *_: time.sleep(0.01), lambda *_: None
    monkeypatch.setattr(kernels, "_dense_kernels", lambda inputs: {"slow": slow, "quick": quick, "too": slow})
    options = {"batches": [1], "budgets": [64], "page_size": 4, "repeats": 2, "dtype": torch.float32, "device": CPU}
    (row,) = run_kernels(LlamaConfig(**CONFIG), **options)
    assert row.dense == "quick" and row.dense_timing.median < 10


def test_dense_kernels_compute_the_same():
    query, keys, values = (torch.randn(2, heads, length, 16) for heads, length in ((4, 1), (2, 64), (2, 64)))
    dense = kernels._dense_kernels((query, keys, values))
    assert {"sdpa math", "sdpa math, packed"} <= dense.keys()
    ours, _ = raas_kernels.attend(query, keys, values, torch.zeros(2, 2, 64), scale=0.25, page_size=4)
    for name, kernel in dense.items():
        torch.testing.assert_close(kernel(query, keys, values), ours, msg=name)


def command(*options):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from raas_cache.cli import app

    return CliRunner().invoke(app, ["bench", "--device", "cpu", *map(str, options)])


def test_command_prints_and_writes(config_folder, tmp_path):
    pytest.importorskip("matplotlib")
    options = ("--model", config_folder, "--seen", "32,64", "--budget", "48,64", "--page-size", 4, "--steps", 3)
    result = command("--method", "streaming_llm", *options, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + 4 * 4
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert found["threads"] == torch.get_num_threads() and found["dtype"] == "float32" and found["device"] == "CPU"
    assert found["plan"]["budgets"] == [48, 64] and len(found["rows"]) == 16
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"bench.json", *(f"{n}.{e}" for n in ("ms_per_token", "kv_bytes") for e in ("png", "svg"))}


def test_command_times_kernels(config_folder, tmp_path):
    options = ("--model", config_folder, "--budget", 64, "--batch", 2, "--steps", 2, "--out", tmp_path / "out")
    result = command("--kernels", *options)
    assert result.exit_code == 0, result.output
    share = re.search(r"\| (\d+)% \|", result.stdout)
    assert 0 <= int(share[1]) < 1000
    (row,) = json.loads((tmp_path / "out" / "kernels.json").read_text())["rows"]
    assert row["bytes_read"] == 2 * 2 * 2 * 64 * 16 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "rass"], "did you mean 'raas'?"),
        (["--method", "raas,kvpress"], "an environment that has kvpress with --peer-python"),
        (["--mode", "fast"], "mode='fast' is unknown: use one of 'eager', 'compiled'"),
        (["--seen", "1k"], "'1k' must be numbers"),
        (["--seen", "0"], "seen=0 must be at least 1"),
        (["--batch", "0"], "batch=0 must be at least 1"),
        (["--budget", "40"], "budget=40 must be at least 47"),
        (["--budget", "1024", "--page-size", 1024], "budget=1024 must be at least 2048"),
        (["--page-size", 6], "page_size=6"),
        (["--model", "medium"], "model='medium' must be one of small, llama-3-8b, a folder"),
        (["--dtype", "int4"], "'int4' must be float32, bfloat16 or float16"),
        (["--device", "tpu"], "--device"),
        (["--kernels", "--budget", "100"], "budget=100 must be whole pages"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(options, message):
    result = command(*options)
    assert result.exit_code == 2, result.output
    (error,) = (line for line in result.output.splitlines() if line.startswith("Error: "))
    assert message in error


def test_timing_needs_no_extra():
    code = "import sys; sys.modules.update(dict.fromkeys(['typer', 'rich', 'matplotlib'])); import raas_cache.bench"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plots_without_matplotlib_are_refused_at_once(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = command("--out", tmp_path)
    assert result.exit_code == 2 and "pip install raas-cache[viz]" in result.output


def test_other_layers_than_full_attention_are_refused(tmp_path):
    config = {**CONFIG, "model_type": "mistral", "sliding_window": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"\(mistral\) has layers that do not cache plain keys"):
        load_config(str(tmp_path))


def test_help_lists_the_options():
    output = command("--help").output
    for option in (
        "method", "seen", "batch", "budget", "mode", "model", "page-size", "steps", "copies", "device", "dtype", "seed",
        "out", "kernels", "peer-python",
    ):  # fmt: skip
        assert f"--{option} " in output


@pytest.mark.gpu
def test_everything_on_a_gpu(tmp_path):
    config, device = LlamaConfig(**CONFIG), torch.device("cuda")
    plan = Plan(("raas", "h2o"), (512,), budgets=(BUDGET,), modes=steps.MODES, page_size=PAGE, steps=4)
    eager, compiled = run(build_model(config, device, torch.bfloat16), plan)
    assert {row.ran for row in eager} == {"eager"}
    assert {row.case.method for row in compiled if row.ran == "compiled"} >= {"StaticCache(seen)", "raas"}
    (row,) = run_kernels(
        load_config("llama-3-8b"), batches=[32], budgets=[2048], page_size=16, repeats=10, dtype=torch.bfloat16,
        device=device,
    )  # fmt: skip
    assert 0.1 < row.share < 1.2

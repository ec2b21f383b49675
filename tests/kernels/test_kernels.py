"""Each Triton kernel against the torch reference in float64: in the interpreter here, on the device under `-m gpu`."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

from raas_kernels import dispatch, reference
from raas_kernels.configs import CONFIGS_FILE, Config, choose_config, default_config

from ..helpers import use_engine


fused = pytest.importorskip("raas_kernels.fused", reason="triton is not installed here", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
CODES = [torch.int8, torch.float8_e4m3fn]


def relative_error(result, expected):
    result, expected = result.double(), expected.double()
    finite = torch.isfinite(expected)
    assert torch.equal(result[~finite], expected[~finite])
    return ((result - expected)[finite].norm() / expected[finite].norm()).item()


def make_store(batch=1, heads=2, pages=5, decode_pages=3, page_size=8, dk=16, dv=16, dtype=torch.float32, seed=0):
    """A store mid-generation: a padded prompt, one decode page that holds nothing, one partly filled."""
    torch.manual_seed(seed)
    slots, rows = pages * page_size, (batch, heads)
    store = {
        "keys": torch.randn(*rows, slots, dk, dtype=dtype, device=DEVICE),
        "values": torch.randn(*rows, slots, dv, dtype=dtype, device=DEVICE),
        "bias": torch.zeros(*rows, slots, device=DEVICE),
        "positions": torch.arange(slots, dtype=torch.int32, device=DEVICE).expand(*rows, -1).contiguous(),
        "priority": torch.randint(0, 9, (*rows, decode_pages), device=DEVICE).double(),
        "open_slot": torch.full(rows, slots - 2 * page_size, device=DEVICE),
    }
    store["bias"][..., :3] = float("-inf")
    store["bias"][..., -page_size - page_size // 2 :] = float("-inf")
    store["priority"][..., -1] = float("-inf")
    pages_of_keys = store["keys"].unflatten(2, (-1, page_size))
    empty = store["bias"].unflatten(2, (-1, page_size))[..., None] < 0
    bounds = (
        pages_of_keys.masked_fill(empty, float("inf")).amin(3),
        pages_of_keys.masked_fill(empty, float("-inf")).amax(3),
    )
    return store, bounds


def check_attend(
    group, page_size, dk, dv, dtype, softcap=None, has_sinks=False, pages_read=None, code=None, page_score="max",
    group_score="max", **shape,
):  # fmt: skip
    store, _ = make_store(page_size=page_size, dk=dk, dv=dv, dtype=dtype, **shape)
    batch, heads, slots = store["keys"].shape[:3]
    query = torch.randn(batch, heads * group, 1, dk, dtype=dtype, device=DEVICE)
    sinks = torch.linspace(-3, 3, heads * group, dtype=dtype, device=DEVICE) if has_sinks else None
    held, scales, exact_scales = [store["keys"], store["values"]], None, None
    exact = [t.double() for t in (query, *held, store["bias"])]
    if code is not None:
        held, scales = zip(*(reference.quantize(t, code) for t in held), strict=True)
        exact[1:3], exact_scales = (t.double() for t in held), [t.double() for t in scales]
    table = None
    if pages_read is not None:
        order = torch.rand(batch, heads, slots // page_size, device=DEVICE).argsort(-1)
        table = order[..., :pages_read]
    settings = {
        "scale": dk**-0.5, "page_size": page_size, "softcap": softcap, "table": table, "page_score": page_score,
        "group_score": group_score,
    }  # fmt: skip
    output, scores = fused.attend(query, *held, store["bias"], **settings, sinks=sinks, scales=scales)
    exact_sinks = sinks if sinks is None else sinks.double()
    expected_output, expected_scores = reference.attend(*exact, **settings, sinks=exact_sinks, scales=exact_scales)
    assert output.dtype == dtype and scores.dtype == torch.float32
    assert relative_error(output, expected_output) < TOLERANCE[dtype]
    assert relative_error(scores, expected_scores) < TOLERANCE[dtype]


def check_page_bounds(group, page_size, dk, dtype, softcap=None, **shape):
    store, (minima, maxima) = make_store(page_size=page_size, dk=dk, dtype=dtype, **shape)
    batch, heads = store["keys"].shape[:2]
    query = torch.randn(batch, heads * group, 1, dk, dtype=dtype, device=DEVICE)
    bounds = fused.page_bounds(query, minima, maxima, store["bias"], 0.3, page_size, softcap)
    exact = [t.double() for t in (query, minima, maxima, store["bias"])]
    assert relative_error(bounds, reference.page_bounds(*exact, 0.3, page_size, softcap)) < TOLERANCE[dtype]


def check_append(
    page_size, dk, dv, dtype, with_bounds, steps, code=None, padded=False, in_step=True, may_close=False, **shape
):
    store, bounds = make_store(page_size=page_size, dk=dk, dv=dv, dtype=dtype, **shape)
    if code is not None:
        for name in ("keys", "values"):
            store[name], store[f"{name}_scale"] = reference.quantize(store[name], code)
        bounds = [t.float() for t in bounds]
    batch, heads = store["keys"].shape[:2]
    store["clock"] = torch.tensor([999, -1], device=DEVICE).expand(batch, heads, 2).contiguous()
    if not in_step:  # every row and head has tokens of its own behind it
        store["clock"] += torch.arange(batch * heads, device=DEVICE).view(batch, heads, 1) * 3
    states = [
        {**{name: t.clone() for name, t in store.items()}, "bounds": [t.clone() for t in bounds]} for _ in range(2)
    ]
    for step in range(steps):
        # As a model gives them: the heads of one token side by side, so a (row, head) is not contiguous with the next.
        key = torch.randn(batch, 1, heads, dk, dtype=dtype, device=DEVICE).transpose(1, 2)
        value = torch.randn(batch, 1, heads, dv, dtype=dtype, device=DEVICE).transpose(1, 2)
        visible = None
        if padded:  # of padding K and V may be anything
            visible = torch.tensor([(step + row) % 3 > 0 for row in range(batch)], device=DEVICE)
            key[~visible], value[~visible] = float("nan"), float("nan")
        for state, engine in zip(states, (reference, fused), strict=True):
            tensors = [
                state[name] for name in ("keys", "values", "bias", "positions", "priority", "open_slot", "clock")
            ]
            extremes = state["bounds"] if with_bounds else (None, None)
            scales = None if code is None else (state["keys_scale"], state["values_scale"])
            engine.append(*tensors, key, value, page_size, *extremes, scales, visible, may_close)
    for name in store:
        assert torch.equal(states[0][name].view(torch.int8), states[1][name].view(torch.int8)), name
    for ours, theirs in zip(*(state["bounds"] for state in states), strict=True):
        assert torch.equal(ours, theirs)


def check_stamp(alpha, top_ratio, decode_pages, in_step=True):
    torch.manual_seed(1)
    # Scores on a coarse grid: ties are common, and must go to the older page.
    scores = (torch.rand(2, 2, decode_pages + 3, device=DEVICE) * 8).round()[..., 3:] / 8
    positions = torch.argsort(torch.rand(2, 2, 4 * decode_pages, device=DEVICE)).int()
    priority = torch.randint(0, 9, scores.shape, device=DEVICE).double()
    priority[..., -2:] = float("-inf")
    scores[..., -2:] = 0
    clock = torch.tensor([77, 5], device=DEVICE).expand(2, 2, 2).contiguous()
    if not in_step:
        clock += torch.arange(4, device=DEVICE).view(2, 2, 1)
    expected = priority.clone()
    reference.stamp(expected, scores, positions[..., ::4], clock, alpha, top_ratio)
    fused.stamp(priority, scores, positions[..., ::4], clock, alpha, top_ratio)
    assert torch.equal(priority, expected)
    for row, head in itertools.product(range(2), range(2)):
        now = clock[row, head, 0]
        assert (expected[row, head] == now).any() and (expected[row, head] != now).any()


@pytest.mark.parametrize("may_close", [False, True])
@pytest.mark.parametrize("with_bounds", [False, True])
def test_append_to_rows_that_are_not_in_step(with_bounds, may_close):
    """Each row and head goes by its own clock: where it is in its page, when it opens one, and which it recycles."""
    shape = {"batch": 2, "page_size": 4, "dk": 16, "dv": 8, "dtype": torch.float32}
    check_append(**shape, with_bounds=with_bounds, may_close=may_close, steps=11, in_step=False, padded=True)


@pytest.mark.parametrize("with_bounds", [False, True])
def test_rows_that_are_not_in_step_get_what_each_gets_alone(with_bounds):
    store, bounds = make_store(batch=3, page_size=4, dk=8, dv=8)
    store["clock"] = torch.tensor([[[40, 0]] * 2, [[7, 2]] * 2, [[99, 5]] * 2], device=DEVICE)
    names = ("keys", "values", "bias", "positions", "priority", "open_slot", "clock")
    together = [store[name].clone() for name in names]
    extremes = [bound.clone() for bound in bounds] if with_bounds else []
    alone = [[store[name][row : row + 1].clone() for name in names] for row in range(3)]
    own_extremes = [[bound[row : row + 1].clone() for bound in bounds] if with_bounds else [] for row in range(3)]
    for _ in range(9):
        key, value = torch.randn(2, 3, 2, 1, 8, device=DEVICE)
        reference.append(*together, key, value, 4, *extremes)
        for row in range(3):
            one = slice(row, row + 1)
            reference.append(*alone[row], key[one], value[one], 4, *own_extremes[row])
    for row in range(3):
        for ours, theirs in zip([*together, *extremes], [*alone[row], *own_extremes[row]], strict=True):
            assert torch.equal(ours[row : row + 1], theirs)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "has_sinks": True, "page_score": "sum"}], ids=["", "all"])
@pytest.mark.parametrize("programs", [1, 264], ids=["whole", "slices"])
def test_attend_whole_and_in_slices(programs, options, monkeypatch):
    """One program for all slots writes the result itself; slices are joined by a second kernel."""
    launched = []
    monkeypatch.setattr(fused, "choose_config", lambda *shape: launched.append(shape) or Config(16, programs=programs))
    check_attend(group=2, page_size=8, pages=9, dk=32, dv=32, dtype=torch.float32, **options)
    assert launched


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("dk", "dv"), [(64, 64), (80, 80), (96, 64), (128, 128), (256, 256)])
def test_attend(dk, dv, dtype):
    check_attend(group=2, page_size=8, dk=dk, dv=dv, dtype=dtype)


@pytest.mark.parametrize(("group", "page_size"), [(1, 4), (3, 16), (7, 32), (17, 8)])
def test_attend_groups_and_pages(group, page_size):
    check_attend(group=group, page_size=page_size, dk=16, dv=24, dtype=torch.float32, batch=2, heads=1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("softcap", "has_sinks"), [(2.0, False), (None, True), (0.5, True)])
def test_attend_with_softcap_and_sinks(softcap, has_sinks, dtype):
    check_attend(group=3, page_size=8, dk=64, dv=64, dtype=dtype, softcap=softcap, has_sinks=has_sinks, batch=2)


@pytest.mark.parametrize(("page_score", "group_score"), [("sum", "mean"), ("sum", "max"), ("max", "mean")])
@pytest.mark.parametrize("page_size", [1, 8, 64])
def test_attend_with_other_scores(page_size, page_score, group_score):
    scores = {"page_score": page_score, "group_score": group_score}
    check_attend(group=3, page_size=page_size, dk=256, dv=16, dtype=torch.float32, heads=1, has_sinks=True, **scores)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("page_size", "pages_read"), [(8, 3), (1, 40), (4, 2)])
def test_attend_reads_the_pages_of_a_table(page_size, pages_read, dtype):
    shape = {"pages": 60, "decode_pages": 50} if page_size == 1 else {}
    check_attend(
        group=2, page_size=page_size, dk=64, dv=48, dtype=dtype, pages_read=pages_read, softcap=3.0, batch=2, **shape
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("pages_read", [None, 2])
@pytest.mark.parametrize("code", CODES, ids=str)
def test_attend_reads_codes(code, pages_read, dtype):
    check_attend(group=3, page_size=8, dk=64, dv=80, dtype=dtype, code=code, pages_read=pages_read, softcap=2.0)


def test_a_table_reads_what_it_names():
    """Two of four pages of one token each, written out."""
    keys, bias = torch.tensor([1.0, 2.0, 3.0, 9.0]).view(1, 1, 4, 1), torch.zeros(1, 1, 4)
    table = torch.tensor([[[2, 0]]])
    output, scores = reference.attend(torch.ones(1, 1, 1, 1), keys, 10 * keys, bias, 1.0, 1, table=table)
    weights = torch.tensor([3.0, 1.0]).softmax(0)
    torch.testing.assert_close(output.item(), (30 * weights[0] + 10 * weights[1]).item())
    torch.testing.assert_close(scores.flatten(), weights)


@pytest.mark.parametrize(("code", "bound"), [(torch.int8, 0.5 / 127), (torch.float8_e4m3fn, 2.0**-4)], ids=str)
def test_codes_give_the_states_back(code, bound):
    states = torch.randn(2, 3, 50, 64, dtype=torch.float64, device=DEVICE) * torch.logspace(-6, 6, 50)[:, None].to(
        DEVICE
    )
    states[0, 0, 0] = 0
    again = reference.dequantize(*reference.quantize(states, code), states.dtype)
    assert ((again - states).abs().amax(-1) <= 1.001 * bound * states.abs().amax(-1)).all()
    assert (again != states).any()


def test_attend_reads_strided_keys_and_values():
    """An expanded latent's values are a slice of one projection, heads behind tokens (MLA)."""
    store, _ = make_store(heads=2)
    both = torch.randn(1, store["keys"].shape[2], 2, 40, device=DEVICE).transpose(1, 2)
    keys, values = both.split([16, 24], dim=-1)
    query = torch.randn(1, 2, 1, 16, device=DEVICE)
    results = [engine.attend(query, keys, values, store["bias"], 0.25, 8) for engine in (fused, reference)]
    for ours, expected in zip(*results, strict=True):
        assert relative_error(ours, expected) < 1e-5


def test_reference_softcap_and_sinks_by_hand():
    """One head, three tokens, one of them padding: written out."""
    keys, bias = torch.tensor([1.0, 2.0, 9.0]).view(1, 1, 3, 1), torch.tensor([[[0.0, 0.0, float("-inf")]]])
    values, query, sinks = (
        torch.tensor([10.0, 20.0, 99.0]).view(1, 1, 3, 1),
        torch.ones(1, 1, 1, 1),
        torch.tensor([0.7]),
    )
    logits = 1.5 * torch.tanh(torch.tensor([3.0, 6.0]) / 1.5)
    weights = logits.exp() / (logits.exp().sum() + sinks.exp())
    output, scores = reference.attend(query, keys, values, bias, 3.0, 1, softcap=1.5, sinks=sinks)
    torch.testing.assert_close(output.item(), (10 * weights[0] + 20 * weights[1]).item())
    torch.testing.assert_close(scores.flatten(), torch.tensor([weights[0], weights[1], 0.0]))


def test_attend_pages_larger_than_a_tile():
    check_attend(group=2, page_size=64, dk=256, dv=16, dtype=torch.float32, heads=1)


def test_attend_more_pages_than_a_reduction_block():
    check_attend(group=2, page_size=4, dk=16, dv=16, dtype=torch.float32, heads=1, pages=150, decode_pages=100)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dk", [64, 80, 96, 128, 256])
def test_page_bounds(dk, dtype):
    check_page_bounds(group=3, page_size=8, dk=dk, dtype=dtype)
    check_page_bounds(group=3, page_size=8, dk=dk, dtype=dtype, softcap=2.0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("with_bounds", [False, True])
def test_append(dtype, with_bounds):
    check_append(page_size=4, dk=80, dv=64, dtype=dtype, with_bounds=with_bounds, steps=30, padded=with_bounds)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("code", CODES, ids=str)
def test_append_codes(code, dtype):
    check_append(page_size=4, dk=80, dv=64, dtype=dtype, with_bounds=True, steps=30, code=code, padded=True)


@pytest.mark.parametrize("in_step", [True, False])
@pytest.mark.parametrize("decode_pages", [5, 70])
@pytest.mark.parametrize(("alpha", "top_ratio"), [(0.5, None), (None, 0.5), (None, 0.07)])
def test_stamp(alpha, top_ratio, decode_pages, in_step):
    check_stamp(alpha, top_ratio, decode_pages, in_step)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dk", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("budget", [1024, 8192, 65536])
def test_attend_at_size(budget, dk, dtype):
    pages = budget // 16
    batch = 4 if budget < 65536 else 1
    for group in (1, 4, 8):
        check_attend(
            group=group, page_size=16, dk=dk, dv=dk, dtype=dtype,
            batch=batch, heads=4, pages=pages, decode_pages=pages - 8,
        )  # fmt: skip
    for settings in ({"pages_read": pages // 2}, {"page_score": "sum", "group_score": "mean"}, {"code": CODES[0]}):
        check_attend(
            group=4, page_size=16, dk=dk, dv=dk, dtype=dtype, batch=1, heads=4, pages=pages, decode_pages=8, **settings
        )
    check_page_bounds(group=4, page_size=16, dk=dk, dtype=dtype, batch=2, heads=4, pages=pages, decode_pages=8)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("decode_pages", [64, 4096])
def test_append_and_stamp_at_size(decode_pages, dtype):
    check_append(
        page_size=16, dk=128, dv=128, dtype=dtype, with_bounds=True, steps=200,
        batch=4, heads=4, pages=decode_pages + 8, decode_pages=decode_pages,
    )  # fmt: skip
    for code in CODES:
        check_append(
            page_size=16, dk=128, dv=128, dtype=dtype, with_bounds=True, steps=40, code=code,
            batch=4, heads=4, pages=decode_pages + 8, decode_pages=decode_pages,
        )  # fmt: skip
    check_stamp(0.5, None, decode_pages)
    check_stamp(None, 0.3, decode_pages)


class TestDispatch:
    def test_cpu_gets_torch(self, monkeypatch):
        use_engine(monkeypatch, None)
        assert dispatch.engine(torch.device("cpu")) is reference

    @pytest.mark.gpu
    def test_cuda_gets_triton(self, monkeypatch):
        use_engine(monkeypatch, None)
        assert dispatch.engine(torch.device("cuda")) is fused

    @pytest.mark.parametrize(("name", "module"), [("torch", reference), ("triton", fused)])
    def test_forced(self, monkeypatch, name, module):
        use_engine(monkeypatch, name)
        assert dispatch.engine(torch.device(DEVICE)) is module

    def test_unknown_engine_is_named(self, monkeypatch):
        use_engine(monkeypatch, "cuda")
        with pytest.raises(ValueError, match=r"RAAS_KERNELS='cuda'.*'torch' or 'triton'"):
            dispatch.engine(torch.device("cpu"))

    def test_triton_on_cpu_without_the_interpreter_is_refused(self, monkeypatch):
        use_engine(monkeypatch, "triton")
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
            dispatch.engine(torch.device("cpu"))


class TestConfigs:
    def test_a_tuned_shape_gets_what_was_tuned(self):
        tuned = json.loads(CONFIGS_FILE.read_text())
        for shape in tuned["shapes"]:
            chosen = choose_config(
                tuple(tuned["capability"]), shape["rows"], shape["slots"], shape["head_size"], shape["itemsize"]
            )
            assert chosen == Config(**shape["config"])

    def test_other_shapes_get_the_nearest_other_kinds_the_default(self):
        tuned = json.loads(CONFIGS_FILE.read_text())
        here = tuple(tuned["capability"])
        assert choose_config(here, 250, 8000, 100, 2) == choose_config(here, 256, 8192, 128, 2)
        for kind in ((None, 256, 8192, 128, 2), ((8, 0), 256, 8192, 128, 2), (here, 256, 8192, 256, 2)):
            assert choose_config(*kind) == default_config(kind[3], kind[4])
        assert choose_config(here, 256, 8192, 128, 4) == default_config(128, 4)

    @pytest.mark.parametrize("itemsize", [2, 4])
    @pytest.mark.parametrize("head_size", [16, 64, 80, 128, 256, 576])
    def test_the_default_tile_is_one_that_fits(self, head_size, itemsize):
        config = default_config(head_size, itemsize)
        assert config.tile >= fused.MIN_DOT and config.tile & (config.tile - 1) == 0
        held = config.stages * 2 * config.tile * head_size * itemsize
        assert held <= 200 << 10 or config.tile == fused.MIN_DOT

    @pytest.mark.gpu
    def test_tuning_measures_every_candidate(self, monkeypatch):
        from raas_kernels import tune

        tried = [default_config(64, 2), Config(64, programs=8)]
        monkeypatch.setattr(tune, "candidates", lambda rows, head_size: tried)
        best, seconds, default = tune.tune(8, 1024, 64, torch.bfloat16)
        assert best in tried and 0 < seconds <= default < 1

    def test_tuning_without_a_gpu_is_refused(self):
        command, hidden = [sys.executable, "-m", "raas_kernels.tune"], {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        result = subprocess.run(command, capture_output=True, text=True, env=hidden)
        assert result.returncode == 2 and "no CUDA GPU" in result.stderr


class TestOperators:
    """What `torch.compile` is told of the operators is what they do: schema, what they write to, shapes and dtypes."""

    @pytest.fixture(autouse=True)
    def on_device(self):
        with torch.device(DEVICE):
            yield

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("full", [False, True])
    def test_append(self, full, dtype):
        store, (minima, maxima) = make_store(dtype=dtype)
        tensors = [store[name] for name in ("keys", "values", "bias", "positions", "priority", "open_slot")]
        clock = torch.tensor([40, 7]).expand(1, 2, 2).contiguous()
        key, value = (torch.randn(1, 2, 1, 16, dtype=dtype) for _ in range(2))
        options = (minima, maxima, None, None, torch.tensor([False])) if full else (None,) * 5
        torch.library.opcheck(torch.ops.raas_kernels.append, (*tensors, clock, key, value, 8, *options))

    # Triton's attend refuses float64.
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *[torch.float64] * (DEVICE == "cpu")])
    @pytest.mark.parametrize("full", [False, True])
    def test_attend(self, full, dtype):
        store, _ = make_store(dtype=dtype, dv=24)
        keys, values = store["keys"], store["values"]
        query, options = torch.randn(1, 6, 1, 16, dtype=dtype), (None, None, None, None, None)
        if full:
            (keys, key_scales), (values, value_scales) = (reference.quantize(t, torch.int8) for t in (keys, values))
            options = (2.0, torch.zeros(6, dtype=dtype), torch.tensor([[[3, 1], [0, 2]]]), key_scales, value_scales)
        bias = store["bias"].to(torch.promote_types(dtype, torch.float32))
        arguments = (query, keys, values, bias, 0.25, 8, *options, "sum", "mean")
        torch.library.opcheck(torch.ops.raas_kernels.attend, arguments)

    def test_page_bounds(self):
        store, bounds = make_store()
        arguments = (torch.randn(1, 6, 1, 16), *bounds, store["bias"], 0.25, 8, None)
        torch.library.opcheck(torch.ops.raas_kernels.page_bounds, arguments)

    @pytest.mark.parametrize("rule", [(0.5, None), (None, 0.5)])
    def test_stamp(self, rule):
        store, _ = make_store()
        first = store["positions"][..., -24::8]
        clock = torch.tensor([40, 7]).expand(1, 2, 2).contiguous()
        arguments = (store["priority"], torch.rand(1, 2, 3), first, clock, *rule)
        torch.library.opcheck(torch.ops.raas_kernels.stamp, arguments)

"""`raas_kernels.attend`: the torch engine against loops, the Triton kernels against the torch engine in float64."""

import pytest
import torch

from raas_kernels import PagedKV, dequantize, pack_page, pack_values, quantize, unpack
from raas_kernels.ops.attend.configs import Config

from . import by_hand
from .helpers import (
    CODES,
    DEVICE,
    TOLERANCE,
    as_views,
    decoded,
    exact,
    make_kv,
    reference,
    relative_error,
    rows_of,
    triton_engine,
)  # fmt: skip


fused = triton_engine()


def choose_pages(kv, count, batch, holes=False):
    """Some pages of each row and head in any order; with `holes`, -1 at some places."""
    order = torch.rand(batch, kv.bias.shape[1], kv.num_pages, device=DEVICE).argsort(-1)[..., :count]
    if holes:
        order[..., 1::3] = -1
    return order


def check(
    group, dtype=torch.float32, has_sinks=False, pages_read=None, holes=False, rows=None, softcap=None,
    page_score="max", group_score="max", **shape,
):  # fmt: skip
    kv = make_kv(dtype=dtype, **shape)
    heads, dk = kv.keys.shape[1], shape.get("dk", 16)
    batch = len(kv.bias) if rows is None else len(rows)
    query = torch.randn(batch, heads * group, 1, dk, dtype=dtype, device=DEVICE)
    sinks = torch.linspace(-3, 3, heads * group, dtype=dtype, device=DEVICE) if has_sinks else None
    settings = {
        "selected": None if pages_read is None else choose_pages(kv, pages_read, batch, holes), "softcap": softcap,
        "page_score": page_score, "group_score": group_score, "rows": rows,
    }  # fmt: skip
    output, scores = fused.attend(kv, query, dk**-0.5, sinks=sinks, **settings)
    exact_sinks = sinks if sinks is None else sinks.double()
    expected_output, expected_scores = reference.attend(
        exact(kv), query.double(), dk**-0.5, sinks=exact_sinks, **settings
    )
    assert output.dtype == dtype and scores.dtype == torch.float32
    assert output.shape == expected_output.shape and scores.shape == expected_scores.shape
    assert relative_error(output, expected_output) < TOLERANCE[dtype]
    assert relative_error(scores, expected_scores) < TOLERANCE[dtype]


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "has_sinks": True, "page_score": "sum"}], ids=["", "all"])
@pytest.mark.parametrize("programs", [1, 264], ids=["whole", "slices"])
def test_whole_and_in_slices(programs, options, monkeypatch):
    """One program for all slots writes the result itself; slices are joined by a second kernel."""
    from raas_kernels.ops.attend import triton

    launched = []
    monkeypatch.setattr(triton, "choose_config", lambda *shape: launched.append(shape) or Config(16, programs=programs))
    check(group=2, page_size=8, pages=9, dk=32, dv=32, **options)
    assert launched


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("dk", "dv"), [(64, 64), (80, 80), (96, 64), (128, 128), (256, 256)])
def test_head_sizes(dk, dv, dtype):
    check(group=2, page_size=8, dk=dk, dv=dv, dtype=dtype)


@pytest.mark.parametrize(("group", "page_size"), [(1, 4), (3, 16), (7, 32), (17, 8)])
def test_groups_and_pages(group, page_size):
    check(group=group, page_size=page_size, dk=16, dv=24, batch=2, heads=1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("softcap", "has_sinks"), [(2.0, False), (None, True), (0.5, True)])
def test_softcap_and_sinks(softcap, has_sinks, dtype):
    check(group=3, page_size=8, dk=64, dv=64, dtype=dtype, softcap=softcap, has_sinks=has_sinks, batch=2)


@pytest.mark.parametrize(("page_score", "group_score"), [("sum", "mean"), ("sum", "max"), ("max", "mean")])
@pytest.mark.parametrize("page_size", [1, 8, 64])
def test_other_scores(page_size, page_score, group_score):
    scores = {"page_score": page_score, "group_score": group_score}
    check(group=3, page_size=page_size, dk=256, dv=16, heads=1, has_sinks=True, **scores)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("page_size", "pages_read"), [(8, 3), (1, 40), (4, 2)])
def test_selected_pages(page_size, pages_read, dtype):
    shape = {"pages": 60, "decode_pages": 50} if page_size == 1 else {}
    shape |= {"page_size": page_size, "dk": 64, "dv": 48, "batch": 2}
    check(group=2, dtype=dtype, pages_read=pages_read, softcap=3.0, **shape)


@pytest.mark.parametrize("code", [None, *CODES], ids=str)
@pytest.mark.parametrize("page_score", ["max", "sum"])
def test_selected_pages_with_holes(page_score, code):
    shape = {"page_size": 4, "dk": 16, "dv": 16, "batch": 2, "pages": 9, "code": code}
    check(group=2, pages_read=7, holes=True, page_score=page_score, **shape)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("pages_read", [None, 2])
@pytest.mark.parametrize("code", CODES, ids=str)
def test_codes(code, pages_read, dtype):
    check(group=3, page_size=8, dk=64, dv=80, dtype=dtype, code=code, pages_read=pages_read, softcap=2.0)


@pytest.mark.parametrize("code", [None, *CODES], ids=str)
@pytest.mark.parametrize("pages_read", [None, 4])
@pytest.mark.parametrize("strided", [False, True])
def test_chosen_rows_of_a_callers_memory(strided, pages_read, code):
    rows = torch.tensor([2, 0], device=DEVICE)
    shape = {"batch": 3, "page_size": 4, "dk": 16, "dv": 24, "code": code, "strided": strided}
    check(group=2, rows=rows, pages_read=pages_read, holes=True, has_sinks=True, **shape)


def test_pages_larger_than_a_tile():
    check(group=2, page_size=64, dk=256, dv=16, heads=1)


def test_more_pages_than_a_reduction_block():
    check(group=2, page_size=4, dk=16, dv=16, heads=1, pages=150, decode_pages=100)


def test_strided_keys_and_values_of_an_expanded_latent():
    """An expanded latent's values are a slice of one projection, heads behind tokens (MLA)."""
    kv = make_kv(heads=1, bounds=True)
    both = torch.randn(1, kv.keys.shape[2], 2, 40, device=DEVICE).transpose(1, 2)
    expanded = kv.with_contents(*both.split([16, 24], dim=-1))
    query = torch.randn(1, 2, 1, 16, device=DEVICE)
    results = [engine.attend(expanded, query, 0.25) for engine in (fused, reference)]
    for ours, expected in zip(*results, strict=True):
        assert relative_error(ours, expected) < 1e-5


OPTIONS = [
    {},
    {"softcap": 1.5, "has_sinks": True},
    {"page_score": "sum", "group_score": "mean", "has_sinks": True},
    {"pages_read": 4},
    {"pages_read": 4, "holes": True, "page_score": "sum"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_reference_against_loops(options, with_rows, strided):
    settings = dict(options)
    kv = make_kv(batch=3, page_size=4, dk=6, dv=5, dtype=torch.float64, strided=strided)
    rows = torch.tensor([2, 0], device=DEVICE) if with_rows else None
    batch = 2 if with_rows else 3
    query = torch.randn(batch, 6, 1, 6, dtype=torch.float64, device=DEVICE)
    settings["sinks"] = torch.linspace(-2, 2, 6, device=DEVICE).double() if settings.pop("has_sinks", False) else None
    pages_read, holes = settings.pop("pages_read", None), settings.pop("holes", False)
    if pages_read is not None:
        settings["selected"] = choose_pages(kv, pages_read, batch, holes)
    results = [engine.attend(kv, query, 0.4, rows=rows, **settings) for engine in (reference, by_hand)]
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours.cpu(), expected)


@pytest.mark.parametrize("code", CODES, ids=str)
def test_reference_reads_codes_as_the_states_they_stand_for(code):
    kv = make_kv(batch=2, page_size=4, dtype=torch.float32, code=code)
    states = decoded(kv)
    query, selected = torch.randn(2, 6, 1, 16, device=DEVICE), choose_pages(kv, 4, 2, holes=True)
    for pages in (None, selected):
        ours = reference.attend(kv, query, 0.3, selected=pages)
        expected = reference.attend(states, query.double(), 0.3, selected=pages)
        assert all(relative_error(*pair) < 1e-5 for pair in zip(ours, expected, strict=True))


def one_head(keys, values, hidden=()):
    """A cache of one row and one head with one token a page."""
    slots = len(keys)
    bias = torch.zeros(1, 1, slots)
    bias[..., list(hidden)] = float("-inf")
    return PagedKV(
        keys=torch.tensor(keys).view(1, 1, slots, 1),
        values=torch.tensor(values).view(1, 1, slots, 1),
        bias=bias,
        positions=torch.arange(slots).int().view(1, 1, slots),
        priority=torch.zeros(1, 1, slots).double(),
        evictable=torch.ones(1, slots, dtype=torch.bool),
        open_slot=torch.zeros(1, 1, dtype=torch.int64),
        clock=torch.zeros(1, 1, 2, dtype=torch.int64),
        page_size=1,
    )


def test_selected_reads_the_pages_it_names():
    """Two of four pages of one token each, written out."""
    kv = one_head([1.0, 2.0, 3.0, 9.0], [10.0, 20.0, 30.0, 90.0])
    selected = torch.tensor([[[2, -1, 0]]])
    output, scores = reference.attend(kv, torch.ones(1, 1, 1, 1), 1.0, selected=selected)
    weights = torch.tensor([3.0, 1.0]).softmax(0)
    torch.testing.assert_close(output.item(), (30 * weights[0] + 10 * weights[1]).item())
    torch.testing.assert_close(scores.flatten(), torch.tensor([weights[0], 0.0, weights[1]]))


def test_softcap_and_sinks_by_hand():
    """One head, three tokens, one of them padding: written out."""
    kv, sinks = one_head([1.0, 2.0, 9.0], [10.0, 20.0, 99.0], hidden=[2]), torch.tensor([0.7])
    logits = 1.5 * torch.tanh(torch.tensor([3.0, 6.0]) / 1.5)
    weights = logits.exp() / (logits.exp().sum() + sinks.exp())
    output, scores = reference.attend(kv, torch.ones(1, 1, 1, 1), 3.0, softcap=1.5, sinks=sinks)
    torch.testing.assert_close(output.item(), (10 * weights[0] + 20 * weights[1]).item())
    torch.testing.assert_close(scores.flatten(), torch.tensor([weights[0], weights[1], 0.0]))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, in Triton's interpreter
@pytest.mark.parametrize("engine", [reference, fused], ids=["torch", "triton"])
def test_a_row_that_holds_nothing_leaves_the_others_alone(engine):
    kv = make_kv(batch=3, page_size=4)
    kv.bias[1] = float("-inf")
    query = torch.randn(3, 4, 1, 16, device=DEVICE)
    together = engine.attend(kv, query, 0.25)
    for row in (0, 2):
        one = slice(row, row + 1)
        alone = engine.attend(rows_of(kv, one), query[one], 0.25)
        for ours, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[one], expected)
    assert together[0][1].isnan().all()
    assert not (together[1][1] > 0).any(), "no score makes a milestone of a page that holds nothing"


@pytest.mark.parametrize(("code", "bound"), [(torch.int8, 0.5 / 127), (torch.float8_e4m3fn, 2.0**-4)], ids=str)
def test_codes_give_the_states_back(code, bound):
    states = torch.randn(2, 3, 50, 64, dtype=torch.float64) * torch.logspace(-6, 6, 50)[:, None]
    states = states.to(DEVICE)
    states[0, 0, 0] = 0
    again = dequantize(*quantize(states, code), states.dtype)
    assert ((again - states).abs().amax(-1) <= 1.001 * bound * states.abs().amax(-1)).all()
    assert (again != states).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_4_bit_codes_give_the_states_back(dtype):
    """A key within half a step of its channel's range in the page, a value within half a step of its own range."""
    states = (torch.randn(2, 3, 7, 16, 8, device=DEVICE).double() * torch.logspace(-4, 3, 8).to(DEVICE)).to(dtype)
    states[0, 0, 0] = 3.0
    hidden = torch.zeros(2, 3, 7, 16, dtype=torch.bool, device=DEVICE)
    codes, low, high = pack_page(states, hidden)
    assert codes.shape == (2, 3, 7, 16, 4) and low.dtype == dtype
    again = unpack(codes, low[..., None, :], high[..., None, :], torch.float64)
    error = (again - states.double()).abs().amax(-2)
    assert (error <= 1.001 * (high.double() - low.double()) / 30).all() and (error > 0).any()
    assert (again[0, 0, 0] == 3.0).all()
    codes, low, high = pack_values(states)
    again = unpack(codes, low[..., None], high[..., None], torch.float64)
    assert ((again - states.double()).abs().amax(-1) <= 1.001 * (high.double() - low.double()) / 30).all()
    assert torch.equal(low, states.amin(-1)) and torch.equal(high, states.amax(-1))


def test_a_hidden_key_widens_no_bound_unless_all_are_hidden():
    keys = torch.tensor([[1.0, 2.0], [3.0, 1.0], [-9.0, 99.0]], device=DEVICE)
    hidden = torch.tensor([[False, False, True], [True, True, True]], device=DEVICE)
    codes, low, high = pack_page(keys.expand(2, -1, -1), hidden)
    assert low.tolist() == [[1.0, 1.0], [-9.0, 1.0]] and high.tolist() == [[3.0, 2.0], [3.0, 99.0]]
    again = unpack(codes, low[:, None], high[:, None], torch.float32)
    assert again[0].tolist() == [[1.0, 2.0], [3.0, 1.0], [1.0, 2.0]], "a hidden key is at the nearest bound"


def test_views_of_a_callers_memory_hold_the_same_states():
    kv = make_kv()
    assert all(map(torch.equal, as_views(kv.keys, kv.values), (kv.keys, kv.values)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dk", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("budget", [1024, 8192, 65536])
def test_at_size(budget, dk, dtype):
    pages = budget // 16
    shape = {"page_size": 16, "dk": dk, "dv": dk, "dtype": dtype, "heads": 4, "pages": pages}
    for group in (1, 4, 8):
        check(group=group, batch=4 if budget < 65536 else 1, decode_pages=pages - 8, **shape)
    for settings in (
        {"pages_read": pages // 2}, {"page_score": "sum", "group_score": "mean"}, {"strided": True},
        {"code": CODES[0]}, {"code": CODES[2]},
    ):  # fmt: skip
        check(group=4, batch=1, decode_pages=8, **shape, **settings)

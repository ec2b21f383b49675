"""`raas_kernels.PagedKV`: what its properties say of its buffers, and a decode step over rows of their own."""

import dataclasses
import importlib

import pytest
import torch

import raas_kernels
from raas_kernels import PagedKV, append, attend, finite, page_logit_bounds, stamp
from raas_kernels.paged_kv import take_rows

from .helpers import DEVICE, assert_same, copied, make_kv, rows_of


def test_pages_that_are_held_are_evictable_and_hold_a_token():
    kv = make_kv(batch=3, pages=6, rows_differ=True, decode_pages=1)
    assert kv.num_pages == 6
    for row in range(3):
        for head in range(2):
            for page in range(6):
                assert kv.first[row, head, page] == kv.positions[row, head, page * kv.page_size]
                holds = kv.priority[row, head, page] > float("-inf")
                assert kv.held[row, head, page] == (holds and kv.evictable[row, page])


def test_a_filled_cache_holds_every_token_and_recycles_the_oldest_page():
    keys, values = torch.randn(2, 2, 2, 12, 8, device=DEVICE)
    kv = PagedKV.filled(keys, values, page_size=4)
    assert kv.keys is keys and kv.values is values and kv.held.all() and (kv.bias == 0).all()
    assert kv.first[0, 0].tolist() == [0, 4, 8] and kv.clock[1, 1].tolist() == [11, 11]
    query = torch.randn(2, 4, 1, 8, device=DEVICE)
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    torch.testing.assert_close(attend(kv, query, 8**-0.5)[0], expected)
    append(kv, keys[:, :, :1], values[:, :, :1])
    assert (kv.open_slot == 0).all() and kv.first[0, 0].tolist() == [12, 4, 8]


def test_contents_of_a_latent_take_the_place_of_keys_and_values():
    kv = make_kv(batch=2, heads=1, bounds=True, states=2)
    keys, values = torch.randn(2, 2, 4, kv.bias.shape[2], 16, device=DEVICE)
    expanded = kv.with_contents(keys, values)
    assert expanded.keys is keys and expanded.values is values and expanded.evictable is kv.evictable
    assert expanded.bias.shape == expanded.positions.shape == keys.shape[:3] and expanded.clock.shape == (2, 4, 2)
    assert expanded.bias.data_ptr() == kv.bias.data_ptr(), "no copy"
    assert (expanded.key_min, expanded.key_max, expanded.key_scales, expanded.value_scales) == (None,) * 4
    query = torch.randn(2, 8, 1, 16, device=DEVICE)
    whole = dataclasses.replace(
        kv, keys=keys, values=values, key_min=None, key_max=None,
        bias=kv.bias.expand(-1, 4, -1).contiguous(), positions=kv.positions.expand(-1, 4, -1).contiguous(),
    )  # fmt: skip
    for ours, expected in zip(attend(expanded, query, 0.3), attend(whole, query, 0.3), strict=True):
        assert torch.equal(ours, expected)
    assert torch.equal(page_logit_bounds(expanded, query, 0.3), page_logit_bounds(whole, query, 0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.float8_e4m3fn], ids=str)
def test_rows_are_taken_in_any_dtype(dtype):
    tensor = torch.arange(12.0).view(3, 4).to(dtype)
    assert take_rows(tensor, None) is tensor
    taken = take_rows(tensor, torch.tensor([2, 0]))
    assert taken.dtype == dtype and taken.float().tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]


def test_states_of_hidden_tokens_are_made_finite():
    states = torch.tensor([[1.0, float("nan")], [float("inf"), 2.0], [float("nan"), 3.0]])
    found = finite(states, torch.tensor([[True], [True], [False]]))
    assert found[:2].tolist() == [[1, 0], [0, 2]] and found[2, 0].isnan() and found[2, 1] == 3


def step(kv, key, value, query, rows=None):
    """A decode step of RaaS: append, attend, stamp."""
    append(kv, key, value, rows=rows)
    output, scores = attend(kv, query, 0.3, rows=rows)
    stamp(kv, scores, 0.1, None, rows=rows)
    return output


def draw(*shape):
    return torch.randn(*shape, device=DEVICE)


def test_steps_of_some_rows_are_the_steps_that_each_row_takes_alone():
    """Rows enter and leave: each step names the rows that take part, and each row gets what it gets alone."""
    kv = make_kv(batch=4, page_size=4, dk=8, dv=8, rows_differ=True, decode_pages=1, bounds=True, states=2)
    kv.clock += torch.tensor([0, 3, 8, 1], device=DEVICE)[:, None, None]
    alone = [copied(rows_of(kv, slice(row, row + 1))) for row in range(4)]
    for i in range(24):
        rows = [row for row in (3, 0, 2, 1) if (i + row) % 4 > 0]
        key, value, query = (draw(len(rows), heads, 1, 8) for heads in (2, 2, 6))
        outputs = step(kv, key, value, query, torch.tensor(rows, device=DEVICE))
        for place, row in enumerate(rows):
            one = slice(place, place + 1)
            torch.testing.assert_close(outputs[one], step(alone[row], key[one], value[one], query[one]))
    for row in range(4):
        assert_same(rows_of(kv, slice(row, row + 1)), alone[row])


@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_step_compiles_to_one_graph(backend, strided, with_rows):
    """The dataclass, views of a caller's memory and a rows index break no graph, and change no result."""
    kv = make_kv(batch=3, page_size=4, dk=8, dv=8, bounds=True, states=1, strided=strided)
    expected, rows = copied(kv), torch.tensor([2, 0], device=DEVICE) if with_rows else None
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2 * kv.page_size + 1):
            key, value, query = (draw(2 if with_rows else 3, heads, 1, 8) for heads in (2, 2, 6))
            torch.testing.assert_close(compiled(kv, key, value, query, rows), step(expected, key, value, query, rows))
    for field in dataclasses.fields(kv):
        torch.testing.assert_close(getattr(kv, field.name), getattr(expected, field.name))


def test_functions_at_the_top_level_are_no_modules():
    """A function and the folder of its operator share a name; importing the folder leaves the function in its place."""
    for name in ("append", "attend", "stamp", "show"):
        importlib.import_module(f"raas_kernels.ops.{name}.reference")
        assert getattr(raas_kernels, name).__module__ == f"raas_kernels.ops.{name}"

"""`raas_kernels.show`: the torch reference against a loop over slots, and the Triton kernel against the reference."""

import os

import pytest
import torch

from raas_kernels import Held, page_extremes, reference, visibility


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_layer(pages=5, page_size=4, dk=8, dtype=torch.float32, code=None, has_bounds=False, seed=0):
    """Two rows of two KV heads, each with a clock of its own; the last page is half full, another holds nothing."""
    generator = torch.Generator().manual_seed(seed)
    slots = pages * page_size
    positions = torch.stack([torch.randperm(slots, generator=generator) for _ in range(4)]).view(2, 2, slots)
    positions[..., page_size : 2 * page_size] = -1
    clock = torch.tensor([[[slots - 3, 5]] * 2, [[slots - 6, 2]] * 2])
    keys, scales = torch.randn(2, 2, slots, dk, generator=generator).to(dtype), None
    if code is not None:
        keys, scales = reference.quantize(keys, code)
    bias = torch.full((2, 2, slots), float("-inf"))
    bias.masked_fill_((positions >= 0) & (positions <= clock[..., :1]), 0)
    minima = maxima = None
    if has_bounds:
        wide = keys if scales is None else reference.dequantize(keys, scales, torch.float32)
        minima, maxima = page_extremes(wide, bias, page_size)
    held = Held(bias, positions.int(), clock, keys, scales, minima, maxima, page_size)
    return Held(*(part.to(DEVICE) if torch.is_tensor(part) else part for part in held))


def copied(held):
    return Held(*(part.clone() if torch.is_tensor(part) else part for part in held))


@pytest.mark.parametrize("has_bounds", [False, True])
def test_reference_shows_what_the_mask_names(has_bounds):
    held = make_layer(has_bounds=has_bounds)
    before = held.bias.clone()
    visible = torch.rand(2, 12, generator=torch.Generator().manual_seed(1)).to(DEVICE) > 0.5
    visibility.show([held], visible)
    for row in range(2):
        for head in range(2):
            for slot, position in enumerate(held.positions[row, head].tolist()):
                expected = before[row, head, slot].item()
                if 0 <= position <= held.clock[row, head, 0] and position < 12:
                    expected = 0.0 if visible[row, position] else float("-inf")
                assert held.bias[row, head, slot].item() == expected
    if has_bounds:
        extremes = page_extremes(held.keys, held.bias, 4)
        assert all(map(torch.equal, (held.minima, held.maxima), extremes))
    visibility.show([held], torch.ones_like(visible))
    assert torch.equal(held.bias, before), "what was hidden can be shown again"


SHAPES = [
    {},
    {"has_bounds": True},
    {"has_bounds": True, "dk": 12, "page_size": 1, "pages": 7},
    {"has_bounds": True, "code": torch.int8},
    {"has_bounds": True, "dtype": torch.bfloat16},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_equals_the_reference(shape):
    """Layers of two sizes and of two kinds in one call."""
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton runs on a CPU only in its interpreter")
    visibility_triton = pytest.importorskip("raas_kernels.visibility_triton", exc_type=ImportError)
    layers = [make_layer(**shape), make_layer(**{**shape, "pages": 9}, seed=1), make_layer(dk=16, seed=2)]
    expected = [copied(held) for held in layers]
    for seed in range(3):
        visible = torch.rand(2, 13, generator=torch.Generator().manual_seed(seed)).to(DEVICE) > 0.3
        visibility.show(expected, visible)
        visibility_triton.show(layers, visible)
        for held, right in zip(layers, expected, strict=True):
            assert torch.equal(held.bias, right.bias)
            if right.minima is not None:
                assert torch.equal(held.minima, right.minima) and torch.equal(held.maxima, right.maxima)

"""What one decode step of one layer launches, counted: a guard on its cost that no busy machine can fail."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

from raas_cache import from_name

from ..helpers import tiny_model


PAGE = 8
# Those that only look at a tensor in another way cost no pass over it.
VIEWS = {
    "aten::view", "aten::select.int", "aten::slice.Tensor", "aten::unsqueeze", "aten::expand", "aten::transpose.int",
    "aten::detach", "aten::promote_types", "aten::alias", "aten::as_strided", "aten::_unsafe_view",
}  # fmt: skip


class Recorder(TorchDispatchMode):
    """Counts operators, views left out, and the elements of the tensors that they make."""

    def __init__(self):
        super().__init__()
        self.counts, self.largest = Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.name() not in VIEWS:
            self.counts[function.name()] += 1
            for made in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(made, torch.Tensor) and not any(made is given for given in args):
                    self.largest = max(self.largest, made.numel())
        return result


def layer_steps(cache, steps, device="cpu", heads=4, kv_heads=2, head_dim=8):
    """A layer after `steps` decode steps without a model; a function that makes one more."""
    model = tiny_model(heads=heads, kv_heads=kv_heads, head_dim=head_dim, layers=1, dtype=torch.float32)
    attention, sdpa = model.to(device).model.layers[0].self_attn, AttentionInterface()["sdpa"]
    generator = torch.Generator(device).manual_seed(0)

    def step(new=1):
        query, key, value = (
            torch.randn(1, count, new, head_dim, generator=generator, device=device)
            for count in (heads, kv_heads, kv_heads)
        )
        key, value = cache.update(key, value, 0)
        return lambda: sdpa(attention, query, key, value, None, scaling=0.5)[0]

    with torch.no_grad():
        step(2 * PAGE)()
        for _ in range(steps):
            step()()
    return step


def count_a_step(name, steps, budget=8 * PAGE, **options):
    cache = from_name(name, budget, page_size=PAGE, min_decode_pages=2, **options)
    step = layer_steps(cache, steps)
    with torch.no_grad(), Recorder() as recorder:
        step()()
    assert cache.layers[0].table.evicted[0] > 0
    return recorder


WITHIN_A_PAGE = {
    "clock": {"aten::add_.Tensor": 1},
    "slot": {"aten::add.Tensor": 1},
    "K, V and bias": {"aten::scatter_.src": 2, "aten::scatter_.value": 1},
    "attention": {"aten::baddbmm": 1, "aten::_softmax": 1, "aten::bmm": 1},
    "scores": {"aten::amax": 2},
    "stamp": {"aten::ge.Scalar": 1, "aten::masked_fill_.Scalar": 1},
}


def test_a_step_of_raas_is_twelve_operators():
    expected = sum((Counter(part) for part in WITHIN_A_PAGE.values()), Counter())
    drawn = {"aten::randn.generator": 3}
    recorder = count_a_step("raas", steps=PAGE * 20 + 3)
    assert recorder.counts == expected + Counter(drawn)
    assert expected.total() == 12


@pytest.mark.parametrize(
    "name", ["raas", "h2o", "streaming_llm", "tova", "rkv", "random", "gkv", "lazy_eviction", "vase"]
)
def test_a_step_launches_the_same_however_many_tokens_were_seen(name):
    few, many = (count_a_step(name, steps=PAGE * pages + 3) for pages in (10, 40))
    assert few.counts == many.counts and few.largest == many.largest


@pytest.mark.parametrize(("name", "extra"), [("raas", 16), ("h2o", 22), ("streaming_llm", 16)])
def test_opening_a_page_costs_little_more(name, extra):
    opening, within = (count_a_step(name, steps=PAGE * 20 + rest) for rest in (0, 3))
    assert (opening.counts - within.counts).total() <= extra


def test_nothing_of_the_size_of_the_store_is_made():
    """No copy of K or V, of none of their pages: the largest tensor of a step is the weights."""
    budget = 64 * PAGE
    recorder = count_a_step("raas", steps=PAGE * 70 + 3, budget=budget)
    assert recorder.largest == 4 * budget


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "kernels"), [("raas", 3), ("streaming_llm", 2)])
def test_a_step_is_so_many_kernels_on_a_gpu(name, kernels):
    """Append, attend with scores, and for RaaS stamp; where the slots of a row are sliced, one more to join them."""
    cache = from_name(name, 8 * PAGE, page_size=PAGE, min_decode_pages=2)
    step = layer_steps(cache, PAGE * 20 + 3, device="cuda", head_dim=16)
    with torch.no_grad():
        attend = step()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            attend()
            torch.cuda.synchronize()
    on_device = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    launched = {event.key: event.count for event in on_device}
    assert sum(launched.values()) == kernels, launched


# TriAttention takes the rotation from the model that calls the layer, and here no model calls it.
METHODS = (
    "raas", "quest", "h2o", "streaming_llm", "window", "random", "tova", "rkv", "gkv", "lazy_eviction", "vase",
)  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_step_moves_nothing_between_host_and_device(name):
    """On a GPU, each of these operators would be a copy that waits for the device."""
    step = layer_steps(from_name(name, 8 * PAGE, page_size=PAGE, min_decode_pages=2), PAGE * 20)
    with torch.no_grad(), Recorder() as recorder:
        for _ in range(2 * PAGE):
            step()()
    assert not {"aten::lift_fresh", "aten::_local_scalar_dense"} & set(recorder.counts)


@pytest.mark.gpu
@pytest.mark.parametrize("name", METHODS)
def test_a_step_never_waits_for_the_device(name):
    step = layer_steps(from_name(name, 8 * PAGE, page_size=PAGE, min_decode_pages=2), PAGE * 20, "cuda", head_dim=16)
    attentions = []
    with torch.no_grad():
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2 * PAGE):
                attentions.append(step()())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(attention.isfinite().all() for attention in attentions)

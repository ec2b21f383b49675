"""A decode step that runs its host code once, as a CUDA graph does, gives what eager steps give.

The CPU has no CUDA graphs. `Replay` stands for one: it notes the operators of a step with their tensors, and runs the
same operators on the same tensors again.
"""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from raas_cache import from_name
from raas_cache.common import captured_step
from raas_cache.common.captured_step import CapturedStep, can_capture, captured_forward

from ..helpers import generate, prompt, tiny_model


SMALL = {"budget": 32, "page_size": 4, "min_decode_pages": 2}
SHARES = [[1.0, 0.5], [0.75, 0.75]]
CACHES = [
    ("raas", {}), ("raas", {"alpha": 0.05, "granularity": "layer"}), ("raas", {"top_ratio": 0.5}),
    ("raas", {"shares": SHARES}), ("raas", {"kv_dtype": "int8"}), ("raas", {"kv_dtype": "int4"}),
    *((name, {}) for name in ("window", "random", "h2o", "streaming_llm", "tova", "rkv", "gkv", "lazy_eviction")),
    ("vase", {}), ("triattention", {}), ("h2o", {"prompt": "evict"}), ("raas", {"prompt": "select"}),
]  # fmt: skip


class Replay(TorchDispatchMode):
    """Notes each operator and its results. A call runs the operators again, and writes the results to the same tensors.

    Unlike the recording of a CUDA graph, the first run takes place. So `undo` puts the tensors back that it changed.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_written = [
            argument.alias_info is not None and argument.alias_info.is_write for argument in function._schema.arguments
        ]
        for value, written in zip(args, is_written, strict=False):
            if written:
                self.before.append((value, value.clone()))
        result = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, result))
        return result

    def undo(self):
        for tensor, value in reversed(self.before):
            tensor.copy_(value)
        self.before.clear()

    def __call__(self):
        for function, args, kwargs, noted in self.calls:
            result = function(*args, **kwargs)
            pairs = zip(*(x if isinstance(x, (tuple, list)) else [x] for x in (noted, result)), strict=True)
            for old, new in pairs:
                is_made_here = isinstance(new, torch.Tensor) and new.data_ptr() != old.data_ptr()
                if is_made_here:
                    old.copy_(new)


@pytest.fixture
def replays(monkeypatch):
    """Use `Replay` as the CUDA graph, and say as a CUDA graph does that the step is recorded."""
    made = []

    def capture(forward):
        replay = Replay()
        with monkeypatch.context() as patch, replay:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            result = forward()
        replay.undo()
        made.append(replay)
        return replay, result

    monkeypatch.setattr(captured_step, "capture", capture)
    return made


@torch.no_grad()
@pytest.mark.parametrize(("name", "options"), CACHES, ids=lambda value: str(value))
def test_replays_are_as_eager_steps(name, options, replays):
    model = tiny_model()
    ids = prompt(2, 14)["input_ids"]
    eager, captured = (from_name(name, config=model.config, **SMALL, **options) for _ in range(2))
    step = CapturedStep(model, captured)
    expected = model(ids, past_key_values=eager).logits[:, -1]
    assert torch.equal(model(ids, past_key_values=captured).logits[:, -1], expected)
    for count in range(60):
        token = expected.argmax(-1, keepdim=True)
        expected = model(token, past_key_values=eager).logits[:, -1]
        torch.testing.assert_close(step(token), expected, rtol=0, atol=1e-9)
        if count % 20 == 0:  # the host reads the clock, and falls behind again
            assert captured.get_seq_length() == eager.get_seq_length() == 15 + count
    assert len(replays) == 1
    for layer in range(2):
        assert torch.equal(captured.resident_positions(layer), eager.resident_positions(layer))
        assert captured.evicted_pages(layer).sum() > 0
    # An eager step may follow.
    token = expected.argmax(-1, keepdim=True)
    torch.testing.assert_close(
        model(token, past_key_values=captured).logits, model(token, past_key_values=eager).logits, rtol=0, atol=1e-9
    )


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize(("name", "options"), CACHES, ids=lambda value: str(value))
def test_a_cuda_graph_is_as_eager_steps(name, options):
    model = tiny_model(dtype=torch.float32, head_dim=16).cuda()
    ids = prompt(2, 14)["input_ids"].cuda()
    eager, captured = (from_name(name, config=model.config, **SMALL, **options) for _ in range(2))
    assert can_capture(captured, model)
    step = CapturedStep(model, captured)
    expected = model(ids, past_key_values=eager).logits[:, -1]
    model(ids, past_key_values=captured)
    for _ in range(60):
        token = expected.argmax(-1, keepdim=True)
        expected = model(token, past_key_values=eager).logits[:, -1]
        torch.testing.assert_close(step(token), expected, rtol=0, atol=1e-4)
    for layer in range(2):
        assert torch.equal(captured.resident_positions(layer), eager.resident_positions(layer))


@pytest.mark.parametrize("do_sample", [False, True])
def test_generate_replays_the_step(do_sample, replays, monkeypatch):
    """With left padding, whose positions `generate` passes on."""
    monkeypatch.setattr(captured_step, "can_capture", lambda cache, model: True)
    model, inputs = tiny_model(), prompt(2, 14, padding=(0, 5))
    found = []
    for is_captured in (False, True):
        cache = from_name("raas", config=model.config, **SMALL)
        torch.manual_seed(0)
        with captured_forward(model, cache) if is_captured else nullcontext():
            found.append(generate(model, inputs, cache, 60, sample=do_sample))
    assert torch.equal(*found) and len(replays) == 1
    assert "forward" not in vars(model)


def test_what_cannot_be_captured(monkeypatch):
    model = tiny_model()
    assert not can_capture(from_name("raas", config=model.config, **SMALL), model)  # a CPU has no CUDA graphs
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert not can_capture(from_name("dense", config=model.config, **SMALL), model)  # its memory grows

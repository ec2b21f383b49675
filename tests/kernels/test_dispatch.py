"""Which engine serves a call, and the operators that `torch.compile` sees."""

import pytest
import torch

from raas_kernels import dispatch, engine
from raas_kernels.ops.append import reference
from raas_kernels.paged_kv import PagedKV

from ..helpers import use_engine
from .helpers import DEVICE, in_blocks, make_kv, triton_engine


class TestEngine:
    def test_cpu_gets_torch(self, monkeypatch):
        use_engine(monkeypatch, None)
        assert engine(torch.device("cpu")) == "torch"

    @pytest.mark.gpu
    def test_cuda_gets_triton(self, monkeypatch):
        use_engine(monkeypatch, None)
        assert engine(torch.device("cuda")) == "triton"

    def test_torch_can_be_forced(self, monkeypatch):
        use_engine(monkeypatch, "torch")
        assert engine(torch.device(DEVICE)) == "torch"
        assert dispatch.implementation("raas_kernels.ops.append", torch.device(DEVICE)) is reference

    def test_triton_can_be_forced(self, monkeypatch):
        triton_engine()
        use_engine(monkeypatch, "triton")
        assert engine(torch.device(DEVICE)) == "triton"
        module = dispatch.implementation("raas_kernels.ops.append", torch.device(DEVICE))
        assert module.__name__ == "raas_kernels.ops.append.triton"

    def test_unknown_engine_is_named(self, monkeypatch):
        use_engine(monkeypatch, "cuda")
        with pytest.raises(ValueError, match=r"RAAS_KERNELS='cuda'.*'torch' or 'triton'"):
            engine(torch.device("cpu"))

    def test_triton_on_cpu_without_the_interpreter_is_refused(self, monkeypatch):
        use_engine(monkeypatch, "triton")
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
            engine(torch.device("cpu"))


def test_flat_arguments_are_every_field_of_the_dataclass():
    kv = make_kv(bounds=True, states=2, code=torch.int8)
    again, others = dispatch.unflatten([*dispatch.flatten(kv), "other"])
    assert isinstance(again, PagedKV) and vars(again) == vars(kv) and others == ["other"]


class TestOperators:
    """What `torch.compile` is told of the operators is what they do: schema, what they write to, shapes and dtypes."""

    @pytest.fixture(autouse=True)
    def on_device(self):
        with torch.device(DEVICE):
            yield

    @staticmethod
    def check(name, kv, *arguments):
        operator = getattr(torch.ops.raas_kernels, name)
        torch.library.opcheck(operator, (*dispatch.flatten(kv), *arguments))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("full", [False, True])
    @pytest.mark.parametrize("code", [None, torch.uint8], ids=str)
    def test_append(self, code, full, dtype):
        kv = make_kv(batch=2, dtype=dtype, bounds=full, states=2 * full, strided=full, code=code)
        kv.clock[..., 1] = kv.page_size - 1
        rows = torch.tensor([1]) if full else None
        key, value = torch.randn(2, 1 if full else 2, 2, 1, 16, dtype=dtype)
        self.check("append", kv, key, value, torch.tensor([False]) if full else None, rows, full)

    # Triton's attend refuses float64.
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *[torch.float64] * (DEVICE == "cpu")])
    @pytest.mark.parametrize("full", [False, True])
    @pytest.mark.parametrize("code", [torch.int8, torch.uint8], ids=str)
    def test_attend(self, code, full, dtype):
        kv = make_kv(batch=2, dtype=dtype, dv=24, code=code if full else None)
        selected, softcap, sinks, rows = (
            (torch.tensor([[[3, 1, -1], [0, 2, 4]]]), 2.0, torch.zeros(6, dtype=dtype), torch.tensor([1]))
            if full
            else [None] * 4
        )
        query = torch.randn(1 if full else 2, 6, 1, 16, dtype=dtype)
        self.check("attend", kv, query, 0.25, selected, softcap, sinks, "sum", "mean", rows)

    @pytest.mark.parametrize("code", [None, torch.uint8], ids=str)
    def test_blocks(self, code):
        kv = in_blocks(make_kv(batch=2, bounds=True, code=code))
        for name in ("keys", "values", "value_min", "value_max"):  # the check compares results, and NaN equals nothing
            pool = getattr(kv, name)
            if pool is not None:
                pool[pool != pool] = 0
        rows, query = torch.tensor([1]), torch.randn(1, 6, 1, 16)
        self.check("append", kv, *torch.randn(2, 1, 2, 1, 16), None, rows, False)
        self.check("attend", kv, query, 0.25, torch.tensor([[[3, 1, -1], [0, 2, 4]]]), None, None, "max", "max", rows)
        self.check("page_logit_bounds", kv, query, 0.25, None, rows)

    @pytest.mark.parametrize("full", [False, True])
    def test_page_logit_bounds(self, full):
        kv = make_kv(batch=2, bounds=full)
        rows = torch.tensor([1]) if full else None
        query = torch.randn(1 if full else 2, 6, 1, 16)
        self.check("page_logit_bounds", kv, query, 0.25, 2.0 if full else None, rows)

    @pytest.mark.parametrize("rule", [(0.5, None), (None, 0.5)])
    @pytest.mark.parametrize("with_rows", [False, True])
    def test_stamp(self, with_rows, rule):
        kv = make_kv(batch=2)
        rows = torch.tensor([1]) if with_rows else None
        self.check("stamp", kv, torch.rand(1 if with_rows else 2, 2, kv.num_pages), *rule, rows)

"""Operators on paged KV caches: append, attend + score, page bounds, stamp (RaaS, arXiv 2502.11147, section 3).

`PagedKV` is one layer's cache: every buffer, its shape and its dtype. Each operator takes it, and is a folder of
`raas_kernels.ops`: the public function, plain torch in `reference.py`, Triton in `triton.py`. Triton serves CUDA
tensors, torch all others. `RAAS_KERNELS=torch` or `RAAS_KERNELS=triton` forces an engine (Triton on CPU tensors needs
`TRITON_INTERPRET=1`). Under `torch.compile`, Triton's functions are the operators `torch.ops.raas_kernels.*`.
`python -m raas_kernels.ops.attend.tune` finds the best launches for a GPU.

Shapes, everywhere: B batch rows, R the rows that a call touches (`rows`, otherwise all B), H KV heads, G query heads of
each KV head (the query group), P pages of S tokens, N = P * S slots, Dk and Dv head sizes of K and V.
"""

from .contents import key_states, value_states
from .dispatch import engine
from .ops.append import append, victim
from .ops.attend import Reduction, attend, extend
from .ops.page_bounds import page_extremes, page_logit_bounds, refresh_extremes
from .ops.show import show
from .ops.stamp import stamp
from .paged_kv import PagedKV, finite, resident
from .quantize import dequantize, pack, pack_page, pack_values, quantize, unpack


__all__ = [
    "PagedKV",
    "Reduction",
    "append",
    "attend",
    "dequantize",
    "engine",
    "extend",
    "finite",
    "key_states",
    "pack",
    "pack_page",
    "pack_values",
    "page_extremes",
    "page_logit_bounds",
    "quantize",
    "refresh_extremes",
    "resident",
    "show",
    "stamp",
    "unpack",
    "value_states",
    "victim",
]

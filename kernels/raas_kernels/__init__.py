"""Paged-KV kernels on plain tensors: append, attend + score, page bounds, stamp (RaaS, arXiv 2502.11147, section 3).

Every operation exists twice with one signature: plain torch in `reference.py`, Triton in `fused.py`. `show`, for masks
that change the past, stands in `visibility.py` and `visibility_triton.py`. The functions here are the one dispatch
point: Triton for CUDA tensors, torch for all others. `RAAS_KERNELS=torch` or `RAAS_KERNELS=triton` forces an engine
(Triton on CPU tensors needs `TRITON_INTERPRET=1`). Under `torch.compile` they are the operators
`torch.ops.raas_kernels.*`. `python -m raas_kernels.tune` finds the best launches for a GPU.

Shapes, everywhere: B batch rows, H KV heads, G query heads a KV head (the query group), P pages, S tokens a page,
N = P * S slots, Dk / Dv head sizes of K / V, E evictable (decode) pages: the last E of the P pages.
"""

from .dispatch import append, attend, engine, page_bounds, show, stamp
from .reference import Reduction, dequantize, extend, finite, page_extremes, quantize, resident, victim
from .visibility import Held


__all__ = [
    "Held",
    "Reduction",
    "append",
    "attend",
    "dequantize",
    "engine",
    "extend",
    "finite",
    "page_bounds",
    "page_extremes",
    "quantize",
    "resident",
    "show",
    "stamp",
    "victim",
]

"""What a decode step costs with each cache after many tokens, and how near the kernel comes to the memory's speed.

`filling.py` brings caches to any length in seconds, `steps.py` times decode steps, `kernels.py` the attention kernel
alone, `peer.py` steps of kvpress in an environment of its own, `report.py` writes what they found. Neither typer nor
rich is needed here, matplotlib only for the plots.
"""

from .filling import Filler, build_model, fast_forward, kv_shape, load_config
from .kernels import KernelRow, kernel_table, run_kernels
from .peer import Peer
from .report import about, figures, plot, read_json, table, write_json
from .steps import BASELINES, Case, Plan, Row, Timing, run


__all__ = [
    "BASELINES",
    "Case",
    "Filler",
    "KernelRow",
    "Peer",
    "Plan",
    "Row",
    "Timing",
    "about",
    "build_model",
    "fast_forward",
    "figures",
    "kernel_table",
    "kv_shape",
    "load_config",
    "plot",
    "read_json",
    "run",
    "run_kernels",
    "table",
    "write_json",
]

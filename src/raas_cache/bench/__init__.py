"""Benchmarks: the time of a decode step with each cache after many tokens, and the bandwidth of the attention kernel.

`filling.py` fills caches of any length in seconds. `steps.py` times decode steps. `kernels.py` times the attention
kernel alone. `peer.py` times steps of kvpress in a separate environment. `report.py` writes tables, JSON and plots.
This folder needs neither typer nor rich, and matplotlib only for plots.
"""

from .filling import Filler, build_model, fast_forward, kv_shape, load_config
from .kernels import KernelRow, kernel_table, run_kernels
from .peer import Peer
from .report import about, figures, plot, read_json, table, write_json
from .steps import BASELINES, Case, Grid, StepRow, Timing, run


__all__ = [
    "BASELINES",
    "Case",
    "Filler",
    "Grid",
    "KernelRow",
    "Peer",
    "StepRow",
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

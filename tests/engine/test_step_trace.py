"""A decode step of one layer is few Python calls in few files: an eager step pays for each, and so does its reader."""

import os
import sys

import pytest
import torch

import raas_cache
import raas_kernels
from raas_cache import from_name

from .test_step_ops import PAGE, layer_steps


PACKAGES = {name: os.path.dirname(package.__file__) for name, package in
            (("raas_cache", raas_cache), ("raas_kernels", raas_kernels))}  # fmt: skip


def calls_of(function):
    """(Package, file, function) of each Python call in our packages while `function` runs, in their order."""
    calls = []

    def note(frame, event, argument):
        if event != "call":
            return
        code = frame.f_code
        for name, folder in PACKAGES.items():
            if code.co_filename.startswith(folder + os.sep):
                calls.append((name, os.path.relpath(code.co_filename, folder), code.co_qualname))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    return calls


def trace_a_step(name, after, **options):
    """The calls of the decode step of one layer that follows `after` decode steps."""
    cache = from_name(name, 8 * PAGE, page_size=PAGE, min_decode_pages=2, **options)
    step = layer_steps(cache, after)
    with torch.no_grad():
        calls = calls_of(lambda: step()())
    assert cache.layers[0].table.evicted[0] > 0
    return calls


def files(calls, package):
    return sorted({file for name, file, _ in calls if name == package})


def described(calls):
    numbers = ", ".join(f"{len(files(calls, package))} files of {package}" for package in PACKAGES)
    lines = [f"{len(calls)} calls in {numbers}"]
    return "\n".join([*lines, *(f"  {name}/{file}: {function}" for name, file, function in calls)])


@pytest.mark.parametrize("after", [PAGE * 20 + 3, PAGE * 20], ids=["within a page", "opening a page"])
def test_a_step_of_raas_is_25_calls_in_5_files(after):
    calls = trace_a_step("raas", after)
    print(described(calls))
    assert len(calls) <= 25, described(calls)
    assert len(files(calls, "raas_cache")) <= 5, described(calls)

"""Every kernel x dtype x head size compiles for the GPUs people have, on a machine that has none."""

import collections
import os
import subprocess
import sys

import pytest


pytest.importorskip("triton")

# Bytes of shared memory that a block may have. A kernel that wants more compiles, and fails at its first launch.
# The limit under 80 is the lower one of sm_86 and sm_89, which run the same code.
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_compiles_to_ptx_and_cubin(architecture):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_ahead", str(architecture)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line.split() for line in result.stdout.splitlines()]
    coded = 14 if architecture == 80 else 20  # int8 and 4 bits, and fp8 where the GPU has it
    assert collections.Counter(line[0] for line in lines) == {
        "append_kernel": 30 + coded, "attend_kernel": 75 + coded * 5 // 2, "reduce_kernel": 30,
        "page_bounds_kernel": 30, "show_kernel": 45 + (coded - 8) * 3 // 2 + 4, "stamp_kernel": 2,
    }  # fmt: skip
    assert all(int(line[3]) <= SHARED_MEMORY[architecture] for line in lines)

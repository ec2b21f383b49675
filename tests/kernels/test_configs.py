"""How `attend` is launched: the tuned shapes, the default for all others, and the tuner."""

import json
import os
import subprocess
import sys

import pytest
import torch

from .helpers import triton_engine


triton_engine()
from raas_kernels.ops.attend.configs import (  # noqa: E402  # needs Triton
    CONFIGS_FILE,
    MIN_DOT,
    Config,
    choose_config,
    default_config,
    packed_config,
)


def test_a_tuned_shape_gets_what_was_tuned():
    tuned = json.loads(CONFIGS_FILE.read_text())
    for shape in tuned["shapes"]:
        chosen = choose_config(
            tuple(tuned["capability"]), shape["rows"], shape["slots"], shape["head_size"], shape["itemsize"], False
        )
        assert chosen == Config(**shape["config"])


def test_other_shapes_get_the_nearest_other_kinds_the_default():
    tuned = json.loads(CONFIGS_FILE.read_text())
    here = tuple(tuned["capability"])
    assert choose_config(here, 250, 8000, 100, 2, False) == choose_config(here, 256, 8192, 128, 2, False)
    for kind in ((None, 256, 8192, 128, 2), ((8, 0), 256, 8192, 128, 2), (here, 256, 8192, 256, 2)):
        assert choose_config(*kind, False) == default_config(kind[3], kind[4])
    assert choose_config(here, 256, 8192, 128, 4, False) == default_config(128, 4)
    assert choose_config(here, 256, 8192, 128, 2, True) == packed_config(128, 2)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_size", [16, 64, 80, 128, 256, 576])
def test_the_default_tile_is_one_that_fits(head_size, itemsize):
    config = default_config(head_size, itemsize)
    assert config.tile >= MIN_DOT and config.tile & (config.tile - 1) == 0
    in_flight = config.stages * 2 * config.tile * head_size * itemsize
    assert in_flight <= 200 << 10 or config.tile == MIN_DOT


@pytest.mark.gpu
def test_tuning_measures_every_candidate(monkeypatch):
    from raas_kernels.ops.attend import tune

    tried = [default_config(64, 2), Config(64, programs=8)]
    monkeypatch.setattr(tune, "candidates", lambda rows, head_size: tried)
    best, seconds, default = tune.tune(8, 1024, 64, torch.bfloat16)
    assert best in tried and 0 < seconds <= default < 1


def test_tuning_without_a_gpu_is_refused():
    command = [sys.executable, "-m", "raas_kernels.ops.attend.tune"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 2 and "no CUDA GPU" in result.stderr

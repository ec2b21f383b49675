"""What a type checker tells those who use the package. That the package itself is clean is `make types`."""

import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


def test_consumer_in_strict_mode():
    pytest.importorskip("mypy")
    pytest.importorskip("transformers", minversion="5.23", reason="its types are others in older releases")
    # With the project's own options, and so with the cache of `make types`: a first run reads torch and transformers.
    command = [sys.executable, "-m", "mypy", "tests/data/consumer.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

"""Run kvpress for comparison: in a separate process, with the Python of a separate environment."""

import json
import subprocess
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel


SCRIPT = Path(__file__).with_name("kvpress_peer.py")


class Peer:
    """Runs decode steps with kvpress's `DecodingPress` and a `KnormPress`, which shortens the cache every 512 steps.

    The process builds its own model with random weights from the same config. Use this class as a context manager: the
    process ends with the context.

    Args:
        python: the Python of an environment in which kvpress is installed.

    Raises:
        ValueError: this Python cannot be run, or has no kvpress. The methods raise it if the process has ended.
    """

    about: dict[str, str]
    """Versions of kvpress, and of torch and transformers in its environment."""

    def __init__(self, python: str | Path):
        self.python, self._held = str(python), ExitStack()
        # A file instead of a pipe: nobody reads a pipe, so it would fill up and block.
        self._errors = self._held.enter_context(tempfile.TemporaryFile("w+", errors="replace"))  # noqa: SIM115
        # Isolated mode (-I) ignores PYTHONPATH and this folder, whose kernels.py would hide the package `kernels`.
        command, pipe = [self.python, "-I", str(SCRIPT)], subprocess.PIPE
        try:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True)
        except OSError as error:
            self._held.close()
            raise self._failure(error.strerror or str(error)) from None
        self._held.enter_context(self._process)  # closes the pipes and waits for the process
        self._held.callback(self._process.kill)
        self.about = self._answer()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(BrokenPipeError):
            self._held.close()

    def build(self, model: PreTrainedModel, seed: int) -> None:
        """Build a model with the config, dtype and device of `model` in the process."""
        options = {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device), "seed": seed}
        self._ask(config=model.config.to_dict(), threads=torch.get_num_threads(), **options)

    def fill(self, *, batch: int, budget: int, seen: int, copies: int) -> int:
        """Create caches of `batch` rows that hold `min(seen, budget)` tokens. Returns the bytes of one cache."""
        return int(self._ask(batch=batch, budget=budget, seen=seen, copies=copies)["kv_bytes"])

    def step(self, copy: int, position: int) -> float:
        """Run a decode step with one copy of the cache and a token at `position` in every row. Returns milliseconds."""
        return float(self._ask(copy=copy, position=position)["ms"])

    def _ask(self, **message: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # if the process has ended, `_answer` raises an error
            print(json.dumps(message), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        try:
            answer = dict[str, Any](json.loads(line))
        except (ValueError, TypeError):
            self._process.kill()
            self._process.wait()
            self._errors.seek(0)
            said = [line for line in (line, *self._errors) if line.strip()] or ["it printed nothing"]
            self.__exit__()
            raise self._failure(said[-1].strip()) from None
        return answer

    def _failure(self, reason: str) -> ValueError:
        return ValueError(
            f"peer_python={self.python!r} does not run kvpress ({reason}): give the Python of an environment with "
            "kvpress, made by python -m venv peer and peer/bin/pip install kvpress."
        )

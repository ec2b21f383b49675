"""kvpress beside this package: in a process of its own, with the Python of an environment of its own."""

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
    """Decode steps of kvpress's `DecodingPress` with a `KnormPress`, which cuts the cache down every 512 steps.

    They are those of a model of the same config, with random weights of its own. Used as a context manager, for the
    process ends with it.

    Args:
        python: the Python of an environment in which kvpress is installed.

    Raises:
        ValueError: it cannot be run, or has no kvpress; also of the methods, where the process has ended.
    """

    about: dict[str, str]
    """Versions of kvpress, and of the torch and transformers that it runs on."""

    def __init__(self, python: str | Path):
        self.python, self._held = str(python), ExitStack()
        # In a file: a pipe would be full after a while, since nobody reads it.
        self._errors = self._held.enter_context(tempfile.TemporaryFile("w+", errors="replace"))  # noqa: SIM115
        # Isolated (-I): it sees neither PYTHONPATH nor this folder, where a file has the name of the package `kernels`.
        command, pipe = [self.python, "-I", str(SCRIPT)], subprocess.PIPE
        try:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True)
        except OSError as error:
            self._held.close()
            raise self._failure(error.strerror or str(error)) from None
        self._held.enter_context(self._process)  # closes the pipes, and waits
        self._held.callback(self._process.kill)
        self.about = self._answer()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(BrokenPipeError):
            self._held.close()

    def build(self, model: PreTrainedModel, seed: int) -> None:
        """Build a model of the same config, dtype and device as `model`."""
        of = {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device), "seed": seed}
        self._ask(config=model.config.to_dict(), threads=torch.get_num_threads(), **of)

    def fill(self, *, batch: int, budget: int, seen: int, copies: int) -> int:
        """Make caches of `batch` rows that hold `min(seen, budget)` tokens; returns the bytes of each."""
        return int(self._ask(batch=batch, budget=budget, seen=seen, copies=copies)["kv_bytes"])

    def step(self, copy: int, position: int) -> float:
        """Milliseconds of a decode step with one of the caches, of a token at `position` in every row."""
        return float(self._ask(copy=copy, position=position)["ms"])

    def _ask(self, **message: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # where it has ended there is no answer, which says so
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
            said = [line for line in (line, *self._errors) if line.strip()] or ["it said nothing"]
            self.__exit__()
            raise self._failure(said[-1].strip()) from None
        return answer

    def _failure(self, reason: str) -> ValueError:
        return ValueError(
            f"peer_python={self.python!r} does not run kvpress ({reason}): give the Python of an environment that has "
            "it, made by python -m venv peer and peer/bin/pip install kvpress."
        )

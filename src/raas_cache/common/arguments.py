"""Shared by the commands: parse options, and report wrong options in one line with exit code 2."""

import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated

import torch
import typer


LARGEST = 1 << 31
"""Upper limit of every count in a command. Larger counts would overflow sizes that torch computes."""
LARGEST_SEED = (1 << 32) - 1
_NO_MEMORY = (
    "allocate memory",
    "out of memory",
    "calculation overflowed",
    "Overflow when unpacking",
    "multiplication overflow",
)


@contextmanager
def refusing(option: str | None = None, **options: str) -> Iterator[None]:
    """Turn errors of the library into usage errors: one line and exit code 2.

    This covers wrong values, files that cannot be read or written, missing packages, and too little memory.

    Args:
        option: the option that the error names by default.
        options: argument -> option. The error names this option if its message starts with the argument, as in
            "budget=8 is less than one page".
    """
    try:
        yield
    except (ValueError, TypeError, ImportError, OSError, RuntimeError, MemoryError) as error:
        reason = str(error).partition("\n")[0]
        if isinstance(error, MemoryError) or any(words in reason for words in _NO_MEMORY):
            reason, option = f"there is not enough memory ({reason or type(error).__name__}): lower the sizes.", None
        elif isinstance(error, RuntimeError) and not _is_ours(error):
            raise
        argument = re.match(r"(\w+)[=:]", reason)
        raise typer.BadParameter(reason, param_hint=options.get(argument[1], option) if argument else option) from None


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised the error, for example because it cannot serve a model."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("raas_cache.")


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print each warning as one line on stderr, and print every warning of this package."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=UserWarning, module="raas_cache")
        warnings.showwarning = lambda message, *_: typer.echo(f"Warning: {message}", err=True)
        yield


@contextmanager
def folder(option: str, path: Path | None) -> Iterator[None]:
    """Create a folder and check that it can be written to, before any other work. With None, do nothing.

    If the folder is still empty at the end, for example because of a wrong option, it is removed again.
    """
    if path is None:
        yield
        return
    with ExitStack() as stack:
        try:
            for new in [parent for parent in (path, *path.parents) if not parent.exists()][::-1]:
                new.mkdir(exist_ok=True)
                stack.callback(_remove_if_empty, new)
            with tempfile.TemporaryFile(dir=path):
                pass
        except (OSError, ValueError) as error:  # ValueError: a null byte
            reason = getattr(error, "strerror", None) or str(error)
            raise typer.BadParameter(
                f"'{path}' cannot be written to ({reason}): give another folder.", param_hint=option
            ) from None
        yield


def _remove_if_empty(path: Path) -> None:
    with suppress(OSError):
        path.rmdir()


def names(text: str) -> tuple[str, ...]:
    """Split words at commas."""
    return tuple(name.strip() for name in text.split(","))


def numbers(option: str, text: str) -> tuple[int, ...]:
    """Parse whole numbers separated by commas, each at most `LARGEST`."""
    try:
        found = tuple(int(number) for number in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} must be whole numbers, separated by commas.", param_hint=option) from None
    if max(found) > LARGEST:
        raise typer.BadParameter(f"{max(found)} must be at most {LARGEST}.", param_hint=option)
    return found


def power_of_two(value: int) -> int:
    """Callback of `--page-size`: check that the value is a power of two."""
    if value & (value - 1):
        raise typer.BadParameter(f"page_size={value} must be a power of two: try 16.")
    return value


PageSize = Annotated[
    int, typer.Option(min=1, max=LARGEST, callback=power_of_two, help="Tokens per page, a power of two.")
]


def device(name: str | None) -> torch.device:
    """Parse `"cpu"` or `"cuda"`; the default is cuda if available."""
    has_gpu = torch.cuda.is_available()
    if name not in (None, "cpu", "cuda") or (name == "cuda" and not has_gpu):
        raise typer.BadParameter(f"{name!r} must be {'cpu or cuda' if has_gpu else 'cpu'}.", param_hint="--device")
    return torch.device(name or ("cuda" if has_gpu else "cpu"))


def dtype(name: str) -> torch.dtype:
    """Parse `"float32"`, `"bfloat16"` or `"float16"`."""
    if name not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"{name!r} must be float32, bfloat16 or float16.", param_hint="--dtype")
    found: torch.dtype = getattr(torch, name)
    return found

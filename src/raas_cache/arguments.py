"""What the commands share: reading options, and refusing them in one line with exit code 2."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import typer


@contextmanager
def refusing(option: str | None = None) -> Iterator[None]:
    """Make a value that the library refuses, or lacks a package for, a usage error: one line and exit code 2."""
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def names(text: str) -> tuple[str, ...]:
    """Comma-separated words."""
    return tuple(name.strip() for name in text.split(","))


def numbers(option: str, text: str) -> tuple[int, ...]:
    """Comma-separated whole numbers."""
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} must be numbers, comma-separated.", param_hint=option) from None


def device(name: str | None) -> torch.device:
    """`"cpu"` or `"cuda"`; by default cuda if there is one."""
    has_gpu = torch.cuda.is_available()
    if name not in (None, "cpu", "cuda") or (name == "cuda" and not has_gpu):
        raise typer.BadParameter(f"{name!r} must be {'cpu or cuda' if has_gpu else 'cpu'}.", param_hint="--device")
    return torch.device(name or ("cuda" if has_gpu else "cpu"))


def dtype(name: str) -> torch.dtype:
    """`"float32"`, `"bfloat16"` or `"float16"`."""
    if name not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"{name!r} must be float32, bfloat16 or float16.", param_hint="--dtype")
    found: torch.dtype = getattr(torch, name)
    return found

"""Files with shares: `raas-cache shares` writes them, and `RaaSCache(budget, shares=FILE)` reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_shares(path: str | os.PathLike[str]) -> list[Any]:
    """The shares in a file, not yet checked.

    Raises:
        ValueError: the file does not exist, cannot be read, or is not a file of shares. The message names the command
            that writes such a file.
    """
    command = f"raas-cache shares --model MODEL --budget BUDGET --out {os.fspath(path)}"
    found, reason = None, "it has no list of shares"
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"shares={str(path)!r} does not exist: write this file with `{command}`.") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    shares = found.get("shares") if isinstance(found, dict) else None
    if not isinstance(shares, list) or not shares:
        raise ValueError(f"shares={str(path)!r} is not a file of shares ({reason}): write it again with `{command}`.")
    return shares


def write_shares(path: str | os.PathLike[str], shares: list[list[float]], about: Mapping[str, str | int]) -> None:
    """Write shares as JSON, with one line per layer of the model.

    Args:
        about: what the shares were learnt with, such as the name of the model. Readers ignore it.
    """
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in about.items()]
    layers = ",\n".join(f"    {json.dumps(layer)}" for layer in shares)
    text = "\n".join(["{", *lines, f'  "shares": [\n{layers}\n  ]', "}"])
    Path(path).write_text(text + "\n", encoding="utf-8")

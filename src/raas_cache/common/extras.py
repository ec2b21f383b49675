"""Packages that only some of this one needs."""

import importlib.util


def require(module: str, what: str, extra: str) -> None:
    """Raise an ImportError that says what to install if `module` is missing; `what` as in "Plots need matplotlib"."""
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{what}: pip install raas-cache[{extra}]")

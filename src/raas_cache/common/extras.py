"""Optional packages, which only some functions need."""

import importlib.util


def require(module: str, what: str, extra: str) -> None:
    """Raise an ImportError with the pip command if `module` is missing. `what`: for example "Plots need matplotlib"."""
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{what}: pip install raas-cache[{extra}]")

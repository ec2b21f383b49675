"""The file of a recording: its format, and the checks before its content is used.

`numpy.savez_compressed` writes it. It has these members, for T forwards with P pages in total:

    about              JSON: format, method, budget, page_size, prompt, and the KV heads of each layer
    sha256             checksum of all other members; format 1 has none
    <layer>/step       [T, 2] int, position of the newest token, and of the first token of its page (-1: prefill)
    <layer>/begin      [batch, first step + 1] int32, for each token seen at the first step, the position of the first
                       token of its page (-2: evicted before); formats 1 and 2 have none
    <layer>/pages      [T] int, number of pages in each forward, P in total
    <layer>/resident   [T, batch, heads] int32, tokens held
    <layer>/first      [batch, heads, P] int32, position of each page's first token, -1 for an empty page
    <layer>/score      [batch, heads, P] float32, not negative, or NaN
    <layer>/stamp      [batch, heads, P] float32, priority of each page, for RaaS the timestamp
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np


FORMAT = 3  # the format that `write` writes
READABLE = (1, 2, FORMAT)
PAGED = {"first": np.int32, "score": np.float32, "stamp": np.float32}
"""The dtypes of the arrays with one element per page."""
ARRAYS = ("step", "pages", "resident", *PAGED, "begin")


def write(path: str | Path, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Write a file that `read` reads.

    Args:
        about: the fields of `about`, without the format.
        arrays: name of the member -> array.
    """
    text = json.dumps({"format": FORMAT, **about}, default=int)  # converts numpy integers
    with Path(path).open("wb") as file:  # numpy would append ".npz" to a path
        np.savez_compressed(file, about=np.array(text), sha256=np.array(_digest(text, arrays)), **arrays)  # type: ignore[arg-type]


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read a file that `write` wrote, and check that it is complete and consistent. Never unpickles anything.

    Returns:
        `about` and `arrays`, as in `write`.

    Raises:
        OSError: the file cannot be read; FileNotFoundError if it does not exist.
        ValueError: the file is damaged or not a recording. The message describes the problem.
    """
    data = Path(path).read_bytes()
    try:
        about, arrays = _unpack(data)
        _check_about(about)
        layers = _by_layer(about, arrays)
        for layer, of_layer in layers.items():
            _check_layer(f"layer {layer}", of_layer, len(about["heads"][layer]), about["page_size"])
        rows = {of_layer["first"].shape[0] for of_layer in layers.values()}
        _check(len(rows) <= 1, f"its layers have batches of {sorted(rows)} rows")
    except Exception as error:  # for damaged bytes, the readers of zip, numpy and JSON raise many kinds of errors
        raise ValueError(
            f"path={str(path)!r} is not a recording, or is damaged: {str(error) or type(error).__name__}. Give a file "
            "that Recording.save wrote."
        ) from None
    return about, arrays


def _check(holds: bool | np.bool_, wrong: str) -> None:
    if not holds:
        raise ValueError(wrong)


def _unpack(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Unpack `about` and the arrays, and compare the checksums of the archive and of its content."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        # Another file may be large: read one small member before unpacking the others.
        _check("about.npy" in archive.namelist(), "it is an archive without a member 'about'")
        text = str(_array(archive, "about.npy"))
        about = json.loads(text)
        _check(isinstance(about, dict), "its member 'about' is not a JSON object")
        said, readable = about.get("format"), ", ".join(map(str, READABLE))
        _check(type(said) is int and said in READABLE, f"it has format {said!r}, and this version reads {readable}")
        names = [name for name in archive.namelist() if name != "about.npy"]
        arrays = {name.removesuffix(".npy"): _array(archive, name) for name in names}
    if said > 1:
        _check("sha256" in arrays, "it has no checksum")
        _check(str(arrays.pop("sha256")) == _digest(text, arrays), "its content does not match its checksum")
    return about, arrays


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    content = io.BytesIO(archive.read(name))  # read to the end: zipfile then compares its own checksum
    array: np.ndarray = np.lib.format.read_array(content, allow_pickle=False)
    _check(not content.read(1), f"its member {name!r} has more bytes than its array")
    return array


def _digest(about: str, arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(about.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _check_about(about: dict[str, Any]) -> None:
    known = {"format", "method", "budget", "page_size", "prompt", "heads"}
    _check(about.keys() == known, f"its member 'about' has {sorted(about)} instead of {sorted(known)}")
    _check(isinstance(about["method"], str), f"method={about['method']!r} is not a string")
    size, budget, heads = about["page_size"], about["budget"], about["heads"]
    _check(_is_count(size) and size & (size - 1) == 0, f"page_size={size!r} is not a power of two")
    budgets = budget if isinstance(budget, list) else [budget]
    _check(bool(budgets) and all(map(_is_count, budgets)), f"budget={budget!r} is not a number of tokens")
    _check(about["prompt"] in ("pin", "select", "evict"), f"prompt={about['prompt']!r} is unknown")
    _check(isinstance(heads, dict), f"heads={heads!r} has no layers")
    for layer, of_layer in heads.items():
        _check(layer.isdecimal() and str(int(layer)) == layer, f"layer {layer!r} is not an index")
        _check(
            isinstance(of_layer, list) and bool(of_layer) and all(_is_count(head, least=0) for head in of_layer),
            f"heads={of_layer!r} of layer {layer} are not indices",
        )


def _is_count(value: Any, least: int = 1) -> bool:
    return type(value) is int and value >= least


def _by_layer(about: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    names = [name for name in ARRAYS if name != "begin" or about["format"] > 2]
    wanted = {f"{layer}/{name}" for layer in about["heads"] for name in names}
    _check(arrays.keys() == wanted, f"its arrays do not match its layers: {sorted(arrays.keys() ^ wanted)} differ")
    return {layer: {name: arrays[f"{layer}/{name}"] for name in names} for layer in about["heads"]}


def _check_layer(layer: str, arrays: dict[str, np.ndarray], heads: int, page_size: int) -> None:
    """Raise a ValueError if the arrays of a layer are not consistent. Its message starts with `layer`."""
    step, pages, resident, first, score, _ = (arrays[name] for name in ARRAYS[:6])
    for name, dtype in {"step": np.integer, "pages": np.integer, "resident": np.int32, **PAGED}.items():
        _check(np.issubdtype(arrays[name].dtype, dtype), f"{layer}: {name} is {arrays[name].dtype}")
    _check(first.ndim == 3 and first.size > 0, f"{layer}: first has shape {first.shape}")
    forwards, (rows, _, total) = len(pages) if pages.ndim == 1 else 0, first.shape
    shapes = {"step": (forwards, 2), "pages": (forwards,), "resident": (forwards, rows, heads)}
    shapes |= dict.fromkeys(PAGED, (rows, heads, total))
    for name, shape in shapes.items():
        _check(arrays[name].shape == shape, f"{layer}: {name} has shape {arrays[name].shape} instead of {shape}")
    _check(pages.min() > 0 and pages.max() <= total == pages.sum(), f"{layer}: it has {total} pages, not {pages.sum()}")

    newest, page = step.T
    _check(newest[0] >= 0 and (np.diff(newest) > 0).all(), f"{layer}: the steps do not increase")
    _check(newest[-1] <= np.iinfo(np.int32).max, f"{layer}: step {newest[-1]} is out of range")
    _check(((page >= -1) & (page <= newest)).all(), f"{layer}: the page of a token starts outside the sequence")
    _check(((first >= -1) & (first <= np.repeat(newest, pages))).all(), f"{layer}: a page starts outside the sequence")
    begin = arrays.get("begin")
    if begin is not None:
        is_fit = begin.dtype == np.int32 and begin.shape == (rows, newest[0] + 1)
        _check(is_fit, f"{layer}: begin has dtype {begin.dtype} and shape {begin.shape}")
        _check(
            ((begin >= -2) & (begin <= np.arange(newest[0] + 1))).all(), f"{layer}: begin names a page outside the text"
        )
    # Encode forward and page in one number, and sort. Two equal neighbours are the same page twice.
    named = np.sort(first + (np.repeat(np.arange(forwards), pages) << 32), axis=2)
    is_twice = (np.diff(named, axis=2) == 0) & ((named[..., 1:] + 1) & 0xFFFFFFFF != 0)
    _check(not is_twice.any(), f"{layer}: a page is held twice at one step")
    starts = np.cumsum(pages) - pages
    held = np.moveaxis(np.add.reduceat(first >= 0, starts, axis=2, dtype=np.int64), 2, 0)
    _check(((held <= resident) & (resident <= held * page_size)).all(), f"{layer}: resident does not match the pages")
    _check(not ((score < 0) | np.isinf(score)).any(), f"{layer}: a score is negative or infinite")

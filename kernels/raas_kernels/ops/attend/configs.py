"""How Triton's `attend` is launched: configs.json holds the fastest launch of each common shape.

`python -m raas_kernels.ops.attend.tune` measures them.
"""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any


CONFIGS_FILE = Path(__file__).with_name("configs.json")
MIN_DOT = 16  # tl.dot's smallest tile side: smaller query groups are padded up to it


@dataclass(frozen=True)
class Config:
    """One way to launch `attend`.

    Args:
        tile: slots that a program reads at once, a power of two.
        warps: warps of a program.
        stages: tiles in flight.
        programs: the number of programs to aim at; the slots of each (row, KV head) are sliced to reach it.
    """

    tile: int
    warps: int = 4
    stages: int = 3
    programs: int = 264  # two waves of a 132-SM GPU: enough slices that a batch of one still fills it


def default_config(head_size: int, itemsize: int) -> Config:
    """For a shape that nobody tuned: the largest tile whose pipeline fits 99 KiB of shared memory (sm_86, sm_89)."""
    return Config(max(min(16384 // (_next_power_of_2(head_size) * itemsize), 128), MIN_DOT))


def packed_config(head_size: int, itemsize: int) -> Config:
    """For 4-bit codes. Keys also need their bounds and the open page, so a stage takes twice the shared memory."""
    return Config(default_config(head_size, itemsize).tile, stages=2)


def _next_power_of_2(number: int) -> int:
    """As `triton.next_power_of_2`: the tuned launches can also be read where Triton is not installed."""
    return 1 << (number - 1).bit_length()


@functools.cache
def choose_config(
    capability: tuple[int, int] | None, rows: int, slots: int, head_size: int, itemsize: int, is_packed: bool
) -> Config:
    """The configuration of the nearest tuned shape of the same head size and element size, else the default.

    Args:
        capability: the GPU's compute capability, None in the interpreter. A GPU of another capability than the tuned
            one gets the default, because the tuned launches may not fit it.
        rows: batch rows x KV heads.
        slots: slots that attention reads of each.
        head_size: the larger of the K and V head sizes; counts as the next power of two.
        itemsize: bytes of an element of the query.
        is_packed: whether keys and values are 4-bit codes, for which nobody tuned.
    """
    if is_packed:
        return packed_config(head_size, itemsize)
    measured, kind = _tuned(), (_next_power_of_2(head_size), itemsize)
    tuned = [shape for shape in measured["shapes"] if (shape["head_size"], shape["itemsize"]) == kind]
    if not tuned or tuple(measured["capability"]) != capability:
        return default_config(head_size, itemsize)

    def distance(shape: dict[str, Any]) -> float:
        return abs(math.log2(shape["rows"] / rows)) + abs(math.log2(shape["slots"] / slots))

    return Config(**min(tuned, key=distance)["config"])


@functools.cache
def _tuned() -> dict[str, Any]:
    return read_configs(CONFIGS_FILE)


def read_configs(path: Path) -> dict[str, Any]:
    """The launches that `tune` wrote: the `capability` of its GPU, and `shapes`, each with its `config`.

    Raises:
        ValueError: the file is missing, is damaged, or is another kind of file.
    """
    try:
        measured: dict[str, Any] = json.loads(path.read_bytes())
        counts, tiles, (_, _) = [], [], measured["capability"]
        for shape in measured["shapes"]:
            launch = Config(**shape["config"])
            counts += [shape[name] for name in ("head_size", "itemsize", "rows", "slots")]
            counts += [launch.tile, launch.warps, launch.stages, launch.programs]
            tiles.append(launch.tile)
        wrong = [f"{count!r} is no positive number" for count in counts if type(count) is not int or count < 1]
        wrong += [f"tile {tile} is no power of two" for tile in tiles if tile & (tile - 1)]
        if wrong:
            raise ValueError(wrong[0])
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(
            f"{str(path)!r} contains no launch configurations ({type(error).__name__}: {error}): install raas-cache "
            "again, or run python -m raas_kernels.ops.attend.tune on this GPU."
        ) from None
    return measured

"""The options of a model in `eval`, `fidelity`, `shares` and `demo`, and the one function that loads it for them."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from .. import load_model
from ..common import arguments
from ..models.load import ALIAS, QUANTIZED
from ..models.pretrained import EMBEDDED, PRETRAINED
from .runner import processes


AUTO = "auto"
ModelName = Annotated[
    str,
    typer.Option(
        help=f"{', '.join(name for name in PRETRAINED if name != EMBEDDED)}, {ALIAS} (the small model in this "
        "package), a folder, a LoRA adapter, a .gguf file, or a name on the Hub."
    ),
]
Base = Annotated[
    str | None, typer.Option(help="The base model of a LoRA adapter.", show_default="the one that the adapter names")
]
DeviceMap = Annotated[
    str | None,
    typer.Option(help="Where transformers places the layers, such as auto.", show_default="one device per process"),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        help=f"{' or '.join(QUANTIZED)}: quantize the weights with bitsandbytes, on a GPU.", show_default="as stored"
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16, float16, or auto (the checkpoint's).", show_default="float32; on a GPU bfloat16"
    ),
]


def dtype_of(name: str | None) -> torch.dtype | str:
    """Parse `--dtype`. The default is float32 on the CPU and bfloat16 on a GPU."""
    if name == AUTO:
        return AUTO
    if name is None:
        return torch.bfloat16 if processes().device.type == "cuda" else torch.float32
    return arguments.dtype(name)


def load(
    name: str,
    dtype: torch.dtype | str,
    *,
    base: str | None = None,
    device_map: str | None = None,
    quantize: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model of a command with `load_model`, on the device of this process or as `device_map` says."""
    disable_progress_bar()
    if name in (ALIAS, EMBEDDED):
        torch.set_num_threads(1)  # the model is too small for several cores
    state = processes()
    if device_map is not None and state.num_processes > 1:
        raise typer.BadParameter(
            f"{device_map!r} would place every process's model on the same devices: start one process.",
            param_hint="--device-map",
        )
    with arguments.refusing("--model", base="--base", device_map="--device-map", quantize="--quantize"):
        model, tokenizer = load_model(name, base=base, dtype=dtype, device_map=device_map, quantize=quantize)
    # transformers places some quantized models itself, and these cannot move.
    if device_map is None and model.device.type != state.device.type:
        model = model.to(state.device)
    return model, tokenizer

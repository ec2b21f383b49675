"""Load any model that transformers can read, and LoRA adapters: `load_model("Qwen/Qwen3-8B")`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.peft_utils import find_adapter_config_file

from .pretrained import EMBEDDED, PRETRAINED, load_gguf, local_folder


ALIAS = "embedded"
"""Another name of the model in this package."""
QUANTIZED = ("4bit", "8bit")
"""The values that `quantize` accepts."""


def load_model(
    name: str,
    *,
    base: str | None = None,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    quantize: str | None = None,
) -> tuple[PreTrainedModel, Tokenizer]:
    """Load a model and its tokenizer from any place. The commands load `--model` with this function.

    Args:
        name: one of

            - a folder that `save_pretrained` wrote, or a name on the Hub, also of a quantized checkpoint
            - a name that `pretrained` accepts (`"smollm2"`, `"gemma3-270m"`), or `"embedded"`
            - a LoRA adapter: a folder with an `adapter_config.json`, or a name on the Hub. Its weights are merged into
              the weights of its base, so the result is a plain model. The tokenizer is the adapter's if it has one
            - a `.gguf` file. Its weights are dequantized.
        base: the base of a LoRA adapter, any name listed above except an adapter. None for the base that the adapter
            names, which may be a name that `pretrained` accepts.
        dtype: dtype of the weights; `"auto"` for the dtype of the checkpoint, which is float32 for a `.gguf` file.
        device_map: where transformers places the layers, such as `"auto"`. None for the CPU.
        quantize: `"4bit"` (NF4) or `"8bit"` to quantize the weights with bitsandbytes, which needs a CUDA GPU. A
            checkpoint that is quantized already needs no `quantize`.

    Returns:
        The model, in eval mode, and its tokenizer.

    Raises:
        ValueError: the model cannot be loaded, or the arguments do not fit each other.
        ImportError: `peft`, `gguf`, `bitsandbytes` or a package with weights is missing. The message contains the pip
            command.
    """
    if quantize is not None and quantize not in QUANTIZED:
        raise ValueError(f"quantize={quantize!r} must be '4bit' or '8bit'.")
    adapter = _read_adapter(name)
    if adapter is None:
        if base is not None:
            raise ValueError(f"base={base!r} is for LoRA adapters, and {name!r} is none: remove it.")
        return _load_plain(name, dtype, device_map, quantize)
    if quantize is not None:
        raise ValueError(
            f"quantize={quantize!r} would round the merged weights of a LoRA adapter twice: save the merged model with "
            "save_pretrained, and load this folder with quantize."
        )
    base = base or adapter.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"name={name!r} is a LoRA adapter that does not name its base: pass the base (--base).")
    if importlib.util.find_spec("peft") is None:
        raise ImportError("LoRA adapters need peft: pip install raas-cache[lora]")
    return _load_adapter(name, base, dtype, device_map)


def _read_adapter(name: str) -> dict[str, Any] | None:
    """The `adapter_config.json` of a folder or of a name on the Hub, or None if there is none."""
    if name in (ALIAS, *PRETRAINED) or name.endswith(".gguf"):
        return None
    try:
        path = find_adapter_config_file(name)
        found: dict[str, Any] | None = None if path is None else json.loads(Path(path).read_bytes())
    except Exception as error:  # the Hub client raises many kinds of errors
        raise _unloadable(name, error) from error
    return found


def _load_plain(
    name: str, dtype: torch.dtype | str, device_map: Any, quantize: str | None
) -> tuple[PreTrainedModel, Tokenizer]:
    """Load a model that is no adapter."""
    options: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    if quantize is not None:
        options["quantization_config"] = _bitsandbytes(quantize, dtype)
    if name.endswith(".gguf"):
        if options:
            raise ValueError(
                f"{'quantize' if quantize else 'device_map'}: {name!r} is a GGUF file, which is loaded as a whole: "
                "save the model with save_pretrained, and load this folder."
            )
        if importlib.util.find_spec("gguf") is None:
            raise ImportError("GGUF files need gguf: pip install raas-cache[models]")
    # 1. A name of `pretrained` is a folder of this machine.
    place = local_folder(EMBEDDED if name == ALIAS else name) if name in (ALIAS, *PRETRAINED) else name
    # 2. Load the tokenizer first: it is small, and a wrong name raises its error at once.
    try:
        if name.endswith(".gguf"):
            model, tokenizer = load_gguf(Path(name))
            return model.to(torch.float32 if dtype == "auto" else dtype).eval(), tokenizer  # type: ignore[arg-type]
        tokenizer = AutoTokenizer.from_pretrained(place)
        model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **options)
    except Exception as error:  # the Hub client, the config and the weights raise many kinds of errors
        raise _unloadable(name, error) from error
    return model.eval(), tokenizer


def _load_adapter(name: str, base: str, dtype: torch.dtype | str, device_map: Any) -> tuple[PreTrainedModel, Tokenizer]:
    """Load the base of a LoRA adapter, and merge the adapter into its weights."""
    from peft import PeftModel

    # 1. Load the base. An adapter of an adapter would need both, so the base must be a plain model.
    if _read_adapter(base) is not None:
        raise ValueError(f"base={base!r} is a LoRA adapter itself: merge it first, and pass the folder of the result.")
    model, tokenizer = _load_plain(base, dtype, device_map, None)
    # 2. Merge: W + scaling * B @ A replaces each weight W of the base, so no forward computes the adapter apart.
    try:
        merged: PreTrainedModel = PeftModel.from_pretrained(model, name).merge_and_unload()
        # 3. Fine-tuning may have added tokens or another chat template.
        if (Path(name) / "tokenizer_config.json").exists():
            tokenizer = AutoTokenizer.from_pretrained(name)
        if (Path(name) / "generation_config.json").exists():  # and another end token
            merged.generation_config = GenerationConfig.from_pretrained(name)
    except Exception as error:  # peft raises many kinds of errors
        raise _unloadable(name, error) from error
    return merged.eval(), tokenizer


def _bitsandbytes(quantize: str, dtype: torch.dtype | str) -> BitsAndBytesConfig:
    """The settings of bitsandbytes. It computes in `dtype`, or in bfloat16 if `dtype` is `"auto"`."""
    if not torch.cuda.is_available():
        raise ValueError(f"quantize={quantize!r} needs a CUDA GPU, and this machine has none: remove it.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("Quantized weights need bitsandbytes: pip install raas-cache[quantize]")
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if dtype == "auto" else dtype
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def _unloadable(name: str, error: Exception) -> ValueError:
    reason = str(error).strip().partition("\n")[0]
    return ValueError(
        f"name={name!r} cannot be loaded ({type(error).__name__}: {reason}): give a folder with config.json, weights "
        "and tokenizer, or a name on the Hub."
    )

"""lm-evaluation-harness: the model type `raas`, which is `hf` with one of this package's caches.

    lm_eval --model raas --model_args pretrained=MODEL,method=raas,budget=1024 --tasks gsm8k

lm_eval finds the type by the entry point `lm_eval.models`. Releases up to 0.4.13 look for none: there,
`python -m raas_cache.eval.harness` is `lm_eval` with the type registered, and takes the same arguments.
"""

import importlib
import inspect
import sys
import warnings
from typing import Any

import torch
from transformers import Cache


try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError("The model type 'raas' needs lm_eval: pip install raas-cache[harness]") from error

from ..cache.settings import Budget, CacheOptions
from ..common.measure import evictions
from ..common.upstream import CACHE_ARGUMENT
from ..methods.registry import POLICIES
from .decoding import SHORT
from .runner import span_of
from .settings import DENSE, Setting


if __name__ == "__main__":
    # As a script this module has another name: hand over, so that the class is registered as what entry points name.
    importlib.import_module("raas_cache.eval.harness")
    sys.exit(cli_evaluate())

DEFAULT_BUDGET = 1024


@register_model("raas")
class RaaSLM(HFLM):
    """A model of transformers that generates with a cache of this package.

    Every batch of `generate_until` requests gets new caches. Greedy results do not depend on the batch size, and the
    task's `max_gen_toks` holds, whatever the model's generation_config has for `max_new_tokens`.

    Log-likelihood requests are as with `hf`: one forward without decoding, in which no method evicts anything. A
    warning says so, for such a task measures the dense model. The `config` of the results has the method with its
    options, the budget, and the pages that were evicted: with none, a score is the dense model's.

    lm_eval's `--use_cache` tells requests apart, not models: give every method and budget a file of its own.

    Args:
        pretrained: as `HFLM`.
        method (`str`): a name that `from_name` takes; `"dense"` is transformers' `DynamicCache`.
        budget (`int`, or a list of them, *optional*): tokens to hold, 1024 by default; dense takes none.
        kwargs: the method's options (`alpha`, `page_size` ...) as `from_name` takes them, and what `HFLM` takes.

    Raises:
        ValueError: the method, the budget or an option is refused, or the model is one that no cache here can serve.
        TypeError: an argument that neither the method nor the model takes.
    """

    def __init__(self, pretrained: Any, method: str = "raas", budget: Budget | None = None, **kwargs: Any):
        options = {name: kwargs.pop(name) for name in option_names() if name in kwargs}
        if budget is None and method != DENSE:
            budget = DEFAULT_BUDGET
        self.setting: Setting = Setting(method, tuple(budget) if isinstance(budget, list) else budget, options)
        self.setting.new_cache()  # what it refuses is said before a model is loaded
        self.span: int = span_of(self.setting)
        self.pages_evicted: int = 0
        # What HFLM does not know goes to `from_pretrained`, unless the model is loaded already: then nobody looks.
        unknown = kwargs.keys() - inspect.signature(HFLM).parameters.keys()
        if unknown and not isinstance(pretrained, str):
            raise TypeError(_unknown(", ".join(f"{name}={kwargs[name]!r}" for name in sorted(unknown))))
        try:
            super().__init__(pretrained, **kwargs)
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            raise TypeError(_unknown(str(error))) from error
        if self.backend != "causal":
            raise ValueError(f"backend={self.backend!r} is not served: use a decoder-only model, or model type 'hf'.")
        self._new_cache()  # and what it refuses in a model before the first request

    def _new_cache(self) -> Cache:
        return self.setting.new_cache(self.model.config)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], attention_mask: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """The batch's prompts and completions, in parts whose prompts fill as many pages.

        Padding takes pages as a prompt does: in one part, what a budget holds of a row would hang on its neighbours.
        """
        lengths = attention_mask.sum(1)
        spans = lengths.new_zeros(lengths.shape) if self.setting.method == DENSE else -(-lengths // self.span)
        parts = []
        for rows in (spans == span for span in spans.unique()):
            padding = context.shape[1] - int(lengths[rows].max())
            cache = self._new_cache()
            options = {
                "attention_mask": attention_mask[rows, padding:],
                CACHE_ARGUMENT: cache,
                # In the model's generation_config, it would win over the task's limit, which is in `max_length`.
                "max_new_tokens": None,
                "disable_compile": max_length - context.shape[1] <= SHORT,
            }
            out = super()._model_generate(context[rows, padding:], max_length - padding, stop, **{**options, **kwargs})
            parts.append((rows, out[:, context.shape[1] - padding :]))
            self.pages_evicted += evictions(cache) * len(out)
        longest = max(new.shape[1] for _, new in parts)
        tokens = torch.nn.functional.pad(context, (0, longest), value=self.tokenizer.pad_token_id)
        for rows, new in parts:
            tokens[rows, context.shape[1] : context.shape[1] + new.shape[1]] = new
        return tokens

    def _loglikelihood_tokens(self, *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        if self.setting.method != DENSE:
            warnings.warn(
                f"method={self.setting.method!r}: log-likelihood requests decode nothing, so nothing is evicted, and "
                "this task measures the dense model. To measure the method, take a task that generates.",
                stacklevel=2,
            )
        found: list[tuple[float, bool]] = super()._loglikelihood_tokens(*args, **kwargs)
        return found

    def get_model_info(self) -> dict[str, Any]:
        """What `HFLM` says of the model, the cache, and the pages evicted so far, over rows, layers and KV heads."""
        of_cache = {"cache": self.setting.label, "budget": self.setting.budget, "pages_evicted": self.pages_evicted}
        return {**super().get_model_info(), **of_cache}


def option_names() -> list[str]:
    """What `from_name` takes besides a budget, for one method or another; the model's config is given by `RaaSLM`."""
    of_methods = (inspect.signature(policy).parameters for policy in POLICIES.values())
    names = {*CacheOptions.__annotations__, *(name for parameters in of_methods for name in parameters)}
    return sorted(names - {"config"})


def _unknown(what: str) -> str:
    return f"{what}: this is no argument of the model, and the caches' are method, budget, {', '.join(option_names())}."

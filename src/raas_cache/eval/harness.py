"""lm-evaluation-harness: the model type `raas`, which is `hf` with a cache of this package.

    lm_eval --model raas --model_args pretrained=MODEL,method=raas,budget=1024 --tasks gsm8k

lm_eval finds the type through the entry point `lm_eval.models`. Releases up to 0.4.13 do not read this entry point.
With these releases, run `python -m raas_cache.eval.harness` instead of `lm_eval`; it accepts the same arguments.
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
from .runner import span_of
from .settings import DYNAMIC, Setting


if __name__ == "__main__":
    # A script has the name `__main__`. Import this module under its own name, so that the class is registered once.
    importlib.import_module("raas_cache.eval.harness")
    sys.exit(cli_evaluate())

DEFAULT_BUDGET = 1024

SHORT = 2048
"""Up to this many new tokens, compiling the decode step takes longer on a GPU than it saves."""


@register_model("raas")
class RaaSLM(HFLM):
    """A transformers model that generates with a cache of this package.

    Every batch of `generate_until` requests gets new caches. Greedy results do not depend on the batch size. The task's
    `max_gen_toks` is the limit of new tokens, whatever `max_new_tokens` the model's generation_config contains.

    Log-likelihood requests work as with `hf`: one forward without decoding, in which no method evicts anything. The
    score is then that of a dense cache, and a warning says so. The `config` of the results contains the method with its
    options, the budget, and the number of evicted pages. If this number is 0, the score is that of a dense cache.

    lm_eval's `--use_cache` distinguishes requests, but not models. Use a separate file for every method and budget.

    Args:
        pretrained: as in `HFLM`.
        method (`str`): a name that `from_name` accepts, or `"dynamic"` for transformers' `DynamicCache`.
        budget (`int`, or a list of them, *optional*): number of tokens to hold, 1024 by default; none for `"dynamic"`.
        kwargs: options of the method (`alpha`, `page_size` ...) as in `from_name`, and arguments of `HFLM`.

    Raises:
        ValueError: the method, the budget or an option is invalid, or no cache of this package can serve the model.
        TypeError: neither the method nor the model has this argument.
    """

    def __init__(self, pretrained: Any, method: str = "raas", budget: Budget | None = None, **kwargs: Any):
        options = {name: kwargs.pop(name) for name in option_names() if name in kwargs}
        if budget is None and method != DYNAMIC:
            budget = DEFAULT_BUDGET
        self.setting: Setting = Setting(method, tuple(budget) if isinstance(budget, list) else budget, options)
        self.setting.new_cache()  # raises an error for a wrong setting before the model is loaded
        self.span: int = span_of(self.setting)
        self.pages_evicted: int = 0
        # HFLM passes unknown arguments to `from_pretrained`. If the model is loaded already, it would ignore them.
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
        self._new_cache()  # raises an error for an unsupported model before the first request

    def _new_cache(self) -> Cache:
        return self.setting.new_cache(self.model.config)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], attention_mask: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Generate a batch in parts. All prompts of a part fill the same number of pages, see `span_of`.

        Args:
            context: prompts `[rows, tokens]`, padded on the left.
            max_length: largest number of tokens of prompt and completion.
            attention_mask: `[rows, tokens]`.

        Returns:
            Prompts and completions `[rows, tokens]`.
        """
        lengths = attention_mask.sum(1)
        spans = lengths.new_zeros(lengths.shape) if self.setting.method == DYNAMIC else -(-lengths // self.span)
        parts = []
        for rows in (spans == span for span in spans.unique()):
            padding = context.shape[1] - int(lengths[rows].max())
            cache = self._new_cache()
            options = {
                "attention_mask": attention_mask[rows, padding:],
                CACHE_ARGUMENT: cache,
                # None overrides the model's generation_config, so that the task's limit in `max_length` is used.
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
        if self.setting.method != DYNAMIC:
            warnings.warn(
                f"method={self.setting.method!r}: log-likelihood requests decode nothing, so nothing is evicted, and "
                "this task measures a dense cache. To measure the method, choose a task that generates text.",
                stacklevel=2,
            )
        found: list[tuple[float, bool]] = super()._loglikelihood_tokens(*args, **kwargs)
        return found

    def get_model_info(self) -> dict[str, Any]:
        """The info of `HFLM`, the cache, and the pages evicted so far, over all rows, layers and KV heads."""
        cache = {"cache": self.setting.label, "budget": self.setting.budget, "pages_evicted": self.pages_evicted}
        return {**super().get_model_info(), **cache}


def option_names() -> list[str]:
    """Names of all options that `from_name` accepts for some method, except `config`, which `RaaSLM` passes itself."""
    of_policies = (inspect.signature(policy).parameters for policy in POLICIES.values())
    names = {*CacheOptions.__annotations__, *(name for parameters in of_policies for name in parameters)}
    return sorted(names - {"config"})


def _unknown(what: str) -> str:
    return f"{what}: neither the model nor the cache has it. The cache has method, budget, {', '.join(option_names())}."

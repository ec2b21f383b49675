"""Names in transformers that differ between its releases."""

import inspect

from transformers import GenerationMixin


_TAKEN = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE_ARGUMENT = "cache" if "cache" in _TAKEN else "past_key_values"
"""Name of the argument for the cache. transformers 5.24 calls it `cache`, and warns about `past_key_values`.

Remove this constant when the package needs transformers 5.24 or newer.
"""

"""What transformers calls things, where its releases differ."""

import inspect

from transformers import GenerationMixin


_TAKEN = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE_ARGUMENT = "cache" if "cache" in _TAKEN else "past_key_values"
"""What a cache is handed to `generate` and to a model under; since 5.24 the older of the two names draws a warning."""

"""The private names of transformers that continuous batching needs. No other file imports them.

They are the names of transformers 5.24. Releases before it hand the cache to the attention function differently.
"""

import transformers
from packaging.version import Version


OLDEST = "5.24"
if Version(transformers.__version__) < Version(OLDEST):
    raise ImportError(
        f"Continuous batching with a bounded cache needs transformers {OLDEST} or later, and this is transformers "
        f"{transformers.__version__}: upgrade transformers."
    )

from transformers.generation.configuration_utils import ContinuousBatchingConfig  # noqa: E402
from transformers.generation.continuous_batching.cache import (  # noqa: E402
    PagedAttentionCache,
    group_layers_by_attn_type,
)
from transformers.generation.continuous_batching.cache_allocators import (  # noqa: E402
    FULL_ATTENTION,
    SLIDING_ATTENTION,
    CachePool,
    SlidingAttentionCacheAllocator,
)
from transformers.generation.continuous_batching.cb_logits_processors import (  # noqa: E402
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import (  # noqa: E402
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
)
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs  # noqa: E402
from transformers.generation.continuous_batching.model_runner import ModelRunner  # noqa: E402
from transformers.generation.continuous_batching.requests import (  # noqa: E402
    FutureRequestState,
    GenerationOutput,
    RequestState,
    RequestStatus,
)
from transformers.generation.continuous_batching.scheduler import FIFOScheduler  # noqa: E402
from transformers.generation.continuous_batching.utils import (  # noqa: E402
    CudaGraphBuffer,
    find_head_dim,
    find_num_key_value_heads,
)


__all__ = [
    "FULL_ATTENTION",
    "SLIDING_ATTENTION",
    "CachePool",
    "ContinuousBatchProcessor",
    "ContinuousBatchingConfig",
    "ContinuousBatchingIOs",
    "ContinuousBatchingLogitsProcessorList",
    "ContinuousBatchingManager",
    "CudaGraphBuffer",
    "FIFOScheduler",
    "FutureRequestState",
    "GenerationOutput",
    "ModelRunner",
    "PagedAttentionCache",
    "RequestState",
    "RequestStatus",
    "SlidingAttentionCacheAllocator",
    "find_head_dim",
    "find_num_key_value_heads",
    "group_layers_by_attn_type",
]

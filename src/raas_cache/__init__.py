"""raas-cache: the KV cache that lets a reasoning model think for 100,000 tokens in the memory of 1,000.

`model.generate(**inputs, past_key_values=RaaSCache(budget=1024))`: importing this package is all the set-up there is.
"""

from . import viz
from .cache.chat import rewind
from .cache.paged_cache import PagedCache
from .engine.policy import Pages, Policy
from .methods.dense import DenseCache
from .methods.gkv import GKVCache
from .methods.h2o import H2OCache
from .methods.lazy_eviction import LazyEvictionCache
from .methods.quest import QuestCache
from .methods.raas import RaaSCache
from .methods.random import RandomCache
from .methods.registry import from_name, list_methods, register_policy
from .methods.rkv import RKVCache
from .methods.streaming_llm import StreamingLLMCache
from .methods.tova import TOVACache
from .methods.triattention import TriAttentionCache
from .methods.vase import VaSECache
from .methods.window import WindowCache
from .models.load import load_model
from .models.pretrained import embedded_model, pretrained
from .register import register, unregister
from .serving.continuous import continuous
from .sizing.learn_shares import learn_shares
from .sizing.plan import Plan, largest_budget, plan
from .sizing.read_text import read
from .tracing.recording import Recording
from .tracing.trace import record


__all__ = [
    "DenseCache",
    "GKVCache",
    "H2OCache",
    "LazyEvictionCache",
    "PagedCache",
    "Pages",
    "Plan",
    "Policy",
    "QuestCache",
    "RKVCache",
    "RaaSCache",
    "RandomCache",
    "Recording",
    "StreamingLLMCache",
    "TOVACache",
    "TriAttentionCache",
    "VaSECache",
    "WindowCache",
    "continuous",
    "embedded_model",
    "from_name",
    "largest_budget",
    "learn_shares",
    "list_methods",
    "load_model",
    "plan",
    "pretrained",
    "read",
    "record",
    "register",
    "register_policy",
    "rewind",
    "unregister",
    "viz",
]


register()

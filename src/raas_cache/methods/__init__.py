"""One file per method: the rule of its paper, its eviction policy and its cache class.

A method must not know the model, or where pages lie in memory.
"""

from .dense import DenseCache, DensePolicy
from .gkv import GKVCache, GKVPolicy
from .h2o import H2OCache, H2OPolicy
from .lazy_eviction import LazyEvictionCache, LazyEvictionPolicy
from .quest import QuestCache, QuestPolicy
from .raas import RaaSCache, RaaSPolicy
from .random import RandomCache, RandomPolicy
from .rkv import RKVCache, RKVPolicy
from .streaming_llm import StreamingLLMCache, StreamingLLMPolicy
from .tova import TOVACache, TOVAPolicy
from .triattention import TriAttentionCache, TriAttentionPolicy
from .vase import VaSECache, VaSEPolicy
from .window import WindowCache, WindowPolicy


__all__ = [
    "DenseCache",
    "DensePolicy",
    "GKVCache",
    "GKVPolicy",
    "H2OCache",
    "H2OPolicy",
    "LazyEvictionCache",
    "LazyEvictionPolicy",
    "QuestCache",
    "QuestPolicy",
    "RKVCache",
    "RKVPolicy",
    "RaaSCache",
    "RaaSPolicy",
    "RandomCache",
    "RandomPolicy",
    "StreamingLLMCache",
    "StreamingLLMPolicy",
    "TOVACache",
    "TOVAPolicy",
    "TriAttentionCache",
    "TriAttentionPolicy",
    "VaSECache",
    "VaSEPolicy",
    "WindowCache",
    "WindowPolicy",
]

"""One file per method: the rule of its paper, its eviction policy and its cache class.

A method must not know the model, or where pages lie in memory.
"""

from .dense import DenseCache, DensePolicy
from .h2o import H2OCache, H2OPolicy
from .quest import QuestCache, QuestPolicy
from .raas import RaaSCache, RaaSPolicy
from .random import RandomCache, RandomPolicy
from .rkv import RKVCache, RKVPolicy
from .streaming_llm import StreamingLLMCache, StreamingLLMPolicy
from .tova import TOVACache, TOVAPolicy
from .window import WindowCache, WindowPolicy


__all__ = [
    "DenseCache",
    "DensePolicy",
    "H2OCache",
    "H2OPolicy",
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
    "WindowCache",
    "WindowPolicy",
]

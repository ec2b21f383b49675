"""Eviction policies, one file a method: scores in, page priorities out. They know neither memory nor models.

This is the registry: a line for each file.
"""

from .base import POLICIES as POLICIES
from .base import Pages as Pages
from .base import Policy as Policy
from .base import register_policy as register_policy
from .dense import DensePolicy as DensePolicy
from .h2o import H2OPolicy as H2OPolicy
from .quest import QuestPolicy as QuestPolicy
from .raas import RaaSPolicy as RaaSPolicy
from .rkv import RKVPolicy as RKVPolicy
from .streaming_llm import StreamingLLMPolicy as StreamingLLMPolicy
from .tova import TOVAPolicy as TOVAPolicy

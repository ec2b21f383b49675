"""raas-cache: the KV cache that lets a reasoning model think for 100,000 tokens in the memory of 1,000.

`model.generate(**inputs, past_key_values=RaaSCache(budget=1024))`: importing this package is all the set-up there is.
"""

from importlib.resources import files

from . import viz
from .budgets import learn_budgets
from .cache import PagedCache
from .chat import rewind
from .doors import register, unregister
from .methods import (
    DenseCache,
    H2OCache,
    QuestCache,
    RaaSCache,
    RKVCache,
    StreamingLLMCache,
    TOVACache,
    from_name,
    list_methods,
)
from .planning import Plan, largest_budget, plan
from .policies import Pages, Policy, register_policy
from .reading import read
from .recorder import record
from .recording import Recording


__all__ = [
    "DenseCache",
    "H2OCache",
    "PagedCache",
    "Pages",
    "Plan",
    "Policy",
    "QuestCache",
    "RKVCache",
    "RaaSCache",
    "Recording",
    "StreamingLLMCache",
    "TOVACache",
    "embedded_model",
    "from_name",
    "largest_budget",
    "learn_budgets",
    "list_methods",
    "plan",
    "read",
    "record",
    "register",
    "register_policy",
    "rewind",
    "unregister",
    "viz",
]


def embedded_model() -> str:
    """Folder of the small reasoning model shipped with the package, for `from_pretrained`; works offline."""
    return str(files(__name__) / "models" / "chain_reasoner")


register()

"""Show: attention masks that change what is visible of the past.

A 2-d attention mask speaks of every token of the sequence so far. What it says of new tokens goes into the bias with
them; what it says of older tokens is written into the bias here, for all layers of a cache at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...dispatch import implementation
from ...paged_kv import PagedKV
from . import reference


__all__ = ["show"]


def show(kvs: Sequence[PagedKV], visible: Tensor) -> None:
    """Let attention read the tokens that `visible` names, and no others; key_min and key_max follow.

    Triton does so for all layers in one launch, instead of several launches a layer.

    In a 4-bit cache, key_min and key_max follow in the open page only: the codes of other pages count from theirs. A
    token that was hidden when its page was coded has the key of its code, which lies between the bounds of the keys
    that were visible then.

    Args:
        kvs: the layers, on the device of `visible`; `bias`, `key_min` and `key_max` are written in place.
        visible: `[B, T]` bool, by sequence index. Tokens from index T on stay as they are.
    """
    run = reference if torch.compiler.is_compiling() else implementation(__name__, visible.device)
    run.show(kvs, visible)

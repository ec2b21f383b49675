"""Append: write one decode token of each row, and recycle the page of the smallest priority when one is needed."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import flatten, implementation, is_traceable, operator
from ...paged_kv import PagedKV
from . import reference
from .reference import victim


__all__ = ["append", "victim"]


def append(
    kv: PagedKV,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None = None,
    rows: Tensor | None = None,
    may_close: bool = False,
) -> None:
    """Advance the clock and write one decode token of each row into its open page (RaaS, section 3).

    When the open page is full, the row opens the page that `victim` names: its old tokens are gone, and its `states`
    are 0. "The open page's timestamp becomes t" at every token, says the paper. A page that stays open until it is full
    cannot be recycled before, so its priority is written only with its first and its last token.

    In a 4-bit cache, the key goes to `open_keys`. When the page gets its last token, all its keys are coded at once
    (`pack_page`).

    Args:
        kv: written in place.
        key, value: `[R, H, 1, Dk]` and `[R, H, 1, Dv]`, in the dtype of `kv.keys` and `kv.values`; for an 8-bit or
            4-bit cache in the model's dtype.
        visible: `[R]` bool, False where the attention mask hides the token; None if it hides the token of no row.
        rows: `[R]` int64, the batch rows to append to, each at most once; None for all.
        may_close: whether a page may be closed before it is full. Its priority is then written with every token.
    """
    if not torch.compiler.is_compiling():
        implementation(__name__, key.device).append(kv, key, value, visible, rows, may_close)
    elif is_traceable(key.device):
        reference.append_in_graph(kv, key, value, visible, rows, may_close)
    else:
        _append(*flatten(kv), key, value, visible, rows, may_close)


@operator(
    "Tensor key, Tensor value, Tensor? visible, Tensor? rows, bool may_close",
    writes=(
        "keys", "values", "bias", "positions", "priority", "open_slot", "clock", "key_scales", "value_scales",
        "key_min", "key_max", "states", "open_keys", "value_min", "value_max",
    ),
)  # fmt: skip
def _append(
    kv: PagedKV, key: Tensor, value: Tensor, visible: Tensor | None, rows: Tensor | None, may_close: bool
) -> None:
    implementation(__name__, key.device).append(kv, key, value, visible, rows, may_close)

"""How many pages a request needs in each page table, known before the request is admitted."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..engine.page_table import PageTable


DEFAULT_ROWS = 32


def need(tables: Sequence[PageTable], prompt_tokens: int, new_tokens: int | None) -> list[int]:
    """The number of pages that a request can ever use in each of `tables`.

    A table holds the whole prompt while it is read, and then at most the budget: the decode pages that the budget
    leaves beside the prompt, or fewer if the request generates fewer tokens.

    Args:
        prompt_tokens: tokens of the prompt.
        new_tokens: largest number of tokens to generate; None for no limit.

    Raises:
        ValueError: the method never evicts, and `new_tokens` is None.
    """
    size = tables[0].page_size
    prompt_pages = math.ceil(prompt_tokens / size)
    pages = []
    for table in tables:
        if table.settings.grows and new_tokens is None:
            raise ValueError(
                "max_new_tokens=None: this method never evicts, so a request without a limit has no largest size. Pass "
                "max_new_tokens."
            )
        pages.append(_pages(table, prompt_pages, new_tokens))
    return pages


def _pages(table: PageTable, prompt_pages: int, new_tokens: int | None) -> int:
    evicts_prompt = table.settings.prompt == "evict"
    limit = table.limit_beside(1 if evicts_prompt else prompt_pages)
    decode_pages = limit if new_tokens is None else math.ceil(new_tokens / table.page_size)
    if evicts_prompt:  # all pages but the first become evictable
        return max(prompt_pages, 1 + min(limit, prompt_pages - 1 + decode_pages))
    return prompt_pages + min(limit, decode_pages)


def usual_row(table: PageTable) -> int:
    """Pages of a row whose prompt takes half of the budget. With shares, these are the row's pages on average."""
    settings = table.settings
    budget = settings.budget // settings.page_size
    prompt_pages = max(1, budget // 2)
    return max(1, min(_pages(table, prompt_pages, None), 2 * budget))

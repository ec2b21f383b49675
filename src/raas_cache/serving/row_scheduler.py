"""The scheduler of transformers, with admission by rows."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from .row_cache import RowCache
from .upstream import FIFOScheduler, RequestState


class RowScheduler(FIFOScheduler):
    """First come, first served. A request enters a batch after it got its row and all its pages.

    A request of which another row holds the beginning of the prompt waits until that row has read it. All others wait
    only for a row or for pages, and do not overtake each other.
    """

    cache: RowCache

    def clear_cancelled_requests(self) -> list[RequestState]:
        """Remove cancelled requests, and empty the rows of all requests that have ended, before each step."""
        cancelled: list[RequestState] = super().clear_cancelled_requests()
        self.cache.store.clear_ended()
        return cancelled

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        """See `Scheduler.schedule_batch` of transformers."""
        self._admit_waiting()
        scheduled, is_decode, *sizes = super().schedule_batch(token_budget, cache_budget)
        scheduled = scheduled or []  # None would say that requests are starved, which rows cannot be
        self.cache.set_batch(scheduled)
        # A chunk of one token is no decode step.
        return scheduled, is_decode and not self.cache.batch.chunks, *sizes

    def _admit_waiting(self) -> None:
        for request_id in self.waiting_requests_order:
            if request_id in self.cache.store.rows:
                continue
            if not self.cache.admit(self.waiting_requests[request_id]):
                break

    def _get_waiting_candidates(self) -> list[RequestState]:
        admitted = takewhile(self.cache.store.rows.__contains__, self.waiting_requests_order)
        return [self.waiting_requests[name] for name in admitted]

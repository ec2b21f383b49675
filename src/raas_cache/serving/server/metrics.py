"""What `/metrics` shows of a server, in the format of Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from ..manager import RowManager


FINISHED, CANCELLED, REJECTED, FAILED = OUTCOMES = ("finished", "cancelled", "rejected", "failed")


class Metrics(Collector):
    """Reads the numbers of a manager when they are asked for, and counts how requests end.

    Args:
        manager: the manager.

    Attributes:
        outcomes: number of requests that ended, by outcome.
    """

    def __init__(self, manager: RowManager):
        self.manager = manager
        self.outcomes: Counter[str] = Counter()
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """See `prometheus_client.registry.Collector`."""
        store, manager = self.manager.cache.store, self.manager
        gauges = {
            "rows_in_use": ("Rows that a request has.", len(store.rows)),
            "rows_free": ("Rows that a request can get.", store.free_rows),
            "waiting_requests": ("Requests that wait for a row or for pages.", manager.waiting),
            "pages_free": ("Pages that no row has, in the layer with the fewest.", min(store.free_pages)),
            "kv_bytes": ("Bytes of all keys, values and page tables.", manager.nbytes),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"raas_{name}", text, value=value)
        yield CounterMetricFamily("raas_tokens_generated", "Generated tokens.", value=manager.cache.new_tokens)
        ended = CounterMetricFamily("raas_requests", "Requests that ended, by outcome.", labels=["outcome"])
        for outcome in OUTCOMES:
            ended.add_metric([outcome], self.outcomes[outcome])
        yield ended

    def respond(self, request: Request) -> Response:
        """The route `/metrics`."""
        encode, media_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self.registry), media_type=media_type)

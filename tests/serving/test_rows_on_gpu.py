"""Decode steps from a CUDA graph, while requests join and leave."""

import pytest
import torch

from ..helpers import tiny_model
from .alone import answers, requests, rows
from .test_rows import check_alone


pytestmark = pytest.mark.gpu


SETTINGS = [
    *[("raas", {}), ("raas", {"prompt": "evict"}), ("window", {}), ("h2o", {}), ("quest", {})],
    *[("raas", {"kv_dtype": "int8"}), ("raas", {"kv_dtype": "int4"}), ("raas", {"shares": [[1.5, 0.5], [0.5, 1.5]]})],
]


@pytest.mark.parametrize(("method", "options"), SETTINGS, ids=str)
def test_each_request_gives_what_it_gives_alone(method, options):
    model = tiny_model(head_dim=16, dtype=torch.float32).cuda()
    asked = requests(24)
    with rows(model, max_rows=6, chunk=24, method=method, page_size=16, budget=64, **options) as manager:
        found = answers(manager, asked)
        graphs = manager.batch_processor.inputs_and_outputs.graphs._storage
        assert graphs, "no decode step ran from a CUDA graph"
    check_alone(model, asked, found, method, page_size=16, budget=64, **options)

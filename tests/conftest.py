import os
import sys

import pytest
import torch


# Without a GPU the Triton kernels run in Triton's interpreter; it must be chosen before their first import.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# No test needs the Hub, and a name that is not there should not be waited for.
os.environ["HF_HUB_OFFLINE"] = "1"
# The tests run side by side, and their models are too small to gain from threads that would spin against each other.
torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    """GPU tests run where there is a GPU, and only there."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def own_engine():
    """A test that forces an engine does so for itself alone."""
    yield
    dispatch = sys.modules.get("raas_kernels.dispatch")
    if dispatch is not None:
        dispatch.engine.cache_clear()


@pytest.fixture(autouse=True)
def own_methods():
    """A method that a test registers is gone after this test."""
    registry = sys.modules.get("raas_cache.methods.registry")
    registered = [] if registry is None else [registry.POLICIES, registry.CACHES]
    before = [dict(names) for names in registered]
    yield
    for names, old in zip(registered, before, strict=True):
        names.clear()
        names.update(old)

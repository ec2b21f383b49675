"""Out of memory at every allocation that the package makes: the caller who catches it and tries again gets the right
answer, or is told to call `reset()`; never a wrong answer.
"""

import copy
import functools
import os
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import raas_cache
import raas_kernels

from ..faults import (
    AT_OPENING,
    AT_PROMPT,
    AT_TURN,
    METHODS,
    PROMPT,
    TURN,
    Conversation,
    assert_right_or_refused,
    refusal,
)


pytestmark = pytest.mark.filterwarnings("ignore:budget=")
PACKAGE = tuple(os.path.dirname(package.__file__) + os.sep for package in (raas_cache, raas_kernels))
DRAFTED = [(method, mode) for method, mode in METHODS if mode != "evict"]
# The call, and the rows that the cache then holds.
ROW_CALLS = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
    "swap": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
}


@pytest.fixture(autouse=True)
def grows_early(monkeypatch):
    """A store begins with two evictable pages and not with 128 tokens, so that these short conversations outgrow it."""
    monkeypatch.setattr("raas_cache.engine.page_table.FIRST_TOKENS", 8)


class OutOfMemory(TorchDispatchMode):
    """Raises at allocation number `at` of those that the package makes; `count` of them were asked for."""

    def __init__(self, at=None):
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if allocates(function) and is_called_by_package():
            self.count += 1
            if self.count == self.at:
                raise torch.OutOfMemoryError(f"at allocation {self.at}: {function}")
        return function(*args, **(kwargs or {}))


@functools.cache
def allocates(function):
    """Whether a result is a new tensor: neither a view of an argument nor an argument that the operation writes to."""
    returns = function._schema.returns
    return any("Tensor" in str(result.type) and result.alias_info is None for result in returns)


def is_called_by_package():
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            return True
        frame = frame.f_back
    return False


@functools.cache
def conversation_of(method, mode):
    return Conversation(method, mode, layers=2)


def at_every_allocation(prepare, call):
    """Yields a cache from `prepare()` in which `call` has run out of memory, for each of its allocations."""
    cache = prepare()
    with OutOfMemory() as memory:
        call(cache)
    assert memory.count, "the call allocates nothing"
    for at in range(1, memory.count + 1):
        cache = prepare()
        with pytest.raises(torch.OutOfMemoryError, match=f"at allocation {at}:"), OutOfMemory(at):
            call(cache)
        yield cache


@pytest.mark.parametrize("when", ["prompt", "new page", "turn", "growth"])
@pytest.mark.parametrize(("method", "mode"), METHODS)
def test_a_forward(method, mode, when):
    conversation = conversation_of(method, mode)
    if when == "growth":
        conversation = Conversation(method, mode, layers=2, budget=256, lengths=[PROMPT, *[1] * 140])
        number = conversation.at_growth
    else:
        number = {"prompt": AT_PROMPT, "new page": AT_OPENING, "turn": AT_TURN}[when]
        evictions = [conversation.before[AT_OPENING + after].evictions for after in (0, 1)]
        assert (evictions[0] < evictions[1]) == (method not in ("quest", "dense"))
    prepare = functools.partial(conversation.cache_before, number)
    for cache in at_every_allocation(prepare, lambda cache: conversation.forward(cache, number)):
        assert_right_or_refused(conversation, cache, number)


@pytest.mark.parametrize("name", ROW_CALLS)
@pytest.mark.parametrize(("method", "mode"), METHODS)
def test_rows_that_move(method, mode, name):
    """The caller repeats the call, or goes on without it."""
    conversation, number = conversation_of(method, mode), AT_TURN + 1
    call, rows = ROW_CALLS[name]
    prepare = functools.partial(conversation.cache_before, number)
    for cache in at_every_allocation(prepare, call):
        if refusal(call, cache) is None:
            assert_right_or_refused(conversation, cache, number, rows)
    for cache in at_every_allocation(prepare, call):
        assert_right_or_refused(conversation, cache, number)


def drafted(conversation, start):
    """A cache that records the past, before forward number `start`."""
    cache = conversation.new_cache()
    cache.activate_past_recording()
    for number in range(start):
        conversation.forward(cache, number)
    return cache


@pytest.mark.parametrize(("method", "mode"), DRAFTED)
def test_a_draft(method, mode):
    conversation = conversation_of(method, mode)
    start = AT_OPENING - 2
    numbers = range(start, start + 3)

    def call(cache):
        return conversation.draft(cache, numbers)

    def retry(cache):
        torch.testing.assert_close(
            call(cache), torch.cat([conversation.answers[number] for number in numbers], 1), rtol=1e-6, atol=1e-6
        )

    for cache in at_every_allocation(functools.partial(copy.deepcopy, drafted(conversation, start)), call):
        if refusal(retry, cache) is None:
            cache.deactivate_past_recording()
            conversation.assert_goes_on(cache, numbers.stop, forwards=2)


@pytest.mark.parametrize("what", ["draft", "turn"])
@pytest.mark.parametrize(("method", "mode"), DRAFTED)
def test_a_crop(method, mode, what):
    """Two of three drafted tokens, or a whole turn, are taken back. The caller repeats the call, or goes on without."""
    conversation = conversation_of(method, mode)
    if what == "turn":
        first, last, length = AT_TURN, AT_TURN, TURN
        before = conversation.cache_before(first)
        before.activate_past_recording()
        conversation.forward(before, first)
    else:
        first, last, length = AT_OPENING - 1, AT_OPENING, 2
        before = drafted(conversation, first - 1)
        conversation.draft(before, range(first - 1, last + 1))
    before.deactivate_past_recording()
    prepare = functools.partial(copy.deepcopy, before)

    def crop(cache):
        cache.crop(-length)

    for cache in at_every_allocation(prepare, crop):
        if refusal(crop, cache) is None:
            assert_right_or_refused(conversation, cache, first)
    for cache in at_every_allocation(prepare, crop):
        assert_right_or_refused(conversation, cache, last + 1)

"""Any order of forwards, crops, row operations, resets and copies, on any shape, against the oracle.

After a crop the oracle starts again and sees only the tokens that were kept: that is what a crop must amount to. CI
runs 2,000 steps; `RAAS_STATEFUL_STEPS=100000 pytest tests/engine/test_stateful.py` runs more, with a fresh seed.
"""

import copy
import math
import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import AttentionInterface

from raas_cache import from_name
from raas_cache.methods.registry import POLICIES

from ..helpers import resident_set
from ..oracle import OracleCache, dense_attention, oracle_attention


STEPS = int(os.environ.get("RAAS_STATEFUL_STEPS", 2000))
STEPS_A_RUN = 40  # of at most 50: resets and the like end some early
HEAD_DIM = 4
METHODS = [
    ("raas", {"alpha": 0.5}), ("raas", {"alpha": 0.1}), ("raas", {"alpha": 0.01}),
    ("raas", {"alpha": None, "top_ratio": 0.4}), ("h2o", {}), ("tova", {}), ("rkv", {}), ("streaming_llm", {}),
    ("window", {}), ("random", {"recent_tokens": 3}), ("lazy_eviction", {"alpha": 0.1, "recent_tokens": 3}),
    ("gkv", {}), ("vase", {}),
    ("quest", {"dense_layers": 0}), ("dense", {}),
]  # fmt: skip
MAX_ROWS = 4


def eager_attention_forward(module, query, key, value, attention_mask, scaling, softcap, s_aux):
    """What the first forward runs where the softmax has a cap or sinks."""
    output = dense_attention(query, key, value, attention_mask == 0, scaling, softcap, s_aux)
    return output.transpose(1, 2), None


class Attention(torch.nn.Module):
    is_causal = True

    def __init__(self, group):
        super().__init__()
        self.num_key_value_groups = group

    def forward(self, *args, **kwargs):
        return eager_attention_forward(self, *args, **kwargs)


class CacheMachine(RuleBasedStateMachine):
    @initialize(
        heads=st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2)]),
        page_size=st.sampled_from([1, 2, 4, 8]),
        pages=st.integers(1, 10),
        min_decode_pages=st.integers(1, 3),
        method=st.sampled_from(METHODS),
        mode=st.sampled_from(["pin", "select", "evict"]),
        scoring=st.sampled_from(["exact", "minmax"]),
        granularity=st.sampled_from(["head", "layer"]),
        softcap=st.sampled_from([None, 2.0]),
        has_sinks=st.booleans(),
        recording=st.booleans(),
        prompt=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(0, 1 << 32)),
    )
    def begin(
        self, heads, page_size, pages, min_decode_pages, method, mode, scoring, granularity, softcap, has_sinks,
        recording, prompt,
    ):  # fmt: skip
        self.kv_heads, self.group = heads
        self.method, options = method
        self.mode = mode if mode in POLICIES[self.method].prompts else "pin"
        self.settings = {
            "page_size": page_size, "min_decode_pages": min_decode_pages, "scoring": scoring, "prompt": self.mode,
            "granularity": granularity, **options,
        }  # fmt: skip
        recording = recording and self.mode != "evict"
        self.budget = pages * page_size
        self.module = Attention(self.group)
        self.softmax = {"scaling": 0.9, "softcap": softcap, "s_aux": None}
        if has_sinks:
            self.softmax["s_aux"] = torch.linspace(-2, 1, self.kv_heads * self.group, dtype=torch.float64)
        self.cache = from_name(self.method, self.budget, **self.settings)
        if recording:
            self.cache.activate_past_recording()
        self.start(recording, prompt)

    def start(self, recording, prompt):
        self.rows, length, seed = prompt
        self.log, self.seen, self.recording, self.expects_turn = [], 0, recording, recording
        self.recorded = 0
        self.replay()
        self.forward(length, seed)

    def replay(self):
        """The oracle of a cache that has never seen what is not in the log."""
        self.oracle = OracleCache(self.budget, method=self.method, **self.settings)
        for entry in self.log:
            if isinstance(entry, list):
                self.oracle.rows(entry)
            else:
                self.ask_oracle(*entry)

    def ask_oracle(self, query, key, value, visible, kind):
        self.oracle.treat_as = kind
        keys, values = self.oracle.update(key, value, 0)
        return oracle_attention(self.module, query, keys, values, self.mask(visible), **self.softmax)[0]

    def mask(self, visible):
        length = visible.shape[1]
        return visible[:, None, None] & torch.ones(length, length, dtype=torch.bool).tril()

    def forward(self, length, seed):
        generator = torch.Generator().manual_seed(seed)

        def random(heads):
            return torch.randn(self.rows, heads, length, HEAD_DIM, dtype=torch.float64, generator=generator)

        key, value, query = random(self.kv_heads), random(self.kv_heads), 2 * random(self.kv_heads * self.group)
        visible = torch.rand(self.rows, length, generator=generator) > 0.2
        if self.seen == 0:
            visible[:, 0] = True  # a row with nothing to attend to has no output
        is_draft = self.recording and self.seen > 0 and length > 1 and not self.expects_turn
        self.expects_turn = False
        entry = (query, key, value, visible, "draft" if is_draft else "input" if length > 1 else None)
        self.log.append(entry)
        expected = self.ask_oracle(*entry)
        keys, values = self.cache.update(key.clone(), value.clone(), 0)
        attention = AttentionInterface()["raas"]
        output, _ = attention(self.module, query, keys, values, self.mask(visible), **self.softmax)
        torch.testing.assert_close(output[visible], expected[visible], rtol=1e-9, atol=1e-9)
        self.seen += length
        self.recorded += length if self.recording else 0

    @rule(seed=st.integers(0, 1 << 32))
    def decode(self, seed):
        self.forward(1, seed)

    @rule(length=st.integers(2, 9), seed=st.integers(0, 1 << 32))
    def several(self, length, seed):
        self.forward(length, seed)

    @precondition(lambda self: self.mode != "evict")
    @rule()
    def record(self):
        self.cache.activate_past_recording()
        self.recorded = self.recorded if self.recording else 0
        self.recording = self.expects_turn = True

    @precondition(lambda self: self.recorded)
    @rule(share=st.floats(0, 1))
    def crop(self, share):
        self.take_back(round(share * min(self.recorded, self.budget)))  # more than a budget is not kept

    def take_back(self, left):
        self.cache.crop(-left)
        self.recorded, self.seen = 0, self.seen - left
        index = len(self.log)
        while left:
            index -= 1
            if isinstance(self.log[index], list):
                continue
            *tensors, visible, kind = self.log[index]
            kept = max(0, visible.shape[1] - left)
            left -= visible.shape[1] - kept
            if kept:
                self.log[index] = (*(t[:, :, :kept] for t in tensors), visible[:, :kept], kind)
            else:
                del self.log[index]
        self.replay()

    @precondition(lambda self: self.recording)
    @rule(length=st.integers(1, 9), kept=st.integers(0, 9), seed=st.integers(0, 1 << 32))
    def draft(self, length, kept, seed):
        """A round of assisted decoding."""
        self.forward(length, seed)
        self.take_back(min(length, self.budget) * max(0, length - kept) // length)

    def move_rows(self, indices):
        self.rows = len(indices)
        self.log.append(indices)
        self.oracle.rows(indices)

    @rule(data=st.data())
    def reorder(self, data):
        row = st.integers(0, self.rows - 1)
        indices = data.draw(st.lists(row, min_size=self.rows, max_size=self.rows))
        self.cache.reorder_cache(torch.tensor(indices))
        self.move_rows(indices)

    @rule(data=st.data())
    def select(self, data):
        indices = data.draw(st.lists(st.integers(0, self.rows - 1), min_size=1, max_size=self.rows, unique=True))
        self.cache.batch_select_indices(torch.tensor(indices))
        self.move_rows(indices)

    @precondition(lambda self: self.rows * 2 <= MAX_ROWS)
    @rule()
    def repeat(self):
        self.cache.batch_repeat_interleave(2)
        self.move_rows([row for row in range(self.rows) for _ in range(2)])

    @rule(recording=st.booleans(), prompt=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(0, 1 << 32)))
    def reset(self, recording, prompt):
        recording = recording and self.mode != "evict"
        self.cache.reset()
        if recording:
            self.cache.activate_past_recording()
        self.start(recording, prompt)

    @rule()
    def deepcopy(self):
        self.cache = copy.deepcopy(self.cache)

    @invariant()
    def holds_what_the_oracle_holds(self):
        if not hasattr(self, "cache"):
            return
        assert self.cache.get_seq_length() == self.seen
        if not self.seen:
            return
        layer = self.cache.layers[0]
        kv = layer.engine.kv
        pages = kv.first
        for row in range(self.rows):
            for head in range(self.kv_heads):
                state = self.oracle.heads[0, row, head]
                assert resident_set(self.cache, 0, row, head) == self.oracle.resident_set(0, row, head)
                assert self.cache.evicted_pages(0)[row, head] == state.evicted
                held = kv.held[row, head]
                held_pages, priority = pages[row, head][held], kv.priority[row, head][held]
                stamps = dict(zip(held_pages.tolist(), priority.tolist(), strict=True))
                for page in (page for page in state.pages if not page.pinned):
                    stamp = stamps.pop(page.tokens[0])
                    # The store stamps the open page when it is full: until then nothing asks for its stamp.
                    is_open = page is state.open and len(page.tokens) < layer.settings.page_size
                    assert is_open or math.isclose(stamp, page.priority, rel_tol=1e-9, abs_tol=1e-12)
                assert not stamps


@pytest.mark.filterwarnings("ignore:budget=")
def test_any_sequence_of_operations():
    CacheMachine.TestCase.settings = settings(
        max_examples=STEPS // STEPS_A_RUN,
        stateful_step_count=50,
        derandomize="RAAS_STATEFUL_STEPS" not in os.environ,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    CacheMachine.TestCase("runTest").runTest()

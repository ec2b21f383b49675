"""Two layers that get the same tokens: one has a pool of pages, one has rows with memory of their own."""

import torch

from raas_cache.engine.forward import Decode
from raas_cache.engine.layer_engine import LayerEngine
from raas_cache.engine.reserve import reserve
from raas_cache.engine.resize import CONTENTS, movable
from raas_cache.engine.rotation import Rotation

from .tables import CPU, HEADS, PAGE, rows_of, settings


GROUP, HEAD_DIM = 2, 8
SOFTMAX = {"scale": 0.3, "softcap": None, "sinks": None}
PAGES = 30  # both layers have so many pages in each row while they attend, so that sums have the same order


def make_layer(batch, pool_blocks, dtype, **options):
    layer = LayerEngine(settings(**options))
    layer.rotation = Rotation.standard(HEAD_DIM, 1e4, CPU)
    if pool_blocks is not None:
        layer.table.use_pool(pool_blocks)
    layer.table.allocate(*torch.zeros(2, 1, HEADS, 1, HEAD_DIM, dtype=dtype), batch)
    return layer


class SideBySide:
    """The layers `pooled` and `plain`, with the same rows."""

    def __init__(self, batch, pool_blocks, seed=0, dtype=torch.float64, tolerance=0.0, **options):
        self.pooled, self.plain = (make_layer(batch, blocks, dtype, **options) for blocks in (pool_blocks, None))
        self.generator, self.dtype, self.tolerance = torch.Generator().manual_seed(seed), dtype, tolerance
        self.active = set()
        self.addresses = self.pool_addresses()

    def pool_addresses(self):
        pools = (getattr(self.pooled.table.kv, name) for name in CONTENTS)
        return [None if pool is None else pool.data_ptr() for pool in pools]

    @property
    def table(self):
        return self.pooled.table

    def draw(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def draw_tokens(self, rows, new):
        """Query, key and value of `new` tokens of each row."""
        return [self.draw(rows, heads, new, HEAD_DIM) for heads in (HEADS * GROUP, HEADS, HEADS)]

    def forward(self, rows, tokens, admits=False, is_prefill=False):
        """A forward of these rows on both layers; their outputs, which must be equal, or None."""
        outputs = []
        for layer in (self.pooled, self.plain):
            query, key, value = (states.clone() for states in tokens)
            layer.table.set_pages(max(PAGES, layer.table.num_pages))
            layer.set_rows(rows_of(*rows))
            layer.admits, layer.reads_prefill = admits, is_prefill
            outputs.append(Decode(layer).begin(key, value)[0].attend(query, SOFTMAX))
            layer.reads_prefill = False
        self.active |= set(rows)
        if outputs[0] is not None:
            assert outputs[0].isfinite().all()
            torch.testing.assert_close(*outputs, rtol=self.tolerance, atol=self.tolerance)
        self.check()
        return outputs[0]

    def reserve(self, row, pages, shared_from=None):
        reserve(self.table, row, pages, shared_from)

    def release(self, row):
        self.active.discard(row)
        for layer in (self.pooled, self.plain):
            layer.table.release_rows(rows_of(row))

    def poison(self):
        """Leave NaN in every block that no row holds; for codes, in their scales and bounds."""
        held = torch.zeros(self.table.pool_blocks, dtype=torch.bool)
        held[torch.from_numpy(self.table.blocks.ids.ravel()).long()] = True
        held[0] = False
        for name in CONTENTS:
            pool = getattr(self.table.kv, name)
            if pool is not None:
                movable(pool)[~held] = float("nan") if movable(pool).is_floating_point() else 77

    def check(self):
        """The active rows hold the same tokens with the same numbers in the same pages, and pages have memory."""
        ours, theirs, rows = self.pooled.table, self.plain.table, sorted(self.active)
        pages = min(ours.num_pages, theirs.num_pages)
        mine, right = ours.kv, theirs.kv
        seen = right.bias[rows, :, : pages * PAGE] == 0
        assert (mine.bias[rows, :, pages * PAGE :] != 0).all() and (right.bias[rows, :, pages * PAGE :] != 0).all()
        assert torch.equal(mine.bias[rows, :, : pages * PAGE] == 0, seen)
        for one, other in ((mine.positions, right.positions), *zip(ours.states(), theirs.states(), strict=True)):
            assert torch.equal(one[rows, :, : pages * PAGE][seen], other[rows, :, : pages * PAGE][seen])
        evictable = torch.from_numpy(~ours.counts.pinned)[rows, None, :pages]
        holds = (right.priority[rows, :, :pages] > float("-inf")) & evictable
        close = {"rtol": self.tolerance, "atol": self.tolerance}
        for name in ("priority", "states"):
            one, other = getattr(mine, name), getattr(right, name)
            if one is not None:
                torch.testing.assert_close(one[rows, :, :pages][holds], other[rows, :, :pages][holds], **close)
        assert torch.equal(mine.clock[rows], right.clock[rows])
        for name in ("seen", "decoded", "prefilled", "released", "limit"):
            assert (getattr(ours.counts, name)[rows] == getattr(theirs.counts, name)[rows]).all(), name
        assert not (ours.counts.pinned & (ours.blocks.ids == 0)).any()
        assert (ours.blocks.ids[mine.evictable.numpy()] > 0).all()
        assert torch.equal(mine.blocks, torch.from_numpy(ours.blocks.ids))
        assert self.pool_addresses() == self.addresses, "a CUDA graph reads the pool"

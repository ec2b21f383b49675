"""What the scheduler, the inputs and the model of continuous batching see of the rows: a cache of transformers."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedConfig

from .draws import Draws
from .packed_batch import PackedBatch
from .packed_forward import PackedForward
from .row_plan import need
from .row_store import SPARE, RowStore
from .upstream import (
    FULL_ATTENTION,
    SLIDING_ATTENTION,
    CachePool,
    FutureRequestState,
    PagedAttentionCache,
    RequestState,
    SlidingAttentionCacheAllocator,
    find_num_key_value_heads,
    group_layers_by_attn_type,
)


ANY_LENGTH = 1 << 62


class RowAllocator(SimpleNamespace):
    """What the inputs of a batch ask about layers of full attention. The rows need no index of slots."""

    layer_type = FULL_ATTENTION
    supports_block_table = True
    use_block_sharing = False
    write_trash_index = read_trash_index = 0

    def get_seqlen_k(self, past_length: int, query_length: int) -> int:
        """Keys that a mask would have to cover: those of the new tokens."""
        return query_length


class RowCache(PagedAttentionCache):
    """The KV cache of continuous batching: layers of full attention are rows of pages, windows stay as they are.

    Args:
        store: the rows of the layers with full attention.
        config: config of the model's decoder.
        rows: largest number of requests at once.
        max_batch_tokens: largest number of tokens of one forward.
        has_block_table: whether a batch of decode tokens brings its rows as a tensor, for a CUDA graph.
        dtype: dtype of keys and values.
        draws: learns which requests get a new token.
    """

    def __init__(
        self,
        store: RowStore,
        config: PreTrainedConfig,
        rows: int,
        max_batch_tokens: int,
        has_block_table: bool,
        dtype: torch.dtype,
        draws: Draws,
    ):
        self.store, self.config, self.dtype, self.device = store, config, dtype, store.device
        self.draws, self._first_layer = draws, min(store.layers)
        self.max_batch_tokens, self.max_requests = max_batch_tokens, rows
        self.batch = PackedBatch(None, ())
        self.new_tokens = 0  # generated so far, by all requests
        self.max_blocks_per_request = 1 if has_block_table else 0
        self.max_decode_fast_path_length = ANY_LENGTH if has_block_table else 0
        self.use_prefix_sharing = self.allow_block_sharing = False  # `RowStore.admit` shares prefixes
        self.cache_allocators: dict[str, Any] = {}
        self.layer_to_allocator: dict[int, Any] = {}
        self.pool = CachePool(0, 2)
        self.num_blocks, self.bytes_per_sector = rows, 1
        # Rows need no index of slots. The scheduler ends a batch when no such index is left, so one is.
        self.read_cache_limit, self.max_tokens_read = 0, 1
        for index, (kind, layers) in enumerate(group_layers_by_attn_type(config).items()):
            if kind == FULL_ATTENTION:
                allocator: Any = RowAllocator(index=index, tokens_per_page=store.page_size, num_blocks=0)
            else:
                allocator = self._windows(index, layers, rows)
            self.cache_allocators[kind] = allocator
            self.layer_to_allocator |= dict.fromkeys(layers, allocator)

    def _windows(self, index: int, layers: list[int], rows: int) -> SlidingAttentionCacheAllocator:
        """The layers with sliding windows: transformers' own allocator, with memory for the windows of all rows."""
        allocator = SlidingAttentionCacheAllocator(
            index=index,
            config=self.config,
            num_key_value_heads=find_num_key_value_heads(self.config),
            cache_dtype=self.dtype,
            page_size=self.store.page_size,
            layer_indices=layers,
            allow_block_sharing=False,
        )
        sector = math.lcm(allocator.bytes_per_block, 128)
        windows = rows * math.ceil(allocator.sliding_window / allocator.tokens_per_page) * allocator.bytes_per_block
        self.pool = CachePool(math.ceil(windows / sector), 2)
        nbytes = self.pool.num_sectors * sector
        self.window_bytes = torch.zeros(nbytes + 2 * sector, dtype=torch.uint8, device=self.device)
        allocator.register_cache_tensor(sector, nbytes, self.window_bytes, self.pool)
        self.read_cache_limit = allocator.sliding_window
        self.max_tokens_read = rows * allocator.sliding_window
        return allocator

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, which are allocated once."""
        window_bytes = getattr(self, "window_bytes", None)
        return self.store.nbytes + (0 if window_bytes is None else window_bytes.nbytes)

    # Admission.

    def admit(self, state: RequestState) -> bool:
        """Give a waiting request a row and all its pages, if they are free.

        The beginning of its prompt that another row holds already is not read again.
        """
        needed = need(self.store.tables, len(state.initial_tokens), state.max_new_tokens)
        shared = self.store.admit(state.request_id, state.initial_tokens, needed)
        if shared is None:
            return False
        state.remaining_prefill_tokens = state.remaining_prefill_tokens[shared:]
        state.position_offset += shared
        return True

    def can_store_request_tokens(self, state: RequestState, request_len: int, dry_run: bool = False) -> bool:
        """Whether a request has its row. The row has all its pages then."""
        if state.request_id not in self.store.rows:
            return False
        windows = self.cache_allocators.get(SLIDING_ATTENTION)
        if windows is not None and not dry_run:
            for _ in range(windows.needs_new_sectors(state.request_id, state.current_len(), request_len)):
                self.pool.allocate_sector(windows.index)
            windows.allocate_cache_to_request(state.request_id, state.current_len(), request_len)
        return True

    def free_blocks(self, request_id: str, no_cache: bool = False) -> None:
        """Take the row of a request back."""
        self.store.release(request_id)
        self.draws.seeds.pop(request_id, None)
        if SLIDING_ATTENTION in self.cache_allocators:
            self.cache_allocators[SLIDING_ATTENTION].free_blocks(request_id, no_cache=True)

    def free_all_requests(self, clear_ledgers: bool = False) -> None:
        """Take all rows back."""
        for request_id in list(self.store.rows):
            self.free_blocks(request_id)

    def reset(self) -> None:
        """Take all rows back."""
        self.free_all_requests()

    def compute_free_capacity(self, relative: bool = True) -> int | float:
        """Share of the rows that are free, or their number."""
        free = self.store.free_rows
        return free / self.max_requests if relative else free

    def prepare_fork_request(self, src_state: RequestState, dst_req_ids: list[str], copy_src_and_dst: Any) -> list[str]:
        """No request is forked: each of several samples is a request of its own, which shares the prompt's pages."""
        return []

    # A batch.

    def set_batch(self, scheduled: list[FutureRequestState]) -> None:
        """Note which rows the next forward touches."""
        decoding: list[int] = []
        prompts: list[tuple[int, int, bool]] = []
        drawing = []
        for future in scheduled:
            state = future.state
            row, past = self.store.rows[state.request_id], state.position_offset
            if past >= len(state.initial_tokens):
                assert not prompts and future.query_length == 1, "the scheduler puts decode tokens first"
                decoding.append(row)
            else:
                read = past + future.query_length
                prompts.append((row, future.query_length, read == len(state.initial_tokens)))
                self.store.stored(state.request_id, read)
            if future.has_new_token:
                drawing.append((state.request_id, past + future.query_length))
        self.draws.set(drawing)
        self.new_tokens += len(drawing)
        self.batch = PackedBatch.of(decoding, prompts, self.store.device)

    def extend_read_and_write_indices(
        self,
        request_id: str,
        past_length: int,
        query_length: int,
        read_index: list[list[int]] | None,
        write_index: list[list[int]],
    ) -> None:
        """The slots that windows read and write. Rows have none."""
        windows = self.cache_allocators.get(SLIDING_ATTENTION)
        if windows is None:
            return
        write_index[windows.index] += windows.get_write_indices(request_id, past_length, query_length)
        if read_index is not None:
            read_index[windows.index] += windows.get_read_indices(request_id, past_length, query_length)

    def fill_block_table(self, request_id: str, past_length: int, query_length: int, block_table: torch.Tensor) -> None:
        """Write the row of a request to `block_table` `[1, 1]`."""
        block_table.fill_(self.store.rows[request_id])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Receive the new tokens of a layer; a window stores them now, a paged layer in its attention call.

        Args:
            key_states, value_states: `[1, kv_heads, tokens, head_dim]`; RoPE applied to the keys.
            layer_idx: index of the layer in the model.
            kwargs: the arguments of the attention call. For a window they are changed in place.
        """
        layer = self.store.layers.get(layer_idx)
        if layer is None:
            updated: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, layer_idx, kwargs)
            return updated
        block_table = kwargs.get("block_table")
        if block_table is not None and layer_idx == self._first_layer:
            rows = block_table[0, :, 0].long()  # [tokens], -1 for padding
            self.batch = PackedBatch.decoding(torch.where(rows < 0, SPARE, rows))
        forward = PackedForward(layer, key_states, value_states, self.batch)
        key_states.paged_forward = value_states.paged_forward = forward  # type: ignore[attr-defined]
        return key_states, value_states

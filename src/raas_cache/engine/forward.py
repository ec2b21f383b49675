"""The kinds of forwards: each keeps the keys and values that `update` received until its attention call.

`begin` tags key and value with a `Prefill`, `Decode`, `Draft` or `Latent`. The attention function calls its `attend`,
which stores the tokens and reads the pages. If the attention function is never called, the layer does not change; only
a `Latent` stores its tokens at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import raas_kernels

from .attention_inputs import Expanded, Seen, Softmax
from .layer_engine import LayerEngine
from .prefill import write_prefill
from .prefill_eviction import enter_competition, keep_best
from .resize import uncompiled
from .rollback import DecodeNote, PrefillNote
from .step import rank, step


if TYPE_CHECKING:
    from .prefill import Places

INTERRUPTED = (
    "The last forward with this cache was interrupted: an exception or Ctrl-C stopped it after some layers had stored "
    "its tokens. Call cache.reset() and pass the whole sequence again."
)
NOT_CAUSAL = (
    "attention_mask is not causal among the new tokens, but tokens that may be taken back need a causal mask: do not "
    "pass assistant_model or prompt_lookup_num_tokens, or call cache.deactivate_past_recording() first."
)


class Forward:
    """Tokens of one forward of one layer.

    Attributes:
        is_first: whether the rows hold no earlier token. The model's own causal attention over the new tokens is then
            exact, and computes the output.
        new: number of tokens of the forward.
        awaits_attention: whether the attention function has not been called yet.
        is_at_work: whether tokens are being stored and read. An exception leaves it True.
    """

    is_first = False

    def __init__(self, layer: LayerEngine, key: torch.Tensor, value: torch.Tensor):
        self.layer, self.key, self.value, self.new = layer, key, value, key.shape[2]
        self.awaits_attention, self.is_at_work = True, False

    def attend(
        self, query: torch.Tensor, softmax: Softmax, seen: Seen | None = None, expanded: Expanded | None = None
    ) -> torch.Tensor | None:
        """Store the tokens, compute their attention over all stored tokens, and rank the pages.

        A layer that shares the KV of this layer may read a second time. The tokens are then stored already.

        Args:
            query: `[rows, heads, queries, head_dim]`, the queries of the new tokens. A second read may bring the query
                of the last token only.
            seen: what the attention mask says of the new tokens; None if it hides nothing.
            expanded: for a latent, the keys and values that the model expanded from the tensors that `update` returned.

        Returns:
            `[rows, heads, queries, value_dim]`; None after a first forward, whose output the model itself computes.

        Raises:
            ValueError: a draft is read a second time, or its tokens are not causal among themselves.
        """
        is_new, self.awaits_attention = self.awaits_attention, False
        self.is_at_work = True
        if is_new:
            self.store(seen or {})
        output = self.read(query, softmax, expanded)
        self.is_at_work = False
        self.layer.pending = None
        return output

    @property
    def seen_before(self) -> int:
        """Number of tokens before this forward, in the row that has seen the most."""
        return self.layer.table.length_of(self.layer.rows)

    def store(self, seen: Seen) -> None:
        """Store the tokens."""
        raise NotImplementedError

    def read(self, query: torch.Tensor, softmax: Softmax, expanded: Expanded | None) -> torch.Tensor | None:
        """Attention over the stored tokens; the policy sees the scores."""
        raise NotImplementedError

    def hide(self, seen: Seen) -> None:
        """Hide tokens that are stored already: the mask of a latent comes after its tokens."""
        raise NotImplementedError

    def _note(self, note: type[DecodeNote] | type[PrefillNote]) -> None:
        """Add a rollback note of what the new tokens will overwrite, if the past is recorded."""
        layer = self.layer
        layer.expects_turn = False
        if layer.records_past and layer.table.length:
            layer.rollback.note(note.before(layer.table, self.new))
        elif layer.rollback.notes:
            layer.rollback.notes.clear()  # forwards without a note make older notes useless


class Decode(Forward):
    """One decode token per row. One object serves all decode steps of a layer, so that a compiled step can keep it."""

    def __init__(self, layer: LayerEngine):
        self.layer, self.new = layer, 1
        self.key = self.value = None  # type: ignore[assignment]
        self.awaits_attention = self.is_at_work = False

    def attend(
        self, query: torch.Tensor, softmax: Softmax, seen: Seen | None = None, expanded: Expanded | None = None
    ) -> torch.Tensor:
        """As `Forward.attend`, in one function, because every Python call costs time in an eager step."""
        layer, new = self.layer, None
        self.is_at_work = True
        if self.awaits_attention:
            self.awaits_attention = False
            if layer.records_past or layer.expects_turn or layer.rollback.notes:
                self._note(DecodeNote)
            visible = None if seen is None else seen.get("visible")
            new = self.key, self.value, None if visible is None else visible[:, 0].expand(len(self.key))
            self.key = self.value = None  # type: ignore[assignment]
            table = layer.table
            if not torch.compiler.is_compiling() and table.quiet_steps and layer.rows is None:
                table.quiet_steps -= 1
                table.tokens += 1
            else:
                table.before_decode(layer.rows)
        output = step(layer, query, softmax, new, expanded)
        self.is_at_work = False
        layer.pending = None
        return output

    def store(self, seen: Seen) -> None:
        layer = self.layer
        self._note(DecodeNote)
        layer.table.before_decode(layer.rows)
        visible = seen.get("visible")
        shown = None if visible is None else visible[:, 0].expand(len(self.key))
        raas_kernels.append(layer.kv, self.key, self.value, shown, layer.row_index, layer.closes_pages)
        self.key = self.value = None  # type: ignore[assignment]

    def read(self, query: torch.Tensor, softmax: Softmax, expanded: Expanded | None) -> torch.Tensor:
        return step(self.layer, query, softmax, None, expanded)

    def hide(self, seen: Seen) -> None:
        visible = seen.get("visible")
        if visible is not None:
            self.layer.table.hide_decoded(visible[:, 0], self.layer.rows)


class Prefill(Forward):
    """Prefill tokens: a prompt, a chunk of a prompt, or a user's turn."""

    def __init__(self, layer: LayerEngine, key: torch.Tensor, value: torch.Tensor, is_first: bool):
        super().__init__(layer, key, value)
        self.is_first = is_first
        self.among: torch.Tensor | None = None
        self.places: Places | None = None
        self.competes = False  # whether its pages must still be reduced to the budget (prompt="evict")

    @uncompiled
    def store(self, seen: Seen) -> None:
        layer, self.among = self.layer, seen.get("among")
        if self.among is not None and layer.records_past:
            raise ValueError(NOT_CAUSAL)
        self._note(PrefillNote)
        visible, leading, count = seen.get("visible"), seen.get("leading"), len(self.key)
        if visible is not None and len(visible) != count:  # one mask for all rows
            visible, leading = visible.expand(count, -1), leading and leading * count
        self.places = write_prefill(layer.table, self.key, self.value, visible, leading, layer.rows)
        self.competes, layer.admits = layer.settings.prompt == "evict", False
        self.key = self.value = None  # type: ignore[assignment]

    @uncompiled
    def read(self, query: torch.Tensor, softmax: Softmax, expanded: Expanded | None) -> torch.Tensor | None:
        layer = self.layer
        if self.is_first:
            if self.competes:
                self._compete(query, softmax, expanded)
            return None
        if layer.rollback.notes:
            layer.rollback.note_read(query, softmax)
        window = layer.policy.prompt_window if self.competes else None
        output, scores = layer.attend_prefill(query, softmax, expanded, self.among, window)
        queries = query.shape[2] if window is None else min(window, query.shape[2])
        self._rank(scores, queries)
        return output

    def _compete(self, query: torch.Tensor, softmax: Softmax, expanded: Expanded | None) -> None:
        """After a first forward: score the pages with the last queries, then reduce them to the budget."""
        layer, window = self.layer, self.layer.policy.prompt_window
        observed = self.new if window is None else min(window, self.new)
        scores = None
        if observed:
            if expanded is not None:
                expanded = self._by_slot(expanded[0]), self._by_slot(expanded[1])
            _, scores = layer.attend_prefill(query[:, :, -observed:], softmax, expanded, self.among)
        self._rank(scores, observed)

    def _by_slot(self, states: torch.Tensor) -> torch.Tensor:
        """Move states of the new tokens `[rows, heads, new, head_dim]` to slots, `[rows, heads, slots, head_dim]`."""
        assert self.places is not None
        slots = self.layer.kv.keys.shape[2]
        dropped = torch.from_numpy(self.places.dropped).to(states.device)
        token = (torch.arange(slots, device=states.device) + dropped[:, None]).clamp(max=self.new - 1)
        return torch.take_along_dim(states, token[:, None, :, None], 2)

    def _rank(self, scores: torch.Tensor | None, queries: int) -> None:
        layer = self.layer
        if self.competes:
            self.evict(scores, queries)
        elif layer.table.is_decoding and scores is not None:
            rank(layer, scores, queries)
            if layer.tracer is not None:
                layer.tracer.note(layer.table, scores, is_prefill=True)

    def evict(self, scores: torch.Tensor | None, queries: int) -> None:
        """With `prompt="evict"`: make the pages of this prefill evictable, and evict pages down to the budget.

        Args:
            scores: `[rows, kv_heads, pages]`, or None if the policy uses no query of a prompt.
            queries: number of queries that the scores come from.
        """
        layer, places, self.competes = self.layer, self.places, False
        assert places is not None
        if layer.tracer is not None:
            layer.tracer.note(layer.table, scores, is_prefill=True)
        enter_competition(layer.table, places, layer.rows)
        if scores is not None and queries:
            rank(layer, scores, queries)
        keep_best(layer.table, places, layer.rows)

    @uncompiled
    def hide(self, seen: Seen) -> None:
        self.among = seen.get("among")
        visible = seen.get("visible")
        if visible is not None:
            self.layer.table.hide_newest(visible, self.layer.rows)


class Draft(Forward):
    """Drafted tokens, decoded one by one, so that accepted tokens are stored as in plain decoding."""

    def store(self, seen: Seen) -> None:
        if seen.get("among") is not None:
            raise ValueError(NOT_CAUSAL)
        self.visible = seen.get("visible")
        self.is_decoded = False

    hide = store

    @uncompiled
    def read(self, query: torch.Tensor, softmax: Softmax, expanded: Expanded | None) -> torch.Tensor:
        if self.is_decoded:
            raise ValueError(
                "This model shares the KV of a layer with another layer. RaaSCache supports this for one token per "
                "forward, but not for drafts: do not pass assistant_model or prompt_lookup_num_tokens."
            )
        self.is_decoded = True
        layer, table, outputs = self.layer, self.layer.table, []
        drafted: list[torch.Tensor] = []
        if expanded is not None:  # [rows, heads, slots + new, head_dim]: the slots, then the draft
            slots = layer.kv.keys.shape[2]
            drafted = [states[:, :, slots:] for states in expanded]
            expanded = expanded[0][:, :, :slots].clone(), expanded[1][:, :, :slots].clone()
        decode = Decode(layer)
        for i in range(self.new):
            decode.key, decode.value = self.key[:, :, i : i + 1], self.value[:, :, i : i + 1]
            decode.store({"visible": None if self.visible is None else self.visible[:, i : i + 1]})
            if expanded is not None:
                slot = layer.kv.open_slot + layer.kv.clock[..., 1] % table.page_size
                for whole, new in zip(expanded, drafted, strict=True):
                    whole.scatter_(2, slot[:, :, None, None].expand_as(new[:, :, i : i + 1]), new[:, :, i : i + 1])
            outputs.append(decode.read(query[:, :, i : i + 1], softmax, expanded))
        return torch.cat(outputs, 2)


class Latent(Forward):
    """A forward of a model that caches a latent (MLA), and expands it to keys and values after `update`.

    The model expands the new tokens together with the stored tokens, so the new tokens are stored in `update` already.
    In a first forward there are no stored tokens, so it is a plain `Prefill`.
    """

    def __init__(self, forward: Forward):
        super().__init__(forward.layer, forward.key, forward.value)
        self.layer.pending = self
        self.forward, self.is_at_work = forward, True
        forward.awaits_attention = False
        forward.store({})
        keys, values = self.layer.table.states()
        rows = self.layer.row_index
        if rows is not None:
            keys, values = keys[rows], values[rows]
        if isinstance(forward, Draft):
            keys, values = torch.cat([keys, self.key], 2), torch.cat([values, self.value], 2)
        self.returned = keys, values  # the model expands them, [rows, kv_heads, slots, head_dim]

    @property
    def seen_before(self) -> int:
        return super().seen_before - (0 if isinstance(self.forward, Draft) else self.new)

    def store(self, seen: Seen) -> None:
        self.forward.hide(seen)

    def read(self, query: torch.Tensor, softmax: Softmax, expanded: Expanded | None) -> torch.Tensor | None:
        return self.forward.read(query, softmax, expanded)


def begin(decode: Decode, key: torch.Tensor, value: torch.Tensor) -> tuple[Forward, torch.Tensor, torch.Tensor]:
    """Receive the new tokens of a layer, and decide which kind of forward they are.

    The first forward is prefill. Later, one token is a decode token, unless `reads_prefill` is set; several tokens are
    prefill. While the past is recorded, several tokens are a draft, except in the first forward after
    `activate_past_recording`, which is a user's turn. (For a latent, this forward is a draft too, because a crop could
    not compute its timestamps again.)

    Args:
        decode: the layer's forward for decode tokens.
        key, value: `[rows, kv_heads, new, head_dim]`; RoPE applied to the keys.

    Returns:
        The forward, and the key and value to return from `update`. These are the arguments, with the forward as
        attribute `paged_forward`. For a latent they are the buffers `[rows, kv_heads, slots, head_dim]`, followed by
        the draft if there is one.

    Raises:
        RuntimeError: an exception stopped this layer while it stored tokens.
        ValueError: rows, heads, head sizes, dtypes or device differ from the stored tokens.
    """
    layer = decode.layer
    table = layer.table
    if table.kv is None:
        table.allocate(key, value, layer.batch_size or key.shape[0])
    rows, heads, _, head_dim = key.shape
    given = rows, heads, head_dim, value.shape[-1], key.dtype, value.dtype, key.device
    if layer.rows is not None or given != table.signature:
        table.check_same_use(key, value, layer.rows)
    if layer.pending is not None and layer.pending.is_at_work:
        raise RuntimeError(INTERRUPTED)
    taken = (key.detach(), value.detach()) if key.requires_grad or value.requires_grad else (key, value)
    forward: Forward
    is_first = layer.admits or table.is_empty
    if key.shape[2] == 1 and not is_first and not layer.reads_prefill:
        forward = decode
        decode.key, decode.value = taken
        decode.awaits_attention = True
    else:
        is_turn = (layer.expects_turn and not layer.is_latent) or layer.reads_prefill
        if layer.records_past and not is_first and not is_turn:
            forward = Draft(layer, *taken)
        else:
            forward = Prefill(layer, *taken, is_first)
    if layer.is_latent and not is_first:
        latent = Latent(forward)
        return latent, *latent.returned
    layer.pending = forward
    key.paged_forward = value.paged_forward = forward  # type: ignore[attr-defined]
    return forward, key, value

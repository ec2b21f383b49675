"""The kinds of forwards: each keeps the keys and values that `update` received until its attention call.

`Decode.begin` tags key and value with a `Prefill`, `Decode`, `Draft` or `Latent`. The attention function calls its
`attend`, which stores the tokens and reads the pages. If the attention function is never called, the layer does not
change; only a `Latent` stores its tokens at once. `ForwardGuard` compares the layers of a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

import raas_kernels

from .attention_inputs import Expanded, Seen, Softmax
from .forward_base import INTERRUPTED, Forward, StoringForward
from .hide import hide_decoded
from .layer_engine import LayerEngine
from .prefill_forward import Prefill
from .resize import uncompiled
from .rollback import DecodeNote
from .step import step


class Decode(StoringForward):
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
            # As `is_capturing`, written out because of the cost of a call.
            is_traced = torch.compiler.is_compiling() or (
                torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
            )
            if not is_traced and table.quiet_steps and layer.rows is None:
                table.quiet_steps -= 1
                table.tokens += 1
            else:
                table.before_decode(layer.rows)
        output = step(layer, query, softmax, new, expanded)
        self.is_at_work = False
        layer.pending = None
        return output

    def begin(self, key: torch.Tensor, value: torch.Tensor) -> tuple[Forward, torch.Tensor, torch.Tensor]:
        """Receive the new tokens of a layer, and decide which kind of forward they are.

        The first forward is prefill. Later, one token is a decode token, unless `reads_prefill` is set; several tokens
        are prefill. While the past is recorded, several tokens are a draft, except in the first forward after
        `activate_past_recording`, which is a user's turn. (For a latent, this forward is a draft too, because a crop
        could not compute its timestamps again.)

        Args:
            key, value: `[rows, kv_heads, new, head_dim]`; RoPE applied to the keys.

        Returns:
            The forward, and the key and value to return from `update`. These are the arguments, with the forward as
            attribute `paged_forward`. For a latent they are the buffers `[rows, kv_heads, slots, head_dim]`, followed
            by the draft if there is one.

        Raises:
            RuntimeError: an exception stopped this layer while it stored tokens.
            ValueError: rows, heads, head sizes, dtypes or device differ from the stored tokens.
        """
        layer = self.layer
        table = layer.table
        if table.kv is None:
            table.allocate(key, value, layer.batch_size or key.shape[0])
        rows, heads, _, head_dim = key.shape
        given = rows, heads, head_dim, value.shape[-1], key.dtype, value.dtype, key.device
        if layer.rows is not None or given != table.signature:
            table.check_same_use(key, value, layer.rows)
        if layer.pending is not None and layer.pending.is_at_work:
            raise RuntimeError(INTERRUPTED)
        # Without gradients, and without the attribute: a forward that held its own tag would be a reference cycle.
        taken = key.detach(), value.detach()
        forward: StoringForward
        is_first = layer.admits or table.is_empty
        if key.shape[2] == 1 and not is_first and not layer.reads_prefill:
            forward = self
            self.key, self.value = taken
            self.awaits_attention = True
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
            hide_decoded(self.layer.table, visible[:, 0], self.layer.rows)


class Draft(StoringForward):
    """Drafted tokens, decoded one by one, so that accepted tokens are stored as in plain decoding."""

    def store(self, seen: Seen) -> None:
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


class Latent(StoringForward):
    """A forward of a model that caches a latent (MLA), and expands it to keys and values after `update`.

    The model expands the new tokens together with the stored tokens, so the new tokens are stored in `update` already.
    In a first forward there are no stored tokens, so it is a plain `Prefill`.
    """

    def __init__(self, forward: StoringForward):
        super().__init__(forward.layer, forward.key, forward.value)
        self.layer.pending = self
        self.forward, self.is_at_work = forward, True
        forward.awaits_attention = False
        visible, self.layer.announced = self.layer.announced, None
        is_known = visible is not None and tuple(visible.shape) == (len(forward.key), forward.new)
        forward.store({"visible": visible} if visible is not None and is_known else {})
        keys, values = forward.states()
        if isinstance(forward, Draft):
            keys, values = torch.cat([keys, self.key], 2), torch.cat([values, self.value], 2)
        self.returned = keys, values  # the model expands them, [rows, kv_heads, slots, head_dim]

    @property
    def seen_before(self) -> int:
        return super().seen_before - (0 if isinstance(self.forward, Draft) else self.new)

    def store(self, seen: Seen) -> None:
        self.forward.hide(seen)

    hide = store

    def read(self, query: torch.Tensor, softmax: Softmax, expanded: Expanded | None) -> torch.Tensor | None:
        return self.forward.read(query, softmax, expanded)


class ForwardGuard:
    """Follows the forwards of a model from layer to layer, and notices that one did not reach all layers.

    Attributes:
        engine: the layer that received tokens last; None before the first forward.
        layer_idx: the index of this layer; -1 before the first forward.
    """

    def __init__(self) -> None:
        self.engine: LayerEngine | None = None
        self.layer_idx, self._tokens_before = -1, 0
        self._is_torn = False  # whether only some of the layers have had their rows changed

    def check(self) -> None:
        """Raise a RuntimeError if an exception stopped a change of rows after some of the layers."""
        if self._is_torn:
            raise RuntimeError(INTERRUPTED)

    def is_unread(self) -> bool:
        """Whether no attention function has read the tokens that a layer received last.

        Raises:
            RuntimeError: as `check`; or an exception stopped the attention of a layer, and layers before it may have
                stored the tokens. If it stopped the first layer before this layer stored them, nothing has changed.
        """
        pending = None if self.engine is None else self.engine.pending
        is_stopped = pending is not None and not pending.awaits_attention and self.layer_idx > 0
        if self._is_torn or is_stopped:
            raise RuntimeError(INTERRUPTED)
        return pending is not None and pending.awaits_attention

    def begins(self, engine: LayerEngine, layer_idx: int) -> None:
        """Note that the layer `layer_idx` receives tokens.

        Raises:
            RuntimeError: an exception stopped the last forward, so that only some layers have its tokens.
        """
        if not torch.compiler.is_compiling():
            if layer_idx <= self.layer_idx or self.layer_idx < 0:  # a forward of the model begins
                self._tokens_before = engine.table.tokens
            elif engine.table.tokens != self._tokens_before:
                raise RuntimeError(INTERRUPTED)
            self.layer_idx = layer_idx
        self.engine = engine

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Mark the cache as unusable if an exception stops the block, because only some layers may have changed."""
        self.check()
        self._is_torn = True
        yield
        self._is_torn = False

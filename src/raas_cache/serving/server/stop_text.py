"""Stop strings: end a text before the first of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any


class StopText:
    """Receives the pieces of a text, and passes them on to a queue up to the first stop string.

    A piece that may be the beginning of a stop string is held back until the next one. Pieces of one type belong
    together: transformers marks the reasoning of a model with a subclass of str.

    Args:
        stop: the stop strings.
        queue: receives the pieces, and None at the end.
        on_stop: called when a stop string was found.
    """

    def __init__(self, stop: Sequence[str], queue: asyncio.Queue[Any], on_stop: Callable[[], None]):
        self.stop, self.queue, self.on_stop = stop, queue, on_stop
        self.is_found = False
        self._held: Any = ""

    def put_nowait(self, item: Any) -> None:
        """Receive the next piece; or an item that is no text, before which the text held back is passed on."""
        if self.is_found:
            return
        if not isinstance(item, str):
            self._pass_on(len(self._held))
            self.queue.put_nowait(item)
            return
        if type(item) is not type(self._held):
            self._pass_on(len(self._held))
        kind = type(item)
        self._held = kind(self._held + item)
        found = [place for place in map(self._held.find, self.stop) if place >= 0]
        if found:
            self._pass_on(min(found))
            self.is_found = True
            self.queue.put_nowait(None)
            self.on_stop()
        else:
            self._pass_on(len(self._held) - self._beginning())

    def _beginning(self) -> int:
        """Length of the longest end of the held text that is the beginning of a stop string."""
        longest = max(map(len, self.stop)) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(text.startswith(self._held[-length:]) for text in self.stop):
                return length
        return 0

    def _pass_on(self, length: int) -> None:
        kind, text = type(self._held), str(self._held)
        if length:
            self.queue.put_nowait(kind(text[:length]))
        self._held = kind(text[length:])

"""Recordings written by hand, a tokenizer for them, and reading what HTML shows."""

from html.parser import HTMLParser

import numpy as np

from raas_cache import Recording
from raas_cache.tracing.layer_trace import LayerTrace, TraceEntry
from raas_cache.tracing.recording import pages_in_order


PLACE = {"layer": 1, "head": 0}


def recording_of(pages, scores=None, start=3, page_size=2, method="RaaSPolicy()", pinned=2):
    """A recording made by hand: what is held at each step from `start` on, by the pages' first tokens.

    `scores` has those that are not 0, by step and page; the first `pinned` pages are pinned.
    """
    entries = []
    for step, held in enumerate(pages, start):
        score = [(scores or {}).get((step, page), 0) for page in held]
        stamp = [np.nan] * pinned + [step] * (len(held) - pinned)
        arrays = (np.array([[of]], kind) for of, kind in ((held, "i4"), (score, "f4"), (stamp, "f4")))
        entries.append(TraceEntry(step, held[-1], *arrays, np.array([[len(held) * page_size]])))
    begin = pages_in_order(np.array([pages[0]]), 0, start + 1, page_size)
    return Recording(method, 8, page_size, "pin", {1: LayerTrace((0,), entries, begin[None])})


# A prompt of 3 tokens and 8 generated ones in pages of 2: page 5 is evicted at step 7, page 3 at step 9.
HELD = [[0, 2, 3]] * 2 + [[0, 2, 3, 5]] * 2 + [[0, 2, 3, 7]] * 2 + [[0, 2, 7, 9]] * 2
SCORES = {(3, 3): 0.5, (4, 3): 0.75, (8, 3): 0.25, (5, 5): 0.125, (7, 7): 1, (10, 0): 0.5}
MASS = {(6, 5): 0.5, (7, 5): 0.25, (8, 3): 0.5, (9, 5): 0.125, (9, 3): 0.5, (10, 5): 0.0625, (10, 9): 0.5}


class Pieces(HTMLParser):
    """`(tag, title, text)` of all that has a title; checks that tags are closed, and that all they need is in them."""

    def __init__(self, source):
        super().__init__()
        self.found, self.open = [], []
        self.feed(source)
        assert not self.open and not {"script", "style", "link", "img"} & {tag for tag, _, _ in self.found}
        assert "http" not in source and "var(" not in source and source.isascii()

    def handle_starttag(self, tag, attrs):
        self.open.append((tag, dict(attrs).get("title")))
        if self.open[-1][1]:
            self.found.append((*self.open[-1], ""))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][1]:
            tag, title, text = self.found[-1]
            self.found[-1] = tag, title, text + data


class Words:
    """A tokenizer whose tokens are words of their own, some of them HTML."""

    pad_token_id = 99

    def decode(self, ids, **options):
        return " ".join(f"<b>&{token}\n" for token in ids)

"""Brute-force simulation of RaaS: full cache, boolean residency, Python loops, float64.

Written from the algorithm's text, sharing no code with the package: it runs as a `DynamicCache` that keeps everything,
with an attention function that looks only at what would be resident.
"""

import copy
import math

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask


class Page:
    def __init__(self, tokens, pinned):
        self.tokens = tokens
        self.pinned = pinned
        self.timestamp = -1


class Head:
    """What one (layer, row, KV head) holds."""

    def __init__(self):
        self.pages = []
        self.evicted = 0


class OracleCache(DynamicCache):
    def __init__(
        self,
        budget,
        page_size=16,
        alpha=1e-4,
        top_ratio=None,
        scoring="exact",
        granularity="head",
        min_decode_pages=8,
        window=False,
        config=None,
    ):
        super().__init__(config=config)
        self.budget, self.page_size, self.min_decode_pages = budget, page_size, min_decode_pages
        self.alpha, self.top_ratio, self.scoring, self.granularity = alpha, top_ratio, scoring, granularity
        self.window = window  # evict the oldest page, whatever its stamp: prompt + sliding window
        # One token after the first forward is a generated one, several are input: unless this says "draft" or "input".
        self.treat_as = None
        self.heads = {}
        self.padding = {}
        self.placed = {}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if not self.layers[layer_idx].is_sliding:
            # A latent cannot carry the attribute: the next attention call is this one's.
            OracleCache.latest = keys.oracle = (self, layer_idx, key_states.shape[2])
        return keys, values

    def rows(self, indices):
        """Row i becomes a copy of row `indices[i]`, in the page tables and in the K and V of the `DynamicCache`."""
        for name in ("heads", "padding"):
            old = getattr(self, name)
            where = {(key[0], new, *key[2:]): key for key in old for new, row in enumerate(indices) if key[1] == row}
            setattr(self, name, {new: copy.deepcopy(old[key]) for new, key in where.items()})
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[indices], layer.values[indices]

    def reorder_cache(self, beam_idx):
        self.rows(beam_idx.tolist())

    def resident_set(self, layer, row, head):
        pages = self.heads[layer, row, head].pages
        return {token for page in pages for token in page.tokens if token not in self.padding[layer, row]}

    def evicted(self, layer, row, head):
        return self.heads[layer, row, head].evicted

    def append(self, state, token):
        """One new token: open a page if need be, evicting first if all D are held."""
        decode = [page for page in state.pages if not page.pinned]
        pinned_pages = len(state.pages) - len(decode)
        if not decode:
            state.limit = max(self.budget // self.page_size - pinned_pages, self.min_decode_pages)
        open_pages = [page for page in decode if len(page.tokens) < self.page_size]
        assert len(open_pages) <= 1
        if open_pages:
            page = open_pages[0]
        else:
            if len(decode) == state.limit:
                age = (lambda p: p.tokens[0]) if self.window else (lambda p: (p.timestamp, p.tokens[0]))
                state.pages.remove(min(decode, key=age))
                state.evicted += 1
            page = Page([], pinned=False)
            state.pages.append(page)
        page.tokens.append(token)
        page.timestamp = token

    def pin(self, state, tokens):
        """Input tokens: pinned pages, filled one after the other."""
        for token in tokens:
            pinned = [page for page in state.pages if page.pinned]
            if not pinned or len(pinned[-1].tokens) == self.page_size:
                pinned.append(Page([], pinned=True))
                state.pages.append(pinned[-1])
            pinned[-1].tokens.append(token)

    def attend(self, layer, new, query, keys, values, mask, scale, latent=False, softcap=None, sinks=None):
        batch, query_heads, _, _ = query.shape
        kv_heads, total = 1 if latent else keys.shape[1], keys.shape[2]
        first = total - new
        # With KV sharing a second layer reads what is in its place already.
        is_new, self.placed[layer] = self.placed.get(layer) != total, total
        query, keys, values = (x.detach().double().cpu().numpy() for x in (query, keys, values))
        sinks = None if sinks is None else sinks.detach().double().cpu().numpy()
        output = np.zeros((batch, query_heads, query.shape[2], values.shape[-1]))
        skipped = new - query.shape[2]  # a second reader may come for the last token only
        steps = [[i] for i in range(new)] if self.treat_as == "draft" and first else [list(range(skipped, new))]
        for row in range(batch):
            padding = self.padding.setdefault((layer, row), set())
            if mask is not None:
                padding |= {first + i for i in range(new) if not mask[row, 0, -1, mask.shape[-1] - new + i]}
            for step in steps:
                scores = {}
                for head in range(kv_heads):
                    state = self.heads.setdefault((layer, row, head), Head())
                    if is_new and len(step) == 1 and first + step[0] > 0 and self.treat_as != "input":
                        self.append(state, first + step[0])
                    elif is_new:
                        self.pin(state, [first + i for i in step])
                    group = query_heads // kv_heads
                    for i in step:
                        for g in range(head * group, (head + 1) * group):
                            kv = (row, g * keys.shape[1] // query_heads)
                            self.attend_one(
                                state, padding, first + i, query[row, g, i - skipped], keys[kv], values[kv], scale,
                                softcap, None if sinks is None else sinks[g], output[row, g, i - skipped], i,
                                scores.setdefault(head, {}),
                            )  # fmt: skip
                if self.granularity == "layer":
                    self.share_scores(scores, kv_heads)
                if self.scoring == "minmax":
                    for head, raw in scores.items():
                        scores[head] = self.softmax_over_pages(raw)
                for head in range(kv_heads):
                    self.stamp(self.heads[layer, row, head], scores[head], first + step[-1])
        return torch.from_numpy(output)

    def attend_one(self, state, padding, position, query, keys, values, scale, softcap, sink, output, i, scores):
        """One query head's attention, added to the page's scores (numbered by page, for minmax also by query)."""
        cap = (lambda x: softcap * np.tanh(x / softcap)) if softcap else (lambda x: x)
        tokens = [t for page in state.pages for t in page.tokens if t <= position and t not in padding]
        if not tokens:
            return
        logits = cap(keys[tokens] @ query * scale)
        largest = max(logits.max(), -math.inf if sink is None else sink)
        weights = np.exp(logits - largest)
        weights /= weights.sum() + (0 if sink is None else np.exp(sink - largest))
        output[:] = weights @ values[tokens]
        weight_of = dict(zip(tokens, weights, strict=True))
        for number, page in enumerate(state.pages):
            resident = [t for t in page.tokens if t not in padding]
            if self.scoring == "exact":
                score = max((weight_of.get(t, 0.0) for t in resident), default=0.0)
                scores[number] = max(scores.get(number, 0.0), score)
            elif resident:
                low, high = keys[resident].min(0), keys[resident].max(0)
                bound = cap(np.maximum(query * low, query * high).sum() * scale)
                scores[number, i] = max(scores.get((number, i), -math.inf), bound)

    def share_scores(self, scores, kv_heads):
        for number in scores[0]:
            best = max(scores[head][number] for head in range(kv_heads))
            for head in range(kv_heads):
                scores[head][number] = best

    def softmax_over_pages(self, bounds):
        """Of each query's bounds; a page's score is its largest over the new queries."""
        scores = {}
        for i in {i for _, i in bounds}:
            mine = {number: bound for (number, j), bound in bounds.items() if j == i}
            largest = max(mine.values())
            total = sum(math.exp(bound - largest) for bound in mine.values())
            for number, bound in mine.items():
                scores[number] = max(scores.get(number, 0.0), math.exp(bound - largest) / total)
        return scores

    def stamp(self, state, scores, now):
        decode = [(scores.get(number, 0.0), page) for number, page in enumerate(state.pages) if not page.pinned]
        if self.top_ratio is None:
            milestones = [page for score, page in decode if score >= self.alpha]
        else:
            decode.sort(key=lambda pair: (-pair[0], pair[1].tokens[0]))
            milestones = [page for _, page in decode[: math.ceil(self.top_ratio * len(decode))]]
        for page in milestones:
            page.timestamp = now


def oracle_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
    latent = hasattr(module, "expand_kv")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    cache, layer, new = OracleCache.latest if latent else getattr(key, "oracle", (None, None, None))
    if cache is None:
        output = dense_attention(query, key, value, attention_mask, scale, softcap, s_aux)
    else:
        output = cache.attend(layer, new, query, key, value, attention_mask, scale, latent, softcap, s_aux)
    return output.to(query).transpose(1, 2).contiguous(), None


def dense_attention(query, key, value, mask, scale, softcap, sinks):
    """What layers that RaaS leaves alone compute."""
    new, held = query.shape[2], key.shape[2]
    key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
    logits = query @ key.mT * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is None:
        mask = torch.ones(new, held, dtype=torch.bool, device=query.device).tril(held - new)
    logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    if sinks is not None:
        logits = torch.cat([logits, sinks[:, None, None].expand(*logits.shape[:-1], 1)], -1)
    return logits.softmax(-1)[..., :held] @ value


AttentionInterface.register("oracle", oracle_attention)
AttentionMaskInterface.register("oracle", sdpa_mask)

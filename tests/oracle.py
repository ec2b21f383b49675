"""Brute-force simulation of every method: full cache, pages as lists of tokens, Python loops, float64.

Written from the algorithms' text, sharing no code with the package: it runs as a `DynamicCache` that keeps everything,
with an attention function that looks only at what would be resident, and of that only at what would be read.
"""

import copy
import itertools
import math
from statistics import fmean

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

from .oracle_codes import as_stored, codes_of
from .oracle_methods import METHODS, REDUCE, Head, Page, distance_scores, redundancies, softmax


class OracleCache(DynamicCache):
    def __init__(
        self,
        budget,
        page_size=16,
        alpha=0.2,
        top_ratio=None,
        scoring="exact",
        granularity=None,
        min_decode_pages=8,
        method="raas",
        prompt=None,
        kv_dtype=None,
        recent_ratio=0.5,
        dense_layers=2,
        importance_weight=None,
        decay=0.8,
        protected_ratio=0.1,
        recent_tokens=64,
        seed=0,
        config=None,
    ):
        super().__init__(config=config)
        self.method = METHODS[method]()
        self.is_quest = method == "quest"
        self.prompt, self.granularity = prompt or self.method.prompt, granularity or self.method.granularity
        self.budget, self.page_size, self.min_decode_pages = budget, page_size, min_decode_pages
        self.scoring, self.kv_dtype = scoring, kv_dtype
        self.alpha, self.top_ratio, self.recent_ratio = alpha, top_ratio, recent_ratio
        self.dense_layers, self.decay, self.protected_ratio = dense_layers, decay, protected_ratio
        default = {"rkv": 0.1, "gkv": 0.5}.get(method)
        self.importance_weight = default if importance_weight is None else importance_weight
        self.recent_tokens, self.seed = recent_tokens, seed
        # One token after the first forward is a generated one, several are input: unless this says "draft" or "input".
        self.treat_as = None
        self.heads = {}
        self.padding = {}
        self.placed = {}
        self.to_code = []  # pages that the newest tokens have filled or, as input, begun

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        is_sliding = layer_idx < len(self.layers) and self.layers[layer_idx].is_sliding
        given = key_states, value_states
        is_first = not self.get_seq_length(layer_idx)
        if self.kv_dtype and not is_sliding:
            value_states = as_stored(value_states, self.kv_dtype)
            if self.kv_dtype != "int4":  # the keys of a page are coded together, see `code`
                key_states = as_stored(key_states, self.kv_dtype)
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if not self.layers[layer_idx].is_sliding:
            if self.kv_dtype and is_first:
                keys, values = given
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

    def readable_pinned(self, pinned_pages):
        """How many pinned pages a decode step reads with prompt="select"."""
        return min(pinned_pages, max(1, (self.budget // self.page_size) // 2))

    def limit(self, pinned_pages):
        if not self.method.evicts:
            return math.inf
        reserved = {"pin": pinned_pages, "select": self.readable_pinned(pinned_pages), "evict": 1}[self.prompt]
        return max(self.budget // self.page_size - reserved, self.min_decode_pages)

    def append(self, state, token):
        """One generated token: open a page if need be, evicting first if all D are held."""
        if state.limit is None:
            state.limit = self.limit(len(state.pages))
        if state.open is None or len(state.open.tokens) == self.page_size:
            if len(state.evictable()) == state.limit:
                state.evict()
            state.open = Page([], pinned=False, priority=token)
            state.pages.append(state.open)
        state.open.tokens.append(token)
        state.decoded += 1
        if len(state.open.tokens) == self.page_size:
            state.open.priority = token
            self.to_code.append(state.open)

    def pin(self, state, tokens):
        """Input tokens: pinned pages, filled one after the other."""
        for token in tokens:
            pinned = [page for page in state.pages if page.pinned]
            if not pinned or len(pinned[-1].tokens) == self.page_size:
                pinned.append(Page([], pinned=True))
                state.pages.append(pinned[-1])
            pinned[-1].tokens.append(token)
            self.to_code.append(pinned[-1])

    def fill(self, state, tokens):
        """Input tokens that may be evicted: pages of their own, and the first of all stays.

        They close the open page, full or not: from now on it competes, with the index of its newest token.
        """
        is_first = not state.pages
        if state.open is not None:
            state.open.priority = state.open.tokens[-1]
            state.closing, state.open = state.open, None
        for start in range(0, len(tokens), self.page_size):
            held = tokens[start : start + self.page_size]
            state.pages.append(Page(held, pinned=False, priority=held[-1]))
            self.to_code.append(state.pages[-1])
        if is_first:
            state.limit = self.limit(1)
            for page in state.pages[:1]:
                page.pinned = True

    def attend(self, layer, new, query, keys, values, mask, scale, latent=False, softcap=None, sinks=None):
        batch, query_heads, _, _ = query.shape
        kv_heads, total = 1 if latent else keys.shape[1], keys.shape[2]
        group, first = query_heads // kv_heads, total - new
        # With KV sharing a second layer reads what is in its place already.
        is_new, self.placed[layer] = self.placed.get(layer) != total, total
        # The first forward attends to keys as they are, scores by keys as they are stored.
        stored = self.layers[layer].keys if self.kv_dtype and not latent else keys
        stored_states = [
            states.detach().double().cpu().numpy() for states in (self.layers[layer].keys, self.layers[layer].values)
        ]
        is_packed, is_first = self.kv_dtype == "int4", not first
        query, keys, values, stored = (x.detach().double().cpu().numpy() for x in (query, keys, values, stored))
        if is_packed:
            exact, stored = stored, stored.copy()
            keys, stored_states[0] = keys if is_first else stored, stored
        sinks = None if sinks is None else sinks.detach().double().cpu().numpy()
        cap = (lambda x: softcap * np.tanh(x / softcap)) if softcap else (lambda x: x)
        output = np.zeros((batch, query_heads, query.shape[2], values.shape[-1]))
        skipped = new - query.shape[2]  # a second reader may come for the last token only
        steps = [[i] for i in range(new)] if self.treat_as == "draft" and first else [list(range(skipped, new))]
        for row in range(batch):
            padding = self.padding.setdefault((layer, row), set())
            if mask is not None:
                padding |= {first + i for i in range(new) if not mask[row, 0, -1, mask.shape[-1] - new + i]}
            heads = [self.heads.setdefault((layer, row, head), Head(layer, head)) for head in range(kv_heads)]
            for step in steps:
                now = first + step[-1]
                # A second reader may come with the last token of several.
                is_single = new == 1 or self.treat_as == "draft"
                is_generated = is_single and len(step) == 1 and now > 0 and self.treat_as != "input"
                if is_new:
                    for state in heads:
                        self.place(state, [first + i for i in step], is_generated, padding)
                if is_packed:
                    for head, state in enumerate(heads):
                        self.code(state, exact[row, head], stored[row, head], padding)
                is_scored = self.method.is_scored and any(not page.pinned for page in heads[0].seen)
                # Input that may be evicted is cut down once, after its first reader.
                is_scored = is_scored and (is_new or is_generated or self.prompt != "evict")
                scored_queries = self.scored_queries(step, is_generated) if is_scored else []
                selects = is_generated and self.selects(layer)
                totals = [[0.0] * len(state.seen) for state in heads]
                ranges = {}
                if selects or (scored_queries and self.scoring == "minmax"):
                    for g in range(query_heads):
                        kv = g * keys.shape[1] // query_heads
                        if kv not in ranges:
                            ranges[kv] = self.ranges(heads[g // group].seen, stored[row, kv], padding)
                for i in step:
                    bounds, scores = None, []
                    if ranges:
                        bounds = self.bounds(query[row, :, i - skipped], ranges, kv_heads, keys.shape[1], scale, cap)
                    for head, state in enumerate(heads):
                        read = self.pages_read(state, bounds[head]) if selects else state.seen
                        tokens = [t for page in read for t in page.tokens if t <= first + i and t not in padding]
                        if not tokens:  # a padding query's
                            continue
                        per_query_head = []
                        for g in range(head * group, (head + 1) * group):
                            kv = row, g * keys.shape[1] // query_heads
                            q, sink = query[row, g, i - skipped], -math.inf if sinks is None else sinks[g]
                            weights = attention_weights(cap(keys[kv][tokens] @ q * scale), sink)
                            output[row, g, i - skipped] = weights @ values[kv][tokens]
                            if stored is not keys:
                                weights = attention_weights(cap(stored[kv][tokens] @ q * scale), sink)
                            if i in scored_queries and self.scoring == "exact":
                                per_query_head.append(self.page_weights(state.seen, tokens, weights))
                        if per_query_head:
                            scores.append(self.reduced(per_query_head))
                    # A generated token that is masked is a finished row's: what it stamps is nobody's business.
                    if i not in scored_queries or (first + i in padding and not is_generated):
                        continue
                    if self.scoring == "minmax":
                        scores = [softmax(mine) for mine in bounds]
                    elif self.granularity == "layer":
                        scores = [self.reduced(scores)] * kv_heads
                    over_queries = REDUCE["max" if self.method.page_score == "max" else "sum"]
                    for head in range(kv_heads):
                        totals[head] = [over_queries(pair) for pair in zip(totals[head], scores[head], strict=True)]
                if is_scored:
                    if is_generated and self.method.uses_queries:
                        mine = query[row, :, step[-1] - skipped].reshape(kv_heads, group, -1)
                        self.rate_distances(heads, mine, stored[row], padding, now)
                    keys_and_values = [cached[row] for cached in stored_states]
                    self.rate(heads, totals, *keys_and_values, padding, now, len(scored_queries))
                for head, state in enumerate(heads):
                    if is_packed and state.closing is not None:
                        state.closing.coded = codes_of(state.closing, exact[row, head], padding)
                        state.closing = None
                    while self.prompt == "evict" and len(state.evictable()) > state.limit:
                        state.evict()
                    if state.open is None:  # input has closed the open page
                        state.decoded += -state.decoded % self.page_size
        return torch.from_numpy(output)

    def code(self, state, exact, stored, padding):
        """Code the pages that the newest tokens filled or begun, and write what the codes leave into `stored`."""
        for page in state.pages:
            if page in self.to_code:
                page.coded = codes_of(page, exact, padding)
            for token, key in page.coded.items():
                stored[token] = key
        self.to_code = [page for page in self.to_code if page not in state.pages]

    def place(self, state, tokens, is_generated, padding):
        if not is_generated and not state.pages:  # left padding is not held: a row is as it is alone
            tokens = list(itertools.dropwhile(padding.__contains__, tokens))
        if is_generated:
            self.append(state, tokens[0])
        elif self.prompt == "evict":
            self.fill(state, tokens)
        else:
            self.pin(state, tokens)
        state.seen = list(state.pages)

    def scored_queries(self, step, is_generated):
        window = self.method.prompt_window
        if is_generated or self.prompt != "evict" or window is None:
            return step
        return step[max(0, len(step) - window) :]

    def selects(self, layer):
        if self.is_quest:
            return layer >= self.dense_layers
        return self.prompt == "select" and self.method.evicts

    def ranges(self, pages, keys, padding):
        """Each page's smallest and largest keys, None for a page of padding."""
        resident = [[token for token in page.tokens if token not in padding] for page in pages]
        return [(keys[tokens].min(0), keys[tokens].max(0)) if tokens else None for tokens in resident]

    def bounds(self, query, ranges, kv_heads, key_heads, scale, cap):
        """Of one query, the most that a token of each page can score: a list of pages for each KV head."""
        bounds, group = [], len(query) // kv_heads
        for head in range(kv_heads):
            per_query_head = []
            for g in range(head * group, (head + 1) * group):
                low_and_high = ranges[g * key_heads // len(query)]
                per_query_head.append([
                    cap(np.maximum(query[g] * pair[0], query[g] * pair[1]).sum() * scale) if pair else -math.inf
                    for pair in low_and_high
                ])  # fmt: skip
            bounds.append([max(column) for column in zip(*per_query_head, strict=True)])
        return [self.reduced(bounds)] * kv_heads if self.granularity == "layer" else bounds

    def reduced(self, lists):
        """Several lists of the pages' numbers, of query heads or of KV heads, as one."""
        return [REDUCE[self.method.group_score](column) for column in zip(*lists, strict=True)]

    def page_weights(self, pages, tokens, weights):
        weight_of = dict(zip(tokens, weights.tolist(), strict=True))
        return [REDUCE[self.method.page_score](weight_of.get(token, 0.0) for token in page.tokens) for page in pages]

    def pages_read(self, state, bounds):
        """A decode step's, where not all are read; the page of the newest token always is."""
        bound_of = dict(zip(state.seen, bounds, strict=True))

        def best(pages, count):
            return sorted(pages, key=lambda page: (-bound_of[page], page.tokens[0]))[:count]

        pinned = [page for page in state.seen if page.pinned]
        others = [page for page in state.seen if not page.pinned and page is not state.open]
        if not self.is_quest:
            return [*best(pinned, self.readable_pinned(len(pinned))), *others, state.open]
        if self.prompt == "select":
            return [state.open, *best(pinned + others, max(self.budget // self.page_size, 1) - 1)]
        evictable = max(self.budget // self.page_size - len(pinned), self.min_decode_pages)
        return [*pinned, state.open, *best(others, evictable - 1)]

    def rate_distances(self, heads, queries, keys, padding, now):
        """TriAttention's scores, after a generated token's queries, a list for each KV head."""
        for head, state in enumerate(heads):
            state.queries += [(now, query) for query in queries[head]]
            pages = state.evictable()
            scores = distance_scores(pages, state.queries, keys[head], padding, now)
            for page, score in zip(pages, scores, strict=True):
                page.mean_score = score

    def rate(self, heads, totals, keys, values, padding, now, queries):
        """The policy's turn, with the pages' scores."""
        pairs = [
            [(page, score) for page, score in zip(state.seen, mine, strict=True) if page in state.evictable()]
            for state, mine in zip(heads, totals, strict=True)
        ]
        for head, scored in enumerate(pairs):
            held = [page for page, _ in scored]
            if self.method.compares_keys:
                for page, value in zip(held, redundancies(held, keys[head], padding), strict=True):
                    page.redundancy = value
            for page in held:
                ranges = [np.ptp(values[head][token]) for token in page.tokens if token not in padding]
                page.value_range = max(ranges, default=0)
        for state, scored in zip(heads, pairs, strict=True):
            self.method.update(self, scored, now, queries, state)
        if self.granularity == "layer":
            for alike in zip(*([page for page, _ in scored] for scored in pairs), strict=True):
                mean = fmean(page.priority for page in alike)
                for page in alike:
                    page.priority = mean


def attention_weights(logits, sink):
    largest = max(logits.max(), sink)
    powers = np.exp(logits - largest)
    return powers / (powers.sum() + math.exp(sink - largest))


def oracle_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
    latent = hasattr(module, "expand_kv")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    cache, layer, new = OracleCache.latest if latent else getattr(key, "oracle", (None, None, None))
    if cache is None:
        is_causal = getattr(module, "is_causal", True)
        output = dense_attention(query, key, value, attention_mask, scale, softcap, s_aux, is_causal)
    else:
        output = cache.attend(layer, new, query, key, value, attention_mask, scale, latent, softcap, s_aux)
    return output.to(query).transpose(1, 2).contiguous(), None


def dense_attention(query, key, value, mask, scale, softcap, sinks, is_causal=True):
    """What layers that RaaS leaves alone compute, and attention in and to an encoder."""
    new, held = query.shape[2], key.shape[2]
    key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
    logits = query @ key.mT * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is None:
        mask = torch.ones(new, held, dtype=torch.bool, device=query.device)
        mask = mask.tril(held - new) if is_causal else mask
    logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    if sinks is not None:
        logits = torch.cat([logits, sinks[:, None, None].expand(*logits.shape[:-1], 1)], -1)
    return logits.softmax(-1)[..., :held] @ value


AttentionInterface.register("oracle", oracle_attention)
AttentionMaskInterface.register("oracle", sdpa_mask)

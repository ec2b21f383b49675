"""Each method's own rule, by brute force: pages as lists of tokens, priorities in plain Python.

Written from the papers, sharing no code with the package; `oracle.py` runs a model with it.
"""

import math
from statistics import fmean

import numpy as np
import torch


REDUCE = {"max": max, "sum": sum, "mean": fmean}


class Page:
    def __init__(self, tokens, pinned, priority=-1):
        self.tokens = tokens
        self.pinned = pinned
        self.priority = priority
        self.state = 0.0  # what the policy remembers of the page: H2O's sum, R-KV's importance
        self.redundancy = 0.0
        self.coded = {}  # what 4-bit codes leave of the keys, by token; empty while the page is open
        self.value_range = 0.0
        self.stamp, self.interval = None, 0  # LazyEviction's
        self.importance = 0.0  # G-KV's decayed maximum
        self.mean_score = 0.0  # TriAttention's


class Head:
    """What one (layer, row, KV head) holds."""

    def __init__(self, layer=0, index=0):
        self.layer, self.index = layer, index
        self.decoded = 0  # tokens generated so far; a page that a turn closes counts as full
        self.pages = []
        self.seen = []  # the pages that the newest forward looked at: those held before it evicted
        self.open = None  # takes the next generated token, if it is not full
        self.closing = None  # the open page that input has just closed, and that has no codes yet
        self.limit = None  # of evictable pages
        self.evicted = 0
        self.queries = []  # TriAttention's: (position, query) of the generated tokens

    def evictable(self):
        return [page for page in self.pages if not page.pinned]

    def evict(self):
        self.pages.remove(min(self.evictable(), key=lambda page: (page.priority, page.tokens[0])))
        self.evicted += 1


class Method:
    """`update` turns the scores of the evictable pages, as pairs (page, score), into priorities."""

    page_score, group_score, prompt_window = "max", "max", None
    prompt, granularity = "evict", "head"
    evicts = is_scored = True
    compares_keys = uses_queries = False

    def update(self, cache, scored, now, queries, state):
        pass


class RaaS(Method):
    prompt_window, prompt = 32, "pin"

    def update(self, cache, scored, now, queries, state):
        if cache.top_ratio is None:
            milestones = [page for page, score in scored if score >= cache.alpha]
        else:
            ranked = sorted(scored, key=lambda pair: (-pair[1], pair[0].tokens[0]))
            milestones = [page for page, _ in ranked[: math.ceil(cache.top_ratio * len(scored))]]
        for page in milestones:
            page.priority = now


class StreamingLLM(Method):
    prompt_window, is_scored = 0, False


class Window(StreamingLLM):
    prompt = "pin"


class Random(Method):
    prompt_window, prompt = 1, "pin"

    def update(self, cache, scored, now, queries, state):
        for page, _ in scored:
            page.priority = drawn(cache.seed, state, now, page)
        keep_newest(scored, math.ceil(cache.recent_tokens / cache.page_size))


class LazyEviction(Method):
    prompt_window = 32

    def update(self, cache, scored, now, queries, state):
        for page, score in scored:
            page.stamp = page.tokens[0] if page.stamp is None else page.stamp
            if score >= cache.alpha or page.tokens[-1] == now:
                page.interval = max(page.interval, now - page.stamp)
                page.stamp = now
            page.priority = -(now - page.stamp) / max(page.interval, 1)
        keep_newest(scored, math.ceil(cache.recent_tokens / cache.page_size))


class VaSE(Method):
    page_score, group_score, prompt_window = "sum", "mean", 8

    def update(self, cache, scored, now, queries, state):
        part = min(queries / 8, 1)
        for page, score in scored:
            page.state = (1 - part) * page.state + (part * score / queries if queries else 0)
            number = drawn(cache.seed, state, now, page)
            page.priority = page.state / -math.log(number) if number else 0
        protected = int(cache.protected_ratio * state.limit)
        by_range = sorted(scored, key=lambda pair: (-as_bfloat16(pair[0].value_range), -pair[0].tokens[0]))
        for page, _ in by_range[:protected]:
            page.priority = math.inf
        keep_newest(scored, math.ceil(8 / cache.page_size))


class H2O(Method):
    page_score, group_score = "sum", "mean"

    def update(self, cache, scored, now, queries, state):
        for page, score in scored:
            page.state += score
            page.priority = page.state
        keep_newest(scored, int(cache.recent_ratio * state.limit))


class TOVA(Method):
    group_score, prompt_window, granularity = "mean", 1, "layer"

    def update(self, cache, scored, now, queries, state):
        for page, score in scored:
            page.priority = score


class RKV(Method):
    page_score, group_score, prompt_window = "sum", "mean", 8
    compares_keys = True

    def update(self, cache, scored, now, queries, state):
        part, weight = min(queries / 8, 1), cache.importance_weight
        for page, score in scored:
            page.state = (1 - part) * page.state + (part * score / queries if queries else 0)
            page.priority = weight * page.state - (1 - weight) * page.redundancy
        keep_newest(scored, math.ceil(8 / cache.page_size))


class GKV(Method):
    page_score, prompt_window = "sum", 16
    compares_keys = True

    def update(self, cache, scored, now, queries, state):
        part, weight = min(queries / 16, 1), cache.importance_weight
        for page, score in scored:
            page.state = (1 - part) * page.state + (part * score / queries if queries else 0)
        most = max(page.state for page, _ in scored) or 1
        most_redundant = max(page.redundancy for page, _ in scored)
        for page, _ in scored:
            page.importance = max(cache.decay ** (queries / 128) * page.importance, page.state / most)
            page.priority = weight * page.importance - (1 - weight) * page.redundancy / most_redundant
        keep_newest(scored, math.ceil(16 / cache.page_size))


class TriAttention(Method):
    """Only for RoPE that pairs component i with component i + d / 2, and theta 10,000."""

    prompt, uses_queries = "pin", True

    def update(self, cache, scored, now, queries, state):
        for page, _ in scored:
            page.priority = page.mean_score
        keep_newest(scored, 1)


class Quest(Method):
    prompt, evicts, is_scored = "select", False, False


class Dense(Method):
    prompt, evicts, is_scored = "pin", False, False


METHODS = {
    "raas": RaaS, "streaming_llm": StreamingLLM, "h2o": H2O, "tova": TOVA, "rkv": RKV, "quest": Quest, "dense": Dense,
    "window": Window, "random": Random, "lazy_eviction": LazyEviction, "gkv": GKV, "vase": VaSE,
    "triattention": TriAttention,
}  # fmt: skip


def as_bfloat16(number):
    return torch.tensor(number, dtype=torch.float64).bfloat16().item()


def keep_newest(scored, count):
    newest_first = sorted((page for page, _ in scored), key=lambda page: -page.tokens[0])
    for page in newest_first[:count]:
        page.priority = math.inf


def hashed(number):
    """A 32-bit number of a 32-bit number."""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97), (15, 1)):
        number = (number ^ number >> shift) * factor % 2**32
    return number


def drawn(seed, state, now, page):
    """A number in [0, 1): by seed, layer, head, generated tokens so far, and the page's age in tokens."""
    number = 0
    for counter in (seed, state.layer):
        number = hashed(number ^ counter)
    number = hashed(number)
    for counter in (state.index, state.decoded - 1, now - page.tokens[0]):
        number = hashed(number ^ counter % 2**32)
    return number / 2**32


def redundancies(pages, keys, padding):
    """R-KV's: how like the other pages a page is, by the mean of its keys."""
    units = []
    for page in pages:
        resident = [token for token in page.tokens if token not in padding]
        mean = keys[resident].mean(0) if resident else np.zeros(keys.shape[-1])
        units.append(mean / max(np.linalg.norm(mean), 1e-8))
    similar = np.array(units) @ np.array(units).T
    for i in range(len(pages)):
        similar[i, i] = 0
        alike = [j for j in range(len(pages)) if similar[i, j] > 0.5]
        if alike:
            similar[i, max(alike, key=lambda j: pages[j].tokens[0])] = 0
    return softmax([similar[:, j].sum() / len(pages) for j in range(len(pages))])


def pair_numbers(states, theta=10_000):
    """Pairs of components of `states` `[..., d]` as complex numbers, and the angle of each pair for one position."""
    half = states.shape[-1] // 2
    return states[..., :half] + 1j * states[..., half:], theta ** (-np.arange(half) / half)


def distance_scores(pages, queries, keys, padding, now):
    """TriAttention's mean score of each page: `queries` are pairs (position, query), RoPE applied to all."""
    unrotated = []
    for position, query in queries:
        numbers, frequency = pair_numbers(query)
        unrotated.append(numbers * np.exp(-1j * frequency * position))
    centre, length = np.mean(unrotated, 0), np.abs(unrotated).mean(0)
    scores = []
    for page in pages:
        of_tokens = []
        for token in page.tokens:
            if token in padding:
                continue
            numbers, frequency = pair_numbers(keys[token])
            key = numbers * np.exp(-1j * frequency * token)
            amplitude, phase = np.abs(centre) * np.abs(key), np.angle(centre * key.conj())
            norm = ((length - np.abs(centre)) * np.abs(key)).sum()
            of_tokens += [
                (amplitude * np.cos(frequency * (now + 2**power - token) + phase)).sum() + norm for power in range(17)
            ]
        scores.append(np.mean(of_tokens) if of_tokens else 0.0)
    return scores


def softmax(values):
    largest = max(values)
    powers = [math.exp(value - largest) for value in values]
    total = sum(powers)
    return [power / total for power in powers]

"""Each method's own rule, by brute force: pages as lists of tokens, priorities in plain Python.

Written from the papers, sharing no code with the package; `oracle.py` runs a model with it.
"""

import math
from statistics import fmean

import numpy as np


REDUCE = {"max": max, "sum": sum, "mean": fmean}


class Page:
    def __init__(self, tokens, pinned, priority=-1):
        self.tokens = tokens
        self.pinned = pinned
        self.priority = priority
        self.state = 0.0  # what the policy remembers of the page: H2O's sum, R-KV's importance
        self.redundancy = 0.0
        self.coded = {}  # what 4-bit codes leave of the keys, by token; empty while the page is open


class Head:
    """What one (layer, row, KV head) holds."""

    def __init__(self):
        self.pages = []
        self.seen = []  # the pages that the newest forward looked at: those held before it evicted
        self.open = None  # takes the next generated token, if it is not full
        self.closing = None  # the open page that input has just closed, and that has no codes yet
        self.limit = None  # of evictable pages
        self.evicted = 0

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

    def update(self, cache, scored, now, queries, limit):
        pass


class RaaS(Method):
    prompt_window, prompt = 32, "pin"

    def update(self, cache, scored, now, queries, limit):
        if cache.top_ratio is None:
            milestones = [page for page, score in scored if score >= cache.alpha]
        else:
            ranked = sorted(scored, key=lambda pair: (-pair[1], pair[0].tokens[0]))
            milestones = [page for page, _ in ranked[: math.ceil(cache.top_ratio * len(scored))]]
        for page in milestones:
            page.priority = now


class StreamingLLM(Method):
    prompt_window, is_scored = 0, False


class H2O(Method):
    page_score, group_score = "sum", "mean"

    def update(self, cache, scored, now, queries, limit):
        for page, score in scored:
            page.state += score
            page.priority = page.state
        keep_newest(scored, int(cache.recent_ratio * limit))


class TOVA(Method):
    group_score, prompt_window, granularity = "mean", 1, "layer"

    def update(self, cache, scored, now, queries, limit):
        for page, score in scored:
            page.priority = score


class RKV(Method):
    page_score, group_score, prompt_window = "sum", "mean", 8

    def update(self, cache, scored, now, queries, limit):
        part, weight = min(queries / 8, 1), cache.importance_weight
        for page, score in scored:
            page.state = (1 - part) * page.state + (part * score / queries if queries else 0)
            page.priority = weight * page.state - (1 - weight) * page.redundancy
        keep_newest(scored, math.ceil(8 / cache.page_size))


class Quest(Method):
    prompt, evicts, is_scored = "select", False, False


class Dense(Method):
    prompt, evicts, is_scored = "pin", False, False


METHODS = {
    "raas": RaaS, "streaming_llm": StreamingLLM, "h2o": H2O, "tova": TOVA, "rkv": RKV, "quest": Quest, "dense": Dense,
}  # fmt: skip


def keep_newest(scored, count):
    newest_first = sorted((page for page, _ in scored), key=lambda page: -page.tokens[0])
    for page in newest_first[:count]:
        page.priority = math.inf


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


def softmax(values):
    largest = max(values)
    powers = [math.exp(value - largest) for value in values]
    total = sum(powers)
    return [power / total for power in powers]

"""Find the tokens of the recalls in a story."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from transformers import PreTrainedTokenizerBase

from ..eval.tasks import hash_of
from ..fidelity.batches import Source
from ..fidelity.texts import Ids, Text, token_ids
from .stories import PROBES, Probe, Story


SAMPLE = 16
"""The `size` of the story that tells how many tokens a story has."""


@dataclass(frozen=True)
class RecallToken:
    """A recall in tokens.

    Args:
        place: index in the chain of the first token of the value.
        value: index of the value in the values of the probe.
        since_use: tokens since the text last gave the value of this fact.
        since_derivation: tokens since the text first gave it.
    """

    place: int
    value: int
    since_use: int
    since_derivation: int


@dataclass(frozen=True)
class ProbeSource(Source):
    """A text of a probe.

    Args:
        recalls: the recalls in the second half of the chain.
        candidates: the first token of each value of the probe.
    """

    recalls: tuple[RecallToken, ...]
    candidates: tuple[int, ...]


def probe_sources(
    name: str, tokenizer: PreTrainedTokenizerBase, tokens: int, texts: int, seed: int
) -> list[ProbeSource]:
    """Write texts with `tokens` tokens after the prompt. Equal arguments give equal texts.

    Raises:
        ValueError: the tokenizer gives no offsets, does not know a word, or begins two values with the same token; or a
            text of this length has no recall, or needs more names than there are.
    """
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise ValueError(f"The tokenizer {kind} gives no offsets of its tokens: use a model with a fast tokenizer.")
    probe = PROBES[name]
    sources = []
    for index in range(texts):
        story = _story(name, f"{name} {seed} {index}", tokenizer, tokens)
        ids = token_ids(Text(probe.prompt, story.text), tokenizer)
        chain = Ids(ids.prompt, ids.chain[:tokens])
        token_of = _token_of(tokenizer, story.text)
        candidates = _candidates(probe, story, tokenizer) if story.recalls else ()
        recalls = []
        for recall in story.recalls:
            place, value = token_of[recall.place], probe.values.index(recall.value)
            if ids.chain[place] != candidates[value]:
                raise ValueError(_same_token(probe))
            if tokens // 2 <= place < tokens:
                since = (place - token_of[recall.last], place - token_of[recall.first])
                recalls.append(RecallToken(place, value, *since))
        if not recalls:
            raise ValueError(f"tokens={tokens} leaves a text of {name!r} without a recall: give more, such as 1024.")
        text_hash = hash_of(f"{chain.prompt} {chain.chain} {recalls}")
        sources.append(ProbeSource(index, chain, text_hash, tuple(recalls), candidates))
    return sources


def _story(name: str, seed: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Story:
    """The shortest story with this seed that has `tokens` tokens."""
    probe = PROBES[name]

    def length(size: int) -> int:
        return len(token_ids(Text(probe.prompt, probe.write(Random(seed), size).text), tokenizer).chain)

    # 1. An estimate from two sizes.
    shortest = length(0)
    each = (length(SAMPLE) - shortest) / SAMPLE
    size = max(0, int((tokens - shortest) / each) - 1)
    # 2. The exact size, which is near.
    while size > 0 and length(size - 1) >= tokens:
        size -= 1
    while size <= probe.longest and length(size) < tokens:
        size += 1
    if size > probe.longest:
        most = length(probe.longest)
        raise ValueError(f"tokens={tokens} is more than a text of {name!r} can have: give at most {most}.")
    return probe.write(Random(seed), size)


def _token_of(tokenizer: PreTrainedTokenizerBase, text: str) -> dict[int, int]:
    """Index of a character -> index of the first token that contains it."""
    found: dict[int, int] = {}
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    for token, (start, end) in enumerate(offsets):
        for character in range(start, end):
            found.setdefault(character, token)
    return found


def _candidates(probe: Probe, story: Story, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The first token of each value, in the line of the first recall."""
    recall = story.recalls[0]
    start = story.text.rfind("\n", 0, recall.place) + 1
    end = story.text.index("\n", recall.place)
    before, after = story.text[start : recall.place], story.text[recall.place + len(recall.value) : end]
    found = []
    for value in probe.values:
        line = before + value + after
        ids = tokenizer(line, add_special_tokens=False)["input_ids"]
        found.append(ids[_token_of(tokenizer, line)[len(before)]])
    if len(set(found)) < len(found):
        raise ValueError(_same_token(probe))
    return tuple(found)


def _same_token(probe: Probe) -> str:
    return (
        f"The tokenizer does not begin each of the values {', '.join(probe.values)} with a token of its own: use "
        "another model or another probe."
    )

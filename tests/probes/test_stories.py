"""The texts: what they state and recall, read again from the text with regular expressions."""

import re
from collections import Counter
from random import Random
from statistics import mean

import pytest

from raas_cache.probes import PROBES
from raas_cache.probes.stories import CHAIN_LIMIT, GIVEN, NUMBERS, PEOPLE, RESTATED


CHAINS = ("lemma-once", "lemma-restated")


def write(name, size=40, seed=0):
    return PROBES[name].write(Random(seed), size)


def places(name, text):
    """Fact -> the places where the text gives its value, in order. "gives 7" is a result, not a fact."""
    pattern = r"(\w+) has (\w+)" if name == "needle" else r"[Tt]he ([\w ]+?) is (\d)"
    found = {}
    for match in re.finditer(pattern, text):
        found.setdefault(match[1], []).append(match.start(2))
    return found


@pytest.mark.parametrize("name", PROBES)
def test_recalls_are_in_the_text(name):
    story = write(name)
    of_fact = places(name, story.text)
    again = {place: (uses[count], uses[0]) for uses in of_fact.values() for count, place in enumerate(uses[1:])}
    assert {recall.place: (recall.last, recall.first) for recall in story.recalls} == again
    assert len(again) == (PEOPLE if name == "needle" else 40)
    values = set()
    for recall in story.recalls:
        for place in (recall.place, recall.last, recall.first):
            assert story.text[place:].startswith(recall.value)
            assert not story.text[place + len(recall.value)].isalnum() and story.text[place - 1] == " "
        values.add(recall.value)
    assert values <= set(PROBES[name].values) and len(values) > 5


@pytest.mark.parametrize("name", PROBES)
def test_texts_depend_on_the_seed_only(name):
    assert write(name, seed="a").text == write(name, seed="a").text != write(name, seed="b").text
    lengths = [len(write(name, size).text) for size in range(6)]
    assert lengths == sorted(set(lengths)), "a larger size gives a longer text"


@pytest.mark.parametrize("name", CHAINS)
def test_arithmetic(name):
    lines = re.findall(
        r"Since the [\w ]+ is (\d), (adding|subtracting) (\d) gives (\d)\. So the [\w ]+ is (\d)\.\n", write(name).text
    )
    assert len(lines) == 40
    for old, how, change, result, new in lines:
        assert int(old) + int(change) * (1 if how == "adding" else -1) == int(result) == int(new)


def test_a_lemma_is_stated_once():
    """A fact has at most one recall, near or far."""
    story = write("lemma-once", 200)
    uses = Counter(len(found) for found in places("lemma-once", story.text).values())
    assert set(uses) == {1, 2} and uses[2] == 200
    assert all(recall.last == recall.first for recall in story.recalls)
    ages = [recall.place - recall.last for recall in story.recalls[100:]]
    assert min(ages) < 100 and max(ages) > 5000


def test_a_lemma_is_restated():
    """The last use is near, the derivation is far, and few lemmas are in use."""
    story = write("lemma-restated", 600)
    late = story.recalls[100:]
    since_use, since_derivation = (mean(one.place - getattr(one, of) for one in late) for of in ("last", "first"))
    assert since_derivation > 3 * since_use
    uses = [len(found) - 1 for found in places("lemma-restated", story.text).values() if len(found) > 1]
    assert mean(uses) == pytest.approx(RESTATED, rel=0.3)
    line = len(story.text) / 600
    assert since_use / line == pytest.approx(GIVEN, rel=0.3)


def test_needles_are_recalled_at_the_end():
    story = write("needle")
    prose, late = story.text.split("\nAs we said", 1)
    assert len(re.findall(r"\w+ has \w+ ", prose)) == late.count(" has ") == PEOPLE
    assert len(set(re.findall(r"has \w+ (\w+)\.", story.text))) == 1, "the same things: the facts are alike"
    assert len(re.findall(r"[\w ]+, [^.]+\.", prose)) == 40, "sentences about other things"
    people = [re.findall(r"(\w+) has", part) for part in (prose, late)]
    assert sorted(people[0]) == sorted(people[1]) and people[0] != people[1]


@pytest.mark.parametrize("name", CHAINS)
def test_the_longest_chain_uses_every_name_once(name):
    story = write(name, CHAIN_LIMIT)
    stated = re.findall(r"(?:^The|So the) ([\w ]+) is \d\.\n", story.text, re.MULTILINE)
    assert len(stated) == len(set(stated)) == GIVEN + 2 * CHAIN_LIMIT
    with pytest.raises((RuntimeError, StopIteration)):
        write(name, CHAIN_LIMIT + 1)


@pytest.mark.parametrize(("name", "share"), [("lemma-once", 1 / 9), ("needle", 1 / len(NUMBERS))])
def test_chance(name, share):
    assert PROBES[name].chance == pytest.approx(share)
    values = Counter(recall.value for seed in range(60) for recall in write(name, 40, seed).recalls)
    assert max(values.values()) / sum(values.values()) < 1.3 * share, "no value is much more likely than others"

"""The texts of the probes: facts that are stated, and recalled later."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

from .words import ADJECTIVES, EVENTS, NAMES, NOUNS, THINGS, TIMES


@dataclass(frozen=True)
class Recall:
    """A place where the text gives the value of a fact again. Places are indices of characters.

    Args:
        place: where the value begins.
        value: the value, a word of the text.
        last: where the value of the same fact began when the text last gave it.
        first: where it began when the text first gave it.
    """

    place: int
    value: str
    last: int
    first: int


@dataclass
class Story:
    """A text that is written from left to right, and its recalls."""

    text: str = ""
    recalls: list[Recall] = field(default_factory=list)
    # Name -> value, and the places where the text gives it first and last.
    _facts: dict[str, tuple[str, int, int]] = field(default_factory=dict, init=False, repr=False)

    def say(self, words: str) -> None:
        """Write words that give no value."""
        self.text += words

    def state(self, fact: str, value: str) -> None:
        """Write the value of a new fact."""
        self._facts[fact] = value, len(self.text), len(self.text)
        self.text += value

    def recall(self, fact: str) -> None:
        """Write the value of a fact again."""
        value, first, last = self._facts[fact]
        self.recalls.append(Recall(len(self.text), value, last, first))
        self._facts[fact] = value, first, len(self.text)
        self.text += value

    def value(self, fact: str) -> str:
        return self._facts[fact][0]


@dataclass(frozen=True)
class Probe:
    """A kind of text with recalls.

    Args:
        prompt: the text in front of the story. An empty line follows it.
        values: the values that a fact can have, equally likely.
        write: writes a story. A larger `size` (0 or more) makes it longer.
        longest: largest `size`.
    """

    prompt: str
    values: tuple[str, ...]
    write: Callable[[Random, int], Story]
    longest: int = 1 << 20

    @property
    def chance(self) -> float:
        """The share of recalls that a guess gets right."""
        return 1 / len(self.values)


DIGITS = tuple("123456789")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
GIVEN = 6
"""Number of lemmas that a chain begins with, and of the lemmas in use at any time in `lemma-restated`."""
RESTATED = 6
"""Mean number of uses of a lemma in `lemma-restated`, and of the lines between two of its uses."""
PEOPLE = 24
"""Number of people in a `needle`."""


def lemma_once(random: Random, size: int) -> Story:
    """A chain in which each lemma is recalled once at most.

    The age of the recalled lemma is log-uniform: it is as likely that 2 to 3 newer lemmas are unused as 32 to 63.
    """
    unused: list[str] = []  # oldest first

    def choose() -> str:
        age = int(math.exp(random.random() * math.log(len(unused))))  # 1 to len(unused)
        return unused.pop(-age)

    return _chain(random, size, choose, unused.append, lambda derived: None)


def lemma_restated(random: Random, size: int) -> Story:
    """A chain that uses `GIVEN` lemmas at a time, each of them again and again, and restates them at each use.

    After each line, a new lemma replaces one of them with probability 1 / `RESTATED`.
    """
    in_use: list[str] = []

    def add(lemma: str) -> None:
        if len(in_use) < GIVEN:
            in_use.append(lemma)

    def maybe_replace(derived: str) -> None:
        if random.random() < 1 / RESTATED:
            in_use[random.randrange(GIVEN)] = derived

    return _chain(random, size, lambda: random.choice(in_use), add, maybe_replace)


def _chain(
    random: Random,
    size: int,
    choose: Callable[[], str],
    on_lemma: Callable[[str], None],
    on_derived: Callable[[str], None],
) -> Story:
    """`GIVEN` facts, and then `size` times a line that derives a lemma from an earlier one, and another fact.

    Args:
        choose: gives the lemma to derive from.
        on_lemma: is told of each fact and each derived lemma.
        on_derived: is told of each derived lemma, after `on_lemma`.
    """
    story, names = Story(), _names(random)

    def give() -> None:
        name = next(names)
        story.say(f"The {name} is ")
        story.state(name, random.choice(DIGITS))
        story.say(".\n")
        on_lemma(name)

    for _ in range(GIVEN):
        give()
    for _ in range(size):
        old, new = choose(), next(names)
        story.say(f"Since the {old} is ")
        story.recall(old)
        value = random.choice([digit for digit in DIGITS if digit != story.value(old)])
        change = int(value) - int(story.value(old))
        story.say(f", {'adding' if change > 0 else 'subtracting'} {abs(change)} gives {value}. So the {new} is ")
        story.state(new, value)
        story.say(".\n")
        on_lemma(new)
        on_derived(new)
        give()
    return story


def _names(random: Random) -> Iterator[str]:
    """Different names in a random order: all nouns, and then nouns with an adjective."""
    for adjectives in [[""], [f"{adjective} " for adjective in ADJECTIVES]]:
        names = [adjective + noun for adjective in adjectives for noun in NOUNS]
        random.shuffle(names)
        yield from names


CHAIN_LIMIT = (len(NOUNS) * (1 + len(ADJECTIVES)) - GIVEN) // 2
"""The largest `size` of a chain: each line has two new names."""


def needle(random: Random, size: int) -> Story:
    """Prose in which `PEOPLE` people have a number of the same things, and at the end the number of each.

    The facts of the other people are the distractors of a fact. `size` sentences about other things stand between them.
    """
    story, things = Story(), random.choice(THINGS)
    people = random.sample(NAMES, PEOPLE)
    for place, name in enumerate(people):
        story.say(f"{name} has ")
        story.state(name, random.choice(NUMBERS))
        story.say(f" {things}.")
        for _ in range(size * (place + 1) // PEOPLE - size * place // PEOPLE):
            story.say(f" {random.choice(TIMES)}, {random.choice(EVENTS)}.")
        story.say("\n" if place % 4 == 3 else " ")
    for name in random.sample(people, PEOPLE):
        story.say(f"As we said, {name} has ")
        story.recall(name)
        story.say(f" {things}.\n")
    return story


_LEMMAS = "Each thing below has a number from 1 to 9."
PROBES = {
    "lemma-once": Probe(_LEMMAS, DIGITS, lemma_once, CHAIN_LIMIT),
    "lemma-restated": Probe(_LEMMAS, DIGITS, lemma_restated, CHAIN_LIMIT),
    "needle": Probe("This is a story about the things that people have.", NUMBERS, needle),
}
"""The probes by name."""

"""Word problems in plain English with a long solution, for a small pretrained model that was trained on them.

A problem names people one after another, and says how many coins each has compared with an earlier person. The solution
goes through the people in this order, with one line of about 43 tokens per person:

    problem     Anna has 52 coins. Ben has 7 more coins than Anna. Carl has 4 fewer coins than Ben. ... How many coins
                does Carl have?
    solution    Next is Carl. Carl has 4 fewer coins than Ben. Ben has 59 coins. 59 - 4 = 55. So Carl has 55 coins.

There are two families. In `"restated"`, a few people are compared with again and again, for a while. Each such line
repeats how many coins they have, so the last mention of a number is near, as with a milestone of a chain of thought. In
`"once"`, nobody is compared with twice: the solution has stated a number once, up to `FARTHEST` lines before its use.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Literal


Family = Literal["restated", "once"]
FAMILIES: tuple[Family, ...] = ("restated", "once")

# Each is one token of SmolLM2 with a space in front.
NAMES = """
Adam Alan Alex Alice Amy Andrew Anna Anne Arthur Ben Bill Bob Brian Carl Carol Charles Chris Claire Dan David Diana Don
Ed Ella Emma Eric Eva Frank Fred Gary George Grace Greg Harry Helen Henry Ian Jack James Jane Jason Jean Jeff Jennifer
Jim Joe John Julia Karen Kate Ken Kevin Laura Leo Linda Lisa Louis Lucy Luke Maria Martin Mary Matt Max Michael Mike
Nancy Nick Oliver Oscar Paul Peter Rachel Ray Richard Robert Roger Ron Roy Ruth Sam Sara Sarah Scott Simon Sophie Steve
Susan Ted Tim Tom Tony Victor Walter Nina Julie Emily Hannah Daniel Thomas William Elizabeth Margaret Barbara Patricia
Joseph Edward Kenneth Steven Philip Anthony Samuel Benjamin Alexander Nathan Jacob Ethan Noah Mason Sophia Olivia
Charlotte Victoria Katherine Stephen
""".split()  # noqa: SIM905
TOKENS_PER_PERSON = 43
"""Tokens of a line of the solution, with the tokenizer of SmolLM2."""
TOKENS_OF_GIVEN = 15
"""Tokens of the line of a person whose coins the problem states."""
FARTHEST = 32
"""The largest number of lines between a person's line and the line that compares with this person."""
GIVEN: dict[Family, int] = {"restated": 4, "once": 12}
"""Number of people whose coins the problem states. As many people are compared with at the same time."""
MOST_USES = 8
"""How often the family `"restated"` compares with a person at most."""


@dataclass(frozen=True)
class WordProblem:
    """A problem and its solution.

    Args:
        problem: the prompt.
        solution: what the model should generate.
        coins: the number of coins of each person, in the order of the solution.
    """

    problem: str
    solution: str
    coins: tuple[tuple[str, int], ...]


def make_problem(people: int, family: Family, rng: random.Random) -> WordProblem:
    """Draw a problem.

    Args:
        people: number of people, from 2 to 124.
        family: `"restated"` or `"once"`.

    Raises:
        ValueError: an argument is out of range.
    """
    if not 2 <= people <= len(NAMES):
        raise ValueError(f"people={people} must be from 2 to {len(NAMES)}.")
    if family not in FAMILIES:
        raise ValueError(f"family={family!r} must be one of {', '.join(map(repr, FAMILIES))}.")
    given = min(GIVEN[family], people - 1)
    names, coins = rng.sample(NAMES, people), [rng.randint(20, 89) for _ in range(given)]
    facts = [f"{name} has {number} coins." for name, number in zip(names, coins, strict=False)]
    lines = [f" Next is {name}. So {fact}" for name, fact in zip(names, facts, strict=False)]
    for place, other in enumerate(_others(people, given, family, rng), given):
        number = rng.randint(1, 9)
        more = rng.random() < 0.5
        if not 10 <= coins[other] + (number if more else -number) <= 99:  # all numbers of coins have two digits
            more = not more
        left, right = coins[other], names[other]
        coins.append(left + (number if more else -number))
        facts.append(f"{names[place]} has {number} {'more' if more else 'fewer'} coins than {right}.")
        lines.append(
            f" Next is {names[place]}. {facts[-1]} {right} has {left} coins. {left} {'+' if more else '-'} {number} = "
            f"{coins[-1]}. So {names[place]} has {coins[-1]} coins."
        )
    asked = rng.randrange(people)
    question = f"How many coins does {names[asked]} have?"
    end = f" That is everybody. {question} {names[asked]} has {coins[asked]} coins. The answer is {coins[asked]}."
    problem = f"Problem: {' '.join(facts)} {question}\nSolution:"
    return WordProblem(problem, "\n".join(lines) + "\n" + end, tuple(zip(names, coins, strict=True)))


def problems(count: int, people: int, family: Family, seed: int, *, split: str = "test") -> list[WordProblem]:
    """Draw `count` problems. Equal arguments give equal problems, and another split other problems."""
    rng = random.Random(f"{split}/{family}/{people}/{seed}")  # a string seed is the same on every platform
    return [make_problem(people, family, rng) for _ in range(count)]


def coins_of(solution: str) -> list[tuple[str, int]]:
    """The people and their coins that a solution derives, in its order."""
    return [(name, int(coins)) for name, coins in re.findall(r"So (\w+) has (\d+) coins", solution)]


def _others(people: int, given: int, family: Family, rng: random.Random) -> list[int]:
    """For each person who is not given, the index of the earlier person to compare with."""
    others: list[int] = []
    if family == "once":
        unused = list(range(given))
        for place in range(given, people):
            # The first one would get out of reach; otherwise any.
            other = unused[0] if place - unused[0] >= FARTHEST else rng.choice(unused)
            unused.remove(other)
            unused.append(place)
            others.append(other)
        return others
    live = {place: rng.randint(1, MOST_USES) for place in range(given)}
    for place in range(given, people):
        other = rng.choice(list(live))
        others.append(other)
        live[other] -= 1
        if not live[other]:
            del live[other]
            live[place] = rng.randint(1, MOST_USES)
    return others

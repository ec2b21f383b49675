"""Word problems, checked by a reader that solves them from the prompt alone."""

import random
import re

import pytest

from raas_cache.eval import load_task
from raas_cache.eval.word_problems import FAMILIES, FARTHEST, GIVEN, NAMES, coins_of, make_problem, problems


def solve(prompt):
    """The coins of each person, from the sentences of the problem."""
    coins = {}
    for name, number, more, other in re.findall(r"(\w+) has (\d+)(?: (more|fewer))? coins(?: than (\w+))?\.", prompt):
        coins[name] = int(number) if not more else coins[other] + int(number) * (1 if more == "more" else -1)
    return coins, re.search(r"How many coins does (\w+) have\?", prompt)[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_solutions_are_right(family):
    for problem in problems(50, 44, family, seed=1):
        coins, asked = solve(problem.problem)
        assert list(coins.items()) == list(problem.coins) == coins_of(problem.solution)
        assert problem.solution.endswith(f"The answer is {coins[asked]}.")
        assert all(10 <= number <= 99 for number in coins.values())


def uses_of(problem):
    """For each person, the lines of the solution that compare with this person."""
    lines = problem.solution.split("\n")
    return {
        name: [place for place, line in enumerate(lines) if f"coins than {name}." in line] for name, _ in problem.coins
    }


def test_once_compares_with_nobody_twice():
    for problem in problems(50, 60, "once", seed=2):
        for place, uses in enumerate(uses_of(problem).values()):
            assert len(uses) <= 1 and all(use - place <= FARTHEST for use in uses)


def test_restated_compares_with_few_people_often():
    for problem in problems(50, 60, "restated", seed=3):
        uses = list(uses_of(problem).values())
        at_a_time = [
            sum(bool(lines) and place < line <= lines[-1] for place, lines in enumerate(uses)) for line in range(60)
        ]
        assert max(at_a_time) <= GIVEN["restated"]
        assert max(map(len, uses)) > 3


def test_the_same_arguments_give_the_same_problems():
    assert problems(3, 20, "once", 0) == problems(3, 20, "once", 0)
    others = problems(3, 20, "once", 1), problems(3, 20, "once", 0, split="train"), problems(3, 20, "restated", 0)
    assert all(problems(3, 20, "once", 0) != other for other in others)


@pytest.mark.parametrize(
    ("people", "family", "message"),
    [(1, "once", "people=1 must be from 2"), (len(NAMES) + 1, "once", "people="), (5, "twice", "family='twice'")],
)
def test_bad_arguments(people, family, message):
    with pytest.raises(ValueError, match=message):
        make_problem(people, family, random.Random(0))


def test_the_task_marks_every_person_and_the_answer():
    task = load_task("word-problems-once-20", limit=2)
    gold = task.golds[0]
    answer = gold[-3:-1]
    assert task.name == "word-problems-once-20" and len(task.questions) == 2 and task.instruction is None
    assert task.mark(gold, gold) == (answer, True)
    assert task.mark(gold + "\nuser", gold) == (answer, True)
    first = coins_of(gold)[0]
    wrong = gold.replace(f"So {first[0]} has {first[1]} coins", f"So {first[0]} has {first[1] - 1} coins")
    assert task.mark(wrong, gold) == (answer, False)
    assert task.mark("I do not know", gold) == (None, False)
    assert len(load_task("word-problems").golds) == 100

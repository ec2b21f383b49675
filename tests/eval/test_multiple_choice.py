"""GPQA: a file in its format, the options in a fixed random order, and the letters of answers."""

import json
import re
from collections import Counter

import pytest


pytest.importorskip("datasets")
import datasets

from raas_cache.eval import load_task
from raas_cache.eval.tasks.multiple_choice import COLUMNS, PROMPT, mark


def row(number, correct="yes"):
    """A row of the columns of gpqa_diamond.csv that are read, and one more."""
    return dict(zip(COLUMNS, [f"Question {number}?\n", f" {correct}", "no", "perhaps", "never"], strict=True)) | {
        "Record ID": f"rec{number}"
    }


def write(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return f"gpqa-diamond={path}"


def test_the_prompt_of_simple_evals(tmp_path):
    task = load_task(write(tmp_path / "rows.jsonl", [row(1)]))
    (question,), (gold,) = task.questions, task.golds
    head, text, options = question.split("\n\n")
    assert head == PROMPT and text == "Question 1?" and task.instruction == "" and task.name == "gpqa-diamond"
    found = dict(line.split(") ") for line in options.splitlines())
    assert list(found) == ["A", "B", "C", "D"] and sorted(found.values()) == ["never", "no", "perhaps", "yes"]
    assert found[gold] == "yes"


def test_a_csv_file_as_published(tmp_path):
    datasets.Dataset.from_list([row(1), row(2)]).to_csv(tmp_path / "gpqa_diamond.csv")
    written = load_task(write(tmp_path / "rows.jsonl", [row(1), row(2)]))
    assert load_task(f"gpqa-diamond={tmp_path / 'gpqa_diamond.csv'}").questions == written.questions


def test_the_order_of_a_problem_never_changes(tmp_path):
    rows = [row(number) for number in range(400)]
    task = load_task(write(tmp_path / "rows.jsonl", rows))
    backwards = load_task(write(tmp_path / "backwards.jsonl", rows[::-1]), 100, 7)
    assert backwards.questions == task.questions[::-1][:100] and backwards.golds == task.golds[::-1][:100]
    counts = Counter(task.golds)  # 100 of each letter are expected, with a standard deviation of 8.7
    assert counts.keys() == set("ABCD") and all(65 < count < 135 for count in counts.values())


def test_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(*path, **options):
        asked.append((*path, options["split"]))
        return datasets.Dataset.from_list([row(1)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_task("gpqa-diamond").questions) == 1
    assert asked == [("Idavidrein/gpqa", "gpqa_diamond", "train")]


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("So it is iron.\nAnswer: C", "C"),
        ("**Answer: C**", "C"),
        ("**Answer:** C", "C"),
        ("Answer: $C$", "C"),
        ("Answer: (C)", "C"),
        ("Answer: \\boxed{C}", "C"),
        ("ANSWER: C", "C"),
        ("\\boxed{\\text{C}}", "C"),
        ("\\boxed{(C)\\ 5\\,\\mathrm{m}}", "C"),
        ("The correct answer is C.", "C"),
        ("The answer is C) because", "C"),
        ("Answer: A\nNo, wait.\nAnswer: C", "C"),
        ("\\boxed{A} was wrong.\n\nAnswer: C", "C"),
        ("Answer: A</think>Answer: C", "C"),
        ("I first thought so. Answer: C</think>The last", "C"),
        ("Answer: E", None),
        ("Answer: CO2", None),
        ("Answer: c", None),
        ("A common answer", None),
        ("A, B, C or D", None),
        ("", None),
    ],
)
def test_letters(output, answer):
    assert mark(output, "C") == (answer, answer == "C")
    assert mark(output, "B") == (answer, False)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"Question": "1?", "Correct Answer": "1"}], "has no column 'Incorrect Answer 1', only Question, Correct"),
        ([row(1), row(2, correct=" ")], "has an empty 'Correct Answer' in row 1: fill or drop the row"),
    ],
)
def test_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_task(write(tmp_path / "rows.jsonl", rows))

"""The traces in the package, and files with problems and chains of thought."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import raas_cache
from raas_cache.fidelity import Text, load_texts
from raas_cache.fidelity.texts import token_ids


FOLDER = Path(raas_cache.__file__).parent / "fidelity"


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_traces_of_the_package():
    rows = [json.loads(line) for line in (FOLDER / "traces.jsonl").read_text().splitlines()]
    assert load_texts() == [Text(row["problem"], row["reasoning"]) for row in rows]
    assert len(rows) == len({row["problem"] for row in rows}) == 12
    assert (FOLDER / "traces.jsonl").stat().st_size <= 300_000
    page = (FOLDER / "README.md").read_text()
    for row in rows:
        assert row["licence"] in ("MIT", "Apache-2.0", "CC0-1.0") and "llama" not in row["model"].lower()
        line = next(line for line in page.splitlines() if line.startswith(f"| [{row['source'].partition('@')[0]}]"))
        assert row["model"] in line and line.endswith(f"| {row['licence']} |")
        assert re.search(r"@[0-9a-f]{40} ", row["source"])


def test_a_limit_and_other_fields(tmp_path):
    rows = [{"problem": f"p{number}", "reasoning": "r", "more": 1} for number in range(3)]
    path = write(tmp_path / "texts.jsonl", rows[0], "", *rows[1:])
    assert load_texts(path) == [Text(f"p{number}", "r") for number in range(3)]
    assert load_texts(str(path), limit=2) == [Text("p0", "r"), Text("p1", "r")]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"problem": "p"'], r"cannot be read \(line 1, column 16: .*\): give a JSONL file in UTF-8"),
        (['{"problem": "p", "reasoning": "r"}', "[1]"], r"cannot be read \(line 2: this is not a JSON object\)"),
        ([{"problem": "p"}], "has no text 'reasoning' in line 1: add it, or drop the line"),
        ([{"problem": "p", "reasoning": "r"}, {"problem": " ", "reasoning": "r"}], "has no text 'problem' in line 2"),
        ([{"problem": 5, "reasoning": "r"}], "has no text 'problem' in line 1"),
        ([], r"cannot be read \(it is empty\)"),
    ],
)
def test_damaged_files(tmp_path, lines, message):
    with pytest.raises(ValueError, match=f"^data=.*{message}"):
        load_texts(write(tmp_path / "texts.jsonl", *lines))


def test_files_of_another_kind(tmp_path):
    with pytest.raises(ValueError, match=r"^data=.* does not exist: give a JSONL file, or 'traces'"):
        load_texts(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match=r"cannot be read \(its name does not end in .jsonl\)"):
        load_texts(write(tmp_path / "texts.csv", "problem,reasoning"))


def test_special_tokens_are_in_front_of_the_prompt_only():
    tokenizer = AutoTokenizer.from_pretrained(raas_cache.embedded_model())
    found = token_ids(Text("v1 3 v2 4", "v1 3"), tokenizer)
    bare = tokenizer(["v1 3 v2 4", "v1 3"], add_special_tokens=False)["input_ids"]
    assert found.chain == tuple(bare[1])
    assert found.prompt[-4:] == tuple(bare[0]) and len(found.prompt) == 5
    assert tokenizer.decode(found.prompt[0]) == "<s>"


def test_unknown_words():
    tokenizer = AutoTokenizer.from_pretrained(raas_cache.embedded_model())
    with pytest.raises(ValueError, match=r"tokenizer cannot read the data .*: use a model that knows these words"):
        token_ids(Text("How many?", "v1"), tokenizer)

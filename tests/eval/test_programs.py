"""LiveCodeBench: a file in its format, prompts, and programs that run on tests with limits, only when asked for."""

import base64
import json
import os
import pickle
import sys
import time
import zlib

import pytest


pytest.importorskip("datasets")
pytest.importorskip("typer")
import datasets
from typer.testing import CliRunner

from raas_cache.cli import app
from raas_cache.eval import load_task
from raas_cache.eval.tasks import run_program
from raas_cache.eval.tasks.programs import SYSTEM, WITH_STARTER, WITHOUT_STARTER, program_of
from raas_cache.eval.tasks.run_program import Case, passes

from ..helpers import refused


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits need Linux")
LOUD = "ignore:dataset=.*programs that the model writes will run"
ADD = "a, b = map(int, input().split())\nprint(a + b)"
STARTER = "class Solution:\n    def twice(self, values: List[int], factor: int) -> List[int]:\n        "
TWICE = "class Solution:\n    def twice(self, values: List[int], factor: int) -> List[int]:\n"
TWICE += "        return [factor * value for value in values]"


def packed(cases):
    """Private tests as they are published."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


def row(public, private, function=None, starter=""):
    return {
        "question_title": "a title",
        "question_content": "Write a program.",
        "platform": "atcoder",
        "question_id": "abc301_a",
        "contest_date": "2023-05-13T00:00:00",
        "starter_code": starter,
        "public_test_cases": json.dumps(public),
        "private_test_cases": private if isinstance(private, str) else json.dumps(private),
        "metadata": json.dumps({"func_name": function} if function else {}),
    }


def case(given, wanted, kind="stdin"):
    return {"input": given, "output": wanted, "testtype": kind}


SUMS = row([case("1 2\n", "3\n")], packed([case("20 22\n", "42\n")]))
LISTS = row([case("[1, 2]\n3", "[3, 6]", "functional")], [case("[]\n1", "[]", "functional")], "twice", STARTER)


def write(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return f"livecodebench={path}"


def block(program):
    return f"Let us add.\n\n```python\n{program}\n```\n\nThat is all."


class TestOnlyWhenAskedFor:
    def test_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"without a sandbox: .* pass run_code=True \(--run-code\)"):
            load_task(write(tmp_path / "rows.jsonl", [SUMS]))

    def test_is_said_loudly(self, tmp_path):
        with pytest.warns(UserWarning, match=r"programs that the model writes will run on this machine .* 6 seconds"):
            load_task(write(tmp_path / "rows.jsonl", [SUMS]), run_code=True)

    def test_by_the_command(self, tmp_path):
        options = ["eval", "--dataset", write(tmp_path / "rows.jsonl", [SUMS]), "--out", str(tmp_path / "rows")]
        assert "--run-code" in refused(CliRunner().invoke(app, options))
        result = CliRunner().invoke(app, [*options, "--run-code"])  # the embedded model knows no English
        assert "Warning: dataset='livecodebench': programs that the model writes will run" in result.output
        assert "the embedded model only knows chains" in result.output
        words = " ".join(CliRunner().invoke(app, ["eval", "--help"]).output.split())
        assert "DANGER: livecodebench runs the programs that the model writes" in words


@pytest.mark.filterwarnings(LOUD)
class TestTask:
    def test_marks(self, tmp_path):
        task = load_task(write(tmp_path / "rows.jsonl", [SUMS, LISTS]), run_code=True)
        assert task.golds[0].startswith("2 tests, hash ") and task.golds[0] != task.golds[1]
        assert task.mark(block(ADD), task.golds[0]) == (ADD + "\n", True)
        assert task.mark(block(TWICE), task.golds[1])[1] is True
        assert task.mark(block(ADD), task.golds[1])[1] is False
        public_only = "print(3)"
        assert task.mark(block(public_only), task.golds[0]) == (public_only + "\n", False), "private tests count"
        assert task.mark(ADD, task.golds[0]) == (None, False), "no code block"
        assert task.mark(block(ADD), "tests of another file") == (ADD + "\n", False)

    def test_prompts(self, tmp_path):
        task = load_task(write(tmp_path / "rows.jsonl", [SUMS, LISTS]), run_code=True)
        without, with_starter = task.questions
        assert without.startswith(f"{SYSTEM}\n\n### Question:\nWrite a program.\n\n### Format: {WITHOUT_STARTER}\n")
        assert "```python\n# YOUR CODE HERE\n```" in without and WITH_STARTER not in without
        assert f"### Format: {WITH_STARTER}\n```python\n{STARTER}\n```" in with_starter and task.instruction == ""

    def test_of_the_hub(self, monkeypatch):
        asked = []

        def load_dataset(*path, **options):
            asked.append((*path, options))
            return datasets.Dataset.from_list([SUMS])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert len(load_task("livecodebench", run_code=True).questions) == 1
        ((builder, options),) = asked
        assert builder == "json" and options["split"] == "train" and len(options["data_files"]) == 6
        assert options["data_files"][-1] == "hf://datasets/livecodebench/code_generation_lite/test6.jsonl"

    @pytest.mark.parametrize(
        ("broken", "message"),
        [
            (row([], []), r"damaged tests in row 1 \(ValueError: no tests\): restore the row"),
            (SUMS | {"private_test_cases": "AAAA"}, r"damaged tests in row 1 \(ValueError: unreadable private tests"),
            (SUMS | {"public_test_cases": '[{"input": "1"}]'}, r"damaged tests in row 1 \(KeyError: 'output'\)"),
            (SUMS | {"metadata": "{"}, r"damaged tests in row 1 \(JSONDecodeError"),
        ],
        ids=["none", "private", "case", "metadata"],
    )
    def test_damaged_tests(self, tmp_path, broken, message):
        with pytest.raises(ValueError, match=message):
            load_task(write(tmp_path / "rows.jsonl", [SUMS, broken]), run_code=True)

    def test_a_missing_column(self, tmp_path):
        rows = [{name: value for name, value in SUMS.items() if name != "metadata"}]
        with pytest.raises(ValueError, match="has no column 'metadata'"):
            load_task(write(tmp_path / "rows.jsonl", rows), run_code=True)

    def test_a_pickle_of_code_is_not_loaded(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "made"),)

        evil = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
        with pytest.raises(ValueError, match=r"posix.mkdir is not a text"):
            load_task(write(tmp_path / "rows.jsonl", [SUMS | {"private_test_cases": evil}]), run_code=True)
        assert not (tmp_path / "made").exists()

    def test_another_system(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "platform", "darwin")
        with pytest.raises(ValueError, match="needs Linux to limit the memory of programs, and this is darwin"):
            load_task(write(tmp_path / "rows.jsonl", [SUMS]), run_code=True)


@pytest.mark.parametrize(
    ("output", "program"),
    [
        (block("x"), "x\n"),
        ("```\nx\n```", "x\n"),
        ("```python\nx\n```\n```python\ny\n```", "y\n"),
        ("```python\nx\n```\n</think>\n```python\ny\n```", "y\n"),
        ("```python\nx\n```\n</think>That is all.", "x\n"),
        ("```python\nx", None),
        ("x = `y`", None),
        ("```python\nprint('```')\n```", "print('```')\n"),
    ],
)
def test_the_last_code_block(output, program):
    assert program_of(output) == program


class TestRuns:
    @pytest.mark.parametrize(
        ("program", "printed"),
        [
            (ADD, "3"),
            ("import sys\nprint(sum(map(int, sys.stdin.read().split())))", "3\n"),
            ("if __name__ == '__main__':\n    print(3.0)", "3"),
            ("print(' 3 ')\nprint()", "3"),
            ("print(sqrt(9), Counter('aab')['a'])", "3 2"),  # names that LiveCodeBench imports
            ("import sys\nprint(3)\nsys.exit(0)", "3"),
        ],
        ids=range(6),
    )
    def test_right(self, program, printed):
        assert passes(program, [Case("1 2", printed)])

    @pytest.mark.parametrize(
        "program",
        ["print(4)", "print(3, 3)", "print('3\\n3')", "print('three')", "print(3)\nraise SystemExit(1)", "print(3",
         "\ud83d", "print(3)\n1 / 0", "print('NaN')", "import os\nprint(3, flush=True)\nos._exit(7)"],
        ids=range(10),
    )  # fmt: skip
    def test_wrong(self, program):
        assert not passes(program, [Case("1 2", "3")])

    @pytest.mark.parametrize(
        ("program", "right"),
        [
            (TWICE, True),
            ("def twice(values, factor):\n    return tuple(factor * value for value in values)", True),
            ("def twice(values, factor):\n    print('noise')\n    return [3, 6]", True),
            ("def twice(values, factor):\n    return values", False),
            ("def twice(values, factor):\n    return {1}", False),
            ("def twice(values, factor):\n    exit(0)", False),
            ("def thrice(values, factor):\n    return [3, 6]", False),
        ],
        ids=range(7),
    )
    def test_functions(self, program, right):
        assert passes(program, [Case("[1, 2]\n3", "[3, 6]", "twice")]) is right

    def test_all_tests_must_pass(self):
        assert passes(ADD, [Case("1 2", "3"), Case("2 2", "4")])
        assert not passes(ADD, [Case("1 2", "3"), Case("2 2", "5")])

    def test_time_is_limited(self, monkeypatch):
        monkeypatch.setattr(run_program, "SECONDS", 1)
        started = time.perf_counter()
        assert not passes("while True: pass", [Case("", "")])
        assert not passes("import time\ntime.sleep(60)", [Case("", "")])
        assert time.perf_counter() - started < 20

    def test_memory_is_limited(self, monkeypatch):
        program = "print(len(bytearray(1 << 30)))"
        assert passes(program, [Case("", str(1 << 30))])
        monkeypatch.setattr(run_program, "MEMORY", 512 << 20)
        assert not passes(program, [Case("", str(1 << 30))])

    def test_output_is_limited(self, monkeypatch):
        monkeypatch.setattr(run_program, "LARGEST_FILE", 1 << 20)
        assert passes("print('x' * 1000)", [Case("", "x" * 1000)])
        assert not passes("print('x' * (2 << 20))", [Case("", "x" * (2 << 20))])

    def test_no_process_stays(self, tmp_path):
        """A process that the program starts ends with it, also if the program has ended well."""
        late = tmp_path / "late"
        child = f"import time; time.sleep(2); open({str(late)!r}, 'w')"
        program = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])\nprint(3)"
        assert passes(program, [Case("", "3")])
        time.sleep(3)
        assert not late.exists()

    def test_no_secrets_in_the_environment(self, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "secret")
        assert passes("import os\nprint(os.environ.get('HF_TOKEN'))", [Case("", "None")])

    def test_runs_in_a_folder_of_its_own(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert passes("open('here', 'w').close()\nprint(3)", [Case("", "3")])
        assert list(tmp_path.iterdir()) == []

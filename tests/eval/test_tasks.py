"""Data sets: from the Hub's names, local files and chains to prompts and marks; and what `raas-cache eval` refuses."""

import json
import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from raas_cache.eval import chain_task, load_task
from raas_cache.eval.chains import problems
from raas_cache.eval.tasks import HUB_SETS
from raas_cache.eval.tasks.maths import BOXED


pytest.importorskip("datasets")
pytest.importorskip("math_verify")
pytest.importorskip("typer")
import datasets
from typer.testing import CliRunner

from raas_cache.cli import app

from ..helpers import refused, tiny_model


# Rows of the public sets: GSM8K (Cobbe et al., 2021, MIT), MATH-500 (Lightman et al., 2023, MIT).
GSM8K = {
    "question": "A robe takes 2 bolts of blue fiber and half that much white fiber.  How many bolts in total does it "
    "take?",
    "answer": "It takes 2/2=<<2/2=1>>1 bolt of white fiber\nSo the total amount of fabric is 2+1=<<2+1=3>>3 bolts of "
    "fabric\n#### 3",
}
MATH500 = {
    "problem": "Convert the point $(0,3)$ in rectangular coordinates to polar coordinates.  Enter your answer in the "
    "form $(r,\\theta),$ where $r > 0$ and $0 \\le \\theta < 2 \\pi.$",
    "solution": "...",
    "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
}


@pytest.fixture
def tokenizer():
    """Bytes: the embedded model's tokenizer knows no English."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *sorted(alphabet)])}
    bytewise = Tokenizer(models.BPE(vocabulary, []))
    bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bytewise.post_processor = processors.TemplateProcessing("<s> $0", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, bos_token="<s>", eos_token="</s>")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class TestFiles:
    def test_gsm8k_rows(self, tmp_path):
        task = load_task(write(tmp_path / "some.jsonl", [GSM8K, GSM8K | {"answer": "#### 1,234"}]))
        assert task.questions == [GSM8K["question"]] * 2 and task.golds == ["3", "1234"]
        assert task.mark("so it is \\boxed{3}", task.golds[0]) == ("3", True)
        assert task.mark("so it is \\boxed{4}", task.golds[0]) == ("4", False)
        assert task.mark("I do not know", task.golds[0]) == (None, False)

    @pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
    def test_math_rows(self, tmp_path, kind):
        rows = datasets.Dataset.from_list([MATH500] * 3)
        path = tmp_path / f"some.{kind}"
        getattr(rows, f"to_{kind}")(path)
        task = load_task(str(path), limit=2)
        assert task.questions == [MATH500["problem"]] * 2
        assert task.mark("\\boxed{(3,\\pi/2)}", task.golds[0]) == ("(3,\\pi/2)", True)
        assert task.mark("\\boxed{(3,\\pi)}", task.golds[0])[1] is False

    # Rows in the format of each competition: AMC 2023 has decimals, MathArena whole numbers and TeX.
    @pytest.mark.parametrize(
        ("name", "row", "right", "wrong"),
        [
            ("gsm8k", GSM8K, "3", "4"),
            ("math500", MATH500 | {"subject": "Precalculus", "level": 2}, "(3,\\pi/2)", "(3,\\pi)"),
            ("aime24", {"id": 60, "problem": "1+203?", "solution": "...", "answer": "204"}, "204", "205"),
            ("aime25", {"problem": "35*2?", "answer": "070", "id": "0"}, "70", "7"),
            ("aime26", {"problem_idx": 1, "problem": "35*2?", "answer": 70}, "70", "7"),
            ("hmmt25", {"problem_idx": 1, "problem": "x?", "answer": "9 \\sqrt{15}"}, "9\\sqrt{15}", "9\\sqrt{5}"),
            ("amc23", {"id": 0, "question": "30-3?", "answer": 27.0, "url": "https://"}, "27", "26"),
        ],
    )
    def test_the_task_of_a_name_from_a_file(self, tmp_path, name, row, right, wrong):
        task = load_task(f"{name}={write(tmp_path / 'other=name.jsonl', [row])}")
        assert (task.name, task.max_new_tokens) == (name, HUB_SETS[name].max_new_tokens)
        assert task.instruction == BOXED and task.questions == [row.get("problem") or row["question"]]
        marks = [task.mark(f"so \\boxed{{{answer}}}", task.golds[0])[1] for answer in (right, wrong)]
        assert marks == [True, False]

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([{"question": "1+1?", "result": "2"}], "has no column 'answer', only question, result: rename"),
            ([{"text": "1+1?", "answer": "2"}], "has no column 'problem' or 'question' or 'prompt', only text, answer"),
            ([{"question": "1+1?", "answer": "2"}, {"question": "1", "answer": " "}], "empty 'answer' in row 1"),
            ([{"question": None, "answer": "2"}], "empty 'question' in row 0: fill or drop the row"),
        ],
    )
    def test_refused(self, tmp_path, rows, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            load_task(write(tmp_path / "some.jsonl", rows))

    GOOD = '{"question": "1+1?", "answer": "2"}\n'

    @pytest.mark.parametrize(
        ("name", "content", "fault"),
        [
            (
                "latin.jsonl",
                (GOOD + GOOD.replace("1+1", "caf\xe9")).encode("latin-1"),
                "line 2 has byte 0xe9, which is not",
            ),
            (
                "latin.json",
                ("[\n" + GOOD.replace("1+1", "caf\xe9") + "]").encode("latin-1"),
                "line 2 has byte 0xe9, which is not",
            ),
            ("latin.csv", "question,answer\n1,2\ncaf\xe9,2\n".encode("latin-1"), "line 3 has byte 0xe9, which is not"),
            ("utf16.jsonl", GOOD.encode("utf-16"), "line 1 has byte 0xff, which is not UTF-8: save the file as UTF-8"),
            (
                "cut.jsonl",
                (GOOD + "\n" + '{"question": "1\n' + GOOD).encode(),
                "line 3, column 14: Unterminated string",
            ),
            ("list.jsonl", (GOOD + "[1]\n").encode(), "line 2: this is not a JSON object"),
            ("half.jsonl", (GOOD + GOOD.replace("1+1", "\\ud83d")).encode(), "line 2: 'utf-8' codec can't encode"),
            ("nul.jsonl", GOOD.encode() + b"\0\0\0\n", "line 2, column 1: Expecting value"),
            ("deep.jsonl", GOOD.encode() + b"[" * 100_000 + b"\n", "line 2: "),
            ("cut.json", b'[{"question": "1",\n "answer": 2},\n {]', "line 3, column 3: Expecting property name"),
            ("quote.csv", b'question,answer\n1,2\n"1,2\n3,4\n', "line 3: unexpected end of data"),
            ("long.csv", b'question,answer\n"1\n",2\n1,2,3\n', "line 4: 3 fields, where the first line has 2"),
            ("empty.csv", b"\n", "it is empty"),
            ("number.json", b"5", "ArrowInvalid: JSON parse error"),
            ("broken.parquet", b"PAR1", "ArrowInvalid: Parquet"),
        ],
    )
    def test_damage_names_file_and_line(self, tmp_path, name, content, fault):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"dataset='{tmp_path / name}' cannot be loaded ({fault}")):
            load_task(str(tmp_path / name))

    def test_a_byte_order_mark_is_no_damage(self, tmp_path):
        (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + self.GOOD.encode())
        assert load_task(str(tmp_path / "bom.jsonl")).questions == ["1+1?"]

    def test_broken_or_empty(self, tmp_path):
        for name, text in (("broken.jsonl", '{"question": "1'), ("empty.jsonl", "")):
            (tmp_path / name).write_text(text)
            with pytest.raises(
                ValueError, match=f"{name}' cannot be loaded .*check that the format matches the file name"
            ):
                load_task(str(tmp_path / name))


class TestHub:
    @pytest.mark.parametrize("name", [name for name, entry in HUB_SETS.items() if entry.question])
    def test_loads_its_columns_and_split(self, monkeypatch, name):
        entry, asked = HUB_SETS[name], []

        def load_dataset(*path, **options):
            asked.append((*path, options["split"]))
            return datasets.Dataset.from_list([{entry.question: "1+1?", "answer": "2", "id": 0}])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        task = load_task(name)
        assert asked == [(entry.path, entry.name, entry.split)]
        assert (task.questions, task.golds, task.max_new_tokens) == (["1+1?"], ["2"], entry.max_new_tokens)

    def test_any_other(self, monkeypatch):
        rows = datasets.Dataset.from_list([{"prompt": "1+1?", "answer": "so #### 2"}])
        known = {("org/sums", None, "test"): rows}
        monkeypatch.setattr(datasets, "load_dataset", lambda *path, split: known[(*path, split)])
        task = load_task("org/sums")
        assert (task.questions, task.golds) == (["1+1?"], ["2"])

    def test_out_of_reach(self, monkeypatch):
        def load_dataset(*path, **options):
            raise ConnectionError("Couldn't reach the Hub\nand much more")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        message = "dataset='gsm8k' cannot be loaded (ConnectionError: Couldn't reach the Hub): use a local file"
        with pytest.raises(ValueError, match=re.escape(message)):
            load_task("gsm8k")


class TestPrompts:
    def test_of_a_chat_model(self, tmp_path, tokenizer):
        task = load_task(write(tmp_path / "some.jsonl", [GSM8K]))
        tokenizer.chat_template = "<s>{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %} [assistant]"
        (text,) = task.prompts(tokenizer)
        (ids,) = task.token_ids(tokenizer, [text])
        assert text == f"<s>[user] {GSM8K['question']}{BOXED} [assistant]"
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"], "the template brought its own <s>"

    def test_of_a_base_model(self, tmp_path, tokenizer):
        task = load_task(write(tmp_path / "some.jsonl", [GSM8K]))
        (text,) = task.prompts(tokenizer)
        (ids,) = task.token_ids(tokenizer, [text])
        assert text == f"{GSM8K['question']}{BOXED}\n\n"
        assert ids[0] == tokenizer.bos_token_id

    def test_of_chains(self, tokenizer):
        task, sample = load_task("chains-6", limit=3, seed=5), problems(3, 6, seed=5)
        tokenizer.chat_template = "never"
        assert task.prompts(tokenizer) == [problem.prompt for problem in sample]
        assert task.token_ids(tokenizer, task.prompts(tokenizer))[0][0] == tokenizer.bos_token_id, (
            "no template, no instruction"
        )
        assert task.golds == [problem.chain for problem in sample] and task.max_new_tokens == (6 * 12 + 4 + 1) * 3 // 2
        assert [task.mark(gold, gold)[1] for gold in task.golds] == [True] * 3
        assert task.mark(task.golds[0] + " ;", task.golds[0])[1] is False
        assert chain_task(sample, "chains-6") == task
        assert len(load_task("chains").golds) == 100

    @pytest.mark.parametrize(
        ("name", "limit", "message"),
        [
            ("gms8k", None, "dataset='gms8k' is not a data set: did you mean 'gsm8k'?"),
            (
                "poetry",
                None,
                "dataset='poetry' is not a data set: use gsm8k, math500, aime24, aime25, aime26, hmmt25, amc23, ",
            ),
            ("nowhere.jsonl", None, "dataset='nowhere.jsonl' does not exist: check the path"),
            ("gsm8k=nowhere.jsonl", None, "dataset='gsm8k=nowhere.jsonl' does not exist: check the path"),
            ("gsm8k=rows.txt", None, "dataset='gsm8k=rows.txt' must name a .jsonl, .json, .csv, .parquet file after"),
            ("gms8k=nowhere.jsonl", None, "dataset='gms8k=nowhere.jsonl' does not exist: check the path"),
            ("gsm8k", 0, "limit=0 must be at least 1"),
            ("chains-500", None, "num_lines=500"),
        ],
    )
    def test_refused(self, name, limit, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            load_task(name, limit)


class TestCommand:
    def test_runs_a_local_file_on_a_local_model(self, tmp_path, tokenizer):
        """A random model, which solves nothing: what counts is that it runs, is marked and written."""
        tiny_model(dtype=torch.float32, vocab_size=258).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        path = write(tmp_path / "robes.jsonl", [GSM8K, {"question": MATH500["problem"], "answer": MATH500["answer"]}])
        options = ["--model", tmp_path / "model", "--dataset", path, "--method", "dynamic,raas:alpha=0.3"]
        options += ["--budget", 32, "--max-new-tokens", 12, "--page-size", 4, "--out", tmp_path / "rows"]
        result = invoke(*options)
        assert result.exit_code == 0, result.output
        assert "| dynamic | all | all | 0.0% (0.0% to 65.8%) | 12 | 100.0% |" in result.output
        assert "| raas | 32 (exceeded in 2 rows) | 0 | 0.0%" in result.output
        assert "Unless said otherwise: alpha=0.3, page_size=4." in result.output
        rows = [json.loads(line) for line in (tmp_path / "rows" / "rows-0.jsonl").read_text().splitlines()]
        assert [row["gold"] for row in rows if row["method"] == "dynamic"] == [MATH500["answer"], "3"], "longest first"

    def test_several_data_sets_have_folders_of_their_own(self, tmp_path):
        options = ["--dataset", "chains-4,chains-5", "--limit", 1, "--method", "dynamic", "--out", tmp_path / "rows"]
        result = invoke(*options)
        assert result.exit_code == 0, result.output
        for name in ("chains-4", "chains-5"):
            assert f"1 problems from {name}, embedded, " in result.output
            assert json.loads((tmp_path / "rows" / name / "settings.json").read_text())["task"] == name
        error = refused(invoke(*options[:-1], tmp_path / "other", "--dataset", "chains-4,gms8k"))
        assert "did you mean 'gsm8k'" in error and not (tmp_path / "other").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--dataset", "nowhere.jsonl"], "--dataset"),
            (["--preset", "raas-papr"], "'raas-papr' is not a preset: use raas-paper"),
            (["--dataset", "livecodebench"], "marked by running the code that the model writes"),
            (["--base", "smollm2"], "for --base: base='smollm2' is for LoRA adapters, and 'embedded' is none"),
            (["--quantize", "3bit"], "for --quantize: quantize='3bit' must be '4bit' or '8bit'"),
            (["--dataset", "gms8k"], "did you mean 'gsm8k'"),
            (["--method", "raas,rass"], "did you mean 'raas'"),
            (["--method", "raas:alhpa=1"], "alhpa"),
            (["--method", "raas:alpha=7"], "alpha=7"),
            (["--budget", "many"], "--budget"),
            (["--budget", "8"], "budget=8 is less than one page"),
            (["--page-size", 6], "page_size=6"),
            (["--temperature", -1], "temperature=-1"),
            (["--dtype", "int4"], "--dtype"),
            (["--model", "nowhere/at/all", "--limit", 2], "'nowhere/at/all' cannot be loaded"),
            (["--limit", 0], "--limit"),
        ],
    )
    def test_bad_options_are_one_line_and_exit_code_2(self, options, message, tmp_path):
        assert message in refused(invoke(*options, "--out", tmp_path / "rows"))
        assert not (tmp_path / "rows").exists(), "nothing half written"

    def test_a_model_of_another_language(self, tmp_path):
        path = write(tmp_path / "robes.jsonl", [GSM8K])
        result = invoke("--dataset", path, "--out", tmp_path / "rows")
        assert result.exit_code == 2 and "cannot read" in result.output and "only knows chains" in result.output
        assert not (tmp_path / "rows").exists()

    def test_a_folder_without_a_model(self, tmp_path):
        result = invoke("--model", tmp_path, "--out", tmp_path / "rows")
        assert result.exit_code == 2 and "give a folder with config.json" in result.output

    def test_folder_of_other_rows(self, tmp_path):
        options = ["--dataset", "chains-4", "--limit", 1, "--method", "dynamic", "--out", tmp_path / "rows"]
        assert invoke(*options).exit_code == 0
        result = invoke(*options, "--seed", 1)
        assert (
            result.exit_code == 2
            and "contains rows with seed=0, but this run has 1: give another folder" in result.output
        )


def invoke(*options):
    return CliRunner().invoke(app, ["eval", *map(str, options)])

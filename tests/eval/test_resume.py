"""A folder of rows: when a row from before is another one, or marked again; damaged files; two runs at once."""

import importlib
import json
import linecache
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raas_cache import embedded_model
from raas_cache.eval import Decoding, Setting, chain_task, inputs, read_rows, run
from raas_cache.eval.chains import problems
from raas_cache.eval.rows import RowFile
from raas_cache.eval.tasks import Task

from ..helpers import refused
from .rows import ROW


pytest.importorskip("accelerate")

DYNAMIC = [Setting("dynamic")]


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model())


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32).eval()


@pytest.fixture
def task():
    return chain_task(problems(3, 4, seed=0))


METHOD = """
from dataclasses import dataclass
from raas_cache import register_policy
from raas_cache.methods import StreamingLLMPolicy

@register_policy("mine")
@dataclass(frozen=True)
class Mine(StreamingLLMPolicy):
    '''Keeps the newest pages.'''
"""


def parts(task, **changed):
    """The task with something of it changed."""
    names = ("name", "questions", "golds", "max_new_tokens", "instruction", "mark", "marker")
    return Task(**{name: getattr(task, name) for name in names} | changed)


def never(*args, **kwargs):
    raise AssertionError("nothing is to be generated")


class TestGold:
    """What was right before is marked by the gold answers of today, and nothing is generated for it."""

    @pytest.fixture
    def changed(self, task):
        golds = [task.golds[0] + " ;", *task.golds[1:]]
        return parts(task, golds=golds)

    def test_rows_are_marked_again(self, model, tokenizer, task, changed, tmp_path, monkeypatch):
        rows = run(model, tokenizer, task, DYNAMIC, out=tmp_path)
        assert [row.correct for row in rows] == [True] * 3
        monkeypatch.setattr(model, "generate", never)
        with pytest.warns(UserWarning, match=r"rows were marked again; changed rows: 1\."):
            rows = run(model, tokenizer, changed, DYNAMIC, out=tmp_path)
        assert [row.correct for row in rows] == [False, True, True]
        assert [row.gold for row in rows] == changed.golds
        kept = {row.index: row for row in read_rows(tmp_path)}
        assert [asdict(kept[row.index]) for row in rows] == [asdict(row) for row in rows], "on disk, too, for plot"
        run(model, tokenizer, changed, DYNAMIC, out=tmp_path)  # without a warning

    def test_of_all_settings_and_of_rows_that_are_not_asked_for(self, model, tokenizer, task, changed, tmp_path):
        run(model, tokenizer, task, [*DYNAMIC, Setting("raas", 256, {"page_size": 4})], out=tmp_path)
        with pytest.warns(UserWarning, match=r"rows were marked again; changed rows: 2\."):
            run(model, tokenizer, changed, DYNAMIC, out=tmp_path)
        assert sorted(row.index for row in read_rows(tmp_path) if not row.correct) == [0, 0]

    def test_another_marker(self, model, tokenizer, task, tmp_path, monkeypatch):
        run(model, tokenizer, task, DYNAMIC, out=tmp_path)
        monkeypatch.setattr(model, "generate", never)
        stricter = parts(task, mark=lambda output, gold: ("never", False), marker="stricter")
        with pytest.warns(UserWarning, match=r"rows were marked again; changed rows: 3\."):
            rows = run(model, tokenizer, stricter, DYNAMIC, out=tmp_path)
        assert [(row.answer, row.correct) for row in rows] == [("never", False)] * 3

    def test_a_marker_of_unknown_version_marks_all(self, model, tokenizer, task, tmp_path):
        run(model, tokenizer, parts(task, marker=None), DYNAMIC, out=tmp_path)
        other = parts(task, marker=None, mark=lambda output, gold: (None, False))
        with pytest.warns(UserWarning, match=r"rows were marked again; changed rows: 3\."):
            assert not any(row.correct for row in run(model, tokenizer, other, DYNAMIC, out=tmp_path))

    def test_damaged_lines_stay_where_they_are(self, model, tokenizer, task, changed, tmp_path):
        run(model, tokenizer, task, DYNAMIC, out=tmp_path)
        path = tmp_path / "rows-0.jsonl"
        path.write_bytes(b"{damaged\n" + path.read_bytes())
        with pytest.warns(UserWarning, match="marked again|line 1 is damaged"):
            run(model, tokenizer, changed, DYNAMIC, out=tmp_path)
        lines = path.read_bytes().splitlines()
        assert lines[0] == b"{damaged" and len(lines) == 4

    def test_the_marker_of_answers_knows_its_code_and_packages(self, monkeypatch):
        pytest.importorskip("math_verify")
        from raas_cache.eval import answers

        before = answers.marker()
        assert "math-verify 0" in before and "sympy 1" in before
        monkeypatch.setattr(answers, "version", lambda name: "99")
        assert answers.marker() != before


class TestInputs:
    """Each thing that a row depends on: with another one, the folder is refused."""

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("weights", lambda model, tokenizer: model.model.layers[1].mlp.up_proj.weight.data[3, 5].add_(1e-6)),
            ("config", lambda model, tokenizer: setattr(model.config, "rms_norm_eps", 1e-5)),
            ("eos_token_id", lambda model, tokenizer: setattr(model.generation_config, "eos_token_id", 3)),
            ("tokenizer", lambda model, tokenizer: tokenizer.add_tokens(["word"])),
            ("tokenizer", lambda model, tokenizer: setattr(tokenizer, "clean_up_tokenization_spaces", True)),
            ("attention", lambda model, tokenizer: model.set_attn_implementation("eager")),
            ("dtype", lambda model, tokenizer: model.to(torch.bfloat16)),
        ],
    )
    def test_of_the_model(self, model, tokenizer, task, tmp_path, name, change):
        run(model, tokenizer, task, DYNAMIC, out=tmp_path)
        change(model, tokenizer)
        with pytest.raises(ValueError, match=rf"^out=.* contains rows with {name}=.*give another folder"):
            run(model, tokenizer, task, DYNAMIC, out=tmp_path)

    @pytest.mark.parametrize("name", ["transformers", "torch", "raas_cache", "kernels"])
    def test_of_the_code(self, model, tokenizer, task, tmp_path, monkeypatch, name):
        run(model, tokenizer, task, DYNAMIC, out=tmp_path)
        if name == "raas_cache":
            monkeypatch.setattr(inputs, "of_package", lambda: "0.0.1")
        elif name == "kernels":
            monkeypatch.setattr(inputs.raas_kernels, "engine", lambda device: "another")
        else:
            monkeypatch.setattr(getattr(inputs, name), "__version__", "4.0")
        with pytest.raises(ValueError, match=f"contains rows with {name}=.*give another folder"):
            run(model, tokenizer, task, DYNAMIC, out=tmp_path)

    @pytest.mark.parametrize(
        ("name", "other"),
        [
            ("seed", {"decoding": Decoding(temperature=1.0, seed=1)}),
            ("top_p", {"decoding": Decoding(temperature=1.0, top_p=0.5)}),
            ("temperature", {"decoding": Decoding(temperature=0.5)}),
            ("top_k", {"decoding": Decoding(temperature=1.0, top_k=2)}),
        ],
    )
    def test_of_sampling(self, model, tokenizer, task, tmp_path, name, other):
        run(model, tokenizer, task, DYNAMIC, out=tmp_path, decoding=Decoding(temperature=1.0))
        with pytest.raises(ValueError, match=f"contains rows with {name}=.*give another folder"):
            run(model, tokenizer, task, DYNAMIC, out=tmp_path, **other)

    def test_of_a_method_of_ones_own(self, model, tokenizer, task, tmp_path, monkeypatch):
        """Edited, it is another method, and its rows are others; those of the other methods stay."""
        path, out = tmp_path / "my_method.py", tmp_path / "rows"
        mine = [Setting("mine", 64, {"page_size": 4, "min_decode_pages": 1})]
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "my_method", raising=False)
        path.write_text(METHOD)
        module = importlib.import_module("my_method")
        run(model, tokenizer, task, [*DYNAMIC, *mine], out=out)
        assert len(run(model, tokenizer, task, mine, out=out)) == 3
        path.write_text(METHOD + "    edited = True\n")
        linecache.checkcache()
        importlib.reload(module)
        with pytest.raises(ValueError, match="contains rows with mine="):
            run(model, tokenizer, task, mine, out=out)
        assert len(run(model, tokenizer, task, DYNAMIC, out=out)) == 3

    def test_of_a_method_without_a_file(self):
        """Typed in, nobody can say that it is the same the next time."""
        names = {"__name__": "typed_in"}
        exec(METHOD, names)
        (first,) = inputs.of_methods([Setting("mine", 64), *DYNAMIC, Setting("raas", 64)]).values()
        inputs._of_policy.cache_clear()
        assert inputs.of_methods([Setting("mine", 64)]) != {"mine": first}

    def test_an_unknown_origin_is_refused(self, model, tokenizer, task, tmp_path):
        run(model, tokenizer, task, DYNAMIC, out=tmp_path)
        (tmp_path / "settings.json").unlink()
        with pytest.raises(ValueError, match="contains rows with task=None, but this run has 'chains'"):
            run(model, tokenizer, task, DYNAMIC, out=tmp_path)

    def test_a_folder_without_rows_takes_any(self, model, tokenizer, task, tmp_path):
        (tmp_path / "settings.json").write_text('{"task": "gsm8k"}')
        assert len(run(model, tokenizer, task, DYNAMIC, out=tmp_path)) == 3

    def test_what_stays_the_same(self, model, tokenizer, task, tmp_path):
        """A model that was saved and loaded elsewhere, a tokenizer that has padded meanwhile, another greedy batch."""
        run(model, tokenizer, task, DYNAMIC, out=tmp_path / "rows")
        model.save_pretrained(tmp_path / "model")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
        tokenizer(["v1", "v1 v2"], padding=True, truncation=True, max_length=9)
        again.generate = never
        assert len(run(again, tokenizer, task, DYNAMIC, out=tmp_path / "rows", batch_size=1)) == 3

    def test_weights_wherever_they_are(self, model):
        from accelerate import cpu_offload

        wanted = inputs.of_weights(model)
        cpu_offload(model)
        assert any(weight.is_meta for weight in model.state_dict().values())
        assert inputs.of_weights(model) == wanted

    def test_weights_in_chunks_and_subclasses(self, model, monkeypatch):
        from torch.testing._internal.two_tensor import TwoTensor

        before = inputs.of_weights(model)
        monkeypatch.setattr(inputs, "CHUNK", 1000)
        assert inputs.of_weights(model) == before
        state = model.state_dict()
        monkeypatch.setattr(model, "state_dict", lambda: state)
        name = min(state)
        state[name] = TwoTensor(state[name], state[name].clone())
        two = inputs.of_weights(model)
        state[name].b[0] += 1
        assert len({before, two, inputs.of_weights(model)}) == 3

    def test_a_change_of_code_is_another_package(self, tmp_path, monkeypatch):
        before = inputs.of_package()
        assert before.startswith("0.") and ", code " in before
        read = inputs.Path.read_text
        edited = lambda path, **how: read(path, **how) + "# edited" * (path.name == "page_table.py")  # noqa: E731
        monkeypatch.setattr(inputs.Path, "read_text", edited)
        assert inputs.of_package.__wrapped__() != before


DAMAGED = {
    b'{"index": 1,': "line 2 is damaged (column 13: Expecting property name",
    b"\x00\x00\x00": "line 2 is damaged (column 1: Expecting value",
    b"\xff\xff\xff": "line 2 is damaged (",
    b"[" * 100_000: "line 2 is damaged (",
    b"[1, 2]": "line 2 is damaged (it is not a JSON object)",
    b"5": "line 2 is damaged (it is not a JSON object)",
    b"{}": "line 2 is damaged (it has no 'index')",
    ROW.to_json().replace('"tokens": 9', '"tokens": "9"').encode(): "(tokens='9' is not a valid value)",
    ROW.to_json().replace('"tokens": 9', '"tokens": -9').encode(): "(tokens=-9 is not a valid value)",
    ROW.to_json().replace('"tokens": 9', '"tokens": true').encode(): "(tokens=True is not a valid value)",
    ROW.to_json().replace('"correct": true', '"correct": 1').encode(): "(correct=1 is not a valid value)",
    ROW.to_json().replace("2.0", "NaN").encode(): "(seconds=nan is not a valid value)",
    ROW.to_json().replace("512", "[]").encode(): "(budget=[] is not a valid value)",
    ROW.to_json().replace("512", '[64, "x"]').encode(): "(budget=[64, 'x'] is not a valid value)",
    ROW.to_json().replace('"gold"', '"told"').encode(): "(it has no 'gold')",
    ROW.to_json().replace("{", '{"more": 1, ', 1).encode(): "('more' is not a field of a row)",
}


def test_dense_without_a_budget_was_dynamic(tmp_path):
    """Before `dynamic` had its name, `dense` meant `DynamicCache`, and `DenseCache` has a budget."""
    old = replace(ROW, method="dense", budget=None, options={})
    ours = replace(ROW, method="dense", index=1)
    (tmp_path / "rows-0.jsonl").write_text(old.to_json() + ours.to_json(), encoding="utf-8")
    assert [row.setting for row in read_rows(tmp_path)] == [Setting("dynamic"), Setting("dense", 512, {"page_size": 4})]


class TestDamage:
    """One damaged line costs one row, and a warning says which."""

    @pytest.mark.parametrize(("line", "reason"), DAMAGED.items(), ids=range(len(DAMAGED)))
    def test_costs_one_row(self, tmp_path, line, reason):
        path = tmp_path / "rows-0.jsonl"
        first, last = ROW.to_json().encode(), ROW.to_json().replace('"index": 0', '"index": 1').encode()
        path.write_bytes(first + line.rstrip(b"\n") + b"\n\n" + last + b'{"unfinished": ')
        with pytest.warns(UserWarning) as told:
            rows = read_rows(tmp_path)
        assert [row.index for row in rows] == [0, 1]
        (warning,) = told
        assert str(path) in str(warning.message) and reason in str(warning.message)

    def test_its_row_runs_again(self, model, tokenizer, task, tmp_path):
        first = run(model, tokenizer, task, DYNAMIC, out=tmp_path)
        path = tmp_path / "rows-0.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(lines[0] + b"{" + lines[1] + lines[2])
        with pytest.warns(UserWarning, match="line 2 is damaged") as told:
            again = run(model, tokenizer, task, DYNAMIC, out=tmp_path)
        assert len(told) == 1, "said once"
        assert [row.output for row in again] == [row.output for row in first]
        with pytest.warns(UserWarning, match="line 2 is damaged"):
            assert len(read_rows(tmp_path)) == 3

    @pytest.mark.parametrize("text", ['{"task": ', "[1]", "", "\xff"])
    def test_settings_are_named(self, model, tokenizer, task, tmp_path, text):
        run(model, tokenizer, task, DYNAMIC, out=tmp_path)
        (tmp_path / "settings.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=r"^folder=.* has a damaged settings.json \(.*\): restore it, or give"):
            run(model, tokenizer, task, DYNAMIC, out=tmp_path)


class TestTwoAtOnce:
    def test_the_second_is_refused_and_the_first_goes_on(self, tmp_path):
        pytest.importorskip("typer")
        from typer.testing import CliRunner

        from raas_cache.cli import app

        options = ["--dataset", "chains-30", "--limit", "4", "--method", "dynamic", "--batch-size", "1"]
        options += ["--out", str(tmp_path)]
        words = [sys.executable, "-m", "raas_cache.eval", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        first = subprocess.Popen(words, env=environment, **pipes)
        while first.poll() is None and not read_rows(tmp_path):
            time.sleep(0.005)
        error = refused(CliRunner().invoke(app, ["eval", *options]))
        assert first.poll() is None, "it was still at work"
        output, errors = first.communicate()
        assert first.returncode == 0, errors
        assert "--out" in error and "is being written to by another run: wait until it has ended" in error
        assert (
            len((tmp_path / "rows-0.jsonl").read_text().splitlines()) == 4
            and "| dynamic | all | all | 100.0%" in output
        )

    def test_all_processes_of_a_run_are_refused(self, tmp_path):
        """The main process alone looks at the folder; the others must not wait for it."""
        pytest.importorskip("typer")
        RowFile(tmp_path, 0).append(ROW)
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        words += ["-m", "raas_cache.eval", "--dataset", "chains-4", "--method", "dynamic", "--out", str(tmp_path)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        both = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
        assert both.returncode != 0 and "contains rows with task=None, but this run has 'chains-4'" in both.stderr
        assert len(read_rows(tmp_path)) == 1

    def test_a_run_that_failed_lets_go(self, model, tokenizer, task, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(model, "generate", never)
            with pytest.raises(AssertionError):
                run(model, tokenizer, task, DYNAMIC, out=tmp_path)
        assert len(run(model, tokenizer, task, DYNAMIC, out=tmp_path)) == 3

    def test_settings_say_what_rows_depend_on(self, model, tokenizer, task, tmp_path):
        run(model, tokenizer, task, DYNAMIC, out=tmp_path)
        kept = json.loads((tmp_path / "settings.json").read_text())
        assert kept["task"] == "chains" and len(kept["weights"]) == 16 and kept["marker"] == task.marker

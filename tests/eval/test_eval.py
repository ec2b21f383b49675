"""`raas_cache.eval.run` and `raas-cache eval`: rows that do not depend on batches or processes, and are never lost."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from raas_cache import list_methods
from raas_cache.eval import (
    Decoding,
    Setting,
    by_setting,
    chain_task,
    parse_methods,
    read_rows,
    run,
    settings,
    summarize,
    table,
)
from raas_cache.eval.chains import make_problem, problems
from raas_cache.eval.rows import Row, RowFile

from .rows import ROW


pytest.importorskip("accelerate")

ROOT = Path(__file__).parents[2]
DYNAMIC = [Setting("dynamic")]
SMALL = {"page_size": 4, "min_decode_pages": 1}
MEASURED = ("seconds",)
"""Fields of a row that are times."""


def mixed_lengths(count=9, seed=3):
    """Chain problems of 4 to 8 lines, whose prompts and chains differ in length."""
    rng = random.Random(seed)
    return chain_task([make_problem(rng.randint(4, 8), rng, split="test") for _ in range(count)])


def same(rows, but=MEASURED):
    """Rows without what is measured, to be compared."""
    return [{name: value for name, value in asdict(row).items() if name not in but} for row in rows]


class TestRun:
    def test_dense_solves_and_a_small_budget_does_not(self, model, tokenizer):
        task = chain_task(problems(6, 12, seed=0))
        wanted = settings(parse_methods("dynamic,raas", **SMALL), [60, 400])
        dynamic, small, large = by_setting(run(model, tokenizer, task, wanted)).values()
        assert all(row.correct and not row.truncated and row.budget is None for row in dynamic)
        assert [row.output for row in large] == [row.output for row in dynamic] == task.golds
        assert sum(row.correct for row in small) < 3
        assert [row.tokens for row in dynamic] == [len(gold.split()) + 1 for gold in task.golds], "end token included"
        assert all(row.evictions > 0 for row in small) and not any(row.evictions for row in dynamic + large)
        # 3 layers of 2 KV heads, K and V of 64 float32.
        assert {row.kv_bytes for row in small} == {60 * 3 * 2 * 2 * 64 * 4}
        assert {row.kv_bytes for row in dynamic} == {
            (dynamic[0].prompt_tokens + dynamic[0].tokens - 1) * 3 * 2 * 2 * 64 * 4
        }

    @pytest.mark.parametrize("page_size", [4, 16])
    @pytest.mark.parametrize(
        "method",
        [
            *list_methods(),
            *("h2o:prompt=pin", "tova:prompt=pin", "rkv:prompt=pin", "raas:prompt=select", "raas:prompt=evict"),
            *("raas:scoring=minmax", "raas:kv_dtype=int8"),
        ],
    )
    def test_a_row_gives_what_it_gives_alone(self, model, tokenizer, method, page_size):
        task = mixed_lengths()
        (setting,) = settings(parse_methods(method, page_size=page_size, min_decode_pages=1), [80])
        one, many = (run(model, tokenizer, task, [setting], batch_size=size) for size in (1, 9))
        assert len({row.prompt_tokens for row in one}) > 3
        assert len({row.batch for row in many}) < len({row.batch for row in one})
        # The bytes of a cache that grows are those of its batch.
        but = (
            (*MEASURED, "batch", "kv_bytes", "mean_kv_bytes")
            if setting.method in ("dynamic", "quest")
            else (*MEASURED, "batch")
        )
        assert same(one, but) == same(many, but)

    def test_batches_share_prompts_that_fill_as_many_pages(self, model, tokenizer):
        task = mixed_lengths()
        (setting,) = settings(parse_methods("raas", page_size=16, min_decode_pages=1), [96])
        rows = run(model, tokenizer, task, [setting], batch_size=9)
        pages = [{-(-row.prompt_tokens // 16) for row in rows if row.batch == batch} for batch in range(9)]
        assert all(len(of_batch) <= 1 for of_batch in pages)
        assert any(len({row.prompt_tokens for row in rows if row.batch == batch}) > 1 for batch in range(9))

    def test_limit_of_new_tokens_truncates(self, model, tokenizer):
        task = chain_task(problems(3, 8, seed=0))
        rows = run(model, tokenizer, task, [Setting("dynamic")], decoding=Decoding(max_new_tokens=20))
        assert all(row.truncated and row.tokens == 20 and not row.correct for row in rows)
        assert all(task.golds[row.index].startswith(row.output) for row in rows)

    def test_prompt_over_the_budget_runs_and_is_marked(self, model, tokenizer, recwarn):
        task = chain_task(problems(2, 12, seed=0))
        wanted = settings(parse_methods("raas", page_size=4), [16, 256])
        tight, wide = by_setting(run(model, tokenizer, task, wanted)).values()
        assert all(row.over_budget for row in tight) and not any(row.over_budget for row in wide)
        # 48 tokens of prompt and the floor of 8 pages, not the budget.
        assert tight[0].kv_bytes == (48 + 8 * 4) * 3 * 2 * 2 * 64 * 4
        assert "16 (exceeded in 2 rows)" in table(summarize(tight + wide))
        assert not [warning for warning in recwarn if "budget" in str(warning.message)]

    def test_sampling_is_seeded(self, model, tokenizer):
        task = chain_task(problems(4, 8, seed=0))
        first, again, other = (
            run(
                model,
                tokenizer,
                task,
                [Setting("dynamic")],
                batch_size=2,
                decoding=Decoding(temperature=5.0, seed=seed),
            )
            for seed in (0, 0, 1)
        )
        assert same(first) == same(again) != same(other)
        assert first[0].output != first[1].output

    def test_budgets_by_layer(self, model, tokenizer, tmp_path):
        task = chain_task(problems(2, 8, seed=0))
        setting = Setting("raas", (64, 96, 64), SMALL)
        (row, _) = run(model, tokenizer, task, [setting], out=tmp_path)
        assert row.kv_bytes == (64 + 96 + 64) * 2 * 2 * 64 * 4
        assert same(read_rows(tmp_path)) == same(run(model, tokenizer, task, [setting], out=tmp_path))

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: Decoding(max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
            (lambda: Decoding(temperature=-1), "temperature=-1 must not be negative"),
            (lambda: Decoding(top_p=0), r"top_p=0 must be in \(0, 1\]"),
            (lambda: Decoding(top_k=-1), "top_k=-1 must not be negative; 0 is all tokens"),
            (lambda: Decoding(samples=0), "samples=0 must be at least 1"),
            (lambda: Decoding(samples=2), "samples=2 needs a temperature above 0, such as 0.6: greedy samples are"),
            (lambda: run(None, None, None, [], batch_size=0), "batch_size=0 must be at least 1"),
            (lambda: settings([("dynamic", {"alpha": 0.1})], [64]), "method='dynamic' takes neither"),
            (lambda: settings([("rass", {})], [64]), "did you mean 'raas'"),
            (lambda: parse_methods("raas:alpha"), "write 'alpha' as alpha=VALUE"),
        ],
    )
    def test_refused(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()

    def test_methods_are_read_with_their_options(self):
        assert parse_methods("dynamic, raas:alpha=1e-4:prompt=pin,h2o:page_size=8", page_size=4) == [
            ("dynamic", {}),
            ("raas", {"page_size": 4, "alpha": 1e-4, "prompt": "pin"}),
            ("h2o", {"page_size": 8}),
        ]
        both = settings(parse_methods("dynamic,raas,raas"), [64, 128])
        assert [setting.key for setting in both] == [("dynamic", None), ("raas", 64), ("raas", 128)]
        assert Setting("raas", 64, {"page_size": 4, "alpha": 0.1}).label == "raas:alpha=0.1:page_size=4"


class TestResume:
    def test_rows_are_run_once(self, model, tokenizer, tmp_path, monkeypatch):
        task, wanted = chain_task(problems(5, 6, seed=0)), settings(parse_methods("dynamic,raas", **SMALL), [64])
        first = run(model, tokenizer, task, wanted, out=tmp_path, batch_size=2)
        calls = count_calls(monkeypatch, model)
        assert same(run(model, tokenizer, task, wanted, out=tmp_path, batch_size=2), ()) == same(first, ())
        assert calls == []
        more = [*wanted, Setting("raas", 96, SMALL)]
        assert len(run(model, tokenizer, task, more, out=tmp_path, batch_size=5)) == 15 and len(calls) == 1

    def test_a_batch_that_was_cut_short_runs_again_as_it_was(self, model, tokenizer, tmp_path):
        task, wanted = mixed_lengths(), settings(parse_methods("raas", page_size=16, min_decode_pages=1), [96])
        first = run(model, tokenizer, task, wanted, out=tmp_path, batch_size=4)
        path = tmp_path / "rows-0.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:2]) + lines[2][:40])
        assert len(read_rows(tmp_path)) == 2, "a line without an end does not count"
        assert same(run(model, tokenizer, task, wanted, out=tmp_path, batch_size=4)) == same(first)
        kept = path.read_bytes().splitlines(keepends=True)
        assert kept[:2] == lines[:2] and len(kept) == len(lines) == len({json.loads(line)["index"] for line in kept})

    def test_rows_end_one_by_one(self, model, tokenizer, tmp_path, monkeypatch):
        """A row is on disk while its batch goes on."""
        task, seen = mixed_lengths(), []
        append = RowFile.append
        monkeypatch.setattr(RowFile, "append", lambda file, row: (append(file, row), seen.append(read_rows(tmp_path))))
        rows = run(model, tokenizer, task, [Setting("dynamic")], out=tmp_path, batch_size=9)
        assert [len(found) for found in seen] == list(range(1, len(task.golds) + 1))
        assert {row.seconds for row in rows if row.batch == rows[0].batch} != {rows[0].seconds}

    def test_marking_takes_none_of_the_seconds(self, model, tokenizer, monkeypatch):
        """Neither of the row that is marked, nor of the rows that end later."""
        clock = [0.0]

        def mark(output, gold):
            clock[0] += 1000
            return output, output == gold

        monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
        task = replace(mixed_lengths(4), mark=mark)
        rows = run(model, tokenizer, task, DYNAMIC, batch_size=4)
        assert len(rows) == 4 and clock == [4000.0] and {row.seconds for row in rows} == {0.0}

    def test_a_folder_of_other_rows_is_refused(self, model, tokenizer, tmp_path):
        task, wanted = chain_task(problems(2, 6, seed=0)), [Setting("dynamic")]
        run(model, tokenizer, task, wanted, out=tmp_path, about={"model": "this"})
        with pytest.raises(
            ValueError, match=r"contains rows with model='this', but this run has 'that': give another folder"
        ):
            run(model, tokenizer, task, wanted, out=tmp_path, about={"model": "that"})
        with pytest.raises(ValueError, match="max_new_tokens=115, but this run has 9: give another folder"):
            run(model, tokenizer, task, wanted, out=tmp_path, decoding=Decoding(max_new_tokens=9))
        with pytest.raises(ValueError, match="contains row 0 with another prompt: give another folder"):
            run(model, tokenizer, chain_task(problems(2, 6, seed=1)), wanted, out=tmp_path)

    def test_whatever_text_comes_back(self, tmp_path):
        row = replace(ROW, output="a\r\n\u2028\x85\ud83d {")
        for process in (0, 1):
            RowFile(tmp_path, process).append(replace(row, index=process))
        assert read_rows(tmp_path) == [row, replace(row, index=1)]

    def test_a_file_is_no_folder(self, model, tokenizer, tmp_path):
        (tmp_path / "rows").write_text("")
        with pytest.raises(ValueError, match="is a file: give a folder"):
            run(model, tokenizer, chain_task(problems(1, 6, seed=0)), [Setting("dynamic")], out=tmp_path / "rows")

    def test_kill_at_a_random_row(self, tmp_path):
        """`kill -9`, again and again, then to the end: the table of a run that nobody disturbed."""
        options = ["--dataset", "chains-12", "--limit", 10, "--budget", "64,128", "--page-size", 4, "--batch-size", 2]
        options += ["--method", "dynamic,raas", "--out"]
        whole = command(*options, tmp_path / "whole")
        assert whole.returncode == 0, whole.stderr
        rng, cut, kills = random.Random(time.time_ns()), tmp_path / "cut", 0
        while kills < 2:
            process = start(*options, cut)
            stop_at = len(read_rows(cut)) + rng.randint(1, 8)
            while process.poll() is None and len(read_rows(cut)) < stop_at:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            assert len(read_rows(cut)) >= stop_at
        rest = command(*options, cut)
        assert rest.returncode == 0, rest.stderr
        assert columns(rest.stdout) == columns(whole.stdout)
        lines = (cut / "rows-0.jsonl").read_text().splitlines()
        assert len(lines) == len({Row(**json.loads(line)).key for line in lines}) == 30
        assert sorted_rows(cut) == sorted_rows(tmp_path / "whole")


class TestProcesses:
    def test_two_give_row_for_row_what_one_gives(self, tmp_path):
        options = ["--dataset", "chains-8", "--limit", 7, "--budget", "48", "--page-size", 4, "--batch-size", 2]
        options += ["--method", "dynamic,raas,h2o", "--out"]
        one = command(*options, tmp_path / "one", CUDA_VISIBLE_DEVICES="")
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2]
        launch += ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0]
        two = command(*options, tmp_path / "two", launch=[*launch, "-m", "raas_cache.eval"], CUDA_VISIBLE_DEVICES="")
        assert one.returncode == two.returncode == 0, one.stderr + two.stderr
        assert sorted_rows(tmp_path / "one") == sorted_rows(tmp_path / "two")
        assert columns(one.stdout) == columns(two.stdout)
        of_each = [len((tmp_path / "two" / f"rows-{process}.jsonl").read_text().splitlines()) for process in (0, 1)]
        assert sum(of_each) == 21 and min(of_each) > 5, "both worked"
        assert two.stdout.count("| method |") == 1


class TestSummary:
    def test_table_adds_up(self):
        row = replace(ROW, options={}, prompt_tokens=50, tokens=100, kv_bytes=1000, mean_kv_bytes=500.0)
        rows = [row, replace(row, index=1, correct=False, tokens=300, truncated=True, seconds=4.0, kv_bytes=3000)]
        rows += [replace(row, index=2, batch=2, seconds=1.0, over_budget=True, evictions=10)]
        (summary,) = summarize(rows)
        assert (summary.rows, summary.correct, summary.truncated, summary.over_budget) == (3, 2, 1, 1)
        assert summary.mean_tokens == pytest.approx(500 / 3)
        assert summary.tokens_per_second == 100, "500 tokens in a batch of 4 s and one of 1 s"
        assert summary.kv_bytes == 3000 and summary.evictions == 6 and summary.mean_kv_bytes == 500
        assert (summary.problems, summary.samples, summary.devices) == (3, 1, ("CPU",))
        assert summary.interval == pytest.approx((0.2077, 0.9385), abs=1e-4)
        assert table([summary]).splitlines()[-1] == (
            "| raas | 512 (exceeded in 1 rows) | 462 | 66.7% (20.8% to 93.9%) | 167 | 33.3% | 100 | 3,000 | 500 | 6 |"
        )


def count_calls(monkeypatch, model):
    calls, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **inputs: (calls.append(1), generate(**inputs))[1])
    return calls


def start(*options, launch=(sys.executable, "-m", "raas_cache.eval"), **environment):
    pytest.importorskip("typer")
    environment = {**os.environ, **environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(word) for word in (*launch, *options)], env=environment, cwd=ROOT, **pipes)


def command(*options, **how):
    process = start(*options, **how)
    process.stdout, process.stderr = process.communicate()
    return process


def columns(output):
    """The table without the column of tokens/s."""
    return [
        [cell for index, cell in enumerate(line.split("|")) if index != 7]
        for line in output.splitlines()
        if line.startswith("|")
    ]


def sorted_rows(folder):
    return sorted(
        same(read_rows(folder)), key=lambda row: (row["method"], str(row["budget"]), row["index"], row["sample"])
    )

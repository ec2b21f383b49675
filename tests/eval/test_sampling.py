"""Sampled rows: their random numbers, and that they do not depend on batch, process, cache or interruption."""

import random
import signal
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from raas_cache.eval import Decoding, Setting, chain_task, parse_methods, read_rows, run, settings
from raas_cache.eval.chains import make_problem, problems
from raas_cache.eval.sampling import RowSampler

from .test_eval import command, count_calls, same, sorted_rows, start


pytest.importorskip("accelerate")

CPU = torch.device("cpu")
DYNAMIC = [Setting("dynamic")]
HOT = Decoding(temperature=4.0, top_p=0.99, samples=3)
PROBABILITIES = torch.tensor([0.4, 0.25, 0.0, 0.2, 0.1, 0.05])


@pytest.fixture(scope="module")
def task():
    rng = random.Random(5)
    return chain_task([make_problem(rng.randint(3, 6), rng, split="test") for _ in range(5)])


def drawn(keys, scores, step=0, limit=4, temperature=1.0, top_p=1.0, top_k=0):
    """The tokens that the sampler draws at a step: `[rows]`. `scores`: `[vocabulary]`, the same for all rows."""
    how = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    sampler = RowSampler(keys, limit, 7, device=CPU, **how)
    found = sampler(torch.zeros(len(keys), 7 + step, dtype=torch.long), scores.expand(len(keys), -1))
    assert found.isfinite().sum(1).tolist() == [1] * len(keys), "one token is left"
    return found.argmax(1)


class TestRowSampler:
    KEYS = tuple((0, index, 0) for index in range(20_000))

    @pytest.mark.parametrize(
        ("how", "kept"),
        [
            ({}, [0, 1, 3, 4, 5]),
            ({"top_k": 3}, [0, 1, 3]),
            ({"top_p": 0.8}, [0, 1, 3]),  # 0.4 and 0.25 sum to less than 0.8
            ({"top_p": 0.5, "top_k": 4}, [0, 1]),
            ({"top_k": 1}, [0]),
        ],
    )
    def test_draws_from_the_distribution(self, how, kept):
        counts = torch.bincount(drawn(self.KEYS, PROBABILITIES.log(), **how), minlength=6)
        expected = torch.zeros(6)
        expected[kept] = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
        assert counts[expected == 0].tolist() == [0] * int((expected == 0).sum())
        torch.testing.assert_close(counts / len(self.KEYS), expected, rtol=0, atol=0.012)

    def test_temperature(self):
        counts = torch.bincount(drawn(self.KEYS, PROBABILITIES.log(), temperature=0.5), minlength=6)
        torch.testing.assert_close(
            counts / len(self.KEYS), PROBABILITIES**2 / (PROBABILITIES**2).sum(), rtol=0, atol=0.012
        )

    def test_steps_and_rows_are_independent(self):
        scores = torch.zeros(2)
        steps = torch.stack([drawn(self.KEYS, scores, step) for step in range(4)]).double()
        assert steps.corrcoef().fill_diagonal_(0).abs().max() < 0.03
        rows = steps[0, :10_000], steps[0, 10_000:]
        assert torch.stack(rows).corrcoef()[0, 1].abs() < 0.03

    def test_depends_on_key_and_step_alone(self):
        """Not on the other rows, on the limit, or on torch's generator."""
        scores = torch.randn(50, generator=torch.Generator().manual_seed(0))
        keys = [(1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3)]
        together = [drawn(keys, scores, step) for step in range(4)]
        torch.manual_seed(9)
        for row, key in enumerate(keys):
            alone = [drawn([key], scores, step, limit=9).item() for step in range(4)]
            assert alone == [tokens[row].item() for tokens in together]
        assert len({tuple(tokens[row].item() for tokens in together) for row in range(4)}) == 4

    @pytest.mark.parametrize(("number", "token"), [(1.0, 3), (np.nextafter(0.0, 1.0), 1)])
    def test_ends_of_the_range(self, monkeypatch, number, token):
        """The largest and the smallest random number draw tokens whose probability is above 0."""
        monkeypatch.setattr("raas_cache.eval.sampling._uniform", lambda key, count: np.full(count, number))
        scores = torch.tensor([-torch.inf, 0.3, 0.7, 0.1, -torch.inf])
        assert drawn([(0,)], scores).tolist() == [token]


class TestRows:
    def test_any_batch_gives_the_same(self, model, tokenizer, task):
        caches = settings(parse_methods("dynamic,raas", page_size=4, min_decode_pages=1), [48])
        runs = [run(model, tokenizer, task, caches, batch_size=size, decoding=HOT) for size in (1, 4, 15)]
        but = ("seconds", "batch", "kv_bytes", "mean_kv_bytes")
        assert same(runs[0], but) == same(runs[1], but) == same(runs[2], but)
        assert [(row.index, row.sample) for row in runs[0][:15]] == [(i, s) for i in range(5) for s in range(3)]
        assert len({row.output for row in runs[0][:3]}) == 3, "samples differ"

    def test_seed(self, model, tokenizer, task):
        rows = run(model, tokenizer, task, DYNAMIC, decoding=HOT)
        other = run(model, tokenizer, task, DYNAMIC, decoding=replace(HOT, seed=1))
        assert {row.seed for row in rows} == {0} and {row.seed for row in other} == {1}
        assert all(one.output != two.output for one, two in zip(rows, other, strict=True))

    def test_caches_that_keep_everything_give_the_same(self, model, tokenizer, task):
        """Rows of two settings have the same random numbers, so their differences are due to the cache."""
        dynamic = run(model, tokenizer, task, DYNAMIC, decoding=HOT)
        raas = run(model, tokenizer, task, [Setting("raas", 512, {"page_size": 4})], decoding=HOT)
        assert [row.output for row in raas] == [row.output for row in dynamic]

    def test_nothing_of_the_generation_config_is_used(self, model, tokenizer, task, monkeypatch):
        wanted = [same(run(model, tokenizer, task, DYNAMIC, decoding=how)) for how in (HOT, Decoding())]
        config = type(model.generation_config)(
            eos_token_id=model.generation_config.eos_token_id, do_sample=True, top_k=1, top_p=0.1, temperature=0.1,
            min_p=0.9, repetition_penalty=9.0, no_repeat_ngram_size=1, min_new_tokens=60, num_beams=2,
            max_new_tokens=3, suppress_tokens=[5, 6, 7],
        )  # fmt: skip
        monkeypatch.setattr(model, "generation_config", config)
        assert [same(run(model, tokenizer, task, DYNAMIC, decoding=how)) for how in (HOT, Decoding())] == wanted
        assert model.generation_config is config

    def test_more_samples_in_the_same_folder(self, model, tokenizer, task, tmp_path, monkeypatch):
        whole = run(model, tokenizer, task, DYNAMIC, batch_size=5, decoding=HOT)
        two = run(model, tokenizer, task, DYNAMIC, out=tmp_path, batch_size=5, decoding=replace(HOT, samples=2))
        calls = count_calls(monkeypatch, model)
        three = run(model, tokenizer, task, DYNAMIC, out=tmp_path, batch_size=5, decoding=HOT)
        assert same([row for row in three if row.sample < 2], ()) == same(two, ())
        # Prompts of one and of two spans cannot share a batch, so each has a batch of samples 2.
        assert 1 <= len(calls) <= 2 and same(three, ("seconds", "batch", "kv_bytes", "mean_kv_bytes")) == same(
            whole, ("seconds", "batch", "kv_bytes", "mean_kv_bytes")
        )
        # Fewer samples use a part of the folder.
        assert same(run(model, tokenizer, task, DYNAMIC, out=tmp_path, decoding=replace(HOT, samples=2)), ()) == same(
            two, ()
        )

    def test_bytes_over_time(self, model, tokenizer):
        """`DynamicCache` grows by a token in each step, and a full window does not grow."""
        task = chain_task(problems(1, 6, seed=0))
        (dynamic,) = run(model, tokenizer, task, DYNAMIC)
        (window,) = run(model, tokenizer, task, [Setting("window", 16, {"page_size": 4, "min_decode_pages": 4})])
        token = 3 * 2 * 2 * 64 * 4
        held = [dynamic.prompt_tokens + step for step in range(dynamic.tokens)]
        assert dynamic.mean_kv_bytes == np.mean(held) * token and dynamic.kv_bytes == held[-1] * token
        assert window.kv_bytes >= window.mean_kv_bytes > 0.8 * window.kv_bytes


def test_one_process_or_killed_and_finished_by_two(tmp_path):
    options = ["--dataset", "chains-5", "--limit", 4, "--budget", 40, "--page-size", 4, "--batch-size", 3]
    options += ["--method", "dynamic,raas", "--samples", 4, "--temperature", 4, "--top-p", 0.99, "--top-k", 20]
    one = command(*options, "--out", tmp_path / "one", CUDA_VISIBLE_DEVICES="")
    assert one.returncode == 0, one.stderr
    wanted = sorted_rows(tmp_path / "one")
    assert len(wanted) == 32 and len({row["output"] for row in wanted}) > 16
    two = tmp_path / "two"
    process = start(*options, "--out", two, CUDA_VISIBLE_DEVICES="")
    while process.poll() is None and len(read_rows(two)) < 4:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 4 <= len(read_rows(two)) < 32, "it was killed in the middle"
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    rest = command(*options, "--out", two, launch=(*launch, "-m", "raas_cache.eval"), CUDA_VISIBLE_DEVICES="")
    assert rest.returncode == 0, rest.stderr
    assert sorted_rows(two) == wanted
    assert (two / "rows-1.jsonl").exists(), "both processes worked"
    assert "pass@1 (95 % interval) | pass@4 | maj@4 |" in rest.stdout

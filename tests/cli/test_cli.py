"""`raas-cache demo` on the embedded model: what it prints, and how it refuses bad options."""

import re

import pytest
import torch


pytest.importorskip("typer")
from typer.testing import CliRunner

from raas_cache import pretrained
from raas_cache.cli import app, demo_reading
from raas_cache.eval import chains
from raas_cache.fidelity.texts import Text

from ..helpers import refused


@pytest.fixture(autouse=True)
def same_threads():
    """The demo sets torch's threads for its whole process, which here is everyone's."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(*options):
    return CliRunner().invoke(app, ["demo", *map(str, options)])


def table_rows(output):
    """Cells of each body row."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]


def test_demo_streams_a_chain_and_compares():
    # 8 + 3 * 12 + 4 = 48 tokens of prompt and 12 * 12 + 5 = 149 of chain; with 72 tokens nearly all is evicted.
    result = run("--problems", 3, "--lines", 12, "--budget", 72, "--budget", 256, "--page-size", 4)
    assert result.exit_code == 0, result.output
    assert "Traceback" not in result.output

    dynamic, small, large = table_rows(result.output)
    assert dynamic[0] == "dynamic" and small[0] == large[0] == "raas"
    assert (small[1], large[1]) == ("72 (37%)", "256 (130%)")
    assert dynamic[2] == large[2], "nothing evicted: equal to DynamicCache"
    assert dynamic[-1] == "-" and int(small[-1].replace(",", "")) > 0 and large[-1] == "0"
    assert float(small[-2].split()[0]) < float(dynamic[-2].split()[0])


def test_demo_shows_the_chain_line_by_line():
    result = run("--problems", 1, "--lines", 6, "--budget", 256)
    lines = [line for line in result.output.splitlines() if " holds " in line]
    assert len(lines) == 7, "six steps and the answer"
    shape = re.compile(
        r"(#\d+ v\d+ [+-] v\d+ = \d [+-] \d = v\d+ \d ;|#\d+ v\d+ \? \d) +right  holds (\d+) of \2 tokens"
    )
    assert all(shape.fullmatch(line) for line in lines), lines


def test_default_budgets_fit_short_problems():
    result = run("--problems", 1, "--lines", 1)
    assert result.exit_code == 0, result.output
    budgets = [row[1] for row in table_rows(result.output)[1:]]
    assert 1 <= len(budgets) == len(set(budgets))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--problems", 0], "--problems"),
        (["--lines", 0], "--lines"),
        (["--lines", 1000], "--lines"),
        (["--budget", 10], "--budget"),
        (["--budget", "many"], "--budget"),
        (["--alpha", 1.5], "alpha=1.5"),
        (["--page-size", 6], "page_size=6"),
        (["--page-size", 0], "--page-size"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(options, message):
    assert message in refused(run(*options))


def test_demo_is_a_command_of_its_own():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "demo" in result.output


def test_a_pretrained_model_reads_and_writes(monkeypatch):
    """With the embedded model in place of SmolLM2: the same steps on a text of its words."""
    model, tokenizer = pretrained("chain_reasoner")
    (problem,) = chains.problems(1, 40, seed=0)
    monkeypatch.setattr(demo_reading, "load_model", lambda name, **_: (model, tokenizer))
    monkeypatch.setattr(demo_reading, "load_texts", lambda limit: [Text(problem.prompt, problem.chain)])
    monkeypatch.setattr(demo_reading, "QUESTION", "v1 3 v2 4 | #3 + v1 #4 ?")
    result = run("--model", "smollm2", "--budget", 192, "--budget", 1024)
    assert result.exit_code == 0, result.output
    dynamic, *bounded = table_rows(result.output)
    assert [row[0] for row in (dynamic, *bounded)] == ["dynamic", "window", "raas", "window", "raas"]
    assert [row[3] for row in bounded[2:]] == ["+0.000", "+0.000"], "nothing was evicted"
    assert float(bounded[0][2]) > float(dynamic[2]) and bounded[0][3] != "+0.000"
    assert float(bounded[0][-1].split()[0]) < float(dynamic[-1].split()[0])
    held, seen = map(int, re.search(r"The cache holds (\d+) of (\d+) tokens", result.output).groups())
    assert held <= 64 < seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lines", 5], "--lines"),
        (["--problems", 2], "--problems"),
        (["--seed", 1], "--seed"),
        (["--alpha", 2.0], "alpha=2.0"),
    ],
)
def test_options_that_a_pretrained_model_does_not_take(monkeypatch, options, message):
    monkeypatch.setattr(demo_reading, "load_model", lambda name, **_: pretrained("chain_reasoner"))
    monkeypatch.setattr(demo_reading, "load_texts", lambda limit: [Text("v1 3 v2 4", "v1 3 " * 20)])
    assert message in refused(run("--model", "smollm2", *options))


def test_an_unknown_model_of_the_demo():
    error = refused(run("--model", "nowhere/at/all"))
    assert "for --model: name='nowhere/at/all' cannot be loaded" in error


def test_the_embedded_model_is_no_adapter():
    assert "for --base: remove it: --model embedded is no LoRA adapter" in refused(run("--base", "smollm2"))

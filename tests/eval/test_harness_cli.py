"""lm-evaluation-harness by its own command line: every type of request, `--batch_size auto` and `--log_samples`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("lm_eval")

from raas_cache import embedded_model
from raas_cache.eval.chains import problems


ROOT = Path(__file__).parents[2]
SAMPLE = [*problems(2, 8, seed=0), *problems(2, 10, seed=0)]
HEAD = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/chains.jsonl}}, cache_dir: {folder}/datasets}}
test_split: test
doc_to_text: "{{{{prompt}}}}"
"""
TASKS = {
    # Log-likelihoods of two continuations: the right chain, and another chain.
    "choice": """
output_type: multiple_choice
doc_to_choice: "{{[chain, other]}}"
doc_to_target: 0
metric_list: [{metric: acc}]
""",
    # The log-likelihood of a continuation, and whether it is the greedy one.
    "likelihood": """
output_type: loglikelihood
doc_to_target: " {{chain}}"
metric_list: [{metric: perplexity, aggregation: perplexity}, {metric: acc}]
""",
    # The log-likelihood of a text, in windows of max_length tokens.
    "rolling": """
output_type: loglikelihood_rolling
doc_to_target: "{{prompt}} {{chain}} {{prompt}} {{chain}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "generate": """
output_type: generate_until
doc_to_target: "{{chain}}"
generation_kwargs: {until: ["</s>"], do_sample: false, max_gen_toks: 150}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    lines = [
        json.dumps({"prompt": problem.prompt, "chain": problem.chain, "other": other.chain})
        for problem, other in zip(SAMPLE, SAMPLE[1:] + SAMPLE[:1], strict=True)
    ]
    (folder / "chains.jsonl").write_text("\n".join(lines))
    for name, body in TASKS.items():
        (folder / f"{name}.yaml").write_text(HEAD.format(name=name, folder=folder) + body)
    return folder


@pytest.fixture(scope="module")
def by_command_line(tasks, tmp_path_factory):
    """The results and the logged answers of each task, and what the command printed; each command runs once."""
    known = {}

    def run(model, arguments, names=tuple(TASKS)):
        if (model, arguments) not in known:
            out = tmp_path_factory.mktemp("out")
            command = [sys.executable, "-m", "raas_cache.eval.harness", "run", "--model", model, "--model_args"]
            # A rolling request has more than 256 tokens, so it is read in windows.
            command += [f"pretrained={embedded_model()},max_length=256,dtype=float32{arguments}"]
            command += ["--tasks", ",".join(names), "--include_path", tasks, "--output_path", out, "--device", "cpu"]
            command += ["--batch_size", "auto", "--max_batch_size", "4", "--log_samples"]
            path = os.pathsep.join(map(str, (ROOT / "src", ROOT / "kernels")))
            env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
            ended = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True)
            assert ended.returncode == 0, ended.stderr
            (file,) = out.rglob("results_*.json")
            samples = {}
            for name in names:
                (log,) = out.rglob(f"samples_{name}_*.jsonl")
                found = [json.loads(line) for line in log.read_text().splitlines()]
                samples[name] = [one["resps"] for one in sorted(found, key=lambda one: one["doc_id"])]
            known[model, arguments] = json.loads(file.read_text()), samples, ended.stdout + ended.stderr
        return known[model, arguments]

    return run


SMALL = ",method=raas,budget=64,page_size=4,min_decode_pages=4"
LARGE = ",method=raas,budget=256,page_size=4"


@pytest.mark.parametrize("name", TASKS)
def test_equals_hf_where_nothing_is_evicted(by_command_line, name):
    dense, samples, _ = by_command_line("hf", "")
    ours, of_ours, _ = by_command_line("raas", LARGE)
    assert len(samples[name]) == len(SAMPLE) and of_ours[name] == samples[name]
    assert ours["results"][name] == dense["results"][name]
    assert ours["config"]["pages_evicted"] == 0


def test_a_small_budget_changes_only_what_is_generated(by_command_line):
    _, samples, _ = by_command_line("hf", "")
    ours, of_ours, printed = by_command_line("raas", SMALL)
    for name in ("choice", "likelihood", "rolling"):
        assert of_ours[name] == samples[name]
    assert of_ours["generate"] != samples["generate"] and ours["config"]["pages_evicted"] > 0
    assert "log-likelihood requests decode nothing, so nothing is evicted" in printed


def test_the_requests_tell_models_apart(by_command_line):
    """The tests above could not fail if every log-likelihood were 0."""
    results, samples, _ = by_command_line("hf", "")
    assert results["results"]["choice"]["acc,none"] == 1.0
    assert len({str(answer) for answer in samples["rolling"]}) == len(SAMPLE)


def test_the_batch_size_is_found(by_command_line):
    for model, arguments in (("hf", ""), ("raas", SMALL)):
        assert "Determined Largest batch size: 4" in by_command_line(model, arguments)[2] or (
            "Determined largest batch size: 4" in by_command_line(model, arguments)[2]
        )

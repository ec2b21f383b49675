"""The model type of lm-evaluation-harness, on the embedded model and a local task, offline."""

import configparser
import importlib
import inspect
import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from transformers import DynamicCache, T5Config, T5ForConditionalGeneration


pytest.importorskip("lm_eval")
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from raas_cache import DenseCache, RaaSCache, embedded_model, list_methods
from raas_cache.common.upstream import CACHE_ARGUMENT
from raas_cache.eval.chains import problems
from raas_cache.eval.harness import RaaSLM, option_names
from raas_cache.methods.registry import CACHES


ROOT = Path(__file__).parents[2]
# Of two lengths, so that a batch has left padding: prompts of 36 and 42 tokens, chains of 101 and 125.
SAMPLE = [*problems(2, 8, seed=0), *problems(2, 10, seed=0)]
LARGE, SMALL = 256, 64
TASK = """
task: chains
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/chains.jsonl}}, cache_dir: {folder}/datasets}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{chain}}}}"
generation_kwargs: {{until: ["</s>"], do_sample: false, max_gen_toks: 150}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module", autouse=True)
def offline():
    def refuse(*_):
        raise AssertionError("the network was asked")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.socket.connect", refuse)
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with the task `chains`."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [json.dumps({"prompt": problem.prompt, "chain": problem.chain}) for problem in SAMPLE]
    (folder / "chains.jsonl").write_text("\n".join(lines))
    (folder / "chains.yaml").write_text(TASK.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def evaluate(tasks):
    """The exact chains, the completions and the results' config of a run; each run is done once."""
    known, manager = {}, TaskManager(include_path=str(tasks), include_defaults=False)

    def run(batch_size=4, **arguments):
        key = batch_size, *sorted(arguments.items())
        if key not in known:
            found = lm_eval.simple_evaluate(
                model="raas",
                model_args={"pretrained": embedded_model(), **arguments},
                tasks=["chains"],
                task_manager=manager,
                batch_size=batch_size,
                device="cpu",
                bootstrap_iters=0,
            )
            samples = sorted(found["samples"]["chains"], key=lambda sample: sample["doc_id"])
            texts = [sample["resps"][0][0] for sample in samples]
            known[key] = found["results"]["chains"]["exact_match,none"], texts, found["config"]
        return known[key]

    return run


def lm(**arguments):
    return RaaSLM(**{"pretrained": embedded_model(), "device": "cpu", "batch_size": 4, "page_size": 4, **arguments})


class TestGeneration:
    def test_dynamic_solves_all(self, evaluate):
        exact, texts, config = evaluate(method="dynamic")
        assert (exact, texts) == (1.0, [problem.chain for problem in SAMPLE])
        assert (config["cache"], config["budget"], config["pages_evicted"]) == ("dynamic", None, 0)

    @pytest.mark.parametrize("method", [name for name in list_methods() if name in CACHES])
    def test_large_budget_equals_dynamic(self, evaluate, method):
        exact, texts, config = evaluate(method=method, budget=LARGE, page_size=4)
        assert (exact, texts) == evaluate(method="dynamic")[:2]
        assert (config["cache"], config["budget"]) == (f"{method}:page_size=4", LARGE)
        assert config["pages_evicted"] == 0

    def test_small_budget_evicts(self, evaluate):
        exact, texts, config = evaluate(method="raas", budget=SMALL, page_size=4, min_decode_pages=4)
        assert config["pages_evicted"] > 0
        assert exact < 1.0 and texts != evaluate(method="dynamic")[1]

    def test_options_reach_the_method(self, evaluate):
        common = {"method": "raas", "budget": SMALL, "page_size": 4, "min_decode_pages": 4}
        assert evaluate(**common, alpha=1e-4)[1] != evaluate(**common)[1]

    @pytest.mark.parametrize("page_size", [4, 16], ids=["pages apart", "same pages"])
    @pytest.mark.parametrize("method", ["raas", "h2o", "quest"])
    def test_batch_size_changes_nothing(self, evaluate, method, page_size):
        """With small pages the two lengths of prompt fill different numbers of them."""
        common = {"method": method, "budget": SMALL, "page_size": page_size, "min_decode_pages": 1}
        assert evaluate(1, **common)[:2] == evaluate(4, **common)[:2]

    @pytest.mark.parametrize(
        ("method", "kind"), [("raas", RaaSCache), ("dynamic", DynamicCache), ("dense", DenseCache)]
    )
    def test_each_call_gets_a_new_cache(self, monkeypatch, method, kind):
        model = lm(batch_size=2) if method == "raas" else RaaSLM(embedded_model(), method, device="cpu", batch_size=2)
        caches, generate = [], model.model.generate

        def recording(**kwargs):
            caches.append(kwargs[CACHE_ARGUMENT])
            assert caches[-1].get_seq_length() == 0
            return generate(**kwargs)

        monkeypatch.setattr(model.model, "generate", recording)
        gen_kwargs = {"until": ["</s>"], "max_gen_toks": 8}
        model.generate_until([Instance("generate_until", {}, (p.prompt, gen_kwargs), i) for i, p in enumerate(SAMPLE)])
        assert len(caches) == len(set(map(id, caches))) == 2
        assert {type(cache) for cache in caches} == {kind}
        assert len(caches[0].layers) == model.model.config.num_hidden_layers

    def test_the_tasks_limit_holds(self):
        model = lm()
        assert model.model.generation_config.max_new_tokens > 5
        request = Instance("generate_until", {}, (SAMPLE[0].prompt, {"until": [], "max_gen_toks": 5}), 0)
        (text,) = model.generate_until([request])
        assert len(text.split()) == 5


class TestLogLikelihood:
    requests = tuple(Instance("loglikelihood", {}, (problem.prompt, f" {problem.chain}"), 0) for problem in SAMPLE)

    def test_warns_that_nothing_is_evicted(self):
        with pytest.warns(UserWarning, match=r"method='raas': log-likelihood requests decode nothing.*that generates"):
            found = lm(budget=SMALL).loglikelihood(self.requests)
        assert found == HFLM(embedded_model(), device="cpu", batch_size=4).loglikelihood(self.requests)

    @pytest.mark.filterwarnings("error:method=")
    def test_dynamic_gives_no_warning(self):
        RaaSLM(embedded_model(), "dynamic", device="cpu").loglikelihood(self.requests[:1])

    @pytest.mark.filterwarnings("error:method=")
    def test_generation_has_nothing_to_warn_of(self):
        model = lm(batch_size="auto", max_batch_size=2, max_length=64)  # the search for the batch size is one forward
        model.generate_until([Instance("generate_until", {}, ("v1 1", {"until": [], "max_gen_toks": 1}), 0)])


class TestArguments:
    def test_default_budget(self):
        assert lm().setting.budget == 1024

    def test_options_of_every_method_are_the_caches(self):
        assert {"alpha", "top_ratio", "importance_weight", "recent_ratio", "page_size"} <= set(option_names())
        assert not {"config", "policy", "budget"} & set(option_names())

    def test_no_option_hides_one_of_hf(self):
        assert not {"method", "budget", *option_names()} & inspect.signature(HFLM).parameters.keys()

    def test_arguments_of_from_pretrained_pass_through(self):
        assert lm(attn_implementation="eager").model.config._attn_implementation == "eager"

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"method": "raass"}, ValueError, "name='raass' is not a method: did you mean 'raas'"),
            ({"budget": 0}, ValueError, "budget=0 must be positive"),
            ({"budget": "many"}, TypeError, "budget='many' must be an int"),
            ({"budget": [64]}, ValueError, r"budget=\(64,\) has 1 entries, but the model has a layer 1"),
            ({"page_size": 6}, ValueError, "page_size=6 must be a power of two"),
            ({"alpha": 2.0}, ValueError, "alpha=2.0 must lie in"),
            ({"method": "h2o", "alpha": 0.1}, TypeError, "'h2o' has no option 'alpha'"),
            ({"method": "dynamic"}, ValueError, "method='dynamic' takes neither a budget nor options.*page_size"),
            ({"aplha": 0.1}, TypeError, "'aplha': neither the model nor the cache has it.*alpha"),
        ],
        ids=str,
    )
    def test_bad_arguments(self, arguments, error, message):
        with pytest.raises(error, match=message):
            lm(**arguments)

    def test_unknown_argument_with_a_loaded_model(self):
        model = lm()
        with pytest.raises(TypeError, match=r"aplha=0\.1: neither the model nor the cache has it"):
            lm(pretrained=model.model, tokenizer=model.tokenizer, aplha=0.1)

    def test_encoder_decoder(self):
        config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=275)
        model = T5ForConditionalGeneration(config)
        with pytest.raises(ValueError, match="backend='seq2seq' is not served: use a decoder-only model"):
            lm(pretrained=model, tokenizer=embedded_model())


class TestDoors:
    def test_registered(self):
        assert get_model("raas") is RaaSLM

    def test_entry_point(self):
        """What later lm_eval looks for; see its docs/plugins.md."""
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        name, _, value = setup["options.entry_points"]["lm_eval.models"].strip().partition(" = ")
        assert name == "raas"
        assert EntryPoint(name, value, "lm_eval.models").load() is RaaSLM

    def test_lm_eval_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
        monkeypatch.delitem(sys.modules, "raas_cache.eval.harness")
        with pytest.raises(ImportError, match=r"needs lm_eval: pip install raas-cache\[harness\]"):
            importlib.import_module("raas_cache.eval.harness")

    def test_command_line(self, tasks, tmp_path):
        arguments = f"pretrained={embedded_model()},method=raas,budget={LARGE},page_size=4,alpha=1e-4"
        command = [sys.executable, "-m", "raas_cache.eval.harness", "run", "--model", "raas", "--model_args", arguments]
        command += ["--tasks", "chains", "--include_path", tasks, "--batch_size", "4", "--device", "cpu"]
        command += ["--output_path", tmp_path]
        path = os.pathsep.join(map(str, (ROOT / "src", ROOT / "kernels")))
        env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        run = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        (file,) = tmp_path.rglob("results_*.json")
        found = json.loads(file.read_text())
        assert found["results"]["chains"]["exact_match,none"] == 1.0
        assert (found["config"]["cache"], found["config"]["budget"]) == ("raas:alpha=0.0001:page_size=4", LARGE)

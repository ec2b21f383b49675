"""Bad values for the options of every command: one line that blames the right option, exit code 2, no traceback."""

import json

import pytest


pytest.importorskip("typer")
pytest.importorskip("accelerate")
import typer
from transformers import AutoConfig
from typer.testing import CliRunner

import raas_cache
from raas_cache.cli import app
from raas_cache.common import arguments
from raas_cache.eval import read_rows

from ..helpers import refused


HUGE = "9" * 30
BASES = {
    "demo": ["--problems", "1", "--lines", "1"],
    "plan": ["--model", "small"],
    "bench": ["--method", "raas", "--seen", "64", "--budget", "64", "--steps", "2", "--copies", "1", "--device", "cpu",
              "--page-size", "4"],
    "kernels": ["--kernels", "--budget", "64", "--steps", "2", "--device", "cpu", "--page-size", "4"],
    "eval": ["--dataset", "chains-4", "--limit", "1", "--method", "raas", "--budget", "64", "--max-new-tokens", "2"],
}  # fmt: skip
SIZES = ["-1", "0", "1.5", "many", "", HUGE]
LISTS = ["-1", "0", "1.5", "1,,2", "", HUGE]
SEEDS = ["-1", "1.5", HUGE, str(1 << 32)]
SHARES = ["-1", "nan", "inf", "much"]
VALUES = [
    *(("demo", option, SIZES) for option in ("--problems", "--lines", "--budget", "--page-size")),
    *(("bench", option, SIZES) for option in ("--page-size", "--steps", "--copies")),
    *(("eval", option, SIZES) for option in ("--page-size", "--limit", "--max-new-tokens")),
    *(("plan", option, SIZES) for option in ("--prompt", "--tokens", "--page-size")),
    *(("plan", option, LISTS) for option in ("--batch", "--budget")),
    *(("bench", option, LISTS) for option in ("--seen", "--batch", "--budget")),
    *(("kernels", option, LISTS) for option in ("--batch", "--budget")),
    ("eval", "--budget", [*LISTS, "8"]),
    ("eval", "--batch-size", SIZES[:-1]),
    *((command, "--page-size", ["6"]) for command in BASES),
    *((command, "--seed", SEEDS) for command in ("demo", "bench", "kernels", "eval")),
    ("demo", "--alpha", SHARES),
    ("plan", "--memory", [*SHARES, "0", "1e308"]),
    ("eval", "--temperature", [*SHARES, "1e-320", "1e-9"]),
    ("eval", "--top-p", [*SHARES, "0", "1.1"]),
    ("eval", "--top-k", ["-1", "1.5", "many", "", HUGE]),
    ("eval", "--samples", [*SIZES, "2"]),  # 2 needs a temperature
    *((command, "--dtype", ["", "int4"]) for command in ("plan", "bench", "kernels", "eval")),
    *((command, "--device", ["", "tpu", "cuda:0"]) for command in ("bench", "kernels")),
    ("bench", "--mode", ["", "Eager", "eager,"]),
    *((command, "--model", ["", "nowhere/at/all"]) for command in ("plan", "bench", "kernels", "eval")),
    ("eval", "--dataset", ["", "chains-0", "chains-" + HUGE, "nowhere.jsonl"]),
    ("bench", "--method", ["", "raas,", "rass", "raas:alpha=1"]),
]
METHODS = {
    "raas:alhpa=1": "name='raas' has no option 'alhpa': did you mean 'alpha'?",
    "h2o:recent=0.5": "name='h2o' has no option 'recent': did you mean 'recent_ratio'?",
    "quest:alpha=1": "name='quest' has no option 'alpha': use one of config, dense_layers, granularity,",
    "raas:self=1": "name='raas' has no option 'self'",
    "raas:budget=64": "method='raas:budget=64': 'budget' applies to all methods: remove it here",
    "raas:config=1": "'config' applies to all methods",
    "raas:name=1": "'name' applies to all methods",
    "raas:alpha=0.1:alpha=0.2": "'alpha' is given twice: remove one of the two",
    "raas:alpha": "write 'alpha' as alpha=VALUE",
    "raas:alpha=" + "-" * 20_000 + "1": "alpha='---",
    "raas:alpha={[]:1}": "write '1}' as 1}=VALUE",
    "raas:page_size=2.5": "page_size=2.5 must be an int",
    "raas:page_size=6": "page_size=6 must be a power of two",
    "dynamic:alpha=1": "method='dynamic' takes neither",
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Nothing is written into the folder that the tests run in."""
    monkeypatch.chdir(tmp_path)


def invoke(command, *options):
    words = [{"kernels": "bench"}.get(command, command), *BASES.get(command, []), *options]
    return CliRunner().invoke(app, list(map(str, words)))


@pytest.mark.parametrize(("command", "option", "values"), VALUES, ids=lambda part: part if str(part) == part else "")
def test_the_right_option_is_blamed(command, option, values, tmp_path):
    for value in values:
        error = refused(invoke(command, option, value))
        assert f"for '{option}'" in error or f"for {option}:" in error or f"'{option}' /" in error, (value, error)
    assert list(tmp_path.iterdir()) == [], "nothing half written"


@pytest.mark.parametrize(("method", "message"), METHODS.items(), ids=range(len(METHODS)))
def test_options_of_methods(method, message):
    error = refused(invoke("eval", "--method", method))
    assert "for --method:" in error and message in error


@pytest.mark.parametrize("command", ["bench", "kernels", "eval"])
@pytest.mark.parametrize("path", ["file", "file/x", "/proc/x", "/dev/null", "/dev/null/x", "a" * 300, "dangling"])
def test_out_that_cannot_be_written_to(command, path, tmp_path, monkeypatch):
    """Known before a model is loaded or a step is timed."""
    (tmp_path / "file").write_text("kept")
    (tmp_path / "dangling").symlink_to("/nowhere/at/all")
    for work in (
        "raas_cache.cli.bench.build_model",
        "raas_cache.cli.bench.kernel_bench.run_kernels",
        "raas_cache.eval.command.load",
    ):
        monkeypatch.setattr(work, lambda *args, **kwargs: pytest.fail("at work already"))
    error = refused(invoke(command, "--out", path))
    assert "for --out:" in error and "cannot be written to" in error and error.endswith("give another folder.")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_folder_that_was_there_stays(tmp_path):
    (tmp_path / "results").mkdir()
    refused(invoke("eval", "--out", tmp_path / "results", "--model", "nowhere/at/all"))
    refused(invoke("eval", "--out", tmp_path / "results" / "a" / "b", "--model", "nowhere/at/all"))
    assert list(tmp_path.rglob("*")) == [tmp_path / "results"]


@pytest.mark.parametrize("path", ["nowhere", "file", "file/x", "/proc/x", "a" * 300, "dangling"])
def test_plot_of_no_folder(path, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("kept")
    refused(invoke("plot", path))


CONFIGS = {
    "[1]": "AttributeError",
    '{"model_type": "llama"\n,,}': "not a valid JSON file",
    '{"model_type": "llama", "hidden_size": "many"}': "hidden_size",
    '{"model_type": "llama", "hidden_size": 0}': "ZeroDivisionError",
    '{"model_type": "vit"}': "Unrecognized configuration class",
}


@pytest.mark.parametrize("command", ["plan", "bench", "kernels"])
@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_configs_that_make_no_model(command, config, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(config)
    assert "for --model:" in refused(invoke(command, "--model", tmp_path / "model"))


@pytest.mark.parametrize("command", ["plan", "bench", "kernels"])
def test_code_that_comes_with_a_config_is_neither_run_nor_asked_for(command, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    of = {"AutoConfig": "configuration_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Mine"}
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": of}))
    (folder / "configuration_mine.py").write_text("import pathlib\npathlib.Path('ran').touch()\nclass Mine: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    error = refused(invoke(command, "--model", folder))
    assert "for --model:" in error and "needs code of its own, which this command does not run" in error
    # A model that transformers knows itself is served, whatever code comes with it.
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    known = {"model_type": "llama", "auto_map": of, "vocab_size": 64, **small}
    (folder / "config.json").write_text(json.dumps(known))
    result = invoke(command, "--model", folder)
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "ran").exists()


def test_a_config_whose_code_is_trusted_is_planned_in_python(tmp_path, monkeypatch):
    """As the message says: who has run the code that made the config is not asked for the model's."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    folder = tmp_path / "model"
    folder.mkdir()
    of = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": of, **small}))
    (folder / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class Mine(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert raas_cache.plan(config, 1024).paged_layers == 2


def test_damaged_files_of_a_folder_are_named(tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "rows"
    assert invoke("eval", "--out", folder).exit_code == 0
    rows = folder / "rows-0.jsonl"
    rows.write_bytes(rows.read_bytes() + b"{damaged\n")
    result = invoke("plot", folder)
    assert result.exit_code == 0, result.output
    (warning,) = (line for line in result.output.splitlines() if line.startswith("Warning: "))
    assert f"{rows}, line 2 is damaged (column 2" in warning
    (folder / "bench.json").write_text('{"rows": [{"case": {}}]}')
    error = refused(invoke("plot", folder))
    assert f"'{folder / 'bench.json'}' is not a file that bench wrote (row 0: TypeError: " in error
    (folder / "settings.json").write_text("{")
    assert "has a damaged settings.json (Expecting property name" in refused(invoke("plot", folder))
    error = refused(invoke("eval", "--out", folder))
    assert "for --out:" in error and "has a damaged settings.json" in error
    assert len(rows.read_bytes().splitlines()) == 2


def test_too_little_memory_is_said_and_other_faults_are_not_hidden():
    with (
        pytest.raises(typer.BadParameter, match="there is not enough memory") as refusal,
        arguments.refusing("--budget"),
    ):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate\nmore")
    assert refusal.value.param_hint is None
    with pytest.raises(RuntimeError, match="a fault"), arguments.refusing("--budget"):
        raise RuntimeError("a fault")


def test_a_model_that_no_cache_can_serve_is_blamed_on_the_model(tmp_path):
    from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM

    from raas_cache import embedded_model

    AutoTokenizer.from_pretrained(embedded_model()).save_pretrained(tmp_path / "bloom")
    BloomForCausalLM(BloomConfig(vocab_size=275, hidden_size=32, n_layer=2, n_head=4)).save_pretrained(
        tmp_path / "bloom"
    )
    error = refused(invoke("eval", "--model", tmp_path / "bloom", "--out", tmp_path / "rows"))
    assert "for --model:" in error
    assert read_rows(tmp_path / "rows") == []

"""What is shipped: the packages, the embedded model, and a wheel that holds all of it."""

import ast
import graphlib
import importlib.metadata
import importlib.resources
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import raas_cache
from raas_cache.eval.chains import VOCABULARY, problems


ROOT = Path(__file__).parents[2]
MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's package `kernels`"


def test_kernels_import_neither_transformers_nor_raas_cache():
    assert run("import sys, raas_kernels; print({'transformers', 'raas_cache'} & set(sys.modules))") == "set()\n"


def imports_of(path):
    """The modules of the package that a file names in its imports, those for type checkers too."""
    inside = path.relative_to(ROOT / "src").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = [*inside[: len(inside) - node.level + 1], *(node.module or "").split(".")]
            start = ".".join(part for part in module if part)
            yield from (start if node.module else f"{start}.{name.name}" for name in node.names)


def test_arrows_point_one_way():
    """No file imports, over whatever way, one that imports it; the package's face hands names on and does not count."""
    files = {
        ".".join(path.relative_to(ROOT / "src").with_suffix("").parts): path
        for path in (ROOT / "src" / "raas_cache").rglob("*.py")
        if path.name != "__init__.py"
    }
    arrows = {name: set(imports_of(path)) & files.keys() for name, path in files.items()}
    assert arrows["raas_cache.cache.paged_cache"] >= {
        "raas_cache.attention.dispatch",
        "raas_cache.cache.paged_layer",
        "raas_cache.tracing.recording",
    }
    order = list(graphlib.TopologicalSorter(arrows).static_order())  # raises a CycleError that names the circle
    layers = ["engine.page_table", "cache.paged_layer", "cache.paged_cache", "methods.raas", "cli.commands"]
    places = [order.index(f"raas_cache.{name}") for name in layers]
    assert places == sorted(places)


def test_package_is_typed():
    for package in ("raas_cache", "raas_kernels"):
        assert importlib.resources.files(package).joinpath("py.typed").is_file()


def test_public_names():
    assert {"RaaSCache", "embedded_model", "register", "unregister"} <= set(raas_cache.__all__)
    assert all(hasattr(raas_cache, name) for name in raas_cache.__all__)


def test_embedded_model_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in Path(raas_cache.embedded_model()).iterdir()}
    assert files.keys() >= MODEL_FILES
    assert sum(files.values()) <= 8e6


def test_embedded_model_loads_and_reasons_offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    tokenizer = AutoTokenizer.from_pretrained(raas_cache.embedded_model())
    model = AutoModelForCausalLM.from_pretrained(raas_cache.embedded_model(), dtype=torch.float32).eval()
    assert set(VOCABULARY) <= tokenizer.get_vocab().keys()
    (problem,) = problems(1, num_lines=8, seed=0)
    inputs = tokenizer(problem.prompt, return_tensors="pt", return_token_type_ids=False)
    cache = raas_cache.RaaSCache(budget=256)
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=120, do_sample=False)
    completion = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert completion == problem.chain


def test_wheel_holds_everything(tmp_path):
    # Of a copy: a build leaves its folders behind, and setuptools would ship what an earlier build left in them.
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("src", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for path in ROOT.iterdir():
        if path.name in {"pyproject.toml", "setup.cfg", "README.md", "LICENSE"}:
            shutil.copy(path, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, source]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("raas_cache-*-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())

    for folder, package in (("src", "raas_cache"), ("kernels", "raas_kernels")):
        code = {path.relative_to(source / folder).as_posix() for path in (source / folder / package).rglob("*.py")}
        assert code, package
        assert code <= names
    data = {f"raas_cache/models/chain_reasoner/{name}" for name in MODEL_FILES}
    assert data | {"raas_cache/py.typed", "raas_kernels/py.typed", "raas_kernels/ops/attend/configs.json"} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"raas_cache", "raas_kernels"}


def test_metadata():
    try:
        metadata = importlib.metadata.metadata("raas-cache")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("raas-cache is not installed, only on the path")
    assert metadata["Requires-Python"] == ">=3.10"
    assert {"cli", "dev", "eval", "harness", "train", "viz"} <= set(metadata.get_all("Provides-Extra"))
    scripts = importlib.metadata.entry_points(group="console_scripts", name="raas-cache")
    assert {script.value for script in scripts} == {"raas_cache.cli:app"}

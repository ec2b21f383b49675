"""What is shipped: the packages, the embedded model, and a wheel that holds all of it."""

import ast
import graphlib
import importlib.metadata
import importlib.resources
import re
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


# The rooms of docs/architecture.md, the lowest first. A file imports from its own room and from lower floors.
FLOORS = [
    {"raas_kernels"},
    {"engine"},
    {"attention"},
    {"cache"},
    {"common"},
    {"methods", "models", "tracing"},
    {"bench", "serving", "sizing", "viz"},
    {"raas_cache"},  # __init__.py and register.py
    {"eval"},
    {"fidelity"},
    {"probes"},
    {"cli"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Imports that point up. None of them runs when the package is imported.
UPWARD = {
    # A cache gives each layer a trace, and Jupyter displays a cache: types only, and an import when it is displayed.
    ("raas_cache.cache.paged_cache", "raas_cache.tracing.recording"),
    ("raas_cache.cache.modes", "raas_cache.tracing.recording"),
    ("raas_cache.cache.paged_layer", "raas_cache.tracing.layer_trace"),
    ("raas_cache.cache.inspection", "raas_cache.viz.html"),
}


def files_of_packages():
    """Every file of both packages, by the name of its module."""
    for folder in ("src", "kernels"):
        package = "raas_cache" if folder == "src" else "raas_kernels"
        for path in (ROOT / folder / package).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


FILES = dict(files_of_packages())


def imports_of(name, only_at_import=False):
    """The modules that a file imports: at its top, for type checkers, and inside functions.

    Args:
        only_at_import: leave out what does not run when the file is imported.
    """
    package = name.split(".") if FILES[name].name == "__init__.py" else name.split(".")[:-1]
    tree = ast.parse(FILES[name].read_text())
    for node in tree.body if only_at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (start, node.module) if part)
            for alias in node.names:
                yield f"{module}.{alias.name}" if f"{module}.{alias.name}" in FILES else module


ARROWS = {name: set(imports_of(name)) for name in FILES}


def room_of(name):
    package, _, inside = name.partition(".")
    if package != "raas_cache":
        return package
    return inside.partition(".")[0] if inside.partition(".")[0] in FLOOR else "raas_cache"


def test_arrows_point_down():
    """No file imports from a higher floor, or from another room of its floor."""
    rooms = {room_of(name) for name in FILES}
    assert rooms == FLOOR.keys()
    assert {room_of(target) for target in ARROWS["raas_cache.cache.paged_layer"] & FILES.keys()} >= {"attention"}
    up = {
        (name, target)
        for name, targets in ARROWS.items()
        for target in targets & FILES.keys()
        if room_of(target) != room_of(name) and FLOOR[room_of(target)] >= FLOOR[room_of(name)]
    }
    assert up == {(name, target) for name, target in UPWARD if room_of(name) != room_of(target)}


def test_arrows_make_no_circle():
    arrows = {name: {target for target in targets & FILES.keys() if target != name} for name, targets in ARROWS.items()}
    for name, target in UPWARD:
        arrows[name].remove(target)  # raises a KeyError if the import is gone: then remove its line from UPWARD
    list(graphlib.TopologicalSorter(arrows).static_order())  # raises a CycleError that names the circle


def test_arrows_that_point_up_do_not_run_at_import():
    assert not {(name, target) for name, target in UPWARD if target in imports_of(name, only_at_import=True)}


@pytest.mark.parametrize(
    ("room", "may_import"),
    [
        ("raas_kernels", set()),
        ("engine", {"raas_kernels"}),
        ("attention", {"engine", "transformers"}),
        ("cache", {"raas_kernels", "engine", "attention", "transformers", "tracing", "viz"}),  # the last two: UPWARD
        ("methods", {"raas_kernels", "engine", "cache"}),
        ("tracing", {"engine", "cache", "common"}),
    ],
)
def test_what_a_room_knows(room, may_import):
    known = {*FLOOR, "transformers"}
    names = [name for name in FILES if room_of(name) == room]
    assert names
    found = {room_of(target) for name in names for target in ARROWS[name] if target.split(".")[0] != "raas_cache"}
    found |= {room_of(target) for name in names for target in ARROWS[name] if target in FILES}
    assert (found & known) - {room} == may_import


def test_architecture_page_shows_the_arrows():
    """The drawing has each room on its floor with the rooms that it imports; every room has a paragraph."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    lines = re.findall(r"^ *(\d+) +(\w+) +▼ (.*)$", page.split("```")[1], re.MULTILINE)
    assert {room: int(floor) for floor, room, _ in lines} == FLOOR
    for _, room, imports in lines:
        found = {
            room_of(target)
            for name in FILES
            if room_of(name) == room
            for target in ARROWS[name] & FILES.keys()
            if (name, target) not in UPWARD
        }
        assert set(re.findall(r"\w+", imports)) & FLOOR.keys() == found - {room}, room
        if room != "raas_cache":
            assert re.search(rf"^### `(?:src/raas_cache/|kernels/){room}/`", page, re.MULTILINE), room


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

    for folder, package in (("src", "raas_cache"), ("src", "raas_cache_cli"), ("kernels", "raas_kernels")):
        code = {path.relative_to(source / folder).as_posix() for path in (source / folder / package).rglob("*.py")}
        assert code, package
        assert code <= names
    data = {f"raas_cache/models/chain_reasoner/{name}" for name in MODEL_FILES}
    data |= {f"{package}/py.typed" for package in ("raas_cache", "raas_cache_cli", "raas_kernels")}
    assert data | {"raas_kernels/ops/attend/configs.json"} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "raas_cache",
        "raas_cache_cli",
        "raas_kernels",
    }


def test_metadata():
    try:
        metadata = importlib.metadata.metadata("raas-cache")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("raas-cache is not installed, only on the path")
    assert metadata["Requires-Python"] == ">=3.10"
    assert {"cli", "dev", "eval", "harness", "train", "viz"} <= set(metadata.get_all("Provides-Extra"))
    scripts = importlib.metadata.entry_points(group="console_scripts", name="raas-cache")
    assert {script.value for script in scripts} == {"raas_cache_cli:app"}

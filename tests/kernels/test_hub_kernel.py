"""The kernels as a kernel of the Hugging Face Hub: built, loaded by its package `kernels`, beside those installed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import raas_kernels
from raas_kernels import reference

from ..helpers import use_engine
from .test_kernels import DEVICE, make_store


# Without that package, this repository's folder of the same name is what is imported: it has no version.
kernels = pytest.importorskip("kernels", minversion="0.17")

ROOT = Path(__file__).parents[2]
VARIANT = Path("build", "torch-universal")
PAGE, DECODE_PAGES = 8, 3
BUFFERS = ("keys", "values", "bias", "positions", "priority", "open_slot", "clock")


def build(target):
    command = [sys.executable, ROOT / "kernels" / "build_hub.py", target]
    return subprocess.run(command, capture_output=True, text=True)


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    target = tmp_path_factory.mktemp("hub") / "new" / "kernel"
    result = build(target)
    assert result.returncode == 0, result.stderr
    return target


@pytest.fixture
def hub(built, monkeypatch):
    """The Hub's kernel, forced to Triton, as are those installed."""
    use_engine(monkeypatch, "triton")
    return kernels.get_local_kernel(built)


def make_state(dtype):
    """A store whose open page is half full, with the same contents in any dtype."""
    store, (minima, maxima) = make_store(batch=2, page_size=PAGE, decode_pages=DECODE_PAGES)
    store |= {"minima": minima, "maxima": maxima}
    store["clock"] = torch.tensor([43, PAGE // 2 - 1], device=DEVICE).expand(2, 2, 2).contiguous()
    return {name: held.to(dtype) if held.dtype == torch.float32 else held for name, held in store.items()}


def make_tokens(count, dtype):
    generator = torch.Generator().manual_seed(1)
    shapes = (2, 6, 1, 16), (2, 2, 1, 16), (2, 2, 1, 16)
    drawn = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(count)]
    return [[states.to(DEVICE, dtype) for states in token] for token in drawn]


def decode(engine, state, query, key, value):
    """One decode step: all four operations."""
    bounds = state["minima"], state["maxima"]
    engine.append(*(state[name] for name in BUFFERS), key, value, PAGE, *bounds)
    output, scores = engine.attend(query, state["keys"], state["values"], state["bias"], 0.25, PAGE)
    upper = engine.page_bounds(query, *bounds, state["bias"], 0.25, PAGE)
    first = state["positions"][..., -DECODE_PAGES * PAGE :: PAGE]
    engine.stamp(state["priority"], scores[..., -DECODE_PAGES:], first, state["clock"], 0.1, None)
    return output, scores, upper


def run(engine, dtype, decode=decode):
    """What is held after six decode steps, and what they gave; the fifth opens a page."""
    state = make_state(dtype)
    given = [decode(engine, state, *token) for token in make_tokens(6, dtype)]
    return [*state.values(), *(result for step in given for result in step)]


def check_against_reference(results):
    for result, expected in zip(results, run(reference, torch.float64), strict=True):
        torch.testing.assert_close(result.double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_holds_the_whole_package(built):
    package = contents(ROOT / "kernels" / "raas_kernels")
    found = contents(built)
    assert {f"{VARIANT.as_posix()}/{name}": content for name, content in package.items()}.items() <= found.items()
    metadata = f"{VARIANT.as_posix()}/metadata.json"
    assert len(found) == len(package) + 3 and found.keys() >= {"README.md", "LICENSE", metadata}
    assert found["README.md"].startswith(b"---\nlibrary_name: kernels\n")


def test_metadata_is_what_the_hub_asks_for(built):
    metadata = kernels.Metadata.read_from_file(built / VARIANT / "metadata.json")
    assert metadata.name.python_name == "raas_kernels" and metadata.id.isidentifier()
    assert (metadata.version, metadata.license, metadata.python_depends) == (1, "Apache-2.0", [])
    metadata.digest.validate(type(metadata.digest).hash_variant(metadata.digest.algorithm, built / VARIANT))


def test_imports_torch_triton_and_itself(built):
    """A universal kernel is Python that imports nothing else, and itself by no name: it is loaded under another."""
    imported = set()
    for path in (built / VARIANT).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names == {"torch", "triton"}


def test_builds_are_equal_and_replace_each_other(built, tmp_path):
    assert build(tmp_path).returncode == 0  # an empty folder
    (tmp_path / VARIANT / "stale.py").touch()
    (tmp_path / ".gitattributes").touch()  # a clone of the repository on the Hub has files of its own
    assert build(tmp_path).returncode == 0
    found = contents(tmp_path)
    assert found.pop(".gitattributes") == b"" and found == contents(built)
    assert not any(str(ROOT).encode() in content for content in found.values())


@pytest.mark.parametrize("name", ["README.md", "build/torch-universal/metadata.json"])
def test_another_folder_is_refused_and_left_alone(name, tmp_path):
    mine = tmp_path / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text('{"name": "mine"}')
    for target in (tmp_path, mine):
        result = build(target)
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert f"target {str(target)!r} is neither an empty folder nor an earlier build" in result.stderr
        assert "name a folder that does not exist yet" in result.stderr
    assert contents(tmp_path) == {name: b'{"name": "mine"}'}


def test_computes_what_the_reference_does(hub):
    device = torch.device(DEVICE)
    assert hub.__name__ != "raas_kernels" and hub.__all__ == raas_kernels.__all__
    assert hub.engine(device).__name__ == f"{hub.__name__}.fused"
    assert raas_kernels.engine(device).__name__ == "raas_kernels.fused"
    for engine in (hub, raas_kernels, hub):
        check_against_reference(run(engine, torch.float32))


def test_compiles_to_operators_of_its_own(hub):
    traced = []

    def backend(graph, _):
        traced.extend(str(node.target) for node in graph.graph.nodes if "raas_kernels" in str(node.target))
        return graph.forward

    for engine in (hub, raas_kernels):
        traced.clear()
        compiled = torch.compile(decode, fullgraph=True, backend=backend)
        check_against_reference(run(engine, torch.float32, compiled))
        assert traced == [f"{engine.__name__}.{name}.default" for name in ("append", "attend", "page_bounds", "stamp")]

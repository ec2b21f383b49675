"""The kernels as a kernel of the Hugging Face Hub: built, and loaded by its package `kernels` beside the installed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import raas_kernels

from ..helpers import use_engine
from .helpers import DEVICE, exact, make_kv, reference, triton_engine


# Without that package, this repository's folder of the same name is imported instead: it has no version.
kernels = pytest.importorskip("kernels", minversion="0.17")

ROOT = Path(__file__).parents[2]
VARIANT = Path("build", "torch-universal")


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
    """The Hub's kernel; it and the installed one are forced to Triton."""
    triton_engine()  # skips the test where there is no Triton
    use_engine(monkeypatch, "triton")
    return kernels.get_local_kernel(built)


def make_tokens(count):
    generator = torch.Generator().manual_seed(1)
    shapes = (2, 6, 1, 16), (2, 2, 1, 16), (2, 2, 1, 16)
    return [[torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes] for _ in range(count)]


def decode(engine, kv, query, key, value):
    """One decode step: all four operators."""
    engine.append(kv, key, value)
    output, scores = engine.attend(kv, query, 0.25)
    bounds = engine.page_logit_bounds(kv, query, 0.25)
    engine.stamp(kv, scores, 0.1, None)
    return output, scores, bounds


def run(engine, decode=decode, dtype=torch.float32):
    """The cache after six decode steps, and their results; the fifth opens a page."""
    kv = make_kv(batch=2, bounds=True, states=1)
    kv = exact(kv) if dtype == torch.float64 else kv
    if hasattr(engine, "PagedKV"):  # the Hub's kernel has a class of its own
        kv = engine.PagedKV(**vars(kv))
    results = [decode(engine, kv, *(states.to(dtype) for states in token)) for token in make_tokens(6)]
    buffers = [buffer for buffer in vars(kv).values() if torch.is_tensor(buffer)]
    return [*buffers, *(result for step in results for result in step)]


def check_against_reference(results):
    for result, expected in zip(results, run(reference, dtype=torch.float64), strict=True):
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
    assert (metadata.version, metadata.license, metadata.python_depends) == (2, "Apache-2.0", [])
    metadata.digest.validate(type(metadata.digest).hash_variant(metadata.digest.algorithm, built / VARIANT))


def test_imports_torch_triton_and_itself(built):
    """A universal kernel is Python that imports nothing else, and never itself by its own name."""
    imported = set()
    for path in (built / VARIANT).rglob("*.py"):
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
    for engine in (hub, raas_kernels):
        module = sys.modules[engine.append.__module__.rpartition(".ops.")[0] + ".dispatch"]
        implementation = module.implementation(engine.append.__module__, device)
        assert implementation.__name__ == f"{engine.__name__}.ops.append.triton"
    for engine in (hub, raas_kernels, hub):
        check_against_reference(run(engine))


def test_compiles_to_operators_of_its_own(hub):
    traced = []

    def backend(graph, _):
        traced.extend(str(node.target) for node in graph.graph.nodes if "raas_kernels" in str(node.target))
        return graph.forward

    for engine in (hub, raas_kernels):
        traced.clear()
        compiled = torch.compile(decode, fullgraph=True, backend=backend)
        check_against_reference(run(engine, compiled))
        assert traced == [
            f"{engine.__name__}.{name}.default" for name in ("append", "attend", "page_logit_bounds", "stamp")
        ]

"""A file that is damaged, or is something else: one error names it, and no command ends in a traceback."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from raas_cache import embedded_model
from raas_cache.bench import filling, read_json
from raas_cache.cli import app
from raas_kernels.ops.attend import configs


ROOT = Path(__file__).parents[2]
BENCH = json.loads((ROOT / "docs" / "results" / "bench-h200.json").read_text())
TUNED = json.loads(configs.CONFIGS_FILE.read_text())
CONFIG = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
DAMAGED = {
    "empty": b"", "text": b"hello", "bytes": bytes(range(256)), "latin-1": '{"rows": "é"}'.encode("latin-1"),
    "number": b"3", "null": b"null", "text in JSON": b'"rows"', "list": b"[1]", "no names": b"{}",
    "deep list": b"[" * 100_000, "deep object": b'{"a":' * 100_000, "cut": b'{"rows": [{"case": {"method": "raas", "ba',
    "zip": b"PK\5\6" + bytes(18), "pickle": b"\x80\4N.",
}  # fmt: skip


def command(*options):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    return CliRunner().invoke(app, [*map(str, options)])


def error_of(result):
    """The one line that a command says."""
    assert result.exit_code == 2, (result.output, result.exception)
    (error,) = (line for line in result.output.splitlines() if line.startswith("Error: "))
    return error


def changed(of, *place, to):
    """A copy of some JSON with another value at one place; `...` leaves the place out."""
    copied = json.loads(json.dumps(of))
    *path, last = place
    inner = copied
    for name in path:
        inner = inner[name]
    if to is ...:
        del inner[last]
    else:
        inner[last] = to
    return json.dumps(copied).encode()


BENCHES = [
    changed(BENCH, "rows", to={}),
    changed(BENCH, "rows", to=...),
    changed(BENCH, "rows", 3, to=None),
    changed(BENCH, "rows", 3, "case", to=[1]),
    changed(BENCH, "rows", 3, "case", "method", to=3),
    changed(BENCH, "rows", 3, "case", "seen", to="2048"),
    changed(BENCH, "rows", 3, "case", "seen", to=-1),
    changed(BENCH, "rows", 3, "case", "colour", to="red"),
    changed(BENCH, "rows", 3, "kv_bytes", to=1.5),
    changed(BENCH, "rows", 3, "kv_bytes", to=...),
    changed(BENCH, "rows", 3, "ratios", to=[1]),
    changed(BENCH, "rows", 3, "ratios", "DynamicCache", to="1"),
    changed(BENCH, "rows", 3, "timing", to={}),
    changed(BENCH, "rows", 3, "timing", to="fast"),
    changed(BENCH, "rows", 3, "timing", "median", to=float("nan")),
    changed(BENCH, "rows", 3, "timing", "p10", to=None),
    changed(BENCH, "rows", 3, "timing", "steps", to=7),
    changed(BENCH, "rows", 3, "timing", "steps", to=["8"]),
    changed(BENCH, "rows", 3, "timing", "steps", to=[-1.0]),
]


@pytest.mark.parametrize("data", [*DAMAGED.values(), *BENCHES], ids=[*DAMAGED, *(f"rows {i}" for i in range(19))])
def test_bench_json(data, tmp_path):
    (tmp_path / "bench.json").write_bytes(data)
    with pytest.raises(
        ValueError, match=r"bench\.json' is not a file that bench wrote \(.+\): run bench --out again"
    ) as found:
        read_json(tmp_path / "bench.json")
    if data in BENCHES[2:]:
        assert "(row 3: " in str(found.value)
    pytest.importorskip("matplotlib")
    assert "bench.json' is not a file that bench wrote" in error_of(command("plot", tmp_path))


def test_bench_json_with_flipped_bits(tmp_path):
    """JSON has no checksum: a digit may be another. But what is read can be drawn, and is refused by name otherwise."""
    data, chosen, refused = (ROOT / "docs" / "results" / "bench-cpu-compiled.json").read_bytes(), random.Random(0), 0
    for _ in range(300):
        flipped, place = bytearray(data), chosen.randrange(8 * len(data))
        flipped[place // 8] ^= 1 << place % 8
        (tmp_path / "bench.json").write_bytes(flipped)
        try:
            rows = read_json(tmp_path / "bench.json")
        except ValueError as error:
            assert "bench.json' is not a file that bench wrote" in str(error)
            refused += 1
        else:
            assert len(rows) == 12 and all(row.timing is None or sum(row.timing.steps) > 0 for row in rows)
    assert refused > 50


TUNINGS = [
    changed(TUNED, "shapes", 0, to=3),
    changed(TUNED, "shapes", 0, "rows", to=0),
    changed(TUNED, "shapes", 0, "rows", to=...),
    changed(TUNED, "shapes", 0, "head_size", to="128"),
    changed(TUNED, "shapes", 0, "config", "tile", to=100),
    changed(TUNED, "shapes", 0, "config", "warps", to=-4),
    changed(TUNED, "shapes", 0, "config", "colour", to="red"),
    changed(TUNED, "capability", to=9),
    changed(TUNED, "capability", to=[9]),
    changed(TUNED, "capability", to=...),
]


@pytest.mark.parametrize("data", [*DAMAGED.values(), *TUNINGS, None])
def test_launch_configurations(data, tmp_path, monkeypatch):
    path = tmp_path / "configs.json"
    if data is not None:
        path.write_bytes(data)
    monkeypatch.setattr(configs, "CONFIGS_FILE", path)
    configs._tuned.cache_clear()
    configs.choose_config.cache_clear()
    try:
        with pytest.raises(
            ValueError, match=r"configs\.json' contains no launch configurations \(.+\): install raas-cache"
        ):
            configs.choose_config((9, 0), 256, 8192, 128, 2, False)
    finally:
        configs._tuned.cache_clear()


@pytest.mark.parametrize(
    "data",
    [
        *DAMAGED.values(),
        *(
            json.dumps({**CONFIG, name: value}).encode()
            for name, value in {
                "model_type": ["llama"],
                "hidden_size": "x",
                "num_attention_heads": 0,
                "num_hidden_layers": -1,
                "num_key_value_heads": 3,
                "vocab_size": 0,
                "head_dim": 1.5,
                "layer_types": ["x"],
                "rope_parameters": [1],
                "dtype": "floaty",
                "quantization_config": 3,
            }.items()
        ),
    ],
)
def test_config_json(data, tmp_path):
    (tmp_path / "config.json").write_bytes(data)
    for read in (filling.read_config, filling.load_config):
        with pytest.raises(ValueError, match=r"a folder with the config\.json of a model that .* \(.*: .*\)"):
            read(str(tmp_path))
    for name in ("plan", "bench"):
        assert f"model={str(tmp_path)!r} must be" in error_of(command(name, "--model", tmp_path))


def test_a_config_with_code_of_its_own_is_refused_and_not_asked_about(tmp_path):
    code = {"auto_map": {"AutoConfig": "own.OwnConfig"}, "model_type": "own"}
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **code}))
    (tmp_path / "own.py").write_text("raise SystemExit('the code was run')")
    result = command("plan", "--model", tmp_path)
    assert "must be one of" in error_of(result) and "[y/N]" not in result.output


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("data", [b"", b"version https://git-lfs.github.com/spec/v1", b"[" * 100_000], ids=len)
def test_the_embedded_model(name, data, tmp_path, monkeypatch):
    folder = shutil.copytree(embedded_model(), tmp_path / "model")
    (folder / name).write_bytes(data)
    for module in ("raas_cache.models.pretrained", "raas_cache.cli.demo"):
        monkeypatch.setattr(f"{module}.embedded_model", lambda: str(folder))
    assert f"the embedded model in {str(folder)!r} cannot be loaded" in error_of(command("demo", "--problems", 1))


@pytest.mark.parametrize("data", [*DAMAGED.values(), b'{"name": "other"}'])
def test_a_folder_of_something_else_is_no_earlier_hub_kernel(data, tmp_path):
    described = tmp_path / "build" / "torch-universal" / "metadata.json"
    described.parent.mkdir(parents=True)
    described.write_bytes(data)
    build = [sys.executable, ROOT / "kernels" / "build_hub.py", tmp_path]
    result = subprocess.run(build, capture_output=True, text=True)
    assert result.returncode == 2 and "is neither an empty folder nor an earlier build" in result.stderr
    assert "Traceback" not in result.stderr and described.read_bytes() == data

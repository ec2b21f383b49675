"""`kernels/benchmarks/`: every case of every script runs, and `--base` compares two commits."""

import argparse
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .helpers import DEVICE


ROOT = Path(__file__).parents[2]
SCRIPTS = ("append", "attend", "page_bounds", "stamp")


@pytest.fixture
def load(monkeypatch):
    """Import a script as its folder's, and forget it afterwards: its name is that of no installed module."""
    monkeypatch.syspath_prepend(ROOT / "kernels" / "benchmarks")
    yield importlib.import_module
    for name in ("common", "step", *SCRIPTS):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_case_runs(script, load, monkeypatch):
    """With a small cache instead of each case's own."""
    module, common = load(script), load("common")
    prepare = module.prepare
    monkeypatch.setattr(module, "prepare", lambda batch, budget, *args, **kw: prepare(batch, 64, *args, **kw))
    monkeypatch.setitem(common.COLD_BYTES, DEVICE, 1)
    options = argparse.Namespace(device=torch.device(DEVICE), dtype=torch.float32)
    cases = module.make_cases(options)
    assert len({name for name, _ in cases}) == len(cases) > 3
    for name, prepared in cases:
        assert 0 < common.seconds(prepared(), 2, options.device) < 60, name


def test_a_step_in_each_cache(load, monkeypatch):
    """A full RaaSCache and a full StaticCache take step after step."""
    module, common = load("step"), load("common")
    monkeypatch.setattr(module, "BUDGET", 12 * module.PAGE)
    monkeypatch.setitem(common.COLD_BYTES, DEVICE, 1)
    options = argparse.Namespace(device=torch.device(DEVICE), dtype=torch.float32)
    with torch.no_grad():
        calls, before_step = module.contenders((2, 3), options)
        assert list(calls)[-2:] == [module.RAAS, "in a StaticCache"]
        for _ in range(module.PAGE + 1):
            before_step()
            for name, layers in calls.items():
                assert 0 < module.time_layers(layers, options.device) < 60, name


def git(folder, *command):
    author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", folder, *author, *command], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path):
    """A repository with the kernels alone, of one commit, in which `attend.py` is missing."""
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__", "attend.py"))
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message", "base")
    shutil.copy(ROOT / "kernels" / "benchmarks" / "attend.py", tmp_path / "kernels" / "benchmarks")
    return tmp_path


def run(repository, script, *options):
    path = repository / "kernels" / "benchmarks" / f"{script}.py"
    return subprocess.run([sys.executable, path, *options], capture_output=True, text=True, cwd=repository)


def test_base_is_another_commit(repository):
    common = repository / "kernels" / "raas_kernels" / "ops" / "stamp" / "reference.py"
    common.write_text(common.read_text().replace("    # 1. The milestone", "    import time; time.sleep(0.02)\n    #"))
    done = run(repository, "stamp", "--base", "HEAD", "--repeats", "2", "--rounds", "1", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    header, *lines = done.stdout.splitlines()
    assert "HEAD" in header and len(lines) > 3
    assert all(float(line.split()[-1]) > 5 for line in lines), "this checkout is the slower one"
    trees = subprocess.run(["git", "-C", repository, "worktree", "list"], capture_output=True, text=True)
    assert len(trees.stdout.splitlines()) == 1, "the temporary worktree is gone"


@pytest.mark.parametrize(
    ("script", "base", "message"),
    [
        ("stamp", "no-such-commit", "--base 'no-such-commit' is no commit of this repository"),
        ("attend", "HEAD", "--base 'HEAD' has no kernels/benchmarks/attend.py: name a commit that has it."),
    ],
)
def test_a_base_that_cannot_be_compared_is_refused(repository, script, base, message):
    done = run(repository, script, "--base", base)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr

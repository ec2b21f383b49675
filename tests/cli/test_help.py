"""`raas-cache --help` needs typer and nothing else, and says what the commands say."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from raas_cache_cli import COMMANDS, app


WITHOUT = ("torch", "transformers", "numpy", "raas_cache", "raas_kernels")


def test_help_imports_no_torch():
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({WITHOUT}))\n"  # every import of them fails
        "from raas_cache_cli import app; app(['--help'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name in COMMANDS:
        assert f"\n  {name} " in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_summary_is_that_of_the_command(name):
    """The first paragraph of the docstring; both begin the help of the command."""
    command = COMMANDS[name]
    docstring = command.load().__doc__
    assert " ".join(docstring.partition("\n\n")[0].split()) == command.summary
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0
    assert f"{name} [OPTIONS]" in result.output and "--help" in result.output
    assert command.summary in " ".join(result.output.split())


def test_a_wrong_name_is_refused_with_a_similar_one():
    result = CliRunner().invoke(app, ["fidelty"])
    assert result.exit_code == 2
    assert "No such command 'fidelty'" in result.output and "'fidelity'" in result.output


def test_no_command_imports_the_others():
    """A command imports what it needs: `plan` neither the evaluation nor the server."""
    code = (
        "import sys; from raas_cache_cli import app\n"
        "try: app(['plan', '--help'])\n"
        "except SystemExit: print([name for name in sys.modules if name.startswith('raas_cache.')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    imported = result.stdout.splitlines()[-1]
    assert "'raas_cache.cli.plan'" in imported
    for room in ("eval", "fidelity", "probes", "serving.server", "cli.bench"):
        assert f"'raas_cache.{room}'" not in imported

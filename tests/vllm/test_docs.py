"""What docs/vllm.md tells the reader to do."""

import re
import shlex
from importlib.metadata import entry_points
from pathlib import Path

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from raas_cache.serving.vllm import register, settings


PAGE = (Path(__file__).parents[2] / "docs" / "vllm.md").read_text()


def test_the_command_is_one_of_vllm():
    (line,) = re.findall(r"^RAAS_BUDGET=2048 vllm serve (.*)$", PAGE, re.MULTILINE)
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    parsed = parser.parse_args(["--model", *shlex.split(line)])
    assert (parsed.max_model_len, parsed.max_num_seqs) == (32768, 512)
    assert str(parsed.attention_backend).endswith("CUSTOM")


def test_the_table_has_all_variables():
    variables = [value.name for value in vars(settings).values() if isinstance(value, settings.Variable)]
    assert re.findall(r"^\| `(RAAS_\w+)`", PAGE, re.MULTILINE) == variables


def test_vllm_finds_the_plugin():
    (found,) = entry_points(group="vllm.general_plugins", name="raas")
    assert found.load() is register

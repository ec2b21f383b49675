"""Every code block of README, CHANGELOG and the docs runs, on the embedded model and offline.

The blocks of a page run in order, in one folder and one namespace, where `model`, `tokenizer` and `inputs` are at hand.
A `python` block is executed. The commands of a `bash` block run for real with `STAND_INS` at their end, or are parsed
where that would take a GPU, minutes, or the network. A `text` block is what the block before it prints, if that ran as
it stands. Blocks of no language are shown, not run; any other language fails, so that no block is forgotten.
"""

import configparser
import contextlib
import importlib.util
import inspect
import io
import json
import re
import runpy
import shlex
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationMixin

from raas_cache import embedded_model, register
from raas_cache.eval.chains import problems
from raas_cache.methods.registry import CACHES, POLICIES


pytest.importorskip("typer")
from typer.testing import CliRunner

from raas_cache.cli import app

from .. import kvpress_stand_in
from ..probes import tiny


ROOT = Path(__file__).parents[2]
PAGES = {
    page.relative_to(ROOT).as_posix(): page
    for page in (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md")))
}
FENCE = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```\s*$", re.MULTILINE | re.DOTALL)
LONGEST = 700
"""Tokens that a block may generate; a chain of the embedded model ends by itself before."""
STAND_INS = {
    "serve": "--model chain_reasoner --budget 256 --memory 0.01 --port 0",
    "demo": "--model chain_reasoner --problems 1 --lines 3",
    "eval": "--dataset chains-3 --limit 2 --max-new-tokens 16",
    "fidelity": "--model chain_reasoner --data chains.jsonl --tokens 40 --page-size 4",
    "probe": "--model reader --probe lemma-restated --tokens 160 --texts 1 --page-size 4",
    "shares": "--model chain_reasoner --data chains.jsonl --tokens 40 --budget 56 --page-size 4",
    "bench": "--model small --device cpu --seen 64 --batch 1 --budget 64 --steps 2 --mode eager",
}
"""Options that a command gets beside its own, of which the last one counts; models of the Hub are the embedded one.
`reader` is a random model that knows the words of the probes."""


@dataclass
class Block:
    """A fenced block of a page, and the line on which its code begins."""

    language: str
    code: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(fence[2], textwrap.dedent(fence[3]), text.count("\n", 0, fence.start(3)) + 1)
        for fence in FENCE.finditer(text)
    ]


@pytest.mark.parametrize("page", PAGES)
def test_languages_are_known(page):
    assert {block.language for block in blocks_of(PAGES[page])} <= {"python", "text", "bash", ""}
    assert PAGES[page].read_text().count("```") == 2 * len(blocks_of(PAGES[page])), "a fence that is not closed"


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model())


@pytest.fixture
def inputs(tokenizer):
    (problem,) = problems(1, num_lines=20, seed=0)
    return tokenizer(problem.prompt, return_tensors="pt", return_token_type_ids=False)


class HubTokenizer:
    """A tokenizer of the Hub knows English, which the embedded one does not: such a text becomes `inputs`."""

    def __init__(self, tokenizer, inputs):
        self.tokenizer, self.inputs = tokenizer, inputs

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *args, **options):
        try:
            return self.tokenizer(*args, **options)
        except Exception:  # tokenizers raises nothing more precise
            return self.inputs

    def apply_chat_template(self, *_, **__):
        return self.inputs


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A folder with a random model that knows the words of the probes."""
    folder, tokenizer = tmp_path_factory.mktemp("reader"), tiny.tokenizer_of("spaced")
    tiny.model_of(tokenizer, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def offline(monkeypatch, tmp_path, tokenizer, inputs, reader):
    """A folder to work in, the embedded model for those of the Hub, no network, and all as it was afterwards."""

    def refuse(*_):
        raise AssertionError("the network was asked")

    def instead(load, name, *args, **options):
        if Path(name).is_dir():
            return load(name, *args, **options)
        found = load(embedded_model())
        return HubTokenizer(found, inputs) if load.__self__ is AutoTokenizer else found

    def generate(self, *args, **options):
        if "max_new_tokens" in options:
            options["max_new_tokens"] = min(options["max_new_tokens"], LONGEST)
        return unlimited(self, *args, **options)

    def compile_eagerly(forward, mode=None, **options):
        return compiled(forward, backend="eager", **options)

    unlimited, compiled = GenerationMixin.generate, torch.compile
    for kind in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
        load = kind.from_pretrained
        monkeypatch.setattr(
            kind, "from_pretrained", lambda *args, load=load, **options: instead(load, *args, **options)
        )
    monkeypatch.setattr(GenerationMixin, "generate", generate)
    monkeypatch.setattr(torch, "compile", compile_eagerly)
    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    (chain,) = problems(1, num_lines=4, seed=0)
    Path("chains.jsonl").write_text(json.dumps({"problem": chain.prompt, "reasoning": chain.chain}) + "\n")
    Path("reader").symlink_to(reader)
    policies, caches, threads = dict(POLICIES), dict(CACHES), torch.get_num_threads()
    yield tmp_path
    for registry, before in ((POLICIES, policies), (CACHES, caches)):
        registry.clear()
        registry.update(before)
    torch.set_num_threads(threads)
    torch.compiler.reset()
    register()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(PAGES[page])])
def test_page_runs(page, offline, model, tokenizer, inputs):
    names = {"__name__": "__main__", "model": model, "tokenizer": tokenizer, "inputs": inputs}
    printed = None
    for block in blocks_of(PAGES[page]):
        if block.language == "python":
            # Behind as many empty lines as stand before it, so that an error names the page's own line.
            code = compile("\n" * (block.line - 1) + block.code, page, "exec")
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(code, names)
            printed = output.getvalue()
            continue
        if block.language == "text" and printed is not None:
            assert tidy(printed) == tidy(block.code), f"{page}:{block.line}"
        if block.language == "bash":
            outputs = [run_command(words) for words in commands(block.code)]
            printed = None if None in outputs else "".join(outputs)
        else:
            printed = None


def tidy(text):
    return [line.rstrip() for line in text.strip().splitlines()]


def commands(code):
    """The words of each command; what it sets in its environment, and where its output goes, left out."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            del words[0]
        if ">" in words:
            del words[words.index(">") :]
        if words:
            yield words


def run_command(words):
    """Run or parse a command; returns what it prints, if it ran as it stands."""
    match words:
        case ["raas-cache", *arguments]:
            return run_raas_cache(arguments)
        case ["accelerate", "launch", *arguments]:
            from accelerate.commands.launch import launch_command_parser

            launched = launch_command_parser().parse_args(arguments)
            assert launched.module and launched.training_script == "raas_cache.eval"
            run_raas_cache(["eval", *launched.training_script_args])
        case ["torchrun", *arguments]:
            from torch.distributed.run import get_args_parser

            launched = get_args_parser().parse_args(arguments)
            if launched.module:
                command = {"raas_cache.fidelity": "fidelity", "raas_cache.probes": "probe"}[launched.training_script]
                run_raas_cache([command, *launched.training_script_args])
                return None
            know_options(launched.training_script, launched.training_script_args)
        case ["lm_eval", *arguments]:
            parse_lm_eval(arguments)
        case ["python", "-m", "pytest", *arguments]:
            files = [argument for argument in arguments if "/" in argument]
            assert all((ROOT / file.partition("::")[0]).exists() for file in files), words
        case ["python", "-m", "venv", folder]:
            kvpress_stand_in.make(Path(folder))
        case ["peer/bin/pip", "install", "kvpress"]:
            assert Path("peer/bin/python").exists()
        case ["python", "-m", module]:
            assert importlib.util.find_spec(module), words
        case ["python", script, *arguments]:
            know_options(script, arguments)
        case ["make", *arguments]:
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {word for word in arguments if "=" not in word} <= set(targets), words
        case ["curl", "localhost:8000/v1/chat/completions", "-H", _, "-d", body]:
            from raas_cache.serving.server.request_fields import Chat, check

            check(Chat, json.loads(body))
        case ["pip", "install", *arguments]:
            pip_can_install([word for word in arguments if not word.startswith("-")])
        case ["vllm", "serve", *_]:
            pass  # tests/vllm/test_docs.py parses it, where vLLM is installed
        case ["pre-commit", "install"] | ["pre-commit", "run", "--all-files"]:
            assert (ROOT / ".pre-commit-config.yaml").exists()
        case _:
            pytest.fail(f"what does {shlex.join(words)!r} need, to be run in a test?")
    return None


@pytest.mark.parametrize(
    "line",
    [
        "raas-cache no-such-command",
        "raas-cache eval --no-such-option",
        "raas-cache bench --copies many",
        "accelerate launch -m raas_cache.eval --no-such-option",
        "torchrun -m raas_cache.fidelity --no-such-option",
        "torchrun -m raas_cache.no_such_room",
        "python examples/long_chain.py --no-such-option",
        "python -m raas_cache.no_such_module",
        "python -m pytest tests/no_such_file.py",
        "make no-such-target",
        'pip install ".[no-such-extra]"',
        "lm_eval --model raas --model_args no_such_argument=1 --tasks gsm8k",
        "no-such-program",
    ],
)
def test_a_wrong_command_fails(line, offline):
    (words,) = commands(line)
    with pytest.raises((AssertionError, KeyError, pytest.fail.Exception)):
        run_command(words)


async def no_time(_):
    """A server with this main loop starts, and ends at once."""


def run_raas_cache(arguments):
    """What it prints; None if that is the output of a stand-in."""
    stand_ins = STAND_INS.get(arguments[0], "").split()
    with pytest.MonkeyPatch.context() as patch:
        if arguments[0] == "serve":
            patch.setattr("uvicorn.Server.main_loop", no_time)
        result = CliRunner().invoke(app, [*arguments, *stand_ins])
    assert result.exit_code == 0, (arguments, result.output, result.exception)
    return None if stand_ins else result.output


def know_options(script, arguments):
    """The script says that it knows the options."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    known = set(re.findall(r"--[a-z][a-z-]*", output.getvalue()))
    assert {word.partition("=")[0] for word in arguments if word.startswith("--")} <= known, (script, known)


def pip_can_install(requirements):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for requirement in requirements:
        wanted = re.fullmatch(r"(?:\.|raas-cache)(?:\[([a-z,]+)\])?", requirement)
        assert wanted, requirement
        assert set(filter(None, (wanted[1] or "").split(","))) <= set(setup["options.extras_require"]), requirement


def parse_lm_eval(arguments):
    pytest.importorskip("lm_eval")
    from lm_eval._cli import HarnessCLI
    from lm_eval.models.huggingface import HFLM

    from raas_cache.eval.harness import RaaSLM, option_names

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lm_eval", *arguments])
        parsed = HarnessCLI().parse_args()
    assert parsed.model == "raas"
    known = {*option_names(), *inspect.signature(RaaSLM).parameters, *inspect.signature(HFLM).parameters}
    assert set(parsed.model_args) <= known

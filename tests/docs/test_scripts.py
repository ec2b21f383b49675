"""The scripts of `examples` that people copy, as they run them: a chat in the terminal."""

import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast

from raas_cache.common.upstream import CACHE_ARGUMENT

from ..helpers import VOCAB, tiny_model


typer = pytest.importorskip("typer")
from typer.testing import CliRunner  # noqa: E402


EXAMPLES = Path(__file__).parents[2] / "examples"
# As the templates of thinking models: of an earlier answer, only the end is shown again.
TEMPLATE = """
{%- for message in messages %}
{%- set words = message.content.split() %}
{{- "<" + message.role + "> " + (words[-4:] if message.role == "assistant" else words) | join(" ") + " " }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<assistant> " }}{% endif %}"""
QUESTIONS = ["w1 w2 w3 w4 w5", "w6 w7 w8"]
STATE = re.compile(r"\[([\d,]+) tokens seen, ([\d,]+) pages evicted by all KV heads, ([\d.]+) MB of keys and values")


def chat(*options, questions):
    """The end of a chat in which these questions are typed, and what it printed."""
    app = typer.Typer()
    app.command()(runpy.run_path(EXAMPLES / "chat.py")["main"])
    return CliRunner().invoke(app, [*map(str, options)], input="\n".join(["", *questions, ""]))


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<pad>", "<user>", "<assistant>", *(f"w{number}" for number in range(VOCAB - 3))]
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, tokenizer):
    folder = tmp_path_factory.mktemp("chat")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_chat_gives_the_answers_of_new_caches(folder, model, tokenizer):
    """Nothing is evicted, so each turn answers as a new cache that reads the whole text."""
    printed = chat("--model", folder, "--budget", 256, "--max-new-tokens", 20, questions=QUESTIONS).output
    said = partial(tokenizer.decode, skip_special_tokens=True)
    messages, seen = [], []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        inputs = tokenizer.apply_chat_template(messages, **options)
        ids = model.generate(**inputs, max_new_tokens=20, **{CACHE_ARGUMENT: DynamicCache(config=model.config)})
        messages.append({"role": "assistant", "content": said(ids[0, inputs["input_ids"].shape[1] :])})
        assert messages[-1]["content"] in printed
        seen.append(ids.shape[1] - 1)
    assert [int(found[1]) for found in STATE.finditer(printed)] == seen
    assert printed.count("you: ") == 4  # an empty line asks nothing; the last one waits for the end
    # The cache saw the first prompt and 19 tokens of the first answer; the second text keeps the prompt only.
    assert re.findall(r"took back (\d+) tokens", printed) == ["19"]


def test_a_chat_evicts(folder):
    printed = chat("--model", folder, "--budget", 160, "--max-new-tokens", 300, questions=QUESTIONS[:1]).output
    ((seen, evicted, megabytes),) = STATE.findall(printed)
    # 2 layers with 2 KV heads; the cache holds 160 tokens in pages of 16.
    assert (int(seen), int(evicted)) == (306, 4 * 10)
    assert float(megabytes) == pytest.approx(2 * 2 * 2 * 160 * 8 * 4 / 1e6, abs=0.005)


def test_a_model_without_a_chat_template_is_refused():
    result = chat("--model", "chain_reasoner", questions=QUESTIONS)
    assert result.exit_code == 2 and "has no chat template" in result.output


def test_smollm2_chats_in_a_terminal():
    command = [sys.executable, EXAMPLES / "chat.py", "--max-new-tokens", "16"]
    result = subprocess.run(command, input="What is 2 + 3?\nAnd 4 + 5?\n", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    first, second = (int(found[1]) for found in STATE.finditer(result.stdout))
    assert second > first > 30

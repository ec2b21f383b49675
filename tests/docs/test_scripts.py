"""Scripts of `examples`: a chat in the terminal, and the moving picture of the README."""

import re
import runpy
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast

from raas_cache.common.upstream import CACHE_ARGUMENT
from raas_cache.tracing.recording import History

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


@pytest.fixture(scope="module")
def picture():
    return runpy.run_path(EXAMPLES / "moving_picture.py")


def history(scores, first=(0, 4, 8), evicted=(np.nan, 14, np.nan)):
    """Pages of four tokens, of which the first one is the prompt. `scores`: page -> steps at which it scores 0.5."""
    steps = np.arange(3, 20)
    entries = [
        (at, page, 0.5 if step in scores.get(page, ()) else 0.0)
        for at, step in enumerate(steps.tolist())
        for page in range(3)
        if first[page] <= step and not step >= evicted[page]
    ]
    at, page, score = (np.array(column) for column in zip(*entries, strict=True))
    is_pinned = np.array([True, False, False])
    return History(steps, np.array(first), is_pinned, np.array(evicted), steps, at, page, score, score)


def test_times_of_milestones(picture):
    """A page counts once it is full, and steps that nearly touch are one time."""
    far = 16 + picture["FLASH"]
    of = history({1: [5, 8, 9]}, evicted=(np.nan, np.nan, np.nan))
    assert picture["uses_of"](of, 1, 4) == [(8, 9)]
    of = replace(of, steps=np.where(of.steps == 9, far, of.steps))
    assert picture["uses_of"](of, 1, 4) == [(8, 8), (far, far)]


def test_the_picture_shows_each_page(picture):
    bytes_held = np.array([(seen, 100_000) for seen in range(4, 21)])
    lines = [(4, "2 < 3 & 5"), (10, "the end")]
    chain = picture["Chain"](history({1: [9]}), 4, lines, bytes_held, 10_000, 1)
    root = ElementTree.fromstring(picture["draw"](chain, 4, 12, 0, 1))
    kinds = [element.get("class") for element in root.iter()]
    # One page is pinned (the legend has the same colour), two are held, one is used, and one is evicted.
    assert [kinds.count(kind) for kind in ("prompt", "held moves", "use moves", "gone moves")] == [2, 2, 1, 1]
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"2 < 3 & 5", "the end", "RaaSCache: 0.1 MB", "DynamicCache: 0.2 MB"} <= set(texts)
    style = root.find("{http://www.w3.org/2000/svg}style").text
    # 24 of 28 seconds are the 16 steps from 4 to 20: the page is evicted at step 14, and its cross is drawn then.
    assert f"{100 * 24 / 28 * 10 / 16:.2f}% {{ opacity: 0 }}" in style


def test_the_picture_of_the_readme_is_small_and_has_no_script():
    path = EXAMPLES.parent / "docs" / "images" / "pages.svg"
    tags = {element.tag.rpartition("}")[2] for element in ElementTree.parse(path).iter()}
    assert tags == {"svg", "title", "style", "rect", "path", "text"}
    assert path.stat().st_size < 200_000

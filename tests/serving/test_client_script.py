"""`examples/serving_client.py` asks a running server."""

import asyncio
import runpy
from pathlib import Path

import pytest


pytest.importorskip("openai")
pytest.importorskip(
    "raas_cache.serving.server.upstream_server", reason="transformers is older than 5.24", exc_type=ImportError
)

from .served import PROMPTS, serving


SCRIPT = Path(__file__).parents[2] / "examples" / "serving_client.py"


def test_answers_are_those_of_single_requests():
    script = runpy.run_path(SCRIPT)
    with serving() as server:
        answers = asyncio.run(script["ask_all"](f"{server.url}/v1", PROMPTS[:6], 24))
        alone = [server.chat(prompt).choices[0].message.content for prompt in PROMPTS[:6]]
    assert answers == alone and len(set(answers)) > 1

"""The OpenAI server of vLLM with rows, and the official client."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from raas_cache import RaaSCache, embedded_model
from raas_cache.eval.chains import problems


PATIENCE = 300  # seconds until the server answers


@pytest.fixture
def server(tmp_path):
    """A server of the embedded model; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *[
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            embedded_model(),
            "--served-model-name",
            "chains",
        ],
        *[
            "--port",
            str(port),
            "--host",
            "127.0.0.1",
            "--dtype",
            "float32",
            "--enforce-eager",
            "--max-model-len",
            "2048",
        ],
        *["--max-num-seqs", "8", "--kv-cache-memory-bytes", str(1 << 27)],
    ]
    settings = {
        "RAAS_BUDGET": "128",
        "RAAS_MAX_PROMPT": "256",
        "RAAS_OPTIONS": '{"min_decode_pages": 2}',
        "HF_HUB_OFFLINE": "1",
    }
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env={**os.environ, **settings}, stdout=file, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(PATIENCE):
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{address}/health").close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1)
        assert "raas-cache: each request has a row of pages, with budget 128" in log.read_text()
        yield address
    finally:
        process.terminate()
        process.wait(60)


def test_completions_are_those_of_generate(server):
    prompts = [problem.prompt for problem in problems(4, num_lines=20, seed=3)]
    client = OpenAI(base_url=f"{server}/v1", api_key="none")
    answer = client.completions.create(model="chains", prompt=prompts, max_tokens=240, temperature=0)
    model = AutoModelForCausalLM.from_pretrained(embedded_model())
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        ids = torch.tensor([tokenizer(prompt).input_ids])
        cache = RaaSCache(128, min_decode_pages=2)
        output = model.generate(ids, past_key_values=cache, max_new_tokens=240, do_sample=False)
        assert choice.text.strip() == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        assert cache.evictions > 0

"""The server of `raas-cache serve` through OpenAI's client: answers, cancels, a full queue, metrics."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest
import torch
from transformers import GenerationConfig

from raas_cache import RaaSCache, load_model


openai = pytest.importorskip("openai")
pytest.importorskip("prometheus_client")
pytest.importorskip(
    "raas_cache.serving.server.upstream_server", reason="transformers is older than 5.24", exc_type=ImportError
)

from raas_cache.serving.server.handlers import RowCompletion  # noqa: E402
from raas_cache.serving.server.sampling import Sampling, TemperatureOrGreedy, with_every_parameter  # noqa: E402
from raas_cache.serving.server.stop_text import StopText  # noqa: E402
from raas_cache.serving.server.upstream_server import ContinuousBatchingLogitsProcessorList, GenerationState  # noqa: E402

from .served import CACHE, FOREVER, NAME, PROMPTS, Served, serving  # noqa: E402


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


@pytest.fixture
def busy():
    """A server with one row, whose answers never end, and a queue of two requests."""
    with serving(ends=False, max_rows=1, max_queue=2) as running:
        yield running


def text_of(stream):
    return "".join(chunk.choices[0].text for chunk in stream)


class TestAnswers:
    def test_completion(self, server):
        answer = server.complete("7 + 5")
        assert answer.choices[0].finish_reason == "stop" and answer.choices[0].text
        assert answer.usage.prompt_tokens == 4 and 1 < answer.usage.completion_tokens < 24
        assert server.complete("7 + 5", max_tokens=2).choices[0].finish_reason == "length"

    def test_tokens_are_those_of_generate(self, busy):
        model, tokenizer = load_model(NAME)
        ids = tokenizer("7 + 5", return_tensors="pt").input_ids
        cache = RaaSCache(**CACHE)
        out = model.generate(ids, past_key_values=cache, max_new_tokens=40, eos_token_id=[])[0, ids.shape[1] :]
        assert cache.evicted_pages(0).sum() > 0
        answer = busy.complete("7 + 5", max_tokens=40)
        assert answer.choices[0].text == tokenizer.decode(out, skip_special_tokens=True)

    def test_stream(self, server):
        chunks = list(server.complete("7 + 5", stream=True))
        assert len(chunks) > 3
        assert text_of(chunks) == server.complete("7 + 5").choices[0].text
        assert chunks[-1].choices[0].finish_reason == "stop" and chunks[-1].usage.prompt_tokens == 4

    def test_chat(self, server):
        answer = server.chat("7 + 5")
        assert answer.choices[0].message.content == server.complete("7 + 5 ").choices[0].text
        chunks = list(server.chat("7 + 5", stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content
        parts = [{"type": "text", "text": "7 + 5"}]
        assert server.chat(parts).choices[0].message.content == answer.choices[0].message.content

    def test_responses(self, server):
        answer = server.client.responses.create(model=NAME, input="7 + 5", max_output_tokens=24)
        assert answer.output_text == server.chat("7 + 5").choices[0].message.content
        events = list(server.client.responses.create(model=NAME, input="7 + 5", max_output_tokens=24, stream=True))
        assert events[-1].type == "response.completed" and events[-1].response.output_text == answer.output_text

    def test_models_and_health(self, server):
        assert [model.id for model in server.client.models.list()] == [NAME]
        with urllib.request.urlopen(f"{server.url}/health") as answer:
            assert json.load(answer) == {"status": "ok"}

    @pytest.mark.parametrize("path", ["/reset", "/load_model", "/v1/systemone", "/v1/audio/transcriptions"])
    def test_what_rows_do_not_serve_is_no_route(self, server, path):
        assert server.post(path, {})[0] == 404

    def test_without_max_tokens_1024(self):
        handler = RowCompletion(None, GenerationState(continuous_batching=True))
        for usual, wanted in ((None, 1024), (100, 1024), (2048, 2048)):
            config = handler._build_generation_config({}, GenerationConfig(max_new_tokens=usual), True)
            assert config.max_new_tokens == wanted
        assert handler._build_generation_config({"max_tokens": 5}, config, True).max_new_tokens == 5


class TestStop:
    @pytest.mark.parametrize("path", ["complete", "chat"])
    def test_text_ends_before_the_stop_string(self, server, path):
        ask = getattr(server, path)
        choice = ask("7 + 5").choices[0]
        full = choice.text if path == "complete" else choice.message.content
        stop = full[4:7]  # begins within a token
        wanted = full[: full.index(stop)]
        answer = ask("7 + 5", stop=stop)
        choice = answer.choices[0]
        assert (choice.text if path == "complete" else choice.message.content) == wanted
        assert choice.finish_reason == "stop"
        chunks = [chunk.choices[0] for chunk in ask("7 + 5", stop=["nothing", stop], stream=True)]
        pieces = [chunk.text if path == "complete" else chunk.delta.content or "" for chunk in chunks]
        assert "".join(pieces) == wanted and chunks[-1].finish_reason == "stop"

    def test_generation_ends_there(self, busy):
        text = busy.complete("7 + 5", max_tokens=5).choices[0].text
        answer = busy.complete("7 + 5", max_tokens=FOREVER, stop=text[-1])
        assert answer.choices[0].text == text[: text.index(text[-1])] and answer.usage.completion_tokens < 6
        busy.wait_for(raas_rows_in_use=0, finished=2, cancelled=0)

    def test_pieces(self):
        """Every way to cut a text into pieces gives the same beginning, and a stop string's beginning waits."""
        for text, stop, wanted in [("abcabd-x", ["abd"], "abc"), ("aab", ["ab", "b"], "a"), ("abab", ["abc"], "abab")]:
            for cuts in range(1 << (len(text) - 1)):
                pieces, found = re.findall(".", text), []
                for place in reversed(range(len(text) - 1)):
                    if not cuts >> place & 1:
                        pieces[place : place + 2] = ["".join(pieces[place : place + 2])]
                queue = asyncio.Queue()
                filtered = StopText(stop, queue, lambda found=found: found.append(True))
                for piece in [*pieces, None]:
                    filtered.put_nowait(piece)
                assert "".join(iter(queue.get_nowait, None)) == wanted and queue.empty()
                assert len(found) == (text != wanted)


HOT = {"temperature": 2.0, "seed": 5}


class TestSampling:
    def test_seed(self, server):
        texts = [server.complete("7 + 5", **HOT).choices[0].text for _ in range(2)]
        assert texts[0] == texts[1]
        others = {server.complete("7 + 5", **{**HOT, "seed": seed}).choices[0].text for seed in range(8)}
        assert len(others) > 4
        assert len({server.complete("7 + 5", temperature=2.0).choices[0].text for _ in range(8)}) > 4

    def test_parameters_belong_to_one_request(self, server):
        """Requests with different parameters, all at once."""
        greedy = server.complete("7 + 5").choices[0].text
        hot = server.complete("7 + 5", **HOT).choices[0].text
        assert hot != greedy
        ways = [
            ({}, greedy),
            ({"temperature": 0, "seed": 9}, greedy),
            (HOT, hot),
            ({**HOT, "top_p": 1e-6}, greedy),
            ({**HOT, "extra_body": {"top_k": 1}}, greedy),
            ({**HOT, "top_p": 1.0, "extra_body": {"top_k": 1000}}, hot),
        ]

        async def ask():
            async with server.asynchronous() as client:
                calls = [client.completions.create(model=NAME, prompt="7 + 5", max_tokens=24, **way) for way, _ in ways]
                return [answer.choices[0].text for answer in await asyncio.gather(*calls)]

        assert asyncio.run(ask()) == [wanted for _, wanted in ways]

    def test_defaults_are_those_of_the_model(self):
        config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, top_k=20)
        assert Sampling.of({}, config) == Sampling(0.6, 0.9, 20)
        assert Sampling.of({"temperature": 0.0, "seed": 3}, config) == Sampling(0.0, 0.9, 20, 3)
        assert Sampling.of({}, GenerationConfig(do_sample=False, temperature=0.6)).temperature == 0

    def test_temperature_or_greedy(self):
        scores = torch.tensor([[1.0, 3.0, 3.0], [1.0, 3.0, 2.0], [0.0, 0.0, 1.0]])
        model, _ = load_model(NAME)
        config = with_every_parameter(model.generation_config)
        processors = ContinuousBatchingLogitsProcessorList(model._get_logits_processor(config), True)
        assert processors.supported_keys.keys() == {"temperature", "top_p", "top_k"}
        temperatures = torch.tensor([0.0, 2.0, 1.0, 7.0]).view(torch.int32)
        found = TemperatureOrGreedy(processors.logits_processor[0])(scores, temperatures)
        never = -torch.inf
        assert found.tolist() == [[never, 0.0, never], [0.5, 1.5, 1.0], [0.0, 0.0, 1.0]], "the first of equals"


def test_200_requests_at_once_are_equal_to_each_alone(server):
    ways = [
        {"prompt": prompt, "temperature": 1.5 * (number % 2), "seed": number, "max_tokens": 2 + number % 9}
        for number, prompt in enumerate(PROMPTS)
    ]
    alone = [server.complete(**way).choices[0].text for way in ways]

    async def ask():
        async with server.asynchronous() as client:
            calls = [client.completions.create(model=NAME, **way) for way in ways * 5]
            return [answer.choices[0].text for answer in await asyncio.gather(*calls)]

    assert len(ways) * 5 == 200
    before = server.metrics()
    assert asyncio.run(ask()) == alone * 5
    kept = {name: server.idle[name] for name in ("raas_pages_free", "raas_rows_free")}
    server.wait_for(
        finished=before["finished"] + 200, raas_rows_in_use=0, raas_kv_bytes=before["raas_kv_bytes"], **kept
    )
    assert server.metrics()["raas_tokens_generated_total"] > before["raas_tokens_generated_total"] + 200


class TestClientsThatGoAway:
    @pytest.mark.parametrize("path", ["complete", "chat"])
    def test_a_stream(self, busy, path):
        stream = getattr(busy, path)("7 + 5", max_tokens=FOREVER, stream=True)
        for _ in range(3):
            next(stream)
        assert busy.metrics()["raas_rows_in_use"] == 1
        stream.close()
        busy.wait_for(raas_rows_in_use=0, raas_rows_free=1, cancelled=1)
        assert busy.complete("7 + 5", max_tokens=5).usage.completion_tokens == 5

    @pytest.mark.parametrize("options", [{}, {"stop": "nothing"}])
    def test_without_a_stream(self, busy, options):
        with pytest.raises(openai.APITimeoutError):
            busy.client.with_options(timeout=0.5).completions.create(
                model=NAME, prompt="7 + 5", max_tokens=FOREVER, **options
            )
        busy.wait_for(raas_rows_in_use=0, raas_rows_free=1, cancelled=1)

    def test_while_it_waits(self, busy):
        with busy.complete("7 + 5", max_tokens=FOREVER, stream=True) as stream:
            next(stream)
            with pytest.raises(openai.APITimeoutError):
                busy.client.with_options(timeout=0.5).completions.create(model=NAME, prompt="1 + 1")
            busy.wait_for(raas_rows_in_use=1, raas_waiting_requests=0, cancelled=1)


def test_a_full_queue(busy):
    with busy.complete("7 + 5", max_tokens=FOREVER, stream=True) as first:
        next(first)
        waiting = [threading.Thread(target=busy.complete, args=("7 + 5",)) for _ in range(2)]
        for thread in waiting:
            thread.start()
        busy.wait_for(raas_waiting_requests=2)
        for options in ({}, {"stream": True}):
            with pytest.raises(openai.RateLimitError, match="2 requests are waiting") as refused:
                busy.complete("7 + 5", **options)
            assert int(refused.value.response.headers["retry-after"]) > 0
        assert busy.metrics()["rejected"] == 2
        assert busy.metrics()["raas_waiting_requests"] == 2
    for thread in waiting:
        thread.join(30)
    busy.wait_for(finished=2, cancelled=1, raas_rows_in_use=0)
    assert busy.client.with_options(max_retries=2).completions.create(model=NAME, prompt="7 + 5", max_tokens=3)


def test_a_generation_that_failed(busy):
    """The server says so, instead of letting requests wait for ever."""
    busy.manager.background_thread_status.record_fatal_error(RuntimeError("the GPU is gone"))
    with pytest.raises(openai.InternalServerError, match=r"generation has stopped .*the GPU is gone") as failed:
        busy.complete("7 + 5")
    assert failed.value.status_code == 503 and failed.value.type == "server_error"
    with pytest.raises(urllib.error.HTTPError, match="503"):
        urllib.request.urlopen(f"{busy.url}/health")


def test_command_serves_until_ctrl_c():
    command = [
        sys.executable,
        "-c",
        "from raas_cache.cli import app; app()",
        "serve",
        "--model",
        NAME,
        "--budget",
        "256",
        "--port",
        "0",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        seen = []
        for line in process.stderr:
            seen.append(line)
            if found := re.search(r"running on http://127.0.0.1:(\d+)", line):
                break
        assert found, "".join(seen)
        assert Served(int(found[1])).complete("7 + 5", timeout=30).choices[0].text
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in err
    assert out.startswith("chain_reasoner: 32 rows, ")

"""Bad requests to the server: each gets a sentence that names the parameter, in the format of OpenAI's API."""

import asyncio

import pytest


openai = pytest.importorskip("openai")
pytest.importorskip("prometheus_client")
pytest.importorskip("raas_cache.serving.upstream", reason="transformers is too old", exc_type=ImportError)

from .served import NAME, PROMPTS, serving  # noqa: E402


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


CHAT, COMPLETION, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


def said(**message):
    return {"messages": [{"role": "user", "content": "7 + 5", **message}]}


class TestBadRequests:
    @pytest.mark.parametrize(
        ("path", "body", "param", "words"),
        [
            (COMPLETION, {"prompt": ""}, "prompt", "prompt='' must have at least 1 character"),
            (COMPLETION, {}, "prompt", "prompt is missing: add it"),
            (COMPLETION, {"prompt": None}, "prompt", "prompt is missing: add it"),
            (COMPLETION, {"prompt": ["a"]}, "prompt", "prompt=['a'] must be a valid string"),
            (COMPLETION, {"prompt": "7 " * 5000}, "prompt", "prompt has 5,001 tokens"),
            (COMPLETION, {"prompt": "7", "tempersture": 1}, "tempersture", "tempersture is not supported: remove it"),
            (COMPLETION, {"prompt": "7", "logprobs": 3}, "logprobs", "logprobs is not supported: remove it"),
            (COMPLETION, {"prompt": "7", "suffix": "a"}, "suffix", "suffix is not supported: remove it"),
            (COMPLETION, {"prompt": "7", "generation_config": "{}"}, "generation_config", "is not supported: remove"),
            (COMPLETION, {"prompt": "7", "temperature": "hot"}, "temperature", "'hot' must be a valid number"),
            (COMPLETION, {"prompt": "7", "temperature": -1}, "temperature", "must be greater than or equal to 0"),
            (COMPLETION, {"prompt": "7", "temperature": float("nan")}, "temperature", "temperature=nan must be"),
            (COMPLETION, {"prompt": "7", "top_p": 0}, "top_p", "top_p=0 must be greater than 0"),
            (COMPLETION, {"prompt": "7", "max_tokens": 0}, "max_tokens", "max_tokens=0 must be greater than or equal"),
            (COMPLETION, {"prompt": "7", "seed": 2**70}, "seed", "seed="),
            (COMPLETION, {"prompt": "7", "n": 2}, "n", "n=2 is not supported: use 1"),
            (COMPLETION, {"prompt": "7", "frequency_penalty": 0.5}, "frequency_penalty", "use 0"),
            (COMPLETION, {"prompt": "7", "stop": ""}, "stop", "stop='' must have at least 1 character"),
            (COMPLETION, {"prompt": "7", "stop": ["a", ""]}, "stop", "stop[1]='' must have at least 1 character"),
            (COMPLETION, {"prompt": "7", "stream": 1}, "stream", "stream=1 must be a valid boolean"),
            (COMPLETION, {"prompt": "\ud800"}, None, "half of a surrogate pair"),
            (COMPLETION, b'{"prompt": ', None, "The body is not valid JSON (Expecting value): send a JSON object"),
            (COMPLETION, b"", None, "The body is no JSON object"),
            (COMPLETION, b"[" * 100_000, None, ""),
            (COMPLETION, [], None, "The body is no JSON object"),
            (CHAT, {"messages": []}, "messages", "messages=[] must have at least 1 item: change it"),
            (CHAT, {"messages": "hi"}, "messages", "messages='hi' must be a valid list"),
            (CHAT, said(role="me"), "messages", "messages[0].role='me' is not supported: use 'system'"),
            (CHAT, said(name="Ann"), "messages", "messages[0].name is not supported: remove it"),
            (CHAT, said(content=7), "messages", "messages[0].content=7 must be a valid"),
            (CHAT, said(content=[{"type": "image_url"}]), "messages", "content[0].type='image_url' is not supported"),
            (CHAT, said(tool_calls=[{"function": {"name": "f", "arguments": "{"}}]), "messages", "arguments='{'"),
            (CHAT, {**said(), "response_format": {"type": "json_object"}}, "response_format", "is not supported"),
            (CHAT, {**said(), "tools": [{"type": "web"}]}, "tools", "tools[0].type='web' is not supported"),
            (CHAT, {**said(), "tools": [{"type": "function"}]}, "tools", "tools[0].function is missing: add it"),
            (CHAT, {**said(), "chat_template_kwargs": {"tokenize": 0}}, "chat_template_kwargs", "has 'tokenize'"),
            (CHAT, {**said(), "chat_template_kwargs": {"chat_template": "a"}}, "chat_template_kwargs", "remove it"),
            (CHAT, said(content="7 " * 5000), "messages", "messages has 5,00"),
            (
                CHAT,
                said(content="?"),
                None,
                "messages do not fit the chat template of this model (no question): change",
            ),
            (RESPONSES, {}, "input", "input is missing: add it"),
            (RESPONSES, {"input": []}, "input", "input=[] must have at least 1 item"),
            (RESPONSES, {"input": [{"type": "audio"}]}, "input", "input"),
            (RESPONSES, {"input": "7", "previous_response_id": "a"}, "previous_response_id", "is not supported"),
            (
                RESPONSES,
                {"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]},
                "input",
                "must begin with a message",
            ),
        ],
    )
    def test_is_refused_with_a_sentence(self, server, path, body, param, words):
        before = server.metrics()
        status, error = server.post(path, body)
        assert status == 400, error
        assert error["type"] == "invalid_request_error" and error["param"] == param
        assert words in error["message"] and error["message"].endswith(".")
        server.wait_for(rejected=before["rejected"] + 1, raas_rows_free=4)

    def test_another_model(self, server):
        with pytest.raises(openai.NotFoundError, match="model='gpt' is not served here: use 'chain_reasoner'"):
            server.client.completions.create(model="gpt", prompt="7 + 5")

    def test_what_has_no_effect_is_accepted(self, server):
        neutral = {"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "user": "me"}
        body = {**said(), "max_tokens": 3, **neutral, "store": False, "tool_choice": "auto", "top_p": None}
        assert server.post(CHAT, {**body, "stream_options": {"include_usage": True}})[0] == 200

    def test_ids_of_clients_may_be_equal(self, server):
        async def ask():
            same = {"extra_headers": {"x-request-id": "same"}, "max_tokens": 5}
            async with server.asynchronous() as client:
                calls = [client.completions.create(model=NAME, prompt=prompt, **same) for prompt in PROMPTS[:8]]
                return [answer.choices[0].text for answer in await asyncio.gather(*calls)]

        assert asyncio.run(ask()) == [server.complete(prompt, max_tokens=5).choices[0].text for prompt in PROMPTS[:8]]

    def test_a_model_without_chat_template(self):
        with serving(has_template=False) as server:
            for path, field in ((CHAT, "messages"), (RESPONSES, "input")):
                status, error = server.post(path, {"input": "7"} if field == "input" else said())
                assert status == 400 and error["param"] == field
                assert "this model has no chat template: use /v1/completions" in error["message"]

"""A server on localhost, and what a test asks of it."""

import json
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import openai
from prometheus_client.parser import text_string_to_metric_families

from raas_cache import load_model
from raas_cache.serving.server import build_app, server_of


NAME = "chain_reasoner"
TEMPLATE = (
    "{{ bos_token }}{% if messages[0].content == '?' %}{{ raise_exception('no question') }}{% endif %}"
    "{% for message in messages %}{{ message.content }} {% endfor %}"
)
PROMPTS = [f"{a} + {b}" for a in range(1, 9) for b in range(1, 6)]
FOREVER = 10_000_000
CACHE = {"budget": 24, "page_size": 4, "min_decode_pages": 2}


class Served:
    """A running server, and what a test asks of it."""

    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        self.idle = self.metrics()

    def asynchronous(self):
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def complete(self, prompt, **options):
        return self.client.completions.create(model=NAME, prompt=prompt, **{"max_tokens": 24, **options})

    def chat(self, text, **options):
        messages = [{"role": "user", "content": text}]
        return self.client.chat.completions.create(model=NAME, messages=messages, **{"max_tokens": 24, **options})

    def metrics(self):
        """The value of each metric; of requests by outcome."""
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            families = text_string_to_metric_families(answer.read().decode())
            samples = [sample for family in families for sample in family.samples]
        return {sample.labels.get("outcome", sample.name): sample.value for sample in samples}

    def wait_for(self, seconds=20, **values):
        """Wait until metrics have these values."""
        end = time.monotonic() + seconds
        while (found := {name: self.metrics()[name] for name in values}) != values:
            assert time.monotonic() < end, found
            time.sleep(0.02)

    def post(self, path, body):
        """Send bytes, or an object as JSON: the status and the error."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["error"]


@contextmanager
def serving(ends=True, has_template=True, **options):
    """A server of the embedded model on a free port. `ends`: whether the model's end token ends an answer."""
    model, tokenizer = load_model(NAME)
    if not ends:
        model.generation_config.eos_token_id = []
    if has_template:
        tokenizer.chat_template = TEMPLATE
    app = build_app(model, tokenizer, NAME, **{**CACHE, "max_rows": 4, **options})
    server = server_of(app, "127.0.0.1", 0)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        running = Served(server.servers[0].sockets[0].getsockname()[1])
        running.manager = app.state.manager
        yield running
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()
    assert not app.state.manager.is_running(), "the loop ends with the server"

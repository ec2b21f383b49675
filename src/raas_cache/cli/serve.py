"""The `serve` command: a server with OpenAI's API whose KV memory is fixed."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

import typer

from ..common import arguments
from ..common.extras import require
from ..common.parse_methods import parse_method
from ..eval.model_options import Base, DeviceMap, Dtype, ModelName, Quantize, dtype_of, load


def serve(
    budget: Annotated[int, typer.Option(help="Tokens that each request holds in each layer and KV head.")],
    model: ModelName = "smollm2",
    method: Annotated[str, typer.Option(help="A method, with options after colons: raas:alpha=0.1.")] = "raas",
    max_rows: Annotated[
        int | None, typer.Option(min=1, help="Most requests at once.", show_default="as many as --memory holds, or 32")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(help="GB (1e9 bytes) for keys and values.", show_default="as much as --max-rows needs"),
    ] = None,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Most requests that wait for a row. More get status 429 and try again.")
    ] = 256,
    max_batch_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of one forward. Longer prompts are read in chunks.")
    ] = 512,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all networks.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for a free one.")] = 8000,
    base: Base = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
) -> None:
    """Serve a model with OpenAI's API, in a KV cache of fixed memory.

    A request without max_tokens generates at most 1024 tokens, or max_new_tokens of the model's generation_config.json
    if that is larger. Each request has its own temperature, top_p, top_k, seed and stop; without them, it draws as
    generation_config.json says.
    """
    if memory is not None and not 0 < memory <= arguments.LARGEST:
        raise typer.BadParameter(f"{memory} must be above 0 and at most {arguments.LARGEST} GB.", param_hint="--memory")
    with arguments.refusing():
        for package in ("fastapi", "uvicorn", "openai", "prometheus_client"):
            require(package, f"The server needs {package}", "serve")
        from ..serving.server import build_app, server_of
    with arguments.refusing("--method"):
        name, options = parse_method(method)
    with arguments.refusing():
        precision = dtype_of(dtype)
    with arguments.plain_warnings():
        network, tokenizer = load(model, precision, base=base, device_map=device_map, quantize=quantize)
        with arguments.refusing("--method", budget="--budget", memory="--memory", tokenizer="--model"):
            app = build_app(
                network,
                tokenizer,
                model,
                budget,
                method=name,
                max_rows=max_rows,
                memory=None if memory is None else round(memory * 1e9),
                max_queue=max_queue,
                max_batch_tokens=max_batch_tokens,
                **options,
            )
    with app.state.manager as manager, suppress(KeyboardInterrupt):
        print(
            f"{model}: {manager.cache.max_requests} rows, {manager.nbytes / 1e9:.3f} GB of keys and values", flush=True
        )
        server_of(app, host, port).run()

"""Run decode steps with kvpress's `DecodingPress`. `peer.py` starts this script in an environment with kvpress.

The script does not import raas_cache, whose transformers is too new for kvpress. It prints its versions. Then it reads
one JSON object per line, and answers each with one line. The first object describes the model, the others are commands:

    {"config", "dtype", "device", "threads", "seed"}    -> {}
    {"batch", "budget", "seen", "copies"}               -> {"kv_bytes"} of one new cache; drops earlier caches
    {"copy", "position"}                                -> {"ms"} of a step of this copy, with its token at `position`
"""

import gc
import json
import os
import sys
import time
from contextlib import ExitStack
from copy import deepcopy
from importlib.metadata import version
from itertools import chain
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep the output of libraries out of the answers
    sys.stdout = sys.stderr

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    import kvpress
    import torch
    import transformers

    answer(kvpress=version("kvpress"), torch=torch.__version__, transformers=transformers.__version__)
    setup = json.loads(sys.stdin.readline())
    device, dtype = torch.device(setup["device"]), getattr(torch, setup["dtype"])
    torch.set_num_threads(setup["threads"])
    torch.manual_seed(setup["seed"])
    torch.set_default_device(device)
    torch.set_grad_enabled(False)
    config: Any = transformers.AutoConfig.for_model(**setup["config"])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    answer()

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    batch, presses = 0, ExitStack()
    caches: list[Any] = []
    models: list[Any] = []
    for line in sys.stdin:
        command = json.loads(line)
        if "copy" in command:
            position = torch.full((batch, 1), command["position"])
            inputs = {"input_ids": torch.ones_like(position), "position_ids": position, "cache_position": position[0]}
            # In the other process, all caches share one set of weights, so the weights were just read by another
            # step. Read the weights of this process here, so that its step starts in the same state.
            model(input_ids=inputs["input_ids"], use_cache=False)
            synchronize()
            started = time.perf_counter()
            models[command["copy"]](past_key_values=caches[command["copy"]], **inputs)
            synchronize()
            answer(ms=1e3 * (time.perf_counter() - started))
            continue
        presses.close()
        batch, caches, models = command["batch"], [], []
        gc.collect()
        torch.cuda.empty_cache()
        for _ in range(command["copies"]):
            cache: Any = transformers.DynamicCache(config=config)
            size = batch, kv_heads, min(command["seen"], command["budget"]), head_dim
            for index in range(config.num_hidden_layers):
                cache.update(*(torch.randn(size, dtype=dtype) for _ in ("key", "value")), index)
            # A press counts the steps of one cache, so each cache gets its own copy of the model with shared weights.
            twin = deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})
            presses.enter_context(kvpress.DecodingPress(kvpress.KnormPress(), target_size=command["budget"])(twin))
            caches.append(cache)
            models.append(twin)
        answer(kv_bytes=sum(layer.keys.nbytes + layer.values.nbytes for layer in caches[0].layers))


if __name__ == "__main__":
    main()

"""Decode steps of kvpress's `DecodingPress`: what `peer.py` runs with the Python of an environment that has kvpress.

It imports nothing of raas_cache, whose transformers is too new for kvpress. It says its versions, then reads a JSON
object a line and answers each with a line. The first says what to build, the others what to do:

    {"config", "dtype", "device", "threads", "seed"}    -> {}
    {"batch", "budget", "seen", "copies"}               -> {"kv_bytes"} of each cache; those before are dropped
    {"copy", "position"}                                -> {"ms"} of a step of that copy, with its token at `position`
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
    os.dup2(2, 1)  # what libraries print is no answer
    sys.stdout = sys.stderr

    def answer(**said: Any) -> None:
        print(json.dumps(said), file=answers, flush=True)

    import kvpress
    import torch
    import transformers

    answer(kvpress=version("kvpress"), torch=torch.__version__, transformers=transformers.__version__)
    of = json.loads(sys.stdin.readline())
    device, dtype = torch.device(of["device"]), getattr(torch, of["dtype"])
    torch.set_num_threads(of["threads"])
    torch.manual_seed(of["seed"])
    torch.set_default_device(device)
    torch.set_grad_enabled(False)
    config: Any = transformers.AutoConfig.for_model(**of["config"])
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
        of = json.loads(line)
        if "copy" in of:
            position = torch.full((batch, 1), of["position"])
            inputs = {"input_ids": torch.ones_like(position), "position_ids": position, "cache_position": position[0]}
            # The caches of the other process take turns with one set of weights, and find them where the last has left
            # them; so does this one, which has weights of its own.
            model(input_ids=inputs["input_ids"], use_cache=False)
            synchronize()
            started = time.perf_counter()
            models[of["copy"]](past_key_values=caches[of["copy"]], **inputs)
            synchronize()
            answer(ms=1e3 * (time.perf_counter() - started))
            continue
        presses.close()
        batch, caches, models = of["batch"], [], []
        gc.collect()
        torch.cuda.empty_cache()
        for _ in range(of["copies"]):
            cache: Any = transformers.DynamicCache(config=config)
            size = batch, kv_heads, min(of["seen"], of["budget"]), head_dim
            for index in range(config.num_hidden_layers):
                cache.update(*(torch.randn(size, dtype=dtype) for _ in ("key", "value")), index)
            # A press counts the steps of one cache: each gets a twin of the model, of the same weights.
            twin = deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})
            presses.enter_context(kvpress.DecodingPress(kvpress.KnormPress(), target_size=of["budget"])(twin))
            caches.append(cache)
            models.append(twin)
        answer(kv_bytes=sum(layer.keys.nbytes + layer.values.nbytes for layer in caches[0].layers))


if __name__ == "__main__":
    main()

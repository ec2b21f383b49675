"""Requests in rows, and the same requests alone."""

import random
import time
import warnings

import torch

from raas_cache import continuous, from_name
from raas_cache.serving.upstream import ContinuousBatchingConfig

from ..helpers import VOCAB


OPTIONS = {"page_size": 4, "min_decode_pages": 2}


def requests(count, longest=60, new=40, seed=0):
    """(prompt, number of new tokens) of `count` random requests."""
    rng = random.Random(seed)
    lengths = [(rng.randint(1, longest), rng.randint(1, new)) for _ in range(count)]
    return [([rng.randrange(1, VOCAB) for _ in range(length)], limit) for length, limit in lengths]


def rows(model, budget=32, chunk=16, **options):
    """`continuous` with small chunks."""
    batching = ContinuousBatchingConfig(max_batch_tokens=chunk)
    return continuous(model, budget, batching=batching, **{"max_rows": 4, **OPTIONS, **options})


def answers(manager, asked, at_random=True, **options):
    """The tokens of each request; `at_random`: they join while others run, at random times."""
    rng, ids, found = random.Random(1), [], {}
    manager.start()
    for index, (prompt, new) in enumerate(asked):
        seeds = {"seed": options["seeds"][index]} if "seeds" in options else {}
        ids.append(manager.add_request(prompt, max_new_tokens=new, **seeds))
        if at_random and rng.random() < 0.5:
            time.sleep(rng.random() / 50)
    while len(found) < len(ids):
        output = manager.get_result(timeout=1)
        assert output is not None or manager.is_running(), manager.background_thread_status.fatal_error
        if output is not None and output.is_finished():
            assert output.error is None, output.error
            found[output.request_id] = output.generated_tokens
    manager.stop()
    return [found[name] for name in ids]


def alone(model, ids, new, method, budget=32, **options):
    """The tokens that `generate` gives for one request, and the number of evictions."""
    cache = from_name(method, budget, **{**OPTIONS, **options})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "budget=.* leaves", UserWarning)
        output = model.generate(
            torch.tensor([ids], device=model.device),
            past_key_values=cache,
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
    return output[0, len(ids) :].tolist(), cache.evictions

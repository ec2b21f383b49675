"""Requests that come, end and are cancelled at random for a long time: no row, no page and no byte may be lost.

A small model with random weights answers requests in rows, while a queue of many more waits. Every answer that is not
cancelled has its full length. At the end all rows and pages are free again, no buffer has moved, and the memory of the
process has not grown since its first quarter.

    python examples/serving_soak.py --minutes 30 --queue 10000
"""

import argparse
import random
import time

import psutil
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from raas_cache import continuous


def new_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=8, num_key_value_heads=4, intermediate_size=128, num_hidden_layers=2,
        vocab_size=256, max_position_embeddings=1 << 17,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def soak(manager, minutes, queue, seed):
    """Keep `queue` requests waiting for `minutes`, and cancel a tenth of all. Returns counts and memory by time."""
    rng, asked, ended, cancelled, tokens = random.Random(seed), {}, 0, set(), 0
    began, resident = time.monotonic(), []
    process, name = psutil.Process(), 0
    manager.start()
    while (is_open := time.monotonic() - began < 60 * minutes) or asked:
        while is_open and len(asked) < queue:
            prompt = [rng.randrange(256) for _ in range(rng.randint(1, 120))]
            new = rng.randint(1, 200)
            manager.add_request(prompt, request_id=f"soak-{name}", max_new_tokens=new, seed=name)
            asked[f"soak-{name}"], name = new, name + 1
        output = manager.get_result(timeout=0.1)
        if output is not None and output.is_finished() and output.request_id in asked:
            assert output.error is None, output.error
            assert len(output.generated_tokens) == asked.pop(output.request_id)
            ended, tokens = ended + 1, tokens + len(output.generated_tokens)
        if rng.random() < 0.1 or not is_open:
            # Often a request that is running: those are the oldest.
            victims = list(asked)[: 50 if is_open else queue]
            for victim in [rng.choice(victims)] if is_open and victims else victims:
                manager.cancel_request(victim)
                cancelled.add(victim)
                del asked[victim]
        if len(resident) < (time.monotonic() - began) / 5:
            resident.append(process.memory_info().rss)
        assert manager.is_running(), manager.background_thread_status.fatal_error
    return ended, len(cancelled), tokens, resident


def main(minutes, queue, seed):
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    with continuous(new_model(), 64, max_rows=8, page_size=8, min_decode_pages=2, generation_config=greedy) as manager:
        store, nbytes = manager.cache.store, manager.nbytes
        free, addresses = store.free_pages, [table.kv.keys.data_ptr() for table in store.tables]
        ended, cancelled, tokens, resident = soak(manager, minutes, queue, seed)
        while store.rows:
            time.sleep(0.1)
        manager.stop()
        store.clear_ended()
        assert (store.free_rows, store.free_pages) == (8, free), "rows or pages were lost"
        assert [table.kv.keys.data_ptr() for table in store.tables] == addresses, "a buffer has moved"
        first, last = max(resident[: len(resident) // 4 + 1]), max(resident[-len(resident) // 4 :])
        print(
            f"{minutes} minutes: {ended:,} answers of {tokens:,} tokens, {cancelled:,} cancelled, {queue:,} in the queue"
        )
        print(f"keys and values: {nbytes:,} bytes at the beginning, {manager.nbytes:,} at the end")
        print(f"memory of the process: {first / 1e6:,.0f} MB in the first quarter, {last / 1e6:,.0f} MB in the last")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--queue", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))

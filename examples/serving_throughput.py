"""Continuous batching in rows of fixed memory, beside transformers' own continuous batching, at equal memory.

Both answer the same requests with the same model (random weights: only times and counts matter), one after the other in
one process. No answer ends before its length, which is drawn from a range. Three numbers come out for each:

- requests at once: the mean and the largest number of requests that have memory at the same time;
- tokens/s: generated tokens per second, over the whole work or the first `--seconds`;
- useful slots: generated tokens per place in a forward, if the forward had as many places as requests fit at once. For
  static batches this number is computed: a batch of that many requests runs until its longest answer ends.

    python examples/serving_throughput.py                                        # a small model on a CPU
    python examples/serving_throughput.py --shape 8B --layers 8 --requests 192 --prompt 256 --shortest 2048 \
        --longest 16384 --budget 2048 --memory-mb 4096 --seconds 90              # on a GPU
"""

import argparse
import random
import time
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, LlamaConfig

from raas_cache import continuous


SHAPES = {  # hidden size, query heads, KV heads, intermediate size, vocabulary
    "small": (128, 8, 4, 256, 1024),
    "8B": (4096, 32, 8, 14336, 128256),
}
PAGE = 256  # tokens of a page of transformers' cache


@dataclass
class Found:
    """What one way of answering the requests took."""

    name: str
    tokens: int
    seconds: float
    at_once: list[int]
    finished: int

    def line(self) -> str:
        mean = sum(self.at_once) / len(self.at_once)
        return (
            f"| {self.name} | {max(self.at_once)} | {mean:.1f} | {self.tokens / self.seconds:,.1f} | "
            f"{mean / max(self.at_once):.0%} | {self.finished} |"
        )


def new_model(options):
    """A Llama with random weights."""
    hidden, heads, kv_heads, intermediate, vocabulary = SHAPES[options.shape]
    config = LlamaConfig(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        num_hidden_layers=options.layers,
        vocab_size=vocabulary,
        max_position_embeddings=1 << 17,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if device == "cuda" else None).eval()


def bytes_per_token(model):
    """Bytes of keys and values of one token, in all layers."""
    config = model.config
    per_layer = 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    return config.num_hidden_layers * per_layer


def answer(name, manager, asked, seconds):
    """Give all requests to a manager, and watch it until they are answered or the time is over."""
    manager.start()
    began, at_once, finished, done = time.perf_counter(), [], 0, 0
    for prompt, new in asked:
        manager.add_request(prompt, max_new_tokens=new)
    while finished < len(asked) and time.perf_counter() - began < seconds:
        output = manager.get_result(timeout=0.05)
        if output is not None and output.is_finished():
            if output.error is not None:
                raise RuntimeError(f"{name}: {output.error}")
            finished, done = finished + 1, done + len(output.generated_tokens)
        if not manager.is_running():
            raise RuntimeError(f"{name}: the loop ended ({manager.background_thread_status.fatal_error})")
        processor = manager.batch_processor
        active = [] if processor is None else list(processor.scheduler.active_requests.values())
        if active:
            at_once.append(len(active))
    running = sum(state.generated_len() for state in active)
    took = time.perf_counter() - began
    manager.stop(hard_stop=True)
    return Found(name, done + running, took, at_once, finished)


def static_slots(asked, rows):
    """Useful slots of static batches: each runs until its longest answer ends."""
    lengths = [new for _, new in asked]
    batches = [lengths[start : start + rows] for start in range(0, len(lengths), rows)]
    return sum(lengths) / sum(rows * max(batch) for batch in batches)


def main(options):
    rng = random.Random(options.seed)
    model = new_model(options)
    asked = [
        ([rng.randrange(1000) for _ in range(options.prompt)], rng.randint(options.shortest, options.longest))
        for _ in range(options.requests)
    ]
    memory = options.memory_mb << 20
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    print("| | at once, most | mean | tokens/s | useful slots | answers |\n|---|---|---|---|---|---|")
    # 1. Rows. A usual row holds the budget; a request needs no more, because its prompt is shorter.
    rows = max(1, memory // (options.budget * bytes_per_token(model)))
    with continuous(
        model, options.budget, max_rows=rows, memory=memory, generation_config=greedy,
        batching=ContinuousBatchingConfig(max_batch_tokens=max(512, rows)),
    ) as manager:  # fmt: skip
        print(answer(f"rows, budget {options.budget:,}", manager, asked, options.seconds).line(), flush=True)
    # 2. transformers' own cache, with as many bytes.
    settings = ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=memory // (PAGE * bytes_per_token(model)), max_batch_tokens=512
    )
    manager = model.init_continuous_batching(greedy, settings)
    print(answer("dense", manager, asked, options.seconds).line(), flush=True)
    manager.destroy()
    print(f"Static batches of {rows}: {static_slots(asked, rows):.0%} of the slots are useful.")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    lengths = f"{options.prompt} + {options.shortest:,} to {options.longest:,} tokens"
    print(f"{memory:,} bytes of keys and values; {options.requests} requests of {lengths}; {device}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    for name, value in (
        ("layers", 2), ("requests", 48), ("prompt", 16), ("shortest", 64), ("longest", 512), ("budget", 64),
        ("memory-mb", 4), ("seconds", 600), ("seed", 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    main(parser.parse_args())

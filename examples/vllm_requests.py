"""vLLM with rows and without, at equal bytes: how many requests run at once, and how many tokens a second come out.

Runs on a CPU with `make .venv-vllm`, for example:

    .venv-vllm/bin/python examples/vllm_requests.py --requests 48 --new 1000 --budget 128

Each engine runs in a process of its own. The requests are the same: random prompts, and a fixed number of new tokens.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time

from raas_cache import embedded_model


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=embedded_model(), help="folder of the model; by default the embedded one")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--prompt", type=int, default=60, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=1000, help="new tokens of a request")
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--memory", type=int, default=1 << 24, help="bytes for keys and values")
    parser.add_argument("--method", default="raas")
    parser.add_argument("--one", choices=["dense", "rows"], help="run one engine in this process, and print JSON")
    return parser.parse_args()


def run(options):
    """Run all requests: how many fit into the memory at their full length, and how many seconds all took."""
    from vllm import LLM, SamplingParams

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    engine = LLM(
        options.model,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=options.prompt + options.new,
        max_num_seqs=options.requests,
        max_num_batched_tokens=max(512, options.requests),
        enable_prefix_caching=False,
        kv_cache_memory_bytes=options.memory,
        disable_log_stats=True,
    ).llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=options.new, ignore_eos=True)
    rng = random.Random(0)
    for name in range(options.requests):
        engine.add_request(
            str(name), {"prompt_token_ids": [rng.randrange(4, 200) for _ in range(options.prompt)]}, sampling
        )
    core = engine.engine_core.engine_core
    scheduler, cache = core.scheduler, core.vllm_config.cache_config
    blocks, running, steps, start = cache.num_gpu_blocks - 1, 0, 0, time.perf_counter()
    while engine.has_unfinished_requests():
        engine.step()
        running, steps = running + len(scheduler.running), steps + 1
    seconds = time.perf_counter() - start
    if options.one == "dense":
        blocks //= -(-(options.prompt + options.new) // cache.block_size)
    return {"fit": blocks, "running": running / steps, "seconds": seconds}


def main():
    options = arguments()
    if options.one:
        print(json.dumps(run(options)))
        return
    found = {}
    for one in ("dense", "rows"):
        settings = {"RAAS_BUDGET": str(options.budget), "RAAS_METHOD": options.method} if one == "rows" else {}
        plain = {name: value for name, value in os.environ.items() if not name.startswith("RAAS_")}
        done = subprocess.run(
            [sys.executable, *sys.argv, "--one", one], env={**plain, **settings}, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(done.stderr)
        found[one] = json.loads(done.stdout.splitlines()[-1])
    dense, rows = found["dense"], found["rows"]
    print(f"{options.requests} requests of {options.prompt} + {options.new:,} tokens, {options.memory:,} bytes")
    print(f"requests of full length that fit: {dense['fit']} without rows, {rows['fit']} with budget {options.budget}")
    print(f"requests that ran, on average over all steps: {dense['running']:.1f} and {rows['running']:.1f}")
    print(f"tokens a second with rows: {dense['seconds'] / rows['seconds']:.2f} times as many")


if __name__ == "__main__":
    main()

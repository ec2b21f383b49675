"""Decode 100,000 tokens with one `model.generate` call, and print time per token and memory while it runs.

The model is random and Llama-shaped, with about 10M parameters. On a CPU the script takes about a quarter of an hour.

    OMP_NUM_THREADS=1 python examples/long_chain.py --tokens 100000 --budget 1024
"""

import argparse
import resource
import statistics
import time
from pathlib import Path

import torch

from raas_cache import RaaSCache
from raas_cache.bench import build_model, load_config
from raas_cache.common.upstream import CACHE_ARGUMENT


PROMPT = 64


def resident_megabytes() -> float:
    """Current resident memory of the process in MB (Linux only)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


class Watch:
    """A streamer for `generate` that prints the time per step and the memory each time the length has doubled."""

    def __init__(self, cache: RaaSCache, first: int):
        self.cache, self.next, self.times, self.last = cache, first, [], None

    def put(self, _) -> None:
        now = time.perf_counter()
        if self.last is not None:
            self.times.append(now - self.last)
        if self.cache.get_seq_length() >= self.next:
            self.report()
            self.next *= 2
        self.last = time.perf_counter()

    def report(self) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        held, seen = int(self.cache.resident_tokens(0).max()), self.cache.get_seq_length()
        median = 1e3 * statistics.median(self.times)
        print(f"{seen:9,} {held:6,} {median:10.2f} {resident_megabytes():12.1f} {peak:9.1f}", flush=True)
        self.times.clear()

    def end(self) -> None:
        self.report()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000, help="length of the sequence, including the prompt")
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    model = build_model(load_config("small"), torch.device(args.device), torch.float32)
    prompt = torch.randint(1, 4096, (1, PROMPT), device=args.device)
    cache = RaaSCache(args.budget)
    print(f"{'seen':>9} {'held':>6} {'ms/token':>10} {'resident MB':>12} {'peak MB':>9}")
    model.generate(
        prompt, streamer=Watch(cache, 2 * args.budget), do_sample=False, pad_token_id=0,
        min_new_tokens=args.tokens - PROMPT, max_new_tokens=args.tokens - PROMPT, **{CACHE_ARGUMENT: cache},
    )  # fmt: skip
    print(cache)


if __name__ == "__main__":
    main()

"""One rank of a tensor-parallel generation: `torchrun --nproc-per-node 2 -m tests.tensor_parallel FOLDER OUT`.

Rank 0 writes to OUT the tokens, the KV heads of its rank, and the residents of all ranks' KV heads.
"""

import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from raas_cache import RaaSCache

from .helpers import generate, prompt


SETTINGS = {"budget": 64, "page_size": 4, "alpha": 0.05}
STEPS = 80


def run(folder: str, **kwargs) -> tuple[torch.Tensor, RaaSCache]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **kwargs).eval()
    cache = RaaSCache(**SETTINGS)
    return generate(model, prompt(2, 12, (3, 0)), cache, STEPS, sample=False), cache


def main(folder: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    tokens, cache = run(folder, tp_plan="auto")
    positions = cache.resident_positions(1).sort(-1).values
    gathered = [torch.empty_like(positions) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, positions)
    if dist.get_rank() == 0:
        torch.save((tokens, positions.shape[1], torch.cat(gathered, 1)), out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

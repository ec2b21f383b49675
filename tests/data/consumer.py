"""The public API as the README uses it, for `test_typing.py`: is checked by mypy, and never run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from typing_extensions import assert_type

import raas_kernels
from raas_cache import (
    H2OCache,
    PagedCache,
    Pages,
    Policy,
    RaaSCache,
    Recording,
    embedded_model,
    from_name,
    largest_budget,
    learn_shares,
    list_methods,
    plan,
    read,
    record,
    register_policy,
    viz,
)
from raas_cache.eval import Row, Setting, Summary, Task, load_task, parse_methods, run, settings, summarize, table


tokenizer = AutoTokenizer.from_pretrained(embedded_model())
inputs: dict[str, torch.Tensor] = {"input_ids": torch.tensor([[1, 2, 3]])}


def generate() -> None:
    # What transformers 5.23 says of `generate` fits none of its models.
    model: Any = AutoModelForCausalLM.from_pretrained(embedded_model())
    cache = RaaSCache(budget=1024, alpha=0.1, kv_dtype="int8", config=model.config)
    model.generate(**inputs, past_key_values=cache, max_new_tokens=32_000)
    assert_type(cache.nbytes, int)
    assert_type(cache.budget, int | tuple[int, ...])
    assert_type(cache.resident_positions(0), torch.Tensor)
    assert_type(cache.resident_tokens(0), torch.Tensor)
    assert_type(cache.evicted_pages(0), torch.Tensor)
    assert_type(cache.is_compileable, bool)
    cache.crop(-1)
    cache.reset()


def swap_methods(model: PreTrainedModel) -> None:
    assert_type(list_methods(), list[str])
    assert_type(from_name("quest", budget=1024, dense_layers=1), PagedCache)
    H2OCache([512, 1024], recent_ratio=0.5, prompt="pin")
    ids = torch.zeros(1, 900, dtype=torch.int64)
    shares = learn_shares(model, ids, 100, 384, page_size=4, sizes=1)
    assert_type(shares, list[list[float]])
    assert_type(read(model, ids, 3, RaaSCache(384, shares=shares)), torch.Tensor)
    RaaSCache(384, shares=[1.5, [0.5, 0.5]])


def misuse(model: PreTrainedModel) -> None:
    RaaSCache("1024")  # type: ignore[arg-type]
    RaaSCache(1024, alpah=0.1)  # type: ignore[call-arg]
    RaaSCache(1024, prompt="keep")  # type: ignore[arg-type]
    learn_shares(model, torch.zeros(1, 9, dtype=torch.int64), 3, 384, pagesize=4)  # type: ignore[call-arg]


def look_inside(path: Path) -> None:
    cache = RaaSCache(budget=64)
    with record(cache, layers=[1]) as recording:
        assert_type(recording, Recording)
    recording.save(path)
    history = Recording.load(path).history(layer=1, head=0)
    assert_type(history.steps.ndim, int)
    viz.waterfall(recording, layer=1, head=0).savefig(path)
    assert_type(viz.lost_mass(recording, recording, 1, 0).share, float)
    path.write_text(viz.tokens(recording, tokenizer, [1, 2, 3]))


def choose_a_budget(config: PreTrainedConfig) -> None:
    assert_type(plan(config, 2048, batch_size=16, kv_dtype="int8").nbytes, int)
    assert_type(largest_budget(config, 8_000_000_000, page_size=32), int)


@register_policy("newest")
@dataclass(frozen=True)
class Newest(Policy):
    prompt = "evict"
    state = ("seen",)

    share: float = 0.5

    def on_scores(self, pages: Pages) -> None:
        assert_type(pages.held, torch.Tensor)
        pages.state["seen"].add_(pages.scores)


assert_type(Newest(0.25).share, float)


def evaluate(folder: Path) -> None:
    task = load_task("chains", limit=8)
    assert_type(task, Task)
    model = AutoModelForCausalLM.from_pretrained(embedded_model())
    wanted = settings(parse_methods("dynamic,raas:alpha=1e-4"), [256, 512])
    assert_type(wanted, list[Setting])
    rows = run(model, tokenizer, task, wanted, out=folder)
    assert_type(rows, list[Row])
    assert_type(summarize(rows), list[Summary])
    print(table(summarize(rows)))


def kernels(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    kv = raas_kernels.PagedKV.filled(keys, values, page_size=16)
    assert_type(kv.key_min, torch.Tensor | None)
    raas_kernels.append(kv, keys[:, :, :1], values[:, :, :1])
    output, scores = raas_kernels.attend(kv, query, scale=0.125, page_score="sum")
    assert_type(output, torch.Tensor)
    assert_type(scores, torch.Tensor)
    raas_kernels.attend(kv, query, 0.125, page_score="least")  # type: ignore[arg-type]

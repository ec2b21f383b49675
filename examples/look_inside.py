"""Draw the pictures of docs/looking-inside.md, and print the numbers in its text.

    python examples/look_inside.py --out docs/images

The embedded model solves one problem with a RaaSCache of half of the tokens, and the script records the cache. Then a
DenseCache reads the same chain, which shows where the attention would have gone. The default head looks up derived
values.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from raas_cache import DenseCache, RaaSCache, Recording, embedded_model, read, record, viz
from raas_cache.common.upstream import CACHE_ARGUMENT
from raas_cache.eval.chains import problems
from raas_cache.methods.raas import DEFAULT_ALPHA


def main(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("docs/images"),
    layer: Annotated[int, typer.Option(help="Layer to draw.")] = 1,
    head: Annotated[int, typer.Option(help="KV head to draw.")] = 0,
    budget: Annotated[int, typer.Option(help="Budget in tokens.")] = 384,
    lines: Annotated[int, typer.Option(help="Lines of the chain.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the problem.")] = 0,
) -> None:
    """Draw the pages of one chain."""
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    model = AutoModelForCausalLM.from_pretrained(embedded_model()).eval()
    inputs = tokenizer(problems(1, lines, seed)[0].prompt, return_tensors="pt", return_token_type_ids=False)
    ratios = []
    for _ in range(5):
        _, plain = timed(model, inputs, RaaSCache(budget, page_size=4))
        cache = RaaSCache(budget, page_size=4)
        with record(cache) as recording:
            ids, recorded = timed(model, inputs, cache)
        ratios.append(recorded / plain)
    dense = DenseCache(budget, page_size=4)
    with record(dense, layers=[layer], heads=[head]) as everything:
        read(model, ids, inputs["input_ids"].shape[1], dense)

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
    print(f"recording: {recording.nbytes / 1e6:.1f} MB, {statistics.median(ratios):.2f} times the time without it")
    lost = viz.lost_mass(recording, everything, layer, head)
    print(f"layer {layer}, KV head {head}: {lost.share:.1%} of its attention fell on {len(lost.pages)} evicted pages")
    print(worst_step(recording, everything, lost, layer, head))


def timed(model, inputs, cache):
    """Generate; return the ids of prompt and chain ``[1, tokens]``, and the seconds that it took."""
    started = time.perf_counter()
    ids = model.generate(**inputs, do_sample=False, **{CACHE_ARGUMENT: cache})
    return ids, time.perf_counter() - started


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

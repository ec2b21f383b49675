"""Draw what a cache does while a model reasons: the pictures of docs/looking-inside.md.

    python examples/look_inside.py --out docs/images

The embedded model solves one problem through RaaS at half of the tokens, recorded; then a DenseCache reads the same
chain, which tells where the attention would have gone. The head drawn by default is one that looks derived values up.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from raas_cache import DenseCache, RaaSCache, embedded_model, read, record, viz
from raas_cache.eval.chains import problems


def main(
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("docs/images"),
    layer: Annotated[int, typer.Option(help="Layer to draw.")] = 1,
    head: Annotated[int, typer.Option(help="KV head to draw.")] = 0,
    budget: Annotated[int, typer.Option(help="Tokens to hold.")] = 384,
    lines: Annotated[int, typer.Option(help="Lines of the chain.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the problem.")] = 0,
) -> None:
    """Draw the inside of one chain."""
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    model = AutoModelForCausalLM.from_pretrained(embedded_model()).eval()
    inputs = tokenizer(problems(1, lines, seed)[0].prompt, return_tensors="pt", return_token_type_ids=False)
    cache, dense = RaaSCache(budget, page_size=4), DenseCache(budget, page_size=4)
    with record(cache) as recording:
        ids = model.generate(**inputs, past_key_values=cache, do_sample=False)
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
    lost = viz.lost_mass(recording, everything, layer, head)
    print(f"layer {layer}, KV head {head}: {lost.share:.1%} of its attention fell on {len(lost.pages)} evicted pages")


if __name__ == "__main__":
    typer.run(main)

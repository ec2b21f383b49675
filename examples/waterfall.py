"""Draw the waterfall: the earlier lines of its own chain of thought that a model attends to, line by line.

    python examples/waterfall.py --out docs/images/waterfall.png

The embedded model solves one problem with a dense cache. One more forward over its output gives the attention weights.
The picture shows the weights of one head, at the token of each line that comes before the cited value. The script picks
the head with the largest mean weight on the two lines that contain this value: the line that derives it, and the next
line, which restates it. Only citations of values from more than two lines before count. A column is a line that the
model may attend to. A milestone is a column that is dark now and then for a while, and then stays white.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from raas_cache.eval.chains import TOKENS_PER_LINE, ChainProblem, is_exact, problems


ASKS = 6
"""Position of the operator between the two digits of a line. The cited value follows, so the model looks it up here."""


@torch.no_grad()
def lookup_attention(model_folder: Path, problem: ChainProblem) -> np.ndarray:
    """Attention weights ``[layers, heads, lines, 1 + lines]`` at the look-up of each line, on prompt and lines."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="eager").eval()
    inputs = tokenizer(problem.prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, do_sample=False)
    prompt, lines = inputs["input_ids"].shape[1], len(problem.refs)
    if not is_exact(tokenizer.decode(ids[0, prompt:], skip_special_tokens=True), problem):
        raise SystemExit("The model made an error, so its lines differ from the solution: try another --seed.")
    weights = torch.cat(model(ids, output_attentions=True, use_cache=False).attentions)
    end = prompt + lines * TOKENS_PER_LINE
    asking = weights[:, :, prompt + ASKS : end : TOKENS_PER_LINE]
    on_lines = asking[..., prompt:end].unflatten(-1, (lines, TOKENS_PER_LINE)).sum(-1)
    return torch.cat([asking[..., :prompt].sum(-1, keepdim=True), on_lines], dim=-1).numpy()


def pick_head(weights: np.ndarray, problem: ChainProblem) -> tuple[int, int, int, float]:
    """Layer, head, offset, weight. Offset 0: the head reads the line that derives a value, 1: the next line."""
    cited = [(line, ref - problem.num_givens) for line, ref in enumerate(problem.refs) if ref >= problem.num_givens]
    asking, derived = np.array([(line, source) for line, source in cited if line - source > 2]).T
    mean = np.stack([weights[:, :, asking, 1 + derived + offset].mean(-1) for offset in (0, 1)], axis=-1)
    layer, head, _ = np.unravel_index(mean.sum(-1, keepdims=True).argmax(), mean[..., :1].shape)
    return int(layer), int(head), int(mean[layer, head].argmax()), float(mean[layer, head].sum())


def draw(picture: np.ndarray, offset: int, problem: ChainProblem, title: str, out: Path) -> None:
    """Draw ``picture`` ``[lines, 1 + lines]`` (row: line being written; column: prompt or earlier line)."""
    lines = len(picture)
    uses: dict[int, list[int]] = {}
    for line, ref in enumerate(problem.refs):
        if ref >= problem.num_givens:
            uses.setdefault(ref - problem.num_givens + offset, []).append(line)
    # Point at the milestone with the most uses, among the milestones that end in the first two thirds of the chain.
    star = max(uses, key=lambda column: (uses[column][-1] < lines * 2 / 3, len(uses[column])))
    first, last = uses[star][0], uses[star][-1]

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9.4, 7.4), width_ratios=(1, lines), sharey=True, layout="constrained"
    )
    left.imshow(picture[:, :1], cmap="Greys", vmin=0, vmax=1, aspect="auto")
    left.set(xticks=[0], xticklabels=["prompt"], ylabel="line being written (time runs down)")
    for column, used in uses.items():
        right.plot([column, column], [column, used[-1]], color="0.6", linewidth=1)
    shown = np.ma.masked_less(picture[:, 1:], 0.05)  # transparent, so that the grey lines are visible between the uses
    image = right.imshow(shown, cmap="Greys", vmin=0, vmax=1, aspect="auto", zorder=3)
    right.plot([0, lines - 1], [0, lines - 1], color="0.6", linewidth=1)
    right.plot([star, star], [last + 1, lines - 0.5], color="0.2", linewidth=1.5, linestyle=":")
    right.set(xlabel="line looked at (12 tokens each)", xlim=(-0.5, lines - 0.5), ylim=(lines - 0.5, -0.5))
    life = f"A milestone: line {star} is looked at\n{len(uses[star])} times, by lines {first} to {last} ..."
    texts = (
        (life, first, 0.86),
        ("... and then never again:\nits memory can be freed", (last + lines) / 2, 0.66),
    )
    for text, y, height in texts:
        arrow = {"arrowstyle": "->", "color": "0.2"}
        right.annotate(text, (star + 0.6, y), (0.5, height), textcoords="axes fraction", fontsize=12, arrowprops=arrow)
    figure.suptitle(title, x=0.01, ha="left", fontsize=14)
    figure.colorbar(image, ax=right, label="attention weight (0 to 1)", shrink=0.5, pad=0.02)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


def main(
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("docs/images/waterfall.png"),
    seed: Annotated[int, typer.Option(help="Seed of the problem.")] = 2,
    lines: Annotated[int, typer.Option(help="Lines of the chain.")] = 40,
) -> None:
    """Draw the waterfall of one problem."""
    disable_progress_bar()
    problem = problems(1, lines, seed)[0]
    weights = lookup_attention(Path(str(files("raas_cache") / "models" / "chain_reasoner")), problem)
    layer, head, offset, weight = pick_head(weights, problem)
    print(f"layer {layer}, head {head}: mean weight {weight:.2f} on the lines that hold the cited value")
    title = f"What a model looks at while it reasons (layer {layer}, head {head})"
    draw(weights[layer, head], offset, problem, title, out)


if __name__ == "__main__":
    typer.run(main)

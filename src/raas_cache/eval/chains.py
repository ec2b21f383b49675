"""Chain arithmetic: multi-step sums mod 10, worked out line by line, in which derived values are milestones.

A problem gives a few values and a program, its lines shuffled; the completion carries the program out, one 12-token
line a step:

    prompt      v48 3 v49 6 v50 1 | #52 + v50 #53 ? #51 - v49
    completion  #51 v50 - v49 = 1 - 6 = v51 5 ; #52 v51 + v50 = 5 + 1 = v52 6 ; #53 v52 ? 6

Line ``#i`` takes the value before it and adds or subtracts a cited earlier value: ``v_i = v_{i-1} +- v_ref (mod 10)``;
the line marked ``?`` reports it, which is the answer. To stop is thus looked up like any instruction, not guessed.
A derived value is cited by a few later lines and then never again, so the line that derived it is a milestone: needed
for a while, then dead weight. Which values are live is random and unannounced, and no reuse gap is ruled out.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypedDict


if TYPE_CHECKING:
    from typing_extensions import Unpack

Split = Literal["train", "validation", "test"]

NUM_NAMES = 128
"""Names in the vocabulary; a problem's values are named from a random start, wrapping around."""
TOKENS_PER_LINE = 12
"""Tokens of one line of the completion."""
TOKENS_OF_ANSWER = 4
"""Tokens of the completion's last line, which reports the answer."""
VOCABULARY: tuple[str, ...] = (
    *"?=+-;|",
    *"0123456789",
    *(f"v{i}" for i in range(NUM_NAMES)),
    *(f"#{i}" for i in range(NUM_NAMES)),
)
"""Every token of the task; a model adds its own special tokens."""

_RECENT = 4  # a value becomes a milestone within this many lines of its derivation, or never
_COPRIME = (1, 3, 7, 9)  # with no given coprime to 10, a chain can be stuck on even values or on 0 and 5


@dataclass(frozen=True)
class ChainProblem:
    """One problem, as text: tokens separated by single spaces, without special tokens."""

    prompt: str
    chain: str
    """The whole gold completion, answer included."""
    answer: str
    num_givens: int
    """Values stated by the prompt; value ``num_givens + j`` is derived by line ``j``."""
    refs: tuple[int, ...]
    """The index of the value that each line cites."""


class ChainOptions(TypedDict, total=False):
    """Options of `make_problem`."""

    num_givens: int
    live_size: int | None
    max_uses: int


def make_problem(
    num_lines: int,
    rng: random.Random,
    *,
    split: Split | None = None,
    num_givens: int = 4,
    live_size: int | None = 4,
    max_uses: int = 6,
) -> ChainProblem:
    """Draw a problem of ``num_lines`` lines.

    Args:
        split: keep to one split's problems (None: any). A problem belongs to the split its givens hash to, so that
            the statements of two splits never begin alike, whatever the seeds.
        num_givens: values stated in the prompt, at least 2.
        live_size: how many values are in use at a time; a line cites one of them at random. None cites any earlier
            value, all equally likely: no milestones, every value may come back.
        max_uses: a milestone is cited between 1 and this many times.
    """
    total = num_givens + num_lines
    if num_givens < 2 or num_lines < 1 or total >= NUM_NAMES:
        raise ValueError(
            f"num_givens={num_givens} and num_lines={num_lines}: need at least 2 givens and 1 line, and fewer than "
            f"{NUM_NAMES} of both together."
        )
    while True:
        start = rng.randrange(NUM_NAMES)
        values = [rng.randrange(10) for _ in range(num_givens)]
        values[rng.randrange(num_givens)] = rng.choice(_COPRIME)
        givens = " ".join(f"v{(start + i) % NUM_NAMES} {value}" for i, value in enumerate(values))
        if split is None or _split_of(givens) == split:
            break

    refs = _draw_refs(total, num_givens, live_size, max_uses, rng)
    names = [(start + i) % NUM_NAMES for i in range(total)]
    program, lines = [], []
    for i, ref in enumerate(refs, start=num_givens):
        op = rng.choice("+-")
        left, right = values[i - 1], values[ref]
        values.append((left + right if op == "+" else left - right) % 10)
        program.append(f"#{names[i]} {op} v{names[ref]}")
        lines.append(
            f"#{names[i]} v{names[i - 1]} {op} v{names[ref]} = {left} {op} {right} = v{names[i]} {values[i]} ;"
        )
    last, answer = f"#{(start + total) % NUM_NAMES}", str(values[-1])
    program.append(f"{last} ?")
    lines.append(f"{last} v{names[-1]} ? {answer}")
    rng.shuffle(program)  # else a line could be found by counting, and its label would say nothing
    return ChainProblem(f"{givens} | {' '.join(program)}", " ".join(lines), answer, num_givens, tuple(refs))


def problems(
    count: int, num_lines: int, seed: int, *, split: Split = "test", **options: Unpack[ChainOptions]
) -> list[ChainProblem]:
    """``count`` problems of a split, the same for the same arguments; ``options`` are those of `make_problem`."""
    rng = random.Random(f"{split}/{num_lines}/{seed}")  # a string seeds alike on every platform and run
    return [make_problem(num_lines, rng, split=split, **options) for _ in range(count)]


def is_exact(completion: str, problem: ChainProblem) -> bool:
    """Whether every token of the completion is right, up to the end and no further."""
    return completion.split() == problem.chain.split()


def share_right(completion: str, chain: str) -> float:
    """The share of the gold chain that is right before the first error."""
    gold = chain.split()
    same = [ours == theirs for ours, theirs in zip(completion.split(), gold, strict=False)] + [False]
    return same.index(False) / len(gold)


def tokens_of(problem: ChainProblem) -> int:
    """Tokens of the problem, its chain and the end token included."""
    return len(f"<s> {problem.prompt} {problem.chain} </s>".split())


def completion_length(sample: list[ChainProblem]) -> int:
    """Tokens of the longest chain, the end token included."""
    return max(len(problem.chain.split()) for problem in sample) + 1


def answer_of(completion: str) -> str | None:
    """The token after the last ``?``, or None where the completion never got to an answer."""
    _, mark, answer = completion.rpartition("?")
    return answer.split()[0] if mark and answer.strip() else None


def reuse_gaps(sample: Iterable[ChainProblem]) -> list[int]:
    """Lines from the derivation or last citation of a derived value to its next citation, over all citations."""
    gaps = []
    for problem in sample:
        last_use: dict[int, int] = {}
        for line, ref in enumerate(problem.refs):
            if ref >= problem.num_givens:
                gaps.append(line - last_use.get(ref, ref - problem.num_givens))
                last_use[ref] = line
    return gaps


def lifetimes(sample: Iterable[ChainProblem]) -> list[int]:
    """Lines from the derivation of a value to its last citation, over all derived values that are ever cited."""
    return [
        last - (ref - problem.num_givens)
        for problem in sample
        for ref, last in {ref: line for line, ref in enumerate(problem.refs)}.items()
        if ref >= problem.num_givens
    ]


def _split_of(givens: str) -> Split:
    bucket = zlib.crc32(givens.encode()) % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def _draw_refs(total: int, num_givens: int, live_size: int | None, max_uses: int, rng: random.Random) -> list[int]:
    """For each derived value, the index of the value that it cites."""
    if live_size is None:
        return [rng.randrange(i - 1) for i in range(num_givens, total)]
    # The line before is at hand as the left operand, so a citation reaches back at least two values.
    admitted = rng.sample(range(num_givens - 1), min(live_size, num_givens - 1))
    uses_left = {ref: rng.randint(1, max_uses) for ref in admitted}
    seen, refs = set(admitted), []
    for i in range(num_givens, total):
        recent = [ref for ref in range(max(0, i - 1 - _RECENT), i - 1) if ref not in seen]
        while recent and len(uses_left) < live_size:
            ref = recent.pop(rng.randrange(len(recent)))
            uses_left[ref] = rng.randint(1, max_uses)
            seen.add(ref)
        ref = rng.choice(list(uses_left))
        refs.append(ref)
        uses_left[ref] -= 1
        if not uses_left[ref]:
            del uses_left[ref]
    return refs

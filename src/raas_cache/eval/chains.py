"""Chain arithmetic: sums modulo 10 in many steps, solved line by line. The derived values are milestones.

A problem consists of a few values and a program with shuffled lines. The completion executes the program, with one line
of 12 tokens per step:

    prompt      v48 3 v49 6 v50 1 | #52 + v50 #53 ? #51 - v49
    completion  #51 v50 - v49 = 1 - 6 = v51 5 ; #52 v51 + v50 = 5 + 1 = v52 6 ; #53 v52 ? 6

Line ``#i`` takes the value before it and adds or subtracts a cited earlier value: ``v_i = v_{i-1} +- v_ref (mod 10)``.
The line marked ``?`` reports the last value, which is the answer. The model therefore looks up where to stop, like any
other instruction. A few later lines cite a derived value, and then no line cites it again. The line that derives it is
a milestone: needed for a while, and then not needed any more. The set of values in use is random, and the prompt does
not announce it. The gap between two uses of a value has no limit.
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
"""Number of names in the vocabulary. The names of a problem start at a random number and wrap around."""
TOKENS_PER_LINE = 12
"""Number of tokens in a line of the completion."""
TOKENS_OF_ANSWER = 4
"""Number of tokens in the last line of the completion, which reports the answer."""
VOCABULARY: tuple[str, ...] = (
    *"?=+-;|",
    *"0123456789",
    *(f"v{i}" for i in range(NUM_NAMES)),
    *(f"#{i}" for i in range(NUM_NAMES)),
)
"""All tokens of the task. A model adds its own special tokens."""

_RECENT = 4  # a value becomes a milestone within this number of lines after its derivation, or never
_COPRIME = (1, 3, 7, 9)  # without a given that is coprime to 10, all values may be even, or all 0 or 5


@dataclass(frozen=True)
class ChainProblem:
    """A problem as text. Tokens are separated by single spaces; there are no special tokens."""

    prompt: str
    chain: str
    """The complete gold completion, including the answer."""
    answer: str
    num_givens: int
    """Number of values in the prompt. Line ``j`` derives value ``num_givens + j``."""
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
        split: draw only problems of this split (None: any problem). The hash of the given values decides to which split
            a problem belongs, so two splits never contain problems with the same given values.
        num_givens: number of values in the prompt, at least 2.
        live_size: number of values in use at the same time. Each line cites one of them at random. With None, each line
            cites any earlier value with equal probability; then there are no milestones.
        max_uses: largest number of citations of a milestone. The smallest number is 1.
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
    rng.shuffle(program)  # without this, a model could find a line by counting instead of by its label
    return ChainProblem(f"{givens} | {' '.join(program)}", " ".join(lines), answer, num_givens, tuple(refs))


def problems(
    count: int, num_lines: int, seed: int, *, split: Split = "test", **options: Unpack[ChainOptions]
) -> list[ChainProblem]:
    """Draw ``count`` problems of a split. Equal arguments give equal problems. For ``options`` see `make_problem`."""
    rng = random.Random(f"{split}/{num_lines}/{seed}")  # a string seed is the same on every platform
    return [make_problem(num_lines, rng, split=split, **options) for _ in range(count)]


def is_exact(completion: str, problem: ChainProblem) -> bool:
    """Whether the completion equals the gold chain, token for token."""
    return completion.split() == problem.chain.split()


def share_right(completion: str, chain: str) -> float:
    """Number of correct tokens before the first error, as a share of the gold chain."""
    gold = chain.split()
    same = [ours == theirs for ours, theirs in zip(completion.split(), gold, strict=False)] + [False]
    return same.index(False) / len(gold)


def tokens_of(problem: ChainProblem) -> int:
    """Number of tokens of prompt, chain and special tokens."""
    return len(f"<s> {problem.prompt} {problem.chain} </s>".split())


def completion_length(sample: list[ChainProblem]) -> int:
    """Number of tokens of the longest chain, including the end token."""
    return max(len(problem.chain.split()) for problem in sample) + 1


def answer_of(completion: str) -> str | None:
    """The token after the last ``?``, or None if the completion has no answer."""
    _, mark, answer = completion.rpartition("?")
    return answer.split()[0] if mark and answer.strip() else None


def reuse_gaps(sample: Iterable[ChainProblem]) -> list[int]:
    """For each citation of a derived value: lines since its derivation or its previous citation."""
    gaps = []
    for problem in sample:
        last_use: dict[int, int] = {}
        for line, ref in enumerate(problem.refs):
            if ref >= problem.num_givens:
                gaps.append(line - last_use.get(ref, ref - problem.num_givens))
                last_use[ref] = line
    return gaps


def lifetimes(sample: Iterable[ChainProblem]) -> list[int]:
    """For each derived value that is cited: lines from its derivation to its last citation."""
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
    """For each line, draw the index of the value that it cites."""
    if live_size is None:
        return [rng.randrange(i - 1) for i in range(num_givens, total)]
    # The value of the line before is the left operand, so a citation goes back at least two values.
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

r"""Find the final answer in the output of a model, and decide whether it is correct.

math-verify does the mathematics. This file finds the answer. It is also stricter where math-verify accepts too much:
letters read as units (`3c` is not 3), bases (`52_8` is not `52_9`), words (`seat` is not `east`) and rounded numbers.
"""

import hashlib
import logging
import os
import re
import threading
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..common.extras import require


TIMEOUT = 5
"""Seconds that math-verify may take to parse a text, and to compare two texts."""
LONGEST_ANSWER = 1000
"""Number of characters. A longer answer is correct only if it equals the gold answer as text."""
LONGEST_TAIL = 10_000
"""Number of characters at the end of a text in which math-verify looks for an answer."""

_BRACE = re.compile(r"(\\(?:boxed|fbox|framebox(?:\[[^\]]*\])*)\s*\{)|\\.|[{}]", re.DOTALL)
_HASHES = re.compile(r"(?<!#)#{4,}\s*([^\s#].*)")
_BOLD = re.compile(r"(?<!\w)\*\*([^*\n]+)\*\*")
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_THIN = r"(?:\{ ?, ?\}|, ?\\!|\\,)\s*"  # thousands separators in TeX
_TIDY = [(re.compile(pattern), to) for pattern, to in (
    (r"(?<!\\)\\[()\[\]]|\\?\$|\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])", ""),
    (rf"(?<=\d){_THIN}(?=\d{{3}}(?!\d))|(?<!\\)\\!", ""),
    (r"(?<!\\)\\(?:[,;: ]|q?quad(?![a-zA-Z]))|~|\s+", " "),
    (r"\\\\ ?\[[\d.]+(?:pt|em|ex|mm)\]", r"\\\\"),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r" ?\\text ?\{ ?(?:percent|\\?%) ?\}| percent$", r"\\%"),
    (r"^(-?\d+) +(\d+) ?/ ?(\d+)$", r"\1\\frac{\2}{\3}"),
)]  # fmt: skip
_POWER = r"(?: ?\^ ?(?:\d|\{\d\}))?"
# As in math-verify, any word may be a unit and is removed, except words that change the value.
_WORD_UNIT = (
    r"\\(?:text|textrm|mathrm|mbox) ?\{(?![^{}]*\b(?:hundred|thousand|million|billion|trillion|dozen|half|and|or|not|"
    rf"if|[ap]\.?m)\b)[^{{}}\d()]+\}}{_POWER}"
)
_BARE_UNIT = (
    r"(?:(?:square|cubic|sq\.?) )?(?:[ckm]m|kg|ft|mph|inch(?:es)?|feet|foot|yards?|met(?:er|re)s?|miles?|seconds?|"
    rf"minutes?|hours?|days?|weeks?|months?|years?|dollars?|cents?|degrees?|pounds?|units?){_POWER}"
)
_DEGREES = r"\^ ?(?:\\circ|\{ ?\\circ ?\})|°|\\degrees?"
_UNIT = re.compile(rf"(?<=[\d}})]) ?(?:{_DEGREES}|/? ?{_WORD_UNIT}|(?<= ){_BARE_UNIT})\.?$", re.IGNORECASE)
_WRAP = re.compile(r"\\(?:text\w*|math(?:rm|bf|it|sf)|mbox|operatorname) ?\{([^{}]*)\}")
_BASE = re.compile(r"(?<=\d)_(?:\{ ?)?(?!10\b)(\d+)")
_CURLY, _ROUND = re.compile(r"\\\{.*\\\}"), re.compile(r"[(\[].*[)\]]")
# math-verify would treat these as products of letters, in any order.
_WORD = re.compile(r"[A-Za-z]{3,}|[\dA-F]*[A-F][\dA-F]*_\{?\d+\}?")
# math-verify adds two adjacent numbers. The other expressions take sympy too long.
_HOPELESS = re.compile(
    r"(?<!_)\d \d|\\(?:sum|prod|i*int)(?![a-z])|\^ ?\{?[ -]*[\d., ]{5,}|\^ ?\{?[ -]*\d+[} ]*\^|\d{5,}\)* ?!|!\)* ?!|"
    r"\\[dt]?binom.*\d{5,}|\d[eE][+-]?\d{4,}"
)


def marker() -> str:
    """Everything that `mark` depends on besides its arguments: this file, and the versions of its packages.

    Raises:
        ImportError: math-verify is missing.
    """
    require_math_verify()
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    packages = (f"{name} {version(name)}" for name in ("math-verify", "latex2sympy2_extended", "sympy"))
    return ", ".join([f"answers {code}", *packages])


def require_math_verify() -> None:
    """Raise an ImportError with the pip command if math-verify is missing."""
    require("math_verify", "Marking answers needs math-verify", "eval")


def extract(output: str) -> str | None:
    r"""Find the text of the final answer in the output of a model. Returns None if there is no answer.

    The answer is the content of the last `\boxed{}`. If there is none, it is the line after the last `####`. If there
    is none either, it is an answer that the text announces, such as 42 in "The answer is 42.", as math-verify finds it.
    The last number of a truncated chain is not an answer. The text after `</think>` is searched first, then the whole
    text.

    Raises:
        ImportError: math-verify is needed and missing.
    """
    _, mark, after = output.rpartition("</think>")
    answer = _last_answer(after) if mark else None
    return _last_answer(output) if answer is None else answer


def gold_of(answer: str) -> str:
    """Extract the gold answer of a data set: the text after `####` (GSM8K), in a box, or the text itself."""
    hashes: list[str] = _HASHES.findall(answer)
    if hashes:
        return hashes[-1].strip().replace(",", "")
    return (_boxes(answer) or [answer.strip()])[-1]


def mark(output: str, gold: str) -> tuple[str | None, bool]:
    """Find the final answer with `extract`. Returns the answer, and whether it equals the gold answer.

    Raises:
        ImportError: math-verify is missing.
    """
    require_math_verify()
    answer = extract(output)
    return answer, answer is not None and _are_same(answer, gold)


def are_equivalent(answer: str, other: str) -> bool:
    """Whether two answers from `extract` are the same answer, as `mark` compares an answer with the gold answer.

    Raises:
        ImportError: math-verify is needed and missing.
    """
    if answer == other:
        return True
    require_math_verify()
    return _are_same(answer, other)


def is_correct(output: str, gold: str) -> bool:
    """Whether the final answer of the output equals the gold answer, see `mark`."""
    return mark(output, gold)[1]


def _last_answer(text: str) -> str | None:
    if found := _boxes(text) or _HASHES.findall(text):
        return found[-1].strip()
    require_math_verify()
    maths = _math_verify()
    text = _BOLD.sub(r"\1", text[-LONGEST_TAIL:])  # math-verify would read the asterisks as multiplication
    found = maths.parse(text, maths.anywhere, parsing_timeout=_timeout())
    answer = next((match for match in found if isinstance(match, str) and match), None)
    # math-verify finds only the number in 3x or 1e5.
    torn = answer and answer in text and not re.search(rf"(?<!\w){re.escape(answer)}(?![\w^(*/]|\\[a-zA-Z])", text)
    return None if torn else answer


def _boxes(text: str) -> list[str]:
    """The contents of all boxes that are not empty, in the order of their closing braces."""
    contents, opened = [], []
    for brace in _BRACE.finditer(text):
        if brace[1] or brace[0] == "{":
            opened.append(brace.end() if brace[1] else None)
        elif brace[0] == "}" and opened and (start := opened.pop()) is not None:
            contents.append(text[start : brace.start()].strip())
    return [content for content in contents if content]


def _tidy(text: str) -> str:
    """Normalize LaTeX, and remove units."""
    text = text.strip()
    for pattern, to in _TIDY:
        text = pattern.sub(to, text)
    before, text = None, text.strip().removesuffix(".")
    while before != text and re.search(r"\d|\\pi", text):  # 3 \text{ m}/\text{s} has two units
        before, text = text, _UNIT.sub("", text).strip()
    return text.replace(",", "") if _THOUSANDS.fullmatch(text) else text


def _plain(text: str) -> str:
    """Normalize a text for a comparison of strings."""
    before = None
    while before != text:
        before, text = text, _WRAP.sub(r"\1", text)
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text).removesuffix(".")
    text = re.sub(r"^\(([A-Za-z]|\d+)\)$", r"\1", text)  # (C)
    return text.lower() if re.fullmatch(r"[A-Za-z]{2,}", text) else text


def _are_same(answer: str, gold: str) -> bool:
    if max(len(answer), len(gold)) > LONGEST_ANSWER:
        return answer == gold
    return _same(_tidy(answer), _tidy(gold))


def _same(answer: str, gold: str) -> bool:
    plain, plain_gold = _plain(answer), _plain(gold)
    if plain == plain_gold:
        return bool(plain)
    both = (answer, gold)
    if (
        any(_WORD.fullmatch(text) for text in (plain, plain_gold))
        or any(_HOPELESS.search(text) for text in both)
        or any(_CURLY.fullmatch(one) and _ROUND.fullmatch(other) for one, other in (both, both[::-1]))
        or _BASE.findall(answer) not in ([], _BASE.findall(gold))  # an answer may omit the base
    ):
        return False
    maths, seconds = _math_verify(), _timeout()
    parsed_gold, parsed, absurd = (
        maths.parse(rf"\boxed{{{text}}}", maths.boxed, "no_fallback", "first_match", parsing_timeout=seconds)
        for text in (gold, answer, "0=1")
    )

    def equal(target: list[Any]) -> bool:
        # With 12 decimals, 0.333333 does not equal 1/3, and .00006724 does not equal .0000672.
        verify: Callable[..., bool] = maths.verify
        return verify(parsed_gold, target, 12, 50, allow_set_relation_comp=True, timeout_seconds=seconds)

    # For math-verify, all equations without a real solution are equal.
    return equal(parsed) and not ("=" in gold and equal(absurd))


@cache
def _math_verify() -> SimpleNamespace:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns about each timeout, and about a missing timeout
    tidied = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last")
    boxed = LatexExtractionConfig(False, boxed_match_priority=0, normalization_config=tidied)
    return SimpleNamespace(parse=parse, verify=verify, boxed=[boxed], anywhere=[boxed, ExprExtractionConfig(False)])


def _timeout() -> int | None:
    """Seconds, or None where math-verify cannot use signals. `_HOPELESS` then excludes slow expressions."""
    main = threading.current_thread() is threading.main_thread()
    return TIMEOUT if main and os.name == "posix" else None

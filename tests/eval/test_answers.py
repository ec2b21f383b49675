"""Marking answers: real gold answers, pairs that are easy to get wrong, and texts that mean nothing."""

import json
import logging
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raas_cache.eval.answers import extract, gold_of, is_correct


pytest.importorskip("math_verify")

GOLDS = json.loads((Path(__file__).parents[1] / "data" / "gold_answers.json").read_text(encoding="utf-8"))
SETS = ["gsm8k", "math500", "aime24"]
EQUAL_NEIGHBOURS = {("5", "x=5")}  # two texts, one answer
TOWER = "10^{10^{10^{10}}}"


def boxed(answer):
    return rf"Adding up, we get $\boxed{{{answer}}}$. Done."


RIGHT = [
    # fractions and mixed numbers
    (r"\dfrac{1}{2}", r"\frac12"), ("0.5", r"\frac{1}{2}"), ("1/2", "0.5"), (r"\frac{2}{4}", r"\frac{1}{2}"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"), ("1.8", r"1\frac{4}{5}"), ("1 4/5", r"1\frac{4}{5}"),
    (r"\frac{9}{5}", r"1\frac{4}{5}"), ("137.5", r"137 \frac{1}{2}"), ("5:6", r"\frac{5}{6}"),
    # intervals and inequalities
    ("[0, 1)", "[0,1)"), (r"(-\infty,0]", r"\left(-\infty, 0\right]"), ("[-2,7]", r"x \in [-2,7]"),
    (r"(3,\infty)\cup(-\infty,2)", r"(-\infty, 2) \cup (3, \infty)"), (r"(2,\infty)", "x>2"), ("x>2", r"(2,\infty)"),
    ("2<x", "x>2"),
    # units
    (r"864 \text{ in}^2", r"864 \mbox{ inches}^2"), ("864", r"864 \mbox{ inches}^2"), (r"15\text{ cm}^2", "15"),
    (r"5 \text{ m}/\text{s}", "5"), ("10 cm", "10"), ("90", r"90^\circ"), (r"90^{\circ}", "90"), ("90°", r"90^\circ"),
    (r"\frac{270}{7}^\circ", r"\frac{270}7\text{ degrees}"), (r"30^\circ, 60^\circ", "30,60"),
    ("18.9", r"\$18.90"), ("$36", r"\$36"), (r"36\text{ dollars}", r"\$36"), ("5.4", r"5.4 \text{ cents}"),
    (r"50\%", "50"), (r"50\%", "0.5"), (r"50\text{ percent}", r"50\%"),
    # thousands
    ("1,234", "1234"), (r"1{,}234", "1,234"), ("10,080", r"10,\!080"), ("10080", r"10,\!080"), (r"70\,000", "70,000"),
    (r"\$32,348", r"\$32,\!348"), ("11,111,111,100", r"11,\! 111,\! 111,\! 100"), ("1,234.50", "1234.5"),
    # lists, sets and tuples
    ("7,3,5", "3, 5, 7"), ("-2,1", "1,-2"), (r"\{3,2,1\}", r"\{1,2,3\}"), ("x=1, x=-2", "1,-2"),
    (r"1 \text{ and } -2", "1,-2"), (r"1+\sqrt{19}, 1-\sqrt{19}", r"1 \pm \sqrt{19}"),
    (r"\{-2, 1-\sqrt5, 1+\sqrt5\}", r"\{1\pm\sqrt{5},-2\}"), (r"\left\{1,2\right\}", r"\{1,2\}"),
    ("(3, 0.5\\pi)", r"\left( 3, \frac{\pi}{2} \right)"), ("(6, 31, -1)", "(6,31,-1)"),
    # matrices
    (r"\begin{bmatrix} -\frac13 \\ \frac23 \end{bmatrix}", r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}"),
    (r"\begin{pmatrix} \dfrac{1}{3} \\[4pt] 2 \end{pmatrix}", r"\begin{pmatrix} 1/3 \\ 2 \end{pmatrix}"),
    (r"\left[\begin{matrix}1\\2\end{matrix}\right]", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    # roots, pi, complex numbers
    (r"\sqrt{242}", r"11\sqrt2"), (r"\frac{1}{\sqrt3}", r"\frac{\sqrt{3}}{3}"), (r"\sqrt2\sqrt3", r"\sqrt{6}"),
    (r"\pi 7", r"7\pi"), ("-5i+6", "6 - 5i"), ("(1+2i)", "1+2i"), (r"\sqrt[3]{125}", "5"),
    # algebra and equations
    ("ab+2a+5b+10", "(a+5)(b+2)"), (r"\frac{9a+11}{20}", r"\frac{11+9a}{20}"), ("2(k+1)", "2k+2"), ("yx", "xy"),
    ("5", "x=5"), ("x=5", "5"), ("2x+3", "y = 2x + 3"), ("10x-14y+22z+8=0", "5x - 7y + 11z + 4 = 0"),
    (r"\cot(x)", r"\cot x"), (r"\frac{\cos x}{\sin x}", r"\cot x"), (r"\log_2 8", "3"), (r"\binom{5}{2}", "10"),
    # how numbers are written
    (".5", "0.5"), ("0.50", "0.5"), ("3.0", "3"), ("73", "073"), ("+5", "5"), ("5.", "5"), ("2^{10}", "1024"),
    (r"6.72 \times 10^{-5}", ".0000672"), (r"1.2\cdot10^4", "12000"), ("2516", "2516_8"), ("4210_5", "4210_{5}"),
    # words and choices
    ("Evelyn", r"\text{Evelyn}"), (r"\textbf{Evelyn}", r"\text{Evelyn}"), ("Even.", r"\text{even}"),
    ("C", r"\text{(C)}"), (r"\textbf{(C)}", r"\text{(C)}"), (r"\text{C}", "C"), (r"\textbf{(073)}", "073"),
    (TOWER, TOWER),
]  # fmt: skip

WRONG = [
    # intervals, sets, tuples, lists
    ("(0,1)", "[0,1)"), ("[0,1)", "(0,1)"), ("(0,36)", r"(0,9) \cup (9,36)"), (r"\{0,1\}", "(0,1)"),
    ("(0,1)", r"\{0,1\}"), ("(2,1)", "(1,2)"), ("(1,-2)", "(-2,1)"), ("2,1", "(1,2)"), ("(31,6,-1)", "(6,31,-1)"),
    ("1", "1,-2"), ("1,-2", "1"), ("1,2,3", "1,2"), (r"1+\sqrt{19}", r"1 \pm \sqrt{19}"), (r"\pm 5", "5"),
    (r"5 \text{ or } 6", "5"), ("(1,2),(3,4)", "(1,3),(2,4)"), ("x=5,y=6", "x=6,y=5"), (r"\emptyset", "0"),
    ("x<2", "x>2"), (r"x\ge 2", "x>2"), ("2<x<4", "(2,3)"),
    # units and bases count as far as they change the number
    ("3c", "3"), ("3 m", "3"), ("3d", "3c"), (r"3\text{ million}", "3"), (r"6 \text{ AM}", r"6 \text{ PM}"),
    (r"5\%", "0.5"), ("0.05", "5"), (r"\frac{\pi}{2}", r"90^\circ"),
    ("52_9", "52_8"), ("52_8", "52"), ("42", "52_8"), ("1A3_{12}", "3A1_{12}"),
    # roundings of an exact answer
    ("0.33", r"\frac13"), ("0.333333", r"\frac13"), ("3.14159", r"\pi"), ("1.41421356", r"\sqrt2"),
    ("0.000067", ".0000672"), ("4.0000001", "4"), ("100000000000000000001", "100000000000000000000"),
    ("2^{-99}", "2^{-100}"), (r"\frac{1}{2^{99}}", r"\frac{1}{2^{100}}"),
    # commas and blanks
    ("(1,234)", "1234"), (r"\{1,234\}", r"\{1234\}"), ("12", "1,2"), ("10,08", "1008"), ("11/2", "1 1/2"),
    ("1 1/2", "11/2"), ("5 6", "11"), (r"5\ 6", "11"),
    # algebra, matrices, signs
    ("ab+10", "(a+5)(b+2)"), ("2x", "2y"), ("y=5", "x=5"), ("y = 2x - 3", "y = 2x + 3"), ("5 = 6", "5"),
    ("5x - 7y + 11z + 5 = 0", "5x - 7y + 11z + 4 = 0"), ("x^2+2=0", "x^2+1=0"), ("-5", "5"), ("6+5i", "6-5i"),
    ("5i", "5"), (r"\frac{3}{2}", r"\frac{2}{3}"), ("a_1", "a_2"),
    (r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    # words and choices
    ("seat", "east"), (r"\text{seat}", r"\text{east}"), ("CBA", "ABC"), ("B", r"\text{(C)}"), (r"\text{not }5", "5"),
    (r"\text{red}\text{ blue}", r"\text{red}"),
    (r"\text{none}", "0"), (TOWER, "5"), ("5", TOWER),
]  # fmt: skip

OUTPUTS = [
    (r"First \boxed{3}, but no: \boxed{4}.", "4"),
    (r"\boxed{\frac{\sqrt{3}}{2}}", r"\frac{\sqrt{3}}{2}"),
    (r"\boxed{\left\{x : x > \{y\}\right\}} as wanted}", r"\left\{x : x > \{y\}\right\}"),
    (r"\boxed{\text{the } \boxed{5}}", r"\text{the } \boxed{5}"),
    ("$$\\boxed\n{5}$$", "5"),
    (r"\fbox{5}", "5"),
    (r"\framebox[2cm][c]{5}", "5"),
    (r"I shall use \boxed{}. It is \boxed{7}; that was \boxed{}", "7"),
    (r"It is \boxed{7}. Wait, \boxed{\frac{1}{", "7"),
    (r"\boxed{6} and then #### 7", "6"),
    ("#### 6\nno,\n#### $1,234 \nbye", "$1,234"),
    (r"<think>\boxed{3}</think> So \boxed{4}", "4"),
    ("<think>I put 3 in.</think>\n#### 4", "4"),
    (r"<think>So \boxed{3}.</think> That was hard.", "3"),
    (r"<think>So \boxed{3}. And now", "3"),
    (r"</think>\boxed{3}</think>", "3"),
    ("The answer is 42.", "42"),
    ("She makes $1,234 every day.", None),
    ("The answer is **-5**.", "-5"),
    (r"The answer is \(\dfrac{3}{4}\).", r"\frac{3}{4}"),
    ("The answer is 3x", None),  # and not 3
    ("The answer is 1e5.", None),
    ("I do not know.", None),
    (r"\boxed{", None),
    (r"\boxed{}", None),
    ("####", None),
    ("", None),
]


@pytest.mark.parametrize(("output", "answer"), OUTPUTS)
def test_extract(output, answer):
    assert extract(output) == answer


@pytest.mark.parametrize(("answer", "gold"), RIGHT)
def test_right(answer, gold):
    assert is_correct(boxed(answer), gold)


@pytest.mark.parametrize(("answer", "gold"), WRONG)
def test_wrong(answer, gold):
    assert not is_correct(boxed(answer), gold)


@pytest.mark.parametrize(("output", "answer"), OUTPUTS)
def test_outputs_are_marked_by_their_answer(output, answer):
    assert is_correct(output, answer or "7") == (answer is not None)
    assert not is_correct(output, "1000003")


@pytest.mark.parametrize("column, gold", [
    ("5 + 5 = <<5+5=10>>10\n#### 1,000", "1000"), ("#### -3 ", "-3"), (r"So \boxed{2}, no, \boxed{\frac{1}{2}}.",
    r"\frac{1}{2}"), (r" \frac{1}{2} ", r"\frac{1}{2}"), ("10,\\!080", "10,\\!080"), ("", ""),
])  # fmt: skip
def test_gold_of(column, gold):
    assert gold_of(column) == gold


@pytest.mark.parametrize("name", SETS)
def test_gold_answers_are_right(name):
    golds = [gold_of(gold) for gold in GOLDS[name]]
    assert [gold for gold in golds if not is_correct(boxed(gold), gold)] == []
    if name == "gsm8k":
        assert [gold for gold in GOLDS[name] if not is_correct(f"She has {gold} left.\n#### {gold}", gold)] == []


@pytest.mark.parametrize("name", SETS)
def test_gold_answers_are_right_by_mathematics(name, monkeypatch):
    """Without the comparison of strings, all but words."""
    words = re.compile(r"\\text\{\(?\w+\)?\}")
    strings = iter(range(10**6))
    monkeypatch.setattr("raas_cache.eval.answers._plain", lambda text: f"{text}#{next(strings)}")
    golds = sorted({gold for gold in GOLDS[name] if not words.fullmatch(gold)})
    assert [gold for gold in golds if not is_correct(boxed(gold), gold)] == []


@pytest.mark.parametrize("name", SETS)
def test_gold_answers_are_wrong_for_their_neighbours(name):
    golds = [gold_of(gold) for gold in GOLDS[name]]
    pairs = {(gold, other) for gold, other in zip(golds, golds[1:] + golds[:1], strict=True) if gold != other}
    judged_right = {(gold, other) for gold, other in pairs if is_correct(boxed(other), gold)}
    assert judged_right == EQUAL_NEIGHBOURS & pairs


def test_gold_answers_are_all_there():
    assert [len(GOLDS[name]) for name in SETS] == [1319, 500, 30]


@pytest.mark.parametrize("expression", [
    TOWER, f"{TOWER}+x", "2^{1000000000}", "100000000!", "((10!)!)!", r"\binom{1000000000}{500000000}", "9^{9^{9}}",
    r"\sum_{k=1}^{100000000000} \frac{1}{k}", r"\prod_{k=1}^{1000000000} k", "(1+x)^{100000}", "1E999999999",
    "(" * 400 + "1" + ")" * 400, r"\sqrt{" * 150 + "2" + "}" * 150, "9" * 900, "#" * 200_000, r"\text{" * 30_000,
    r"\boxed{" * 30_000, "1 " * 50_000, "**" * 50_000, "$" * 50_000, "A" * 100_000, "(" * 50_000,
], ids=lambda expression: expression[:20])  # fmt: skip
def test_nothing_hangs(expression):
    start = time.monotonic()
    assert not is_correct(boxed(expression), "5")
    assert not is_correct(boxed("5"), expression)
    assert not is_correct(expression, "1000003")
    assert time.monotonic() - start < 25  # with a time limit of 5 s to parse and to compare


def test_another_thread_marks_alike_and_in_silence(caplog, recwarn):
    pairs = [(boxed(answer), gold) for answer, gold in RIGHT + WRONG] + [("The answer is 42.", "42")]
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.extend(is_correct(*pair) for pair in pairs))
    with caplog.at_level(logging.DEBUG, logger=""):
        thread.start()
        thread.join(60)
        assert verdicts == [True] * len(RIGHT) + [False] * len(WRONG) + [True]
        assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert not recwarn.list


def test_signals_are_left_alone():
    before = signal.getsignal(signal.SIGALRM)
    is_correct(boxed(r"\int_0^1 x^{x^{x}} dx"), "5")
    is_correct("5 + 5", "10")
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.alarm(0) == 0


TOKENS = r"""1 2 10 x y \frac { } ( ) [ ] \{ \} ^ _ ! + - * / = , . \boxed{ \text{ \sqrt \pi \left \right \infty & \\ $
    % \begin{pmatrix} \end{pmatrix} #### </think> answer is \times \pm \cup \in < > \log | ' 0.5 E \, \! 1e5 \binom i
    nan \degree \cap \emptyset \mathbb{R} \lim \prime \bar \lfloor"""
LATEX = st.lists(st.sampled_from(TOKENS.split()), max_size=12)
TEXTS = st.text(max_size=60) | LATEX.map("".join) | LATEX.map(" ".join)


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS, st.booleans())
@example("\ud800", "\x00", True)
@example("", "", True)
def test_any_text_is_marked(output, gold, box):
    verdict = is_correct(boxed(output) if box else output, gold)
    assert type(verdict) is bool
    assert isinstance(gold_of(output), str)
    assert extract(output) is None or extract(output)


@settings(max_examples=100, deadline=None)
@given(st.integers(), st.integers())
def test_integers(number, other):
    for output in (rf"\boxed{{{number}}}", f"#### {number}", f"The answer is {number}.", rf"\boxed{{{number:,}}}"):
        assert is_correct(output, str(number))
        assert is_correct(output, str(other)) == (number == other)


@settings(max_examples=60, deadline=None)
@given(st.fractions(max_denominator=10**4), st.fractions(max_denominator=10**4))
def test_fractions(number, other):
    output = boxed(rf"\frac{{{3 * number.numerator}}}{{{3 * number.denominator}}}")
    assert is_correct(output, str(number))
    assert is_correct(output, str(other)) == (number == other)


def test_without_math_verify():
    code = """
import sys
sys.modules["math_verify"] = None
sys.meta_path.insert(0, type("Hidden", (), {"find_spec": staticmethod(lambda *_: None)}))
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "math_verify" else find_spec(name, *rest)
from raas_cache.eval.answers import extract, gold_of, is_correct
assert extract(r"\\boxed{5}") == gold_of("#### 5") == "5"
for call in (lambda: is_correct("#### 5", "5"), lambda: extract("The answer is 5.")):
    try:
        call()
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["Marking answers needs math-verify: pip install raas-cache[eval]"] * 2


METRIC = """
import socket, sys
def refuse(*_):
    raise AssertionError("the network was asked")
socket.socket.connect = socket.getaddrinfo = refuse
import evaluate
import raas_cache.eval
metric = evaluate.load(raas_cache.eval.math_answer())
outputs, golds = [r"So it is \\boxed{\\frac{1}{2}}.", "#### 3"], ["0.5", "4"]
assert metric.compute(predictions=outputs, references=golds) == {"accuracy": 0.5, "correct": [True, False]}
outputs = [rf"\\boxed{{{i}}}" for i in range(5000)]
result = metric.compute(predictions=outputs, references=[str(i - i % 2) for i in range(5000)])
assert result == {"accuracy": 0.5, "correct": [True, False] * 2500}
metric.add_batch(predictions=["#### 3"], references=["3"])
assert metric.compute()["accuracy"] == 1.0
try:
    metric.compute(predictions=[], references=[])
except ValueError as error:
    print(error)
"""


def test_metric_loads_and_computes_offline(tmp_path, monkeypatch):
    pytest.importorskip("evaluate")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", METRIC], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "predictions=[] and references=[] have no accuracy: give at least one of each.\n"

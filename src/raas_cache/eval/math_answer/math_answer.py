"""The metric `evaluate.load(raas_cache.eval.math_answer())`: the share of outputs with a correct final answer."""

import datasets
import evaluate

from raas_cache.eval.answers import is_correct, require_math_verify


DESCRIPTION = "The share of a model's outputs whose final answer equals the gold answer according to math-verify."

CITATION = """\
@misc{mathverify,
  author = {Hynek Kydl{\\'i}{\\v{c}}ek},
  title = {Math-Verify: A Robust Mathematical Expression Evaluation System},
  url = {https://github.com/huggingface/Math-Verify},
  year = {2025},
}
"""

INPUTS = r"""
Args:
    predictions: complete outputs of a model. The answer is in the last `\boxed{}`, after `####`, or announced.
    references: the gold answers.

Returns:
    accuracy: share of correct answers.
    correct: for each prediction, whether its answer is correct.

Examples:
    >>> metric = evaluate.load(raas_cache.eval.math_answer())
    >>> metric.compute(predictions=[r"So it is \boxed{\frac{1}{2}}.", "#### 3"], references=["0.5", "4"])
    {'accuracy': 0.5, 'correct': [True, False]}
"""


class MathAnswer(evaluate.Metric):
    """Marks outputs with `raas_cache.eval.answers.is_correct`."""

    def _info(self) -> evaluate.MetricInfo:
        require_math_verify()
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
            reference_urls=["https://github.com/huggingface/Math-Verify"],
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float | list[bool]]:
        if not predictions:
            raise ValueError("predictions=[] and references=[] have no accuracy: give at least one of each.")
        correct = [is_correct(output, gold) for output, gold in zip(predictions, references, strict=True)]
        return {"accuracy": sum(correct) / len(correct), "correct": correct}

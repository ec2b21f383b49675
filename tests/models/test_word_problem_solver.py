"""The adapter in `examples/word_problem_solver` solves problems that it was not trained on."""

from pathlib import Path

import pytest
import torch

from raas_cache import load_model
from raas_cache.eval.word_problems import FAMILIES, problems


ADAPTER = Path(__file__).parents[2] / "examples/word_problem_solver"


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_attention_solves_a_problem(family):
    """One forward over problem and solution: every token is the most likely one, and then the end token."""
    model, tokenizer = load_model(str(ADAPTER))
    (problem,) = problems(1, 44, family, seed=5)
    before, solution = tokenizer([problem.problem, problem.solution])["input_ids"]
    logits = model(torch.tensor([before + solution]), logits_to_keep=len(solution) + 1).logits[0]
    assert logits.argmax(-1).tolist() == [*solution, model.generation_config.eos_token_id]

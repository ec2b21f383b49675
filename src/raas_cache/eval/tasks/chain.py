"""The task of the embedded model: chains of arithmetic steps."""

import inspect

from .. import chains
from .task import Task, hash_of


def chain_task(sample: list[chains.ChainProblem], name: str = "chains") -> Task:
    """A task of chain problems. The gold answers are whole chains; a row is correct if every token is correct."""
    prompts, golds = [problem.prompt for problem in sample], [problem.chain for problem in sample]
    # Allow longer chains than necessary: a model that has lost a milestone may not stop.
    longest = chains.completion_length(sample) * 3 // 2
    marker = "chains " + hash_of(inspect.getsource(_mark_chain) + inspect.getsource(chains.answer_of))
    return Task(name, prompts, golds, longest, None, _mark_chain, marker)


def _mark_chain(output: str, gold: str) -> tuple[str | None, bool]:
    """A chain is correct if every token is correct. The answer alone is one digit, and guesses are often right."""
    return chains.answer_of(output), output.split() == gold.split()

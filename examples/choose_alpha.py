"""Which alpha keeps a chain right? Chosen on validation problems, then tested on fresh ones, beside a sliding window.

Everything runs on the embedded model and the same paged store, prompt pinned for all; budgets are shares of all tokens
of a problem, the prompt counted in. "exact" is the share of problems with every token of the chain right, "right" the
share of the chain before the first error.

    python examples/choose_alpha.py --lines 50 --budget 0.5 --validate 100 --test 200
"""

import argparse
from functools import partial

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache

from raas_cache import RaaSCache, embedded_model
from raas_cache.eval.chains import ChainProblem, problems
from raas_cache.layer import PagedLayer
from raas_cache.policies import Policy


ALPHAS = (1e-4, 1e-2, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7)
TOP_RATIOS = (0.25, 0.5)


class Window(Policy):
    """The pages opened last: priorities stay what the store makes them. StreamingLLM with the prompt as its sinks."""

    def on_scores(self, priority, scores, first, clock):
        pass


def window_cache(budget: int, page_size: int) -> Cache:
    return Cache(layer_class_to_replicate=partial(PagedLayer, Window(), budget, page_size, 1, "exact", "head"))


@torch.no_grad()
def accuracy(model, tokenizer, sample: list[ChainProblem], new_cache, batch_size: int) -> tuple[float, float]:
    """(share of exact chains, mean share of a chain right before its first error), greedy."""
    exact, right = 0, 0.0
    for start in range(0, len(sample), batch_size):
        part = sample[start : start + batch_size]
        inputs = tokenizer([p.prompt for p in part], padding=True, return_tensors="pt", return_token_type_ids=False)
        length = inputs["input_ids"].shape[1]
        steps = len(part[0].chain.split())
        out = model.generate(**inputs, past_key_values=new_cache(), max_new_tokens=steps)
        for row, problem in zip(tokenizer.batch_decode(out[:, length:]), part, strict=True):
            words, gold = row.split(), problem.chain.split()
            same = [ours == theirs for ours, theirs in zip(words, gold, strict=False)] + [False]
            prefix = min(same.index(False), len(gold))
            exact += prefix == len(gold)
            right += prefix / len(gold)
    return exact / len(sample), right / len(sample)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=50)
    parser.add_argument("--budget", type=float, nargs="+", default=[0.33, 0.5, 0.75], help="shares of all tokens")
    parser.add_argument("--page-size", type=int, default=4)
    parser.add_argument("--validate", type=int, default=100, help="validation problems")
    parser.add_argument("--test", type=int, default=200, help="test problems")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--model", default=embedded_model())
    args = parser.parse_args()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
    validation = problems(args.validate, args.lines, seed=0, split="validation")
    test = problems(args.test, args.lines, seed=0, split="test")
    measure = partial(accuracy, model, tokenizer, batch_size=args.batch_size)
    longest = max(len(f"<s> {p.prompt} {p.chain}".split()) for p in test)

    def report(name: str, split: str, figures: tuple[float, float]) -> None:
        print(f"{name:34} {split:10} exact {figures[0]:6.1%}   right {figures[1]:6.1%}", flush=True)

    report("Dense", "test", measure(test, DynamicCache))
    for share in args.budget:
        budget = int(share * longest)
        print(f"\nbudget {budget} = {share:.0%} of {longest} tokens, pages of {args.page_size}")
        new_raas = partial(RaaSCache, budget, page_size=args.page_size, min_decode_pages=1)
        rules = [{"alpha": alpha} for alpha in ALPHAS] + [{"top_ratio": ratio} for ratio in TOP_RATIOS]
        figures = []
        for rule in rules:
            figures.append(measure(validation, partial(new_raas, **rule)))
            report(f"RaaS {rule}", "validation", figures[-1])
        best = rules[figures.index(max(figures))]
        report(f"RaaS {best}, chosen", "test", measure(test, partial(new_raas, **best)))
        report("RaaS {'alpha': 0.0001}, the paper's", "test", measure(test, partial(new_raas, alpha=1e-4)))
        report("Prompt + sliding window", "test", measure(test, partial(window_cache, budget, args.page_size)))


if __name__ == "__main__":
    main()

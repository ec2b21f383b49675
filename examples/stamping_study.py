"""What should stamp a page? Rules for RaaS's timestamps, swept on validation problems, the best tested on fresh ones.

Everything runs on the embedded model, prompt pinned; budgets are shares of all tokens of a problem. Rules that are not
in the package are policies written here, each a few lines. A Markdown table.

    python examples/stamping_study.py --validate 200 --test 400 > docs/results/stamping.md
"""

import argparse
from dataclasses import dataclass
from functools import partial

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils.logging import disable_progress_bar

from raas_cache import PagedCache, Pages, Policy, embedded_model
from raas_cache.eval.accuracy import accuracy, tokens_of, wilson_interval
from raas_cache.eval.chains import problems
from raas_cache.policies import RaaSPolicy, StreamingLLMPolicy


@dataclass(frozen=True)
class Relative(RaaSPolicy):
    """alpha in units of the uniform weight: `times` / tokens held at most."""

    times: float = 1.0

    def on_scores(self, pages: Pages) -> None:
        alpha = min(self.times / (pages.limit * pages.page_size), 0.999)
        RaaSPolicy(alpha).on_scores(pages)


@dataclass(frozen=True)
class SumOverPage(RaaSPolicy):
    """The page's whole weight, not that of its largest token."""

    page_score = "sum"


@dataclass(frozen=True)
class MeanOverGroup(RaaSPolicy):
    """The mean over the query heads of a KV head, not the largest."""

    group_score = "mean"


@dataclass(frozen=True)
class Decayed(Policy):
    """No threshold: a weight w now is worth a stamp `-tau * ln(w)` tokens old, and the best so far counts."""

    tau: float = 64.0

    def on_scores(self, pages: Pages) -> None:
        stamp = pages.clock[..., :1] + self.tau * pages.scores.double().log()
        pages.priority.copy_(torch.maximum(pages.priority, stamp.masked_fill(~pages.held, float("-inf"))))


ALPHAS = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7)
HIGH = (0.03, 0.1, 0.2, 0.3, 0.5)
FAMILIES = {
    "alpha (the paper's rule)": [(f"alpha {a:g}", RaaSPolicy(a), {}) for a in ALPHAS],
    "top_ratio (the paper's variant)": [(f"top {r:g}", RaaSPolicy(None, r), {}) for r in (0.02, 0.05, 0.1, 0.25, 0.5)],
    "alpha relative to 1 / tokens": [(f"{c} / tokens", Relative(times=c), {}) for c in (1, 3, 10, 30, 100)],
    "sum over the page": [(f"alpha {a:g}", SumOverPage(a), {}) for a in HIGH],
    "mean over the group": [(f"alpha {a:g}", MeanOverGroup(a), {}) for a in HIGH],
    "min/max representatives": [(f"alpha {a:g}", RaaSPolicy(a), {"scoring": "minmax"}) for a in (0.01, *HIGH)],
    "one table a layer": [(f"alpha {a:g}", RaaSPolicy(a), {"granularity": "layer"}) for a in (*HIGH, 0.7)],
    "decayed maximum": [(f"tau {t}", Decayed(t), {}) for t in (16, 32, 64, 128, 256, 1024)],
    "alpha and probation": [
        (f"alpha {a:g}, probation {p}", RaaSPolicy(a, None, p), {})
        for a in (0.1, 0.2, 0.3, 0.5)
        for p in (8, 16, 24, 32)
    ],
}
CONTROLS = {
    "alpha 1e-4 (the paper's value)": (RaaSPolicy(1e-4), {}),
    "the default": (RaaSPolicy(), {}),
    "no stamps: the newest pages": (StreamingLLMPolicy(), {"prompt": "pin"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=50)
    parser.add_argument("--budget", type=float, nargs="+", default=[0.5, 0.4], help="shares of all tokens")
    parser.add_argument("--page-size", type=int, default=4)
    parser.add_argument("--validate", type=int, default=200, help="validation problems")
    parser.add_argument("--test", type=int, default=400, help="test problems")
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    model = AutoModelForCausalLM.from_pretrained(embedded_model()).eval().to(args.device)
    measure = partial(accuracy, model, tokenizer, batch_size=args.batch_size)
    validation = problems(args.validate, args.lines, seed=0, split="validation")
    test = problems(args.test, args.lines, seed=2, split="test")
    total = max(map(tokens_of, test))
    dense = measure(test, DynamicCache)
    print(f"{args.validate} validation and {args.test} test problems of {total} tokens, pages of {args.page_size}.")
    print(f"Dense: {dense.share_exact:.1%} of the test chains exact.")

    for share in args.budget:
        budget = int(share * total)
        new_cache = partial(PagedCache, budget, page_size=args.page_size, min_decode_pages=1)
        print(f"\n## Budget {budget}: {share:.0%} of the tokens\n\nOn validation problems:\n")
        print("| family | setting: exact chains / right before the first error |\n|---|---|")
        best = {}
        for family, settings in FAMILIES.items():
            results = [
                (measure(validation, partial(new_cache, policy=policy, **options)), name, policy, options)
                for name, policy, options in settings
            ]
            shown = "; ".join(f"{name}: {r.share_exact:.1%} / {r.share_right:.1%}" for r, name, _, _ in results)
            print(f"| {family} | {shown} |", flush=True)
            best[family] = max(results, key=lambda found: (found[0].share_exact, found[0].share_right))[1:]
        print("\nThe best of each family, on test problems:\n")
        print("| rule | setting | exact chains (95 % interval) | right before the first error |\n|---|---|---|---|")
        rows = [(family, *setting) for family, setting in best.items()]
        rows += [("control", name, policy, options) for name, (policy, options) in CONTROLS.items()]
        for family, name, policy, options in rows:
            result = measure(test, partial(new_cache, policy=policy, **options))
            low, high = wilson_interval(sum(result.exact), len(result.exact))
            interval = f"{result.share_exact:.1%} ({low:.1%} to {high:.1%})"
            print(f"| {family} | {name} | {interval} | {result.share_right:.1%} |", flush=True)


if __name__ == "__main__":
    main()

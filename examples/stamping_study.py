"""Compare rules that give pages a new timestamp: sweep on validation problems, then test the best on new problems.

Everything runs on the embedded model with a pinned prompt. Budgets are shares of all tokens of a problem. Rules that
are not in the package are policies in this file. The script prints Markdown tables.

    python examples/stamping_study.py --validate 200 --test 400 > docs/results/stamping.md
"""

import argparse
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from raas_cache import Pages, Policy, embedded_model, register_policy
from raas_cache.common.statistics import wilson_interval
from raas_cache.eval import Row, Setting, by_setting, chain_task, run
from raas_cache.eval.chains import problems, share_right, tokens_of
from raas_cache.methods.raas import RaaSPolicy


@register_policy("relative")
@dataclass(frozen=True)
class Relative(RaaSPolicy):
    """The threshold is `times` the uniform attention weight, 1 / (largest number of tokens held)."""

    times: float = 1.0

    def on_scores(self, pages: Pages) -> None:
        alpha = min(self.times / (pages.limit * pages.page_size), 0.999)
        RaaSPolicy(alpha).on_scores(pages)


@register_policy("sum_over_page")
@dataclass(frozen=True)
class SumOverPage(RaaSPolicy):
    """The score of a page is the sum over its tokens instead of the maximum."""

    page_score = "sum"


@register_policy("mean_over_group")
@dataclass(frozen=True)
class MeanOverGroup(RaaSPolicy):
    """The score of a page is the mean over the query group instead of the maximum."""

    group_score = "mean"


@register_policy("decayed")
@dataclass(frozen=True)
class Decayed(Policy):
    """No threshold: a weight w at the current step equals a timestamp `-tau * ln(w)` tokens ago; the maximum counts."""

    tau: float = 64.0

    def on_scores(self, pages: Pages) -> None:
        stamp = pages.clock[..., :1] + self.tau * pages.scores.double().log()
        pages.priority.copy_(torch.maximum(pages.priority, stamp.masked_fill(~pages.held, float("-inf"))))


ALPHAS = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7)
HIGH = (0.03, 0.1, 0.2, 0.3, 0.5)
FAMILIES = {
    "alpha (the paper's rule)": [("raas", {"alpha": a}) for a in ALPHAS],
    "top_ratio (the paper's variant)": [("raas", {"top_ratio": r}) for r in (0.02, 0.05, 0.1, 0.25, 0.5)],
    "alpha relative to 1 / tokens": [("relative", {"times": c}) for c in (1, 3, 10, 30, 100)],
    "sum over the tokens of a page": [("sum_over_page", {"alpha": a}) for a in HIGH],
    "mean over the query group": [("mean_over_group", {"alpha": a}) for a in HIGH],
    "min/max representatives": [("raas", {"alpha": a, "scoring": "minmax"}) for a in (0.01, *HIGH)],
    "one table per layer": [("raas", {"alpha": a, "granularity": "layer"}) for a in (*HIGH, 0.7)],
    "decayed maximum": [("decayed", {"tau": t}) for t in (16, 32, 64, 128, 256, 1024)],
}
CONTROLS = {
    "alpha 1e-4 (the paper's value)": ("raas", {"alpha": 1e-4}),
    "the default": ("raas", {}),
    "no timestamps: the newest pages": ("streaming_llm", {"prompt": "pin"}),
}


def shares(rows: list[Row]) -> tuple[float, float]:
    """Share of chains that are exact, and mean share of a chain that is right before its first error."""
    right = (share_right(row.output, row.gold) for row in rows)
    return sum(row.correct for row in rows) / len(rows), sum(right) / len(rows)


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
    validation = chain_task(problems(args.validate, args.lines, seed=0, split="validation"))
    sample = problems(args.test, args.lines, seed=2, split="test")
    test, total = chain_task(sample), max(map(tokens_of, sample))

    def measure(task, *wanted: Setting) -> list[list[Row]]:
        """The rows of each setting."""
        return list(by_setting(run(model, tokenizer, task, list(wanted), batch_size=args.batch_size)).values())

    (dynamic,) = measure(test, Setting("dynamic"))
    print(f"{args.validate} validation problems and {args.test} test problems of {total} tokens,", end=" ")
    print(f"with pages of {args.page_size} tokens.")
    print(f"With DynamicCache, {shares(dynamic)[0]:.1%} of the test chains are exact.")
    common = {"page_size": args.page_size, "min_decode_pages": 1}
    said = [f"{name}={value}" for name, value in common.items()]
    for share in args.budget:
        budget = int(share * total)
        print(f"\n## Budget {budget}: {share:.0%} of the tokens\n\nOn validation problems:\n")
        print("| family | setting: exact chains / right before the first error |\n|---|---|")
        best = {}
        for family, methods in FAMILIES.items():
            settings = [Setting(method, budget, {**common, **options}) for method, options in methods]
            found = list(zip(map(shares, measure(validation, *settings)), settings, strict=True))
            cells = (f"{setting.label_but(said)}: {exact:.1%} / {right:.1%}" for (exact, right), setting in found)
            shown = "; ".join(cells)
            print(f"| {family} | {shown} |", flush=True)
            best[family] = max(found, key=lambda pair: pair[0])[1]
        print("\nThe best setting of each family, on test problems:\n")
        print("| rule | setting | exact chains (95 % interval) | right before the first error |\n|---|---|---|---|")
        controls = {
            name: Setting(method, budget, {**common, **options}) for name, (method, options) in CONTROLS.items()
        }
        for rule, setting in {**best, **controls}.items():
            (rows,) = measure(test, setting)
            exact, right = shares(rows)
            low, high = wilson_interval(sum(row.correct for row in rows), len(rows))
            print(f"| {rule} | {setting.label_but(said)} | {exact:.1%} ({low:.1%} to {high:.1%}) | {right:.1%} |")


if __name__ == "__main__":
    main()

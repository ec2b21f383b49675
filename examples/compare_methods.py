"""Every method at the same budgets on the embedded model: accuracy, bytes of K and V, time of a step, in Markdown.

Budgets are shares of all tokens of a problem, prompt and chain. Methods run as in their papers, and those that evict
the prompt there once more with the prompt pinned, so that what differs is the method. Budgets by layer are learnt on 16
training problems, with the same budget on average.

    python examples/compare_methods.py --problems 400 > docs/results/methods.md
"""

import argparse
from functools import partial

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils.logging import disable_progress_bar

from raas_cache import embedded_model, from_name, learn_budgets
from raas_cache.eval.accuracy import accuracy, tokens_of, wilson_interval
from raas_cache.eval.chains import problems


# (shown as, method, options). learnt: budgets by layer. pyramid: decode pages of the bottom layer, as a share of the
# mean, those of the top layer as much less. same_bytes: as many tokens as fit into the bytes of the others.
ROWS = [
    ("StreamingLLM", "streaming_llm", {}),
    ("StreamingLLM, prompt pinned", "streaming_llm", {"prompt": "pin"}),
    ("H2O", "h2o", {}),
    ("H2O, prompt pinned", "h2o", {"prompt": "pin"}),
    ("TOVA", "tova", {}),
    ("TOVA, prompt pinned", "tova", {"prompt": "pin"}),
    ("R-KV", "rkv", {}),
    ("R-KV, prompt pinned", "rkv", {"prompt": "pin"}),
    ("Quest", "quest", {}),
    ("Quest, no dense layers", "quest", {"dense_layers": 0}),
    ("RaaS, alpha 1e-4 (paper)", "raas", {"alpha": 1e-4}),
    ("RaaS", "raas", {}),
    ("RaaS, probation 16", "raas", {"probation": 16}),
    ("RaaS, prompt selected", "raas", {"prompt": "select"}),
    ("RaaS, prompt evicted", "raas", {"prompt": "evict"}),
    ("RaaS, int8", "raas", {"kv_dtype": "int8"}),
    ("RaaS, fp8", "raas", {"kv_dtype": "fp8"}),
    ("RaaS, int8 in the same bytes", "raas", {"kv_dtype": "int8", "same_bytes": True}),
    ("RaaS, fp8 in the same bytes", "raas", {"kv_dtype": "fp8", "same_bytes": True}),
    ("RaaS, budgets in a pyramid", "raas", {"pyramid": 1.25}),
    ("RaaS, budgets in a pyramid upside down", "raas", {"pyramid": 0.75}),
    ("RaaS, budgets learnt", "raas", {"learnt": True}),
    ("RaaS, budgets learnt, probation 16", "raas", {"learnt": True, "probation": 16}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--lines", type=int, default=50)
    parser.add_argument("--budget", type=float, nargs="+", default=[0.25, 0.5, 0.75], help="shares of all tokens")
    parser.add_argument("--page-size", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", nargs="+", default=[name for name, _, _ in ROWS], help="which methods, as shown")
    args = parser.parse_args()
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=getattr(torch, args.dtype)).eval()
    model = model.to(args.device)
    sample = problems(args.problems, args.lines, seed=1)
    total = max(map(tokens_of, sample))
    calibration = problems(16, args.lines, seed=0, split="train")
    inputs = tokenizer([p.prompt for p in calibration], padding=True, return_tensors="pt", return_token_type_ids=False)
    measure = partial(accuracy, model, tokenizer, sample, batch_size=args.batch_size)

    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{args.problems} test problems of {total} tokens, pages of {args.page_size}, {args.dtype}, {device}.\n")
    print("| method | budget | exact chains (95 % interval) | right before the first error | KV bytes | ms a step |")
    print("|---|---|---|---|---|---|")

    def report(name: str, budget: str, new_cache) -> None:
        result = measure(new_cache)
        low, high = wilson_interval(sum(result.exact), len(result.exact))
        print(
            f"| {name} | {budget} | {result.share_exact:.1%} ({low:.1%} to {high:.1%}) | {result.share_right:.1%} "
            f"| {result.nbytes:,.0f} | {result.ms_per_step:.2f} |",
            flush=True,
        )

    report("Dense (`DynamicCache`)", "all", DynamicCache)
    report("Dense (`DenseCache`)", "all", partial(from_name, "dense", total, page_size=args.page_size))
    for share in args.budget:
        learnt = None
        for name, method, options in (row for row in ROWS if row[0] in args.rows):
            budget, options = int(share * total), dict(options)
            if options.pop("same_bytes", False):
                head_dim, size = model.config.head_dim, model.dtype.itemsize
                budget = min(int(budget * size * head_dim / (head_dim + 4)), 2 * total)  # a code each, a float32 scale
            prompt = inputs["input_ids"].shape[1]
            if bottom := options.pop("pyramid", None):
                layers = model.config.num_hidden_layers
                shares = [bottom + (2 - 2 * bottom) * layer / (layers - 1) for layer in range(layers)]
                budget = [prompt + round(share_of_layer * (budget - prompt)) for share_of_layer in shares]
            if options.pop("learnt", False):
                steps = total - prompt
                if learnt is None:
                    learnt = learn_budgets(model, inputs.to(args.device), budget, steps, page_size=args.page_size)
                budget = learnt
            settings = {"page_size": args.page_size, "min_decode_pages": 1, **options}
            report(name, f"{share:.0%}: {budget}", partial(from_name, method, budget, **settings))


if __name__ == "__main__":
    main()

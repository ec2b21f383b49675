"""Count which values RaaS evicted before the model needed them, and print Markdown tables.

The embedded model reads gold chains token by token through a cache. Each line cites an earlier value and restates it.
Just before it does, the script notes which KV heads still hold a page that states the value, and whether the model
predicts the digit correctly. Citations are grouped by the number of lines since the value was last stated.

    python examples/what_was_evicted.py --problems 100 > docs/results/evicted.md
"""

import argparse
from collections import defaultdict

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from raas_cache import RaaSCache, embedded_model, learn_shares
from raas_cache.eval.chains import TOKENS_PER_LINE, problems, tokens_of
from raas_cache.sizing.read_text import steps


LEFT, CITED, RESULT = 5, 7, 10  # tokens of a line that state a value
BANDS = ((2, 4), (5, 8), (9, 12), (13, 16), (17, 99))


def statements(problem, line: int) -> tuple[list[int], int]:
    """Positions in the chain that state the value before `line` cites it, and the number of lines since then."""
    value = problem.refs[line] - problem.num_givens
    stated = [(value, RESULT), (value + 1, LEFT)]
    stated += [(other, CITED) for other in range(value + 1, line) if problem.refs[other] == problem.refs[line]]
    stated = [(where, token) for where, token in stated if where < line]
    return [where * TOKENS_PER_LINE + token for where, token in stated], line - max(where for where, _ in stated)


def cited(model, tokenizer, sample, cache) -> list[tuple[int, list[bool], bool]]:
    """For each citation of a derived value: lines since it was stated, which heads hold it, is the digit right."""
    texts = [f"{problem.prompt} {problem.chain}" for problem in sample]
    tokens = tokenizer(texts, return_tensors="pt", return_token_type_ids=False)["input_ids"]
    prompt = tokenizer(sample[0].prompt, return_tensors="pt")["input_ids"].shape[1]
    citations = []
    for place, logits in enumerate(steps(model, tokens, prompt, cache)):
        line, token = divmod(place, TOKENS_PER_LINE)
        if token != CITED or line >= len(sample[0].refs):
            continue
        right = (logits.argmax(-1) == tokens[:, prompt + place]).tolist()
        held = [cache.resident_positions(layer) for layer in range(len(cache.layers))]
        for row, problem in enumerate(sample):
            if problem.refs[line] < problem.num_givens:
                continue
            stated, ago = statements(problem, line)
            stated = torch.tensor(stated) + prompt
            heads = [bool(torch.isin(head, stated).any()) for layer in held for head in layer[row]]
            citations.append((ago, heads, right[row]))
    return citations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--lines", type=int, default=50)
    parser.add_argument("--budget", type=float, default=0.5, help="share of all tokens")
    parser.add_argument("--page-size", type=int, default=4)
    args = parser.parse_args()
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    model = AutoModelForCausalLM.from_pretrained(embedded_model()).eval()
    sample = problems(args.problems, args.lines, seed=3)
    total = max(map(tokens_of, sample))
    budget = int(args.budget * total)
    calibration = [f"{p.prompt} {p.chain}" for p in problems(16, args.lines, seed=0, split="train")]
    ids = tokenizer(calibration, return_tensors="pt")["input_ids"]
    prompt = len(tokenizer(sample[0].prompt)["input_ids"])
    learnt = learn_shares(model, ids, prompt, budget, page_size=args.page_size)
    caches = {
        f"alpha 1e-4 (paper), budget {budget}": {"alpha": 1e-4},
        f"default, budget {budget}": {},
        f"shares {learnt}": {"shares": learnt},
    }
    print(f"{args.problems} gold chains of {args.lines} lines, {total} tokens, pages of {args.page_size}.\n")
    bands = [f"{low} to {high} lines" for low, high in BANDS[:-1]] + [f"{BANDS[-1][0]} lines or more"]
    print("| cache | | " + " | ".join(bands) + " |\n|---|---|" + "---|" * len(bands))
    for name, options in caches.items():
        cache = RaaSCache(budget, page_size=args.page_size, min_decode_pages=1, **options)
        groups = defaultdict(list)
        for ago, held, right in cited(model, tokenizer, sample, cache):
            groups[next(band for band in BANDS if band[0] <= max(ago, 2) <= band[1])].append((held, right))
        found = [groups[band] for band in BANDS]
        rows = [("citations", [str(len(group)) for group in found])]
        for head in range(len(cache.layers) * model.config.num_key_value_heads):
            shares = [sum(held[head] for held, _ in group) / max(len(group), 1) for group in found]
            where = divmod(head, model.config.num_key_value_heads)
            rows.append(("held by layer {}, head {}".format(*where), [f"{share:.0%}" for share in shares]))
        rows.append(("digit right", [f"{sum(r for _, r in group) / max(len(group), 1):.1%}" for group in found]))
        for what, cells in rows:
            print(f"| {name} | {what} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

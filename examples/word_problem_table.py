"""Print the accuracy of the adapter in `examples/word_problem_solver` from the stored rows of an H100.

python examples/word_problem_table.py

The rows come from greedy decoding of 200 problems of each family in bfloat16, and with shares of the first 24 problems
in float32 on a CPU. Without their texts, they are in `docs/results/word-problems/rows.jsonl`. `raas-cache eval --model
examples/word_problem_solver --dataset word-problems` measures the same on any machine.
"""

import json
from collections import defaultdict
from pathlib import Path

from raas_cache.common.statistics import difference


ROWS = Path(__file__).parents[1] / "docs/results/word-problems/rows.jsonl"


def table() -> str:
    """For each data set and setting: problems with a right solution, people with the right number of coins."""
    shares: dict[tuple[str, int, str], dict[int, float]] = defaultdict(dict)
    solved: dict[tuple[str, int, str], int] = defaultdict(int)
    for row in map(json.loads, ROWS.read_text().splitlines()):
        key = row["dataset"], row["budget"], row["method"]
        shares[key][row["index"]] = row["people_right"] / row["people"]
        solved[key] += row["correct"]
    lines = [
        "| data set | budget | cache | solutions right | people right | people right - window (95 %) | sign test |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for key in sorted(shares, key=lambda key: (key[0], -key[1], key[2] != "window", key[2])):
        dataset, budget, method = key
        mine, base = shares[key], shares.get((dataset, budget, "window"))
        compared = "- | -"
        if base is not None and method != "window":
            values = [mine[index] - base[index] for index in mine]
            found = difference(values, list(mine))
            compared = f"{100 * found.mean:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f}) | {found.p_text}"
        right = 100 * sum(mine.values()) / len(mine)
        lines.append(f"| {dataset} | {budget:,} | {method} | {solved[key]}/{len(mine)} | {right:.1f} % | {compared} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

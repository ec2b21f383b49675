"""The paper's experiments on the embedded model: every method at every budget, ablations, the cost of a step, the demo.

The script writes rows to `--rows`, and does not run a row twice. It writes tables and figures to `--out`. It needs
`raas-cache[eval,viz]`. On two cores (`make study`):

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/study.py
"""

import argparse
import shlex
import subprocess
import sys
from itertools import chain
from pathlib import Path
from statistics import fmean

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from raas_cache import embedded_model, learn_shares
from raas_cache.bench import report
from raas_cache.bench import run as run_bench
from raas_cache.bench.filling import build_model, load_config
from raas_cache.bench.steps import Grid
from raas_cache.common.reporting import save
from raas_cache.eval import Setting, by_setting, load_task, parse_methods, run, settings, summarize, table
from raas_cache.eval.chains import problems, share_right
from raas_cache.eval.plots import figures
from raas_cache.eval.runner import processes


COMMON = {"page_size": 4, "min_decode_pages": 1}
METHODS = (
    "dynamic,quest,raas,raas:alpha=1e-4,streaming_llm,streaming_llm:prompt=pin,h2o,h2o:prompt=pin,"
    "tova:prompt=pin,rkv:prompt=pin"
)
"""The methods that the RaaS paper compares with, as in their papers; and methods with a pinned prompt, as in RaaS."""
BUDGETS = (256, 320, 384, 448, 512, 576)
ABLATIONS = {
    "alpha": (1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7),
    "top_ratio": (0.02, 0.05, 0.1, 0.25, 0.5),
    "page_size": (2, 8, 16),
    "prompt": ("select", "evict"),
    "scoring": ("minmax",),
    "granularity": ("layer",),
    "kv_dtype": ("int8",),
}
"""Values of each option besides the default. Each setting changes one option."""
ABLATION_BUDGETS = (384, 448)
DEMO = "from raas_cache.cli import app; app(['demo'])"
PYRAMIDS = (1.25, 0.75)
"""Decode pages of the first layer, relative to the mean. The last layer deviates as much in the other direction."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="a small version: few problems, settings and lengths")
    parser.add_argument("--rows", type=Path, default=Path("results/study"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/study"))
    args = parser.parse_args()
    if args.quick:
        args.problems, args.rows = 16, args.rows / "quick"
        args.out = args.rows
    disable_progress_bar()
    state = processes()
    torch.set_num_threads(1)  # the model is too small to share among cores
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32).eval().to(state.device)

    compared, varied = sections(args.quick)
    if not args.quick:
        sample = problems(16, 50, seed=0, split="train")
        texts = [f"{problem.prompt} {problem.chain}" for problem in sample]
        ids = tokenizer(texts, return_tensors="pt")["input_ids"].to(state.device)
        prompt, layers = len(tokenizer(sample[0].prompt)["input_ids"]), model.config.num_hidden_layers
        for budget in ABLATION_BUDGETS:
            for sizes in (1, model.config.num_key_value_heads):  # by layer, and by KV head
                learnt = learn_shares(model, ids, prompt, budget, page_size=COMMON["page_size"], sizes=sizes)
                varied.append(Setting("raas", budget, {**COMMON, "shares": learnt}))
            for bottom in PYRAMIDS:
                pages = [bottom + (2 - 2 * bottom) * layer / (layers - 1) for layer in range(layers)]
                varied.append(Setting("raas", tuple(prompt + round(p * (budget - prompt)) for p in pages), COMMON))
    task = load_task("chains", args.problems, seed=1)
    every = list({setting.key: setting for setting in compared + varied}.values())
    rows = run(model, tokenizer, task, every, out=args.rows, batch_size=args.batch_size)
    state.destroy_process_group()
    if not state.is_main_process:
        return

    ran = f"chains of 162 + 605 tokens, {report.about(state.device, model.dtype)['device']}"
    command = f"OMP_NUM_THREADS=1 torchrun --nproc-per-node {state.num_processes} {shlex.join(sys.argv)}"
    text = [f"`{command}`: {args.problems} {ran}.\n", "## Every method\n", tabled(rows, compared)]
    text += ["\n## RaaS, one option at a time\n", tabled(rows, varied)]
    args.out.mkdir(parents=True, exist_ok=True)
    by_option = [one for one in varied if isinstance(one.budget, int) and "shares" not in one.options]
    drawn, alone = (
        figures(summarize(chain.from_iterable(chosen(rows, wanted))), ran) for wanted in (compared, by_option)
    )
    save({name: (alone if name.startswith("ablation") else drawn)[name] for name in {**drawn, **alone}}, args.out)

    text += ["\n## A decode step\n", bench(args)]
    if state.device.type == "cpu":
        demo = subprocess.run([sys.executable, "-c", DEMO], capture_output=True, text=True, check=True).stdout
        text += ["\n## `raas-cache demo`\n", f"```\n{demo[demo.index('24 problems') :].rstrip()}\n```"]
    (args.out / "study.md").write_text("\n".join(text) + "\n")
    print("\n".join(text), f"\nwritten to {args.out}")


def sections(quick: bool) -> tuple[list[Setting], list[Setting]]:
    """Settings of the comparison of methods, and settings of the ablations of RaaS."""
    methods, budgets, ablations, at = METHODS, BUDGETS, ABLATIONS, ABLATION_BUDGETS
    if quick:
        methods, budgets, at = "dynamic,quest,streaming_llm,h2o,raas", BUDGETS[::2], ABLATION_BUDGETS[:1]
        ablations = {"alpha": (1e-4, 0.03, 0.5), "page_size": (8, 16)}
    alone = [("raas", {**COMMON, option: value}) for option, values in ablations.items() for value in values]
    return settings(parse_methods(methods, **COMMON), budgets), settings([("raas", COMMON), *alone], at)


def chosen(rows, wanted):
    """The rows of each wanted setting, in the order of the settings."""
    groups = by_setting(rows)
    return [groups[setting.key] for setting in wanted]


def tabled(rows, wanted) -> str:
    """The table of the wanted settings, with the share of a chain that is right before its first error."""
    groups = chosen(rows, wanted)
    right = [fmean(share_right(row.output, row.gold) for row in group) for group in groups]
    summaries = summarize(chain.from_iterable(groups))
    return table(summaries, **{"right before the first error": [f"{share:.1%}" for share in right]})


def bench(args) -> str:
    """Time a step of each cache on the CPU after different numbers of tokens; write the figures, return the table."""
    device = torch.device("cpu")
    seen = (1024, 8192) if args.quick else (1024, 2048, 4096, 8192, 16384, 32768)
    grid = Grid(("raas", "quest", "h2o", "streaming_llm"), seen, steps=10 if args.quick else 30)
    rows = [row for cell in run_bench(build_model(load_config("small"), device, torch.float32), grid) for row in cell]
    report.write_json(args.out / "bench.json", {"model": "small", **report.about(device, torch.float32)}, rows)
    report.plot(rows, args.out)
    return report.table(rows)


if __name__ == "__main__":
    main()

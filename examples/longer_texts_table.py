"""Print the tables of "Longer texts, on a GPU" in docs/fidelity.md from the rows in docs/results/smollm2-h100.

python examples/longer_texts_table.py
"""

from pathlib import Path

from raas_cache.common.reporting import markdown
from raas_cache.eval.rows import read_rows_of
from raas_cache.eval.settings import DYNAMIC, Setting
from raas_cache.fidelity import Fidelity, FidelityRow
from raas_cache.fidelity.reading import DISTANCES


RESULTS = Path(__file__).parents[1] / "docs/results/smollm2-h100"
BUDGETS = (384, 768, 1536)
"""12.5 %, 25 % and 50 % of 3,072 tokens."""
METHODS = (
    "window",
    "random",
    "raas",
    "raas:shares",
    "window:shares",
    "quest",
    "tova:prompt=pin",
    "vase:prompt=pin",
    "gkv:prompt=pin",
    "h2o:prompt=pin",
    "lazy_eviction:prompt=pin",
    "triattention",
    "rkv:prompt=pin",
)
PAPERS = ("streaming_llm", "raas", "tova", "vase", "gkv", "h2o", "lazy_eviction", "rkv")
OPTIONS = (
    "raas",
    "raas:alpha=0.02",
    "raas:alpha=0.005",
    "raas:page_size=4",
    "raas:page_size=64",
    "window:page_size=4",
    "window:kv_dtype=int8",
    "window:kv_dtype=int4",
)
LONGER = ("window", "raas", "raas:shares", "window:shares", "quest", "h2o:prompt=pin", "window:kv_dtype=int4")
FAR = ("window", "raas", "raas:shares", "window:shares", "quest", "window:kv_dtype=int4")


class Rows:
    """The rows of one length.

    Args:
        tokens: number of tokens of each chain.
    """

    def __init__(self, tokens: int):
        self.found = Fidelity(read_rows_of(RESULTS / str(tokens), FidelityRow))
        self.settings = {(name_of(one), one.budget): one for one in self.found.settings}
        self.bytes = {row.setting.key: row.kv_bytes for row in self.found.rows}

    def at(self, name: str, budget: int) -> Setting:
        """The setting with this name and budget. 4-bit and 8-bit stores have a larger budget with as many bytes."""
        if "kv_dtype" in name:
            return next(one for (label, _), one in self.settings.items() if label == name)
        return self.settings[name, budget]

    def difference(self, name: str, other: str, budget: int) -> str:
        """The loss of a cache less the loss of another cache with the same budget, or of `dynamic`."""
        if name == other:
            return "-"
        rival = Setting(DYNAMIC) if other == DYNAMIC else self.at(other, budget)
        return str(self.found.difference(self.at(name, budget), rival))

    def table(self, names: tuple[str, ...], budget: int) -> str:
        """Each setting, compared with the window of the same budget."""
        header = ["cache", "budget", "KV bytes", "loss - dynamic (95 %)", "loss - window (95 %)", "sign test"]
        lines = []
        for name in names:
            one, compared = self.at(name, budget), ["-", "-"]
            if name != "window":
                found = self.found.difference(one, self.settings["window", budget])
                compared = [str(found), found.p_text]
            held = f"{self.bytes[one.key]:,}"
            lines.append([f"`{name}`", f"{one.budget:,}", held, self.difference(name, DYNAMIC, budget), *compared])
        return markdown(header, lines)


def name_of(setting: Setting) -> str:
    """The label without the usual page size and without the path of the shares."""
    return setting.label_but({"page_size=16"}).partition("=docs")[0]


def by_budget(rows: Rows, against: str) -> str:
    """The loss less the loss of another cache, at each budget."""
    header = ["cache", *(f"{budget:,} tokens ({budget / 3072:.1%})" for budget in BUDGETS), f"KV bytes at {BUDGETS[1]}"]
    lines = []
    for name in METHODS:
        held = f"{rows.bytes[rows.at(name, BUDGETS[1]).key]:,}"
        lines.append([f"`{name}`", *(rows.difference(name, against, budget) for budget in BUDGETS), held])
    return markdown(header, lines)


def by_prompt(rows: Rows, budget: int) -> str:
    """Methods whose paper evicts prompt tokens, with the prompt pinned and as in the paper; RaaS with both, too."""
    lines = []
    for name in PAPERS:
        pinned = {"streaming_llm": "window", "raas": "raas"}.get(name, f"{name}:prompt=pin")
        evicting = "raas:prompt=evict" if name == "raas" else name
        losses = [rows.difference(one, DYNAMIC, budget) for one in (pinned, evicting)]
        lines.append([f"`{pinned}`", f"`{evicting}`", *losses, rows.difference(evicting, pinned, budget)])
    return markdown(["prompt pinned", "prompt evicted", "loss pinned", "loss evicted", "evicted - pinned"], lines)


def by_distance(rows: Rows, budget: int) -> str:
    """The loss less the loss of `dynamic`, by the tokens since the last use of the same token."""
    header, lines = ["cache", *DISTANCES], []
    for name in FAR:
        found = [
            rows.found.difference(
                rows.at(name, budget), Setting(DYNAMIC), lambda sums, group=group: sums[..., group, :].sum(-2)
            )
            for group in range(len(DISTANCES))
        ]
        lines.append([f"`{name}`", *map(str, found)])
    return markdown(header, lines)


def tables() -> list[str]:
    """The tables, in the order of the page."""
    rows, longer = Rows(3072), Rows(6144)
    return [
        by_budget(rows, DYNAMIC),
        by_budget(rows, "window"),
        by_distance(rows, 768),
        by_prompt(rows, 768),
        rows.table(("window", *OPTIONS), 768),
        longer.table(LONGER, 1536),
    ]


if __name__ == "__main__":
    print("\n\n".join(tables()))

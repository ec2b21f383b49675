"""Numbers in README are those in docs/results, which commands of this repository wrote."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from raas_cache.eval.settings import common_options


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
METHODS = (ROOT / "docs" / "methods.md").read_text()
RESULTS = ROOT / "docs" / "results"
STUDY = (RESULTS / "study" / "study.md").read_text()


def table(text, after):
    """Body rows of the first Markdown table after some words: cells by header."""
    lines = text[text.index(after) :].splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip().strip("|").split("|")])
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


@pytest.mark.parametrize("page", [README, METHODS], ids=["README", "methods"])
def test_methods(page):
    study = {(row["method"], row["budget"]): row for row in table(STUDY, "## Every method")}
    study |= {(row["method"], row["budget"]): row for row in table(STUDY, "## RaaS, one option")}
    shown = table(page, "at half of the tokens")
    assert len(shown) > 10
    for row in shown:
        found = study[row["method"], row["budget"]]
        assert row == {name: found[name] for name in row}


def test_eight_bits():
    found = table((RESULTS / "eval-h100.md").read_text(), "int8")
    for row in table(METHODS, "### 8-bit stores"):
        assert row in [{name: one[name] for name in row} for one in found]


def test_study_is_what_the_script_runs():
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("study", ROOT / "examples" / "study.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    for after, of in zip(("## Every method", "## RaaS, one option"), study.sections(quick=False), strict=True):
        common = common_options(of)
        wanted = [(one.label_but(common), "all" if one.budget is None else str(one.budget)) for one in of]
        assert sorted(wanted) == sorted(
            (row["method"], row["budget"]) for row in table(STUDY, after) if row["method"] != "raas, by layer"
        )


def test_demo():
    boxed = [[cell.strip() for cell in line.split("│")[1:-1]] for line in STUDY.splitlines() if line.startswith("│")]
    shown = table(README, "What `make demo` ends with")
    assert len(shown) == len(boxed) == 4
    for row, (_, budget, exact, _, _, size, evicted) in zip(shown, boxed, strict=True):
        assert row["budget"].replace(" ", "") == budget.replace(" ", "")
        assert (row["chains exact"], row["KV"], row["pages evicted"] or "-") == (exact, size, evicted)


@pytest.mark.parametrize(
    ("shown", "method", "mode"),
    [
        ("RaaSCache(budget=2048)", "raas", "compiled"),
        ("StaticCache`, as long as needed", "StaticCache(seen)", "compiled"),
        ("StaticCache(max_cache_len=2048)", "StaticCache(budget)", "compiled"),
    ],
)
def test_steps_on_the_gpu(shown, method, mode):
    rows = json.loads((RESULTS / "bench-h200.json").read_text())["rows"]
    (line,) = (row for row in table(README, "## What a step costs") if row["cache"] == shown)
    for seen in (2048, 32_768, 131_072):
        of = {"method": method, "seen": seen, "mode": mode}
        (row,) = (row for row in rows if of.items() <= row["case"].items())
        cell = line[f"after {seen:,}" + " tokens" * (seen == 2048)]
        assert cell == (f"{row['timing']['median']:.2f} ms" if row["timing"] else "does not fit")
        if seen == 32_768:
            assert line["KV at 32,768"] == f"{row['kv_bytes'] / 1e9:.1f} GB"


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), (page.name, target)

"""The pages are true: numbers are those in docs/results, public names are listed, links lead somewhere."""

import configparser
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_origin

import pytest

import raas_cache
import raas_cache.eval
import raas_cache.fidelity
import raas_cache.probes
import raas_kernels
from raas_cache.eval.rows import read_rows_of
from raas_cache.eval.settings import common_options
from raas_cache.fidelity import Fidelity, FidelityRow
from raas_cache.probes import ProbeRow, Recalls
from raas_cache.probes.results import DISTANCES


ROOT = Path(__file__).parents[2]
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


def rows_of_the_study():
    study = {(row["method"], row["budget"]): row for row in table(STUDY, "## Every method")}
    return study | {(row["method"], row["budget"]): row for row in table(STUDY, "## RaaS, one option")}


def test_methods():
    study = rows_of_the_study()
    shown = table(METHODS, "at half of the tokens")
    assert len(shown) > 10
    for row in shown:
        found = study[row["method"], row["budget"]]
        assert row == {name: found[name] for name in row}


def test_choosing_a_budget():
    study, page = rows_of_the_study(), (ROOT / "docs" / "choosing-a-budget.md").read_text()
    starts = [match.start() for match in re.finditer(r"^\| method \| budget", page, re.MULTILINE)]
    assert len(starts) >= 6
    for start in starts:
        for row in table(page[start:], "| method"):
            found = study[row["method"], row["budget"]]
            assert row == {name: found[name] for name in row}
    for method in ("raas:scoring=minmax", "raas:granularity=layer", "raas:top_ratio=0.5"):
        assert study[method, "384"]["accuracy (95 % interval)"].partition("%")[0] + " %" in page


def test_which_budget():
    """The worked example is what the stored rows recommend, and the rules of thumb hold for the stored rows."""
    page, fidelity = ((ROOT / "docs" / name).read_text() for name in ("choosing-a-budget.md", "fidelity.md"))
    words = " ".join(page.split())
    found = Fidelity(read_rows_of(RESULTS / "smollm2", FidelityRow))
    assert found.recommend() in page
    example = {
        row["method"].partition("=docs")[0]: row["loss - dynamic (95 %)"][1:7]
        for row in table(fidelity, "Together they give")[1:]
    }
    assert f"with shares: it loses {example['raas:shares']} nats" in words
    assert f"Quest loses {example['quest']} in five times" in words
    assert f"RaaS without shares {example['raas']}, and the window {example['window']}" in words
    # The table is an excerpt, and the rules follow from it.
    shown = table(page, "### Rules of thumb")
    everything = table(fidelity, "count in the budget:")
    assert len(shown) == 5 and all(row in everything for row in shown)
    lost = {row["cache"]: [float(row[name][1:7]) for name in list(row)[1:4]] for row in shown}
    for name in ("raas:shares", "window:shares"):
        assert lost[name][1] == pytest.approx(lost["window"][2], rel=0.1), "a quarter with shares, half without"
        assert lost[name][2] == pytest.approx(lost["window"][2] / 10, rel=0.2)
    options = table(fidelity, "Options at 768 tokens")
    for row in options:
        if "kv_dtype" in row["cache"]:
            assert f"{row['loss - dynamic (95 %)'][1:7]} with {row['budget']} in {row['cache'][-4:]}" in words
    rows = script_of("longer_texts_table").Rows(3072)
    small, large = (
        rows.found.difference(rows.at(f"raas:page_size={size}", 768), rows.at("raas", 768)).mean for size in (4, 64)
    )
    assert f"Pages of 4 tokens lose {-small:.4f} less, and pages of 64 lose {large:.4f} more" in words
    assert f"a window loses {rows.difference('window', 'dynamic', 768)[1:7]} nats with 768 tokens in bfloat16" in words


def test_eight_bits():
    found = table((RESULTS / "eval-h100.md").read_text(), "int8")
    for row in table(METHODS, "### 8-bit stores"):
        assert row in [{name: one[name] for name in row} for one in found]


def test_fidelity():
    """The tables of the page are those of the stored rows, and so are the numbers in the text."""
    found = Fidelity(read_rows_of(RESULTS / "smollm2", FidelityRow))
    page = (ROOT / "docs" / "fidelity.md").read_text()
    assert len(found.rows) == 8 * 12
    for shown in (found.table("window"), found.by_distance(), found.recommend()):
        assert shown in page
    rows = {row["method"].partition("=docs")[0]: row for row in table(page, "Together they give")}
    words = " ".join(page.split())
    lost = {name: row["loss - dynamic (95 %)"][1:7] for name, row in rows.items() if name != "dynamic"}
    assert f"RaaS with shares loses {lost['raas:shares']}" in words
    assert f"with shares {lost['window:shares']}, where the window without shares loses {lost['window']}" in words
    assert f"lose {lost['window:kv_dtype=int4']} nats" in page
    held = {name: int(row["KV bytes"].replace(",", "")) for name, row in rows.items()}
    assert f"{held['raas:shares'] / held['raas'] - 1:.0%}" == "3%" and held["quest"] / held["raas:shares"] > 5
    readme = table((ROOT / "README.md").read_text(), "## On a real model")
    assert len(readme) == len(rows)
    for row in readme:
        full = rows[row["cache"].strip("`")]
        assert row["KV bytes"] == f"{held[row['cache'].strip('`')] / held['dynamic']:.0%}"
        for name in ("budget", "loss - dynamic (95 %)", "loss - window (95 %)", "same top token"):
            assert row[name] == full[name]


def test_fidelity_of_longer_texts():
    """The tables of the page are those of the stored rows, and the rows support what the text says."""
    script = script_of("longer_texts_table")
    page = (ROOT / "docs" / "fidelity.md").read_text()
    words = " ".join(page.split())
    for shown in script.tables():
        assert shown in page
    rows, longer = script.Rows(3072), script.Rows(6144)

    def compared(one, other, budget, of=rows):
        return of.found.difference(of.at(one, budget), of.at(other, budget))

    # 1. Without shares, no method that evicts is better than the window, and three are level with it.
    for budget in script.BUDGETS:
        for name in script.METHODS[1:]:
            found = compared(name, "window", budget)
            if name in ("raas", "tova:prompt=pin", "vase:prompt=pin"):
                assert not found.is_significant
            elif "shares" not in name and name != "quest":
                assert found.mean > 0 and (found.is_significant or budget != 768)
    assert not compared("raas", "window", 1536, longer).is_significant
    # 2. What shares change.
    for budget, better in zip(script.BUDGETS, (True, True, False), strict=True):
        found = compared("raas:shares", "window:shares", budget)
        assert found.is_significant == better and (not better or f"{-found.mean:.4f}" in page)
        more = rows.bytes[rows.at("window:shares", budget).key] / rows.bytes[rows.at("window", budget).key] - 1
        assert f"{100 * more:.0f} %" in page
    for name in ("raas:shares", "window:shares"):
        assert not compared(name, "quest", 768).is_significant
        assert compared(name, "quest", 1536, longer).high < 0
    eighth, quarter = rows.at("window:shares", 384), rows.at("window", 768)
    assert str(rows.found.difference(eighth, quarter)) in page
    assert f"{rows.bytes[eighth.key] / rows.bytes[quarter.key]:.0%}" == "61%"
    readme = " ".join(README.split())
    for of, budget, ending in ((rows, 768, "Quest {}"), (longer, 1536, "it is {}, {} and {}")):
        lost = [of.difference(name, "dynamic", budget)[1:7] for name in ("window", "raas:shares", "quest")]
        assert ending.format(*(lost[-1:] if budget == 768 else lost)) in readme
        assert max(float(lost[1]), float(of.difference("window:shares", "dynamic", budget)[1:7])) < float(lost[0]) / 3
    # 3. Options.
    found = compared("quest", "window:kv_dtype=int4", 768)
    assert f"by {found.mean:.4f} ({found.low:.4f} to {found.high:.4f})" in words
    assert compared("window:kv_dtype=int4", "raas:shares", 768).high < 0
    assert not compared("window:kv_dtype=int4", "raas:shares", 1536, longer).is_significant
    for alpha in ("0.02", "0.005"):
        assert not compared(f"raas:alpha={alpha}", "raas", 768).is_significant
    for name, size in (("raas", 4), ("window", 4), ("raas", 64)):
        found = compared(f"{name}:page_size={size}", name, 768)
        assert found.is_significant and f"{abs(found.mean):.4f}" in page
    for name in script.PAPERS[1:]:
        evicted, pinned = ("raas:prompt=evict", "raas") if name == "raas" else (name, f"{name}:prompt=pin")
        assert compared(evicted, pinned, 768).is_significant == (name in ("h2o", "rkv"))


def test_word_problems():
    script = subprocess.run(
        [sys.executable, ROOT / "examples" / "word_problem_table.py"], capture_output=True, text=True
    )
    assert script.stdout.strip() in (ROOT / "docs" / "evaluation.md").read_text(), script.stderr
    solved = {
        (row["data set"], row["budget"], row["cache"]): row["solutions right"].replace("/", " of ")
        for row in table(script.stdout, "|")
    }
    for budget, cache in (("2,304", "raas"), ("896", "window"), ("896", "window:shares")):
        assert solved["word-problems-once", budget, cache] in " ".join(README.split())
    for cache in ("window", "window:shares"):
        assert solved["word-problems", "640", cache] in " ".join(README.split())
    rows = [json.loads(line) for line in (RESULTS / "word-problems" / "rows.jsonl").read_text().splitlines()]
    wrong = [
        row["people_right"] == row["people"]
        for row in rows
        if row["dataset"] == "word-problems" and "shares" in row["method"] and not row["correct"]
    ]
    words = " ".join((ROOT / "docs" / "evaluation.md").read_text().split())
    assert f"{sum(wrong)} of the {len(wrong)} wrong solutions with shares have all people right" in words


def test_probes():
    """The tables of the page are those of the stored rows, and so are the numbers in the text."""
    page = (ROOT / "docs" / "probes.md").read_text()
    words, rates = " ".join(page.split()), {}
    for name in raas_cache.probes.PROBES:
        found = Recalls(name, read_rows_of(RESULTS / "smollm2" / "probes" / name, ProbeRow))
        assert len(found.rows) == 7 * 16
        for shown in (found.summary(), found.table("window"), found.by_distance()):
            assert shown in page
        for row in table(page, f"{name}: "):
            rates.setdefault(row["method"].partition("=docs")[0], []).append(row["recalled"])
        of = {one.method + ":shares" * ("shares" in one.options): one for one in found.settings}
        pairs = [("raas", "window"), ("raas", "random"), ("raas:shares", "window:shares"), ("raas:shares", "quest")]
        for one, other in pairs:
            assert found.difference(of[one], of[other]).percent() in words
        beyond = found.difference(of["raas"], of["window"], DISTANCES.index("257 to 512"))
        assert beyond.percent() in words and beyond.is_significant == (name == "lemma-once")
        assert not found.difference(of["raas"], of["random"]).is_significant
        assert found.difference(of["raas:shares"], of["window:shares"]).is_significant == (name == "needle")
    overview = table(page, "Recalled, by probe")
    assert len(overview) == len(rates)
    for row in overview:
        assert [row[name] for name in raas_cache.probes.PROBES] == rates[row["method"]]


def test_bytes_per_token(capsys):
    script_of("bytes_per_token").main()
    assert capsys.readouterr().out in (ROOT / "docs" / "choosing-a-budget.md").read_text()


def script_of(name):
    """A script of `examples`, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def learnt_or_by_layer(row):
    """Whether the script computes the setting of a row while it runs."""
    return row["method"] == "raas, by layer" or row["method"].startswith("raas:shares=")


def test_study_is_what_the_script_runs():
    pytest.importorskip("matplotlib")
    study = script_of("study")
    for after, of in zip(("## Every method", "## RaaS, one option"), study.sections(quick=False), strict=True):
        common = common_options(of)
        wanted = [(one.label_but(common), "all" if one.budget is None else str(one.budget)) for one in of]
        assert sorted(wanted) == sorted(
            (row["method"], row["budget"]) for row in table(STUDY, after) if not learnt_or_by_layer(row)
        )


def test_demo():
    boxed = [[cell.strip() for cell in line.split("│")[1:-1]] for line in STUDY.splitlines() if line.startswith("│")]
    shown = table((ROOT / "docs" / "index.md").read_text(), "It ends with this table")
    assert len(shown) == len(boxed) == 4
    for row, (_, budget, exact, _, _, size, evicted) in zip(shown, boxed, strict=True):
        assert row["budget"].replace(" ", "") == budget.replace(" ", "")
        assert (row["chains exact"], row["KV"], row["pages evicted"] or "-") == (exact, size, evicted)


def test_steps_on_an_h200():
    rows = json.loads((RESULTS / "bench-h200.json").read_text())["rows"]
    shown = table((ROOT / "docs" / "performance.md").read_text(), "bench-h200.json")
    times = {}
    for line in shown:
        of = {"method": line["method"], "seen": int(line["seen"].replace(",", "")), "mode": "compiled"}
        (row,) = (row for row in rows if of.items() <= row["case"].items())
        time = row["timing"]
        assert line["ms/token (p10 to p90)"] == f"{time['median']:.2f} ({time['p10']:.2f} to {time['p90']:.2f})"
        assert (line["ran"], line["KV bytes"]) == (row["ran"], f"{row['kv_bytes']:,}")
        times[line["method"], of["seen"]] = f"{time['median']:.2f} ms"
    assert len(times) == len(shown) == 9
    # The README has three of the times.
    words, ours = " ".join(README.split()), [times["raas", seen] for seen in (2048, 131_072)]
    assert f"takes {ours[0]} for a step after 2,048 tokens and {ours[1]} after 131,072, on one H200" in words
    assert f"`StaticCache` with room for all tokens takes {times['StaticCache(seen)', 2048]} after 2,048" in words
    (large,) = (row for row in rows if row["case"] == {**row["case"], "method": "StaticCache(seen)", "seen": 131_072})
    assert not large["timing"] and "does not fit after 131,072" in words


@pytest.mark.parametrize(("name", "mode", "lines"), [("8b", "compiled", 4), ("1.5b", "eager", 8)])
def test_steps_on_an_h100(name, mode, lines):
    rows = json.loads((RESULTS / f"bench-h100-{name}.json").read_text())["rows"]
    shown = table((ROOT / "docs" / "performance.md").read_text(), f"bench-h100-{name}.json")
    assert len(shown) == lines
    for line in shown:
        of = {"method": line["method"], "seen": int(line["seen"].replace(",", "")), "mode": mode}
        (row,) = (row for row in rows if of.items() <= row["case"].items())
        time = row["timing"]
        assert line["ms/token (p10 to p90)"] == f"{time['median']:.2f} ({time['p10']:.2f} to {time['p90']:.2f})"
        for base in ("dynamic", "StaticCache(budget)"):
            assert line[f"/ {base}"] == f"{row['ratios'][base]:.2f}"
        assert (line["ran"], line["KV bytes"]) == (row["ran"], f"{row['kv_bytes']:,}")


def test_models_served():
    said = re.search(r"with transformers (\S+)\.\d+: (\d+ of the \d+)", (ROOT / "docs" / "models.md").read_text())
    for page in ("README.md", "CHANGELOG.md"):
        text = " ".join((ROOT / page).read_text().split())
        assert re.search(rf"{said[2]} decoder architectures (in|of) transformers {said[1]} are served", text), page


def test_links_lead_somewhere():
    for page in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), (page.name, target)


PUBLIC = [raas_cache, raas_cache.eval, raas_cache.fidelity, raas_cache.probes, raas_kernels]


@pytest.mark.parametrize("package", PUBLIC, ids=lambda package: package.__name__)
def test_reference_has_every_public_name(package):
    page = (ROOT / "docs" / "api.md").read_text()
    listed = set(re.findall(r"^(?:::: |    +heading: )([\w.]+)$", page, re.MULTILINE))
    names = {f"{package.__name__}.{name}" for name in package.__all__ if get_origin(getattr(package, name)) is None}
    assert names <= listed


def test_citation_and_changelog_have_the_version():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    version = setup["metadata"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def build(config, site):
    """Build the site strictly; what it says."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", site]
    return subprocess.run(command, capture_output=True, text=True)


def test_site_builds_and_asks_no_other_host(tmp_path):
    result = build(ROOT / "mkdocs.yml", tmp_path)
    assert result.returncode == 0, result.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]* src=\"?([^\" >]+)", page.read_text())
        loaded += re.findall(
            r"<link[^>]* rel=\"?(?:stylesheet|preconnect|icon)[^>]* href=\"?([^\" >]+)", page.read_text()
        )
        assert [target for target in loaded if "//" in target] == [], page
    # What a page links to outside docs/ has come along.
    assert (tmp_path / "tests" / "cache" / "test_upstream.py").exists()
    assert (tmp_path / "changelog" / "index.html").exists()


def test_broken_links_and_anchors_fail_the_build(tmp_path):
    for name in ("mkdocs.yml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("docs", "src", "kernels", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    with (tmp_path / "docs" / "index.md").open("a") as page:
        page.write("\n[a](no-such-page.md) [b](methods.md#no-such-heading) [c](../src/no_such_file.py)\n")
    result = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert result.returncode != 0
    for target in ("no-such-page.md", "#no-such-heading", "no_such_file.py"):
        assert target in result.stderr

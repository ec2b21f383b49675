"""`raas-cache report`: the page has the numbers of the summaries, loads nothing, and works in a browser."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files

import pytest


pytest.importorskip("matplotlib")

from raas_cache.common.reporting import Cell, Table, image
from raas_cache.eval import compare, compared, summarize, table
from raas_cache.eval.comparison import compared_table
from raas_cache.eval.html_report import MEANING, WIDTH, write_report
from raas_cache.eval.plots import NARROW, WIDE, figures
from raas_cache.eval.results import table_of, versions

from ..helpers import refused
from .browser import BROWSER, opened
from .rows import ROW


SETTINGS = {"task": "chains-40", "model": "models/embedded", "temperature": 0.6, "torch": "2.13.0", "methods": {}}


def rows(method, budget, marks, **options):
    return [
        replace(
            ROW, index=index, sample=sample, method=method, budget=budget, correct=mark == "1", options=options,
            kv_bytes=10 * budget if isinstance(budget, int) else 99990, tokens=90 + index,
        )
        for index, text in enumerate(marks)
        for sample, mark in enumerate(text)
    ]  # fmt: skip


ROWS = [
    *rows("dynamic", None, ["11", "11", "11"]),
    *rows("raas", 1024, ["11", "10", "01"], page_size=4),
    *rows("raas", 512, ["11", "00", "10"], page_size=4),
    *rows("window", 512, ["10", "00", "00"], page_size=4),
    *rows("raas", 512, ["00", "00", "00"], page_size=4, alpha=0.5),
]


@pytest.fixture
def folder(tmp_path):
    return written(tmp_path, ROWS)


def written(folder, found, **settings):
    (folder / "rows-0.jsonl").write_text("".join(row.to_json() for row in found), encoding="utf-8")
    (folder / "settings.json").write_text(json.dumps(SETTINGS | settings))
    return folder


class Parsed(HTMLParser):
    """The tags of a page, its texts, and its tables as lists of cells."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self.tables, self.cell = [], [], [], None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append((tag, given))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            value = given.get("data-value")
            self.cell = Cell("", None if value is None else float(value))
            self.tables[-1][-1].append(self.cell)

    def handle_endtag(self, tag):
        if tag in ("th", "td"):
            self.cell = None

    def handle_data(self, data):
        self.texts.append(data)
        if self.cell is not None:
            self.cell = self.cell._replace(text=self.cell.text + data)
            self.tables[-1][-1][-1] = self.cell

    def attributes(self, *names):
        return [value for _, given in self.tags for name, value in given.items() if name in names]


def parsed(folder, against=None):
    return Parsed(write_report(folder, against).read_text(encoding="ascii"))


def as_list(of_table):
    return [[Cell(name) for name in of_table.header], *of_table.lines]


class TestContent:
    def test_tables_equal_the_summaries_and_the_comparison(self, folder):
        found = parsed(folder)
        assert found.tables == [as_list(table_of(summarize(ROWS))), as_list(compared_table(compare(ROWS, "dynamic")))]
        for said in ("chains-40, embedded", "3 problems, 2 samples each", versions(SETTINGS, ROWS)):
            assert said in found.texts
        assert "Unless said otherwise: page_size=4." in found.texts
        assert "temperature" in found.texts and "0.6" in found.texts, "the settings"

    def test_cells_are_those_of_the_markdown(self):
        assert str(table_of(summarize(ROWS))) == table(summarize(ROWS))
        assert str(compared_table(compare(ROWS, "raas"))) == compared(compare(ROWS, "raas"))
        assert str(Table(["a"], [[Cell("1", 1)]])) == "| a |\n| --- |\n| 1 |"

    def test_values_to_sort_by(self):
        lines = table_of(summarize(ROWS)).lines
        assert [line[1].value for line in lines] == [float("inf"), 1024, 512, 512, 512]
        assert [line[3].value for line in lines] == pytest.approx([1, 2 / 3, 1 / 2, 1 / 6, 0])
        (layers,) = table_of(summarize(rows("raas", (128, 512), ["1"]))).lines
        assert layers[1] == ("128 / 512", 320)
        pairs = compared_table(compare(ROWS, "dynamic")).lines
        assert [line[3].value for line in pairs] == pytest.approx([-1 / 3, -1 / 2, -5 / 6, -1])

    def test_against(self, folder, tmp_path):
        assert parsed(folder, "window").tables[1] == as_list(compared_table(compare(ROWS, "window")))
        with pytest.raises(ValueError, match="against='quest' is not among the methods"):
            write_report(folder, "quest")
        assert len(parsed(written(tmp_path, [row for row in ROWS if row.method != "dynamic"])).tables) == 1
        assert len(parsed(written(tmp_path, [row for row in ROWS if row.method == "dynamic"])).tables) == 1

    def test_every_column_has_a_meaning(self, folder, tmp_path):
        shown = set(parsed(folder).texts)
        shown |= set(parsed(written(tmp_path, [row for row in ROWS if row.sample == 0])).texts)
        assert set(MEANING.values()) <= shown

    def test_figures_are_those_of_plot(self, folder):
        def uri(figure):
            return "data:image/svg+xml;base64," + base64.b64encode(image(figure, "svg")).decode()

        found = parsed(folder)
        wide, narrow = (figures(summarize(ROWS), "chains-40, embedded", shape) for shape in (WIDE, NARROW))
        assert wide.keys() == {"accuracy", "chain_length", "ablation_alpha"}
        assert found.attributes("src") == [uri(figure) for figure in wide.values()]
        assert found.attributes("srcset") == [uri(figure) for figure in narrow.values()]
        assert found.attributes("alt") == ["figure: accuracy", "figure: chain length", "figure: ablation alpha"]

    def test_text_of_the_folder_is_no_html(self, tmp_path):
        bad = '<b onclick="x">é</b>'.replace("/", "")
        found = parsed(written(tmp_path, ROWS, task=bad))
        assert "b" not in {tag for tag, _ in found.tags} and f"{bad}, embedded" in found.texts

    def test_without_settings_the_folder_is_the_title(self, folder):
        (folder / "settings.json").unlink()
        assert folder.name in parsed(folder).texts

    def test_same_rows_give_the_same_bytes(self, folder):
        first = write_report(folder).read_bytes()
        assert write_report(folder).read_bytes() == first


class TestLoadsNothing:
    def test_addresses_are_data(self, folder):
        page = write_report(folder).read_text(encoding="ascii")
        assert not re.search(r"https?:|@import|url\(|//[a-z]", page)
        found = Parsed(page)
        assert not found.attributes("href", "action", "data", "poster", "background")
        addresses = found.attributes("src", "srcset")
        assert len(addresses) == 6 and all(address.startswith("data:image/svg+xml;base64,") for address in addresses)
        for address in addresses:
            drawing = base64.b64decode(address.partition(",")[2]).decode()
            assert not re.search(r"""(href|src)=["'](?!#)|url\((?!#)|@import|<script""", drawing)

    def test_policy_forbids_to_load(self, folder):
        (policy,) = (given["content"] for _, given in parsed(folder).tags if "http-equiv" in given)
        assert policy.startswith("default-src 'none'; img-src data:;") and "http" not in policy


class TestCommand:
    def invoke(self, *words):
        pytest.importorskip("typer")
        from typer.testing import CliRunner

        from raas_cache.cli import app

        return CliRunner().invoke(app, ["report", *map(str, words)])

    def test_writes_the_page(self, folder):
        result = self.invoke(folder, "--against", "window")
        page = folder / "report.html"
        assert result.exit_code == 0 and result.stdout.strip() == str(page), result.output
        assert "Compared with window, pair by pair" in page.read_text()
        assert self.invoke(folder).exit_code == 0 and "Compared with dynamic, pair by pair" in page.read_text()
        assert "--against" in refused(self.invoke(folder, "--against", "quest"))

    def test_a_folder_without_rows(self, tmp_path):
        error = refused(self.invoke(tmp_path / "nothing"))
        assert "FOLDER" in error and "contains no results: run raas-cache eval --out" in error


def test_style_and_figures_change_at_the_same_width():
    style = (files("raas_cache.eval") / "report_page" / "style.css").read_text()
    assert re.findall(r"max-width: (\d+)px", style) == [str(WIDTH)]


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
class TestBrowser:
    def test_a_click_sorts_and_a_second_click_reverses(self, folder):
        script = """
        const [table] = page.querySelectorAll("table");
        const buttons = [...table.querySelectorAll("button")];
        const shown = name => {
          const column = buttons.findIndex(button => button.textContent.startsWith(name));
          buttons[column].click();
          const marked = [...table.querySelectorAll("[aria-sort]")];
          return [[...table.tBodies[0].rows].map(row => row.cells[column].textContent),
                  marked.map(head => head.textContent + " " + head.getAttribute("aria-sort"))];
        };
        return [shown("method"), shown("budget"), shown("budget"), shown("peak KV")];
        """
        found, _ = opened(write_report(folder).read_text(), script, folder)
        assert found == [
            [["dynamic", "raas", "raas", "raas:alpha=0.5", "window"], ["method ascending"]],
            [["512", "512", "512", "1,024", "all"], ["budget ascending"]],
            [["all", "1,024", "512", "512", "512"], ["budget descending"]],
            [["5,120", "5,120", "5,120", "10,240", "99,990"], ["peak KV ascending"]],
        ]

    def test_no_request_is_made(self, folder):
        page = write_report(folder).read_text()
        loaded = "return [...page.images].map(image => image.naturalWidth > 100);"
        assert opened(page, loaded, folder) == ([True, True, True], [])
        tracked = page.replace("</h1>", '</h1><img src="http://raas-cache.invalid/dot.png">')
        assert opened(tracked, "return 0;", folder) == (0, []), "the policy must stop it"
        _, requests = opened(re.sub('<meta http-equiv.*?">', "", tracked), "return 0;", folder)
        assert requests and requests[0].startswith("GET http://raas-cache.invalid/dot.png"), "the proxy must see it"

    def test_is_legible_on_a_phone(self, folder):
        script = """
        for (const folded of page.querySelectorAll("details")) folded.open = true;
        const all = [...page.body.querySelectorAll("*")].filter(one => one.getClientRects().length);
        return {
          inside: window.innerWidth,
          scrolled: page.documentElement.scrollWidth,
          widest: Math.max(...all.map(one => one.getBoundingClientRect().right)),
          overflowing: all.filter(one => one.scrollWidth > one.clientWidth + 1 && one.clientWidth).length,
          smallest: Math.min(...all.map(one => parseFloat(window.getComputedStyle(one).fontSize))),
          shrunk: Math.min(...[...page.images].map(image => image.width / image.naturalWidth)),
          name: window.getComputedStyle(page.querySelector("td"), "::before").content,
        };
        """
        page = write_report(folder).read_text()
        found, _ = opened(page, script, folder, width=375)
        assert found["inside"] == found["scrolled"] == 375 and found["widest"] <= 375 and not found["overflowing"]
        assert found["smallest"] >= 14 and found["shrunk"] > 0.98, "text has the size of the page, also in figures"
        assert found["name"] == '"method"'
        wide, _ = opened(page, script, folder, width=1280)
        assert wide["scrolled"] == 1280 and not wide["overflowing"] and wide["shrunk"] > 0.8 and wide["name"] == "none"

    def test_several_panels_have_the_whole_width_or_the_narrow_form(self, folder, tmp_path):
        found = [*ROWS, *(row for name in ("h2o", "tova") for value in ("pin", "evict") for row in rows(
            name, 512, ["10"], page_size=4, prompt=value))]  # fmt: skip
        page = write_report(written(tmp_path, found)).read_text()
        script = """
        return Object.fromEntries([...page.images].map(image => [image.alt, image.width / image.naturalWidth]));
        """
        for width in (375, 800, 1280):
            shrunk, _ = opened(page, script, tmp_path, width=width)
            assert shrunk.keys() >= {"figure: accuracy", "figure: ablation prompt"} and min(shrunk.values()) > 0.72

    @pytest.mark.parametrize(("dark", "text"), [(False, "rgb(0, 0, 0)"), (True, "rgb(255, 255, 255)")])
    def test_dark_where_the_reader_prefers_it(self, folder, dark, text):
        script = """
        const colour = one => window.getComputedStyle(one).color;
        const paper = [...page.images].map(image => window.getComputedStyle(image).backgroundColor);
        return [...[page.body, page.querySelector("td"), page.querySelector("button")].map(colour), ...new Set(paper)];
        """
        found, _ = opened(write_report(folder).read_text(), script, folder, dark=dark)
        assert found == [text, text, text, "rgb(255, 255, 255)"], "figures have black text on white"

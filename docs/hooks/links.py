"""MkDocs hook: links from docs/ to other files of the repository also work in the site.

The changelog and the card of the kernels become pages of the site. A link to README.md goes to the start page. Any
other linked file is copied into the site. All other links stay unchanged, and MkDocs warns about broken links.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
PAGES = {"CHANGELOG.md": "changelog.md", "kernels/CARD.md": "hub-kernel.md", "README.md": "index.md"}
LINK = re.compile(r"(?<=\]\()[^)#\s]+")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path, uri in PAGES.items():
        if not (DOCS / uri).exists():
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    folder = Path(page.file.abs_src_path).parent

    def in_site(link: re.Match) -> str:
        target = (folder / link[0]).resolve()
        if not target.is_file() or not target.is_relative_to(ROOT):
            return link[0]
        uri = target.relative_to(ROOT).as_posix()
        if target.is_relative_to(DOCS):
            uri = target.relative_to(DOCS).as_posix()
        elif uri in PAGES:
            uri = PAGES[uri]
        elif not files.get_file_from_path(uri):
            files.append(File.generated(config, uri, abs_src_path=str(target)))
        return posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(in_site, markdown)

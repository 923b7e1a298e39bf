"""Hooks that mkdocs calls when it builds the site (see mkdocs.yml).

The pages are written for readers of the repository, so their links lead from file to file. The site has README.md,
CONTRIBUTING.md and CHANGELOG.md beside the pages of docs/, and copies of all other files that a page links to. The
hooks add these files and rewrite the links.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
COPIES = "files"  # folder of the site with the files from outside docs/

# Code and comments come first, because a link in them is not a link.
MARKUP = re.compile(
    r"""
    ^[ ]*(?P<fence>`{3,}|~{3,})[^\n]*\n.*?^[ ]*(?P=fence)
    | <!--.*?-->
    | (?<!`)(?P<ticks>`+)(?!`)(?:(?!\n\n).)+?(?<!`)(?P=ticks)(?!`)
    | (?P<link>!?\[(?P<text>(?:[^][]|\[[^][]*\])*)\]\((?P<target>[^)\s]+)(?P<title>[^)]*)\))
    """,
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)
log = logging.getLogger("mkdocs.hooks.sgalign")  # in strict mode, mkdocs counts the warnings of its loggers


class Rewritten(NamedTuple):
    """The Markdown of a page of the site.

    Attributes:
        text: the Markdown, with links between pages of the site.
        files: the linked files, relative to the root of the repository.
        missing: the links to files that do not exist.
    """

    text: str
    files: list[str]
    missing: list[str]


def place(path: str) -> str:
    """Return the place in the site of a file of the repository.

    Args:
        path: the path of the file, relative to the root.
    """
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    # Without a suffix, a browser would not show the license.
    return f"{COPIES}/{path}" if posixpath.splitext(path)[1] else f"{COPIES}/{path}.txt"


def source(uri: str) -> str:
    """Return the file of the repository that is the source of a page, the inverse of `place` for Markdown.

    Args:
        uri: the place of the page in the site.
    """
    for path, page in PAGES.items():
        if uri == page:
            return path
    return uri.removeprefix(f"{COPIES}/") if uri.startswith(f"{COPIES}/") else f"docs/{uri}"


def rewrite(text: str, path: str, root: Path = ROOT) -> Rewritten:
    """Return a page for the site, in which each link of the Markdown leads to the place of its file.

    Links in fenced and inline code are left alone, and so are URLs. A link to a folder outside docs/ becomes plain
    text. A link to a folder inside docs/ leads to the folder's README.md.

    Args:
        text: the Markdown of the page.
        path: the file of the page, relative to the root.
        root: the root of the repository.
    """
    files: list[str] = []
    missing: list[str] = []

    def lead(link: str) -> str | None:
        """Return the link as the site needs it, or None for a folder outside docs/."""
        if not link or re.match(r"[a-zA-Z][\w+.-]*:|[/#]", link):
            return link
        target, mark, anchor = link.partition("#")
        file = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if (root / file).is_dir():
            if not f"{file}/".startswith("docs/"):
                return None
            file = f"{file}/README.md"
        if not (root / file).is_file():
            missing.append(link)
            return link
        files.append(file)
        return posixpath.relpath(place(file), posixpath.dirname(place(path)) or ".") + mark + anchor

    def replace(match: re.Match[str]) -> str:
        if not match["link"]:
            return match[0]
        inner = MARKUP.sub(replace, match["text"])  # may contain a picture
        link = lead(match["target"])
        if link is None:
            return inner
        return f"{'!' if match[0].startswith('!') else ''}[{inner}]({link}{match['title']})"

    return Rewritten(MARKUP.sub(replace, text), files, missing)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from the root, and all files outside docs/ to which a page leads."""
    from mkdocs.structure.files import File

    def add(path: str) -> None:
        files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))

    for path in PAGES:
        add(path)
    waiting = [source(page.src_uri) for page in files.documentation_pages()]
    while waiting:
        page = waiting.pop()
        for path in rewrite((ROOT / page).read_text(encoding="utf-8"), page).files:
            if files.get_file_from_path(place(path)) is None:
                add(path)
                if path.endswith(".md"):
                    waiting.append(path)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the page with rewritten links, and warn of links to files that do not exist."""
    path = source(page.file.src_uri)
    rewritten = rewrite(markdown, path)
    for link in rewritten.missing:
        log.warning("%s links to %r, which does not exist", path, link)
    return rewritten.text

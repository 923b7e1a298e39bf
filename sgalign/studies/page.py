"""A self-contained HTML page of a report."""

from __future__ import annotations

import base64
import re
from pathlib import Path

from markdown import Markdown

from sgalign.files import written_whole

POLICY = (  # no script, and no file but those inside the page
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
)
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
h2 { margin-top: 3rem; border-top: 2px solid #888; padding-top: 1rem; }
"""


def write_page(path: Path, text: str) -> None:
    """Write a Markdown text as an HTML page that needs no other file. Its images are PNG files beside the page.

    Args:
        path: file of the page. It appears only when it is complete.
        text: the text, with tables and images.
    """

    def inline(match: re.Match[str]) -> str:
        content = base64.b64encode((path.parent / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{content}"'

    converter = Markdown(extensions=["tables"])
    converter.preprocessors.deregister("html_block")  # names of a study may come from others, so markup stays text
    for pattern in ("html", "link", "reference", "short_reference", "autolink", "automail"):
        converter.inlinePatterns.deregister(pattern)
    body = re.sub(r'src="([^"/]+\.png)"', inline, converter.convert(text))
    with written_whole(path) as partial:
        partial.write_text(
            f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n{POLICY}\n<title>sgalign report</title>\n'
            f"<style>{STYLE}</style>\n{body}\n</html>\n",
            encoding="utf-8",
        )

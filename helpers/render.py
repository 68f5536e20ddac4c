"""An executed notebook as one HTML page that stands alone: formulas as MathML, figures and their script inside, code folded."""

import re
from html import escape
from itertools import cycle

from latex2mathml.converter import convert
from nbconvert.filters.ansi import ansi2html
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from plotly.offline import get_plotlyjs
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from helpers import claims, pages

TWIN = "application/vnd.plotly.v1+json"
VERDICT = f"({'|'.join(claims.VERDICTS)})"


class _Words(IPythonRenderer):
    """nbconvert's Markdown, with formulas as MathML; one that cannot be read stays as it was written."""

    def _formula(self, tex: str, display: str) -> str:
        try:
            return convert(tex, display=display)
        except Exception:  # the package's errors have no class in common
            return f"<code>{escape(tex)}</code>"

    def block_math(self, body: str) -> str:
        """$$...$$"""
        return self._formula(body, "block")

    def inline_math(self, body: str) -> str:
        """$...$"""
        return self._formula(body, "inline")

    def latex_environment(self, name: str, body: str) -> str:
        r"""\begin{...}...\end{...}"""
        return self._formula(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")


def words(markdown: str, attachments: dict[str, dict[str, str]] | None = None) -> str:
    """Markdown as HTML: links lead to pages, not notebooks; where a claim is stated is a place to link to; verdicts stand out."""
    html = MarkdownWithMath(_Words(escape=False, attachments=attachments)).render(markdown)
    html = re.sub(r'href="(\d\d_\w+)\.ipynb', r'href="\1.html', html)
    html = re.sub(r"<strong>Claim (\S+)</strong>", r'<strong id="claim-\1">Claim \1</strong>', html)
    return tables(re.sub(f"<strong>{VERDICT}</strong>", _verdict, html))


def marked(summary: str) -> str:
    """A study's summary as HTML, the verdicts in it as they look elsewhere."""
    return re.sub(rf"(?<=: ){VERDICT}\b", _verdict, escape(summary))


def _verdict(found: re.Match[str]) -> str:
    return f'<strong class="verdict {found[1].replace(" ", "-")}">{found[1]}</strong>'


def tables(html: str) -> str:
    """The HTML with each table in a box that scrolls; one with verdicts is laid out as cards where there is no room."""
    return re.sub(r"<table.*?</table>", lambda found: _table(found[0]), html, flags=re.DOTALL)


def _table(table: str) -> str:
    heads = [re.sub("<.*?>", "", head) for head in re.findall(r"<th\b.*?</th>", table, re.DOTALL)]
    if "verdict" not in heads:
        return f'<div class="wide" tabindex="0">{table}</div>'
    label = cycle(heads)
    cells = re.sub(r"<td\b", lambda _: f'<td data-label="{next(label)}"', table)
    return cells.replace("<table", '<table class="claims"', 1)


def title(notebook: NotebookNode, stem: str) -> str:
    """The notebook's first heading."""
    headings = (re.search(r"^# +(.+)", c.source, re.MULTILINE) for c in notebook.cells if c.cell_type == "markdown")
    return next((found[1] for found in headings if found), stem)


def render(notebook: NotebookNode, stem: str) -> str:
    """The notebook as a page. What a cell put out is shown in the richest form that the page can hold."""
    formatter = HtmlFormatter()
    cells = pages.page(
        "cells.html", cells=notebook.cells, words=words, tables=tables, coloured=ansi2html, TWIN=TWIN,
        code=lambda source: highlight(source, PythonLexer(), formatter),
    )  # fmt: skip
    return pages.page(
        "study.html",
        title=title(notebook, stem),
        cells=cells,
        contents=re.findall(r'<h2 id="([^"]+)">(.*?)<a class="anchor-link"', cells, re.DOTALL),
        code_style=formatter.get_style_defs(".highlight"),
        plotly=get_plotlyjs() if "<details class=twin" in cells else "",
    )

"""Render templates to one self-contained HTML file. jinja2 is opened here alone.

Every text is escaped, and characters that nobody sees are shown as their code. `prose` also sets links within the page: each "article 7" leads
to the article's text, and a word in double square brackets, which only our own sentences have, to the glossary at the end of the page. What
stands in backticks is set as code.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from pipeline.pages import glossary

TEMPLATES = Path(__file__).parent / "templates"
_ARTICLE = re.compile(r"\b([Aa]rticle (\d{1,2}))\b")
_CODE = re.compile(r"`([^`]+)`")
_LINK = re.compile(r'<a href="#([^"]+)">([^<]*)</a>')
_TERM = re.compile(r"\[\[([a-z -]+)(?:\|([^]]+))?\]\]")
_UNSEEN = frozenset({"Cc", "Cf", "Co", "Cs", "Zl", "Zp"})
"""Categories of characters that have no shape, or that turn the direction of the text around them."""


def render(template: str, **values: Any) -> str:
    """The text of a template. A link that would lead nowhere on the page is text. Raises jinja2.UndefinedError where a value is not there."""
    text = re.sub(r"\n\s*\n+", "\n", _environment().get_template(template).render(values))
    known = set(re.findall(r' id="([^"]+)"', text))
    return _LINK.sub(lambda found: found[0] if found[1] in known else found[2], text)


@cache
def _environment() -> jinja2.Environment:
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, finalize=lambda value: visible(value) if type(value) is str else value,
    )  # fmt: skip
    found.filters |= {"prose": prose, "said": said, "at": lambda value: f"{value:.1f}".removesuffix(".0")}
    return found


def visible(text: str) -> str:
    """The text with each character that nobody would see written as its code, such as `\\u202e`; a line break
    becomes a space."""
    return "".join(
        " " if letter in "\n\t" else f"\\u{ord(letter):04x}" if unicodedata.category(letter) in _UNSEEN else letter
        for letter in text
    )


def said(text: str) -> Markup:
    """A sentence of a decision or of the log: escaped, with links to the articles that it names."""
    linked = _ARTICLE.sub(r'<a href="#article-\2">\1</a>', str(escape(visible(text))))
    return Markup(linked)


def prose(text: str) -> Markup:
    """A sentence of this package: as `said`, with `[[gap]]` or `[[gap|its words]]` as a link to the glossary.

    Raises KeyError for a term that the page's glossary does not have.
    """

    def link(found: re.Match[str]) -> str:
        term = found[1]
        return f'<a href="#{glossary.anchor(term)}">{found[2] or term}</a>'

    return Markup(_CODE.sub(r"<code>\1</code>", _TERM.sub(link, str(said(text)))))

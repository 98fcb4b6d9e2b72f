"""The configuration of the documentation site: ``scripts/docs`` builds it with Sphinx.

The pages are plain Markdown that also reads well in the repository. The sidebar is made from the
lists of links in ``index.md``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pygments.lexer import RegexLexer, bygroups, include, using
from pygments.lexers.python import PythonLexer
from pygments.token import Comment, Keyword, Name, String, Text

if TYPE_CHECKING:
    from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parents[1]))

from llm_magic import __version__

project = "llm_magic"
author = "the llm_magic authors"
project_copyright = author
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "examples"]

# GitHub and the site have the same anchors of headings.
myst_heading_anchors = 3
# Docstrings write code in single backquotes.
default_role = "code"
# Two hyphens in a text are those of an option.
smartquotes = False
toc_object_entries_show_parents = "hide"
autodoc_member_order = "bysource"
napoleon_use_ivar = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_display_short_literal_types = True
# With -n, every reference to a class of this package has to have a target. Others have none here:
# the inventories of Python and pydantic are on the network.
# Some types of properties of a map have no entry of their own.
nitpick_ignore_regex = [
    ("py:.*", r"(?!llm_magic\.).*"),
    ("py:class", r".*\.ApiKeys|llm_magic\.session\.map\..*"),
]

html_theme = "furo"
html_title = f"llm_magic {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
# Links to documents that move often are checked by hand.
linkcheck_anchors = False
linkcheck_timeout = 20

_SECTION = re.compile(r"^## (.+?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_PAGE = re.compile(r"^- \[[^\]]+\]\(([\w/-]+)\.md\)", re.MULTILINE)


def add_sidebar(_app: Sphinx, name: str, source: list[str]) -> None:
    """Append the sidebar to the first page: each section of the page with the pages it lists."""
    if name != "index":
        return
    for title, text in _SECTION.findall(source[0]):
        if pages := _PAGE.findall(text):
            entries = "\n".join(pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n{entries}\n```\n"


class CellLexer(RegexLexer):
    """Cells with magics: the prompt of ``%%llm`` is text with {references}, the rest is Python."""

    name = "IPython cell"
    aliases = ("ipython",)
    tokens = {  # noqa: RUF012 - the form that Pygments requires
        "root": [
            (r"%%llm\b", Keyword, "options"),
            (r"^%\w+", Keyword, "line"),
            (r"(?s)[^%\n]+", using(PythonLexer)),
            (r"\n|%", Text),
        ],
        "line": [(r"\n", Text, "#pop"), include("words")],
        "options": [(r"\n", Text, "prompt"), include("words")],
        "words": [
            (r"([ \t])(--?[a-z][\w-]*)", bygroups(Text, Name.Attribute)),
            (r'"[^"\n]*"', String),
            (r"#.*", Comment),
            (r"[^\s\"#]+|[ \t\"]", Text),
        ],
        "prompt": [(r"\{[^{}\n]+\}", String.Interpol), (r"[^{]+|\{", Text)],
    }


def setup(app: Sphinx) -> None:
    """Register the sidebar and the lexer."""
    app.connect("source-read", add_sidebar)
    app.add_lexer("ipython", CellLexer)

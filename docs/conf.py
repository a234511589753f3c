"""The documentation site. `make docs` builds it from the Markdown files beside this one, from parts of README.md,
CONTRIBUTING.md and CHANGELOG.md, and from docstrings, into site/. No page of it asks for another host."""

import re
from pathlib import Path
from textwrap import indent

from docutils import nodes
from docutils.utils import new_document
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}

project = "Equipoise"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
myst_heading_anchors = 4  # the headings' names in links are those of GitHub, and a link to none is a warning
smartquotes = False  # z'' is no quotation
highlight_language = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # of torch's modules
python_maximum_signature_line_length = 50
nitpicky = True
nitpick_ignore_regex = [("py:class", ".*")]  # types in signatures, of torch and others: they have no page here
html_theme = "furo"
html_title = "Equipoise"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_show_copyright = html_show_sphinx = html_copy_source = html_use_index = False


class Markdown(SphinxDirective):
    """A docstring, which is Markdown here; autodoc takes it for reStructuredText."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        document = new_document(self.get_source_info()[0], self.state.document.settings)
        MystParser().parse("\n".join(self.content), document)
        for block in document.findall(nodes.literal_block):
            if block.astext().startswith(">>>"):
                block["language"] = "pycon"
        return document.children


def wrap_docstring(app: Sphinx, kind: str, name: str, it: object, options: object, lines: list[str]) -> None:
    # An example is code in Markdown, too, where it is indented.
    text = re.sub(r"^>>> (?:.+\n?)+", lambda it: indent(it[0], "    "), "\n".join(lines), flags=re.MULTILINE)
    lines[:] = [".. markdown::", "", *indent(text, "   ").split("\n"), ""]


def included(found: re.Match[str]) -> str:
    """The lines of a file from one heading to another. At the top of a page, the first heading becomes its title."""
    file, start, end = found.groups()
    text = (ROOT / file).read_text(encoding="utf-8")
    references = re.findall(r"^\[.+\]: .+$", text, re.MULTILINE)
    text = text[text.index(start) : text.index(f"\n{end}\n") if end else None]
    level = start.index(" ") - 1 if found.start() == 0 else 0
    text = re.sub(rf"^#{{{level}}}(?=#+ )", "", text, flags=re.MULTILINE)

    def moved(link: re.Match[str]) -> str:
        path, anchor = link.groups()
        beside = path.removeprefix("docs/") if path.startswith("docs/") else f"../{path}"
        return f"]({PAGES.get(path, beside)}{anchor}"

    return "\n".join([re.sub(r"\]\((?!\w+:|#)([^)#]+)([^)]*)", moved, text), *references, ""])


def read_page(app: Sphinx, name: str, source: list[str]) -> None:
    text = re.sub(r'<!-- (\S+\.md) from "(.+)" to "(.*)" -->\n.*\n', included, source[0])
    text = text.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    text = re.sub(r"\[(?:docs/)?[\w-]+\.md\]\(", "[](", text)  # a link that only names a file takes the page's title
    # A link to a function's file, for readers of the repository, becomes one to the function.
    function = r"\[`(\w+)`\]\(\.\./src/([\w/]+)\.py\)"
    source[0] = re.sub(function, lambda it: f"{{py:obj}}`{it[1]} <{it[2].replace('/', '.')}.{it[1]}>`", text)


def setup(app: Sphinx) -> None:
    app.add_directive("markdown", Markdown)
    app.connect("autodoc-process-docstring", wrap_docstring)
    app.connect("source-read", read_page)

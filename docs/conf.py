"""Sphinx's configuration: `make docs` builds this folder into build/docs, without a network; a warning is an error."""

import os
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "configs/study/results"
sys.path.insert(0, str(ROOT))

project = "syncbn"
author = "syncbn contributors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["conf.py"]

html_theme = "furo"  # its fonts are the reader's, and its scripts are in the site
html_title = "syncbn"
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_extra_path = [f"../{RESULTS}"]  # the kept reports, as they are

nb_execution_mode = "off"  # the notebook has its outputs; tests/ecosystem executes it
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # the changelog's standard form repeats headings
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_mock_imports = ["lightning", "pytorch_lightning"]  # a page about our class needs no Lightning
python_maximum_signature_line_length = 88
napoleon_use_rtype = False

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    f"{RESULTS}/README.md": "results.md",
}
"""Files of the repository that are pages of the site: the file of that name in this folder only holds its place."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")


def with_links_of_the_site(path: Path) -> str:
    """The text of a file with its links leading to pages of the site; a link to anything else becomes its text."""

    def rewritten(found: re.Match[str]) -> str:
        image, text, link, anchor = found[1], found[2], found[3], found[4] or ""
        if "://" in link:
            return found[0]
        target = Path(os.path.normpath(path.parent / link)).relative_to(ROOT).as_posix()
        kept = target.removeprefix(f"{RESULTS}/")
        if image:
            return f"![{text}](../{target})"
        if target in PAGES:
            return f"[{text}]({PAGES[target]}{anchor})"
        if target.startswith("docs/"):
            return f"[{text}]({target.removeprefix('docs/')}{anchor})"
        if kept != target:  # a report is no page of Sphinx's
            return f'<a href="{kept}/report.html">{text}</a>'
        return text

    return LINK.sub(rewritten, path.read_text(encoding="utf-8"))


def read_source(app: Sphinx, docname: str, content: list[str]) -> None:
    """Put a file of the repository in place of the page that stands for it."""
    for file, page in PAGES.items():
        if page == f"{docname}.md":
            text = with_links_of_the_site(ROOT / file)
            content[0] = text + content[0] if docname == "index" else text


def escape_shapes(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """A shape in a docstring, (N, C, *), is not the start of emphasis."""
    lines[:] = [line.replace(", *)", r", \*)") for line in lines]


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", escape_shapes)
    app.connect("source-read", read_source)

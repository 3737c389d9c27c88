"""Documentation: the repository's own pages and notebooks, and a reference made from the docstrings.

``python -m sphinx -W -b html docs build``
"""

from pathlib import Path
from typing import Any

from sphinx.addnodes import pending_xref

from dd_lightning.version import __version__

ROOT = Path(__file__).resolve().parents[1]

project = "dd_lightning"
author = project_copyright = "The dd_lightning authors"
release = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
include_patterns = ["*.md", "benchmarks/README.md", "benchmarks/results/*.md", "configs/README.md", "docs/*.md"]
include_patterns += ["notebooks/*.ipynb"]
_searched = {pattern.split("/")[0] for pattern in include_patterns}
exclude_patterns = [path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in _searched]
root_doc = "docs/index"

nb_execution_mode = "off"  # the test suite executes the notebooks, and their outputs are stored
myst_heading_anchors = 3
autodoc_class_signature = "separated"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
maximum_signature_line_length = 80

html_theme = "furo"
html_title = f"dd_lightning {release}"
html_show_sphinx = False


def unlink_folders(app: Any, doctree: Any) -> None:  # noqa: ANN401  (Sphinx's own types)
    """Show links to folders of the repository, of which no page is made, as their text."""
    folder = ROOT / Path(app.env.docname).parent
    for link in list(doctree.findall(pending_xref)):
        if link["reftype"] == "myst" and (folder / link["reftarget"]).is_dir():
            link.replace_self(link.children)


def start_here(app: Any, exception: Exception | None) -> None:  # noqa: ANN401
    """Lead from the top of the site, where servers look for a first page, to the index."""
    if exception is None:
        (Path(app.outdir) / "index.html").write_text('<meta http-equiv="refresh" content="0; url=docs/index.html">\n')


def setup(app: Any) -> None:  # noqa: ANN401
    """Read pages from the whole repository, where their links lead from one to another."""
    app.srcdir = type(app.srcdir)(ROOT)
    app.connect("doctree-read", unlink_folders)
    app.connect("build-finished", start_here)

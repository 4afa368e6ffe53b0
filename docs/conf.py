"""Sphinx's configuration. Build the pages with ``sphinx-build -W docs docs/_build/html``; they read offline."""

import re
import shutil
from pathlib import Path

from sphinx.errors import ExtensionError

import jadam

DOCS = Path(__file__).parent
REPOSITORY_URL = ""  # of the source on the web, once there is one; adds links to it

project, author, copyright = "jadam", "The jadam developers", "2026, The jadam developers"
version = release = jadam.__version__

# Sphinx reads only what lies below docs.
NOTEBOOKS = DOCS / "notebooks"
shutil.rmtree(NOTEBOOKS, ignore_errors=True)
NOTEBOOKS.mkdir()
for notebook in (DOCS.parent / "notebooks").glob("*.ipynb"):
    shutil.copyfile(notebook, NOTEBOOKS / notebook.name)

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
nitpicky = True  # a reference that leads nowhere is an error, but for names of other projects
OTHERS = r"(jax|optax|nnx|torch|pandas|matplotlib|re|train_state)\..*|NamedSharding|AbstractMesh"
nitpick_ignore_regex = [(r".*", OTHERS)]

default_role = "py:obj"
autodoc_typehints = "none"  # docstrings tell types in words
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

nb_ipywidgets_js = {}  # sliders need a running kernel, not a script from the web
nb_render_markdown_format = "gfm"  # with tables
nb_execution_mode = "off"  # notebooks are committed with their outputs, and tests run them
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "sphinx_book_theme"
html_title = f"jadam {release}"
html_static_path = ["_static"]
html_css_files = ["jadam.css"]
html_copy_source = False
html_show_sourcelink = False
html_context = {"default_mode": "auto"}
html_theme_options = {
    "repository_url": REPOSITORY_URL,
    "use_repository_button": bool(REPOSITORY_URL),
    "use_issues_button": bool(REPOSITORY_URL),
    "use_download_button": False,
    "navbar_persistent": [],  # the sidebar has the search
    "show_toc_level": 2,
}


def check_anchors(app, error):
    """Fails if a link within the pages leads to a place that its page does not have. Sphinx does not look at these."""
    if error or app.builder.name != "html":
        return
    pages = {page.resolve(): page.read_text() for page in Path(app.outdir).rglob("*.html")}
    lost = {
        f"{page.name}: {link}#{anchor}"
        for page, text in pages.items()
        for link, anchor in re.findall(r'href="([^":]*)#([^"]+)"', text)
        if f'id="{anchor}"' not in pages.get((page.parent / link).resolve() if link else page, "")
    }
    if lost:
        raise ExtensionError(f"links to places that do not exist: {', '.join(sorted(lost))}")


def setup(app):
    """Connects the check."""
    app.connect("build-finished", check_anchors)

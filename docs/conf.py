"""The docs site, from the notebooks alone: `sphinx-build -W -b html -c docs . _docs/html`. Names, links and version come from settings.ini."""
import re, sys
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from api import fill
from reader import internals, rooms, settings, start, tutorials

s, first, book, lessons = settings(), start(), rooms(), tutorials()
project, author, version = s["title"], s["author"], s["version"]
release, copyright, language = version, s["copyright"], "en"

extensions = ["myst_nb", "sphinx-mathjax-offline"]
root_doc = "index"
include_patterns = ["index.ipynb", "nbs/start.ipynb", "nbs/[0-9][0-9]_*.ipynb", "nbs/tutorials/[0-9]_*.ipynb",
                    "docs/reference.md", "docs/internals.md", "CONTRIBUTING.md"]
source_suffix = {".ipynb": "myst-nb", ".md": "myst-nb"}
templates_path = ["_templates"]

nb_custom_formats = {f"{doc}.ipynb": ["reader.read", {"path": doc}, False] for doc in ["index"] + [r.doc for r in [first, *book, *lessons]]}
nb_execution_mode = "off"
nb_merge_streams = True
nb_number_source_lines = False
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "attrs_inline", "attrs_block", "deflist", "strikethrough"]
myst_heading_anchors = 3
myst_links_external_new_tab = False
pygments_style = "tango"

html_theme = "sphinx_book_theme"
html_title = s["title"]
html_static_path = ["_static"]
html_css_files, html_js_files = ["book.css"], ["fit.js", "live.js"]
html_logo, html_favicon = "_static/logo.svg", "_static/favicon.svg"
html_show_sphinx = False
html_copy_source = False
html_sidebars = {"**": ["navbar-logo.html", "search-button-field.html", "rooms.html"]}
html_context = {
    "default_mode": "auto",             # dark where the reader's system is
    "book_address": s["doc_host"] + s["doc_baseurl"],
    "book_about": {r.doc: re.sub(r"[$*`\\]", "", r.subtitle) for r in [first, *book, *lessons]},
    "book_description": s["description"],
    "book_start": first,
    "book_tutorials": lessons,
    "book_parts": [(part, list(group)) for part, group in groupby(book, lambda r: r.part)],
}
html_theme_options = {
    "repository_url": s["git_url"], "repository_branch": s["branch"], "path_to_docs": "",
    "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    "use_repository_button": True, "use_issues_button": False, "use_download_button": False, "use_fullscreen_button": False,
    "show_toc_level": 2, "toc_title": "On this page",
}


def fill_pages(app, docname, source):
    "Two pages have places for what the library's own text says."
    if docname == "docs/reference": source[0] = fill(source[0])
    if docname == "docs/internals": source[0] = source[0].replace("%%INTERNALS%%", internals(book))


def filled_anew(app, env, added, changed, removed):
    "These two follow the library, so they are read again whatever their own files say."
    return {"docs/reference", "docs/internals"} & env.found_docs


def setup(app):
    app.connect("source-read", fill_pages)
    app.connect("env-get-outdated", filled_anew)

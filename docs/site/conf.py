"""Sphinx's settings of the site; `pages.py` writes the pages and calls Sphinx."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import formulas

project = "mtprune"
author = "the mtprune authors"
html_title = "mtprune"
extensions = ["myst_nb"]
nb_execution_mode = "off"  # pages show the committed outputs
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# Code in documents may be of any kind (a Makefile's commands, JSON with a comment).
suppress_warnings = ["misc.highlighting_failure"]
smartquotes = False
html_theme = "furo"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#3366AA", "color-brand-content": "#3366AA"},
    "dark_css_variables": {"color-brand-primary": "#8FB4E8", "color-brand-content": "#8FB4E8"},
}
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = html_show_copyright = False
html_math_renderer = "mathml"


def setup(app):
    """Formulas become MathML as pages are made: browsers draw it without a script or a font."""
    block = formulas.visit_block, None
    app.add_html_math_renderer("mathml", (formulas.visit_inline, None), block)

"""Sphinx reads this; `make site` (tools/make_site.py) writes what it builds."""

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert

project = "A laboratory for judging local language models"
extensions = ["myst_nb", "sphinx.ext.autodoc"]
nb_execution_mode = "off"  # the committed outputs
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_math_renderer = "mathml"  # which browsers show without a script
suppress_warnings = ["misc.highlighting_failure", "myst.header", "mystnb.unknown_mime_type"]


def setup(app: Any) -> None:
    def inline(self: Any, node: Any) -> None:
        self.body.append(convert(node.astext()))
        raise nodes.SkipNode

    def block(self: Any, node: Any) -> None:
        self.body.append(convert(node.astext(), display="block"))
        raise nodes.SkipNode

    app.add_html_math_renderer("mathml", (inline, None), (block, None))

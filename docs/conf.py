# SPDX-License-Identifier: Apache-2.0
"""Sphinx settings."""

from __future__ import annotations

import re
from typing import Any

import monai_patchqueue

project = "monai_patchqueue"
author = copyright = "The monai_patchqueue authors"
release = version = monai_patchqueue.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
# Pages include or link to files outside docs/ (the bundle's README), which stay plain links.
suppress_warnings = ["myst.xref_missing"]

html_theme = "furo"
html_title = "monai_patchqueue"
html_static_path = ["_static"]

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
autoclass_content = "class"
napoleon_google_docstring = True
napoleon_numpy_docstring = False


def escape_shapes(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings write shapes as `[C, *spatial]`, which docutils takes for the start of emphasis."""
    lines[:] = [re.sub(r"(?<=[\s\[])\*(?=\w+\])", r"\\*", line) for line in lines]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", escape_shapes)

"""Settings of the documentation. `sphinx-build -W` needs nothing but the packages that hatch.toml pins."""

from __future__ import annotations

import os
from importlib.metadata import version as version_of

project = "bridge"
author = "The bridge authors"
copyright = "2026, the bridge authors. Apache-2.0"
version = release = version_of("bridge-core")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "figures"]
nitpicky = False

# --- Pages ---------------------------------------------------------------------------------------
myst_enable_extensions = ["colon_fence", "deflist", "fieldlist", "substitution"]
myst_heading_anchors = 3
highlight_language = "python"

# --- Reference -----------------------------------------------------------------------------------
# Docstrings write code in single backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "undoc-members": False}
# The reference is built where these are not installed. The library imports them late; this is a safety net.
autodoc_mock_imports = ["megatron", "modelopt", "safetensors", "torch", "transformer_engine", "transformers"]
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 100

# --- Links to other projects ---------------------------------------------------------------------
# Fetched only when asked for, so that a build without a network has the same result and no warnings.
intersphinx_mapping = (
    {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }
    if os.environ.get("DOCS_INTERSPHINX") == "1"
    else {}
)

# --- Look ----------------------------------------------------------------------------------------
html_theme = "furo"
html_title = f"bridge {release}"
html_theme_options = {"navigation_with_keys": True}
html_show_sphinx = False

"""Settings of the documentation. `sphinx-build -W` needs nothing but the packages that hatch.toml pins."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version as version_of
from pathlib import Path

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
exclude_patterns = ["_build", "figures", "reference/generated"]
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
autodoc_default_options = {"members": True, "ignore-module-all": True}  # each name where it is defined
# The reference is built where these are not installed. The library imports them late; this is a safety net.
autodoc_mock_imports = ["megatron", "modelopt", "safetensors", "torch", "transformer_engine", "transformers"]
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # types are in the signature
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


# --- The help of the commands, as they print it --------------------------------------------------
# Page in reference/generated -> command, its module, its verbs.
COMMANDS = {
    "cli.md": ("bridge-core", "bridge_core.cli", ("plan", "import", "export", "verify", "inspect")),
    "cli-peft.md": ("bridge-peft", "bridge_peft.cli", ("export", "import", "merge", "inspect")),
}


def write_cli_pages(app: object) -> None:
    """Write reference/generated/: what `--help` says of every verb of every command."""
    for name, (command, module, verbs) in COMMANDS.items():
        lines: list[str] = []
        for verb in verbs:
            lines += [f"## {command} {verb}", "", "```text", help_of(module, verb), "```", ""]
        page = Path(__file__).parent / "reference" / "generated" / name
        page.parent.mkdir(exist_ok=True)
        page.write_text("\n".join(lines), encoding="utf-8")


def help_of(module: str, verb: str) -> str:
    """What a command prints for `VERB --help`, 96 columns wide and without colours."""
    code = f"import sys; from {module} import main; sys.exit(main(sys.argv[1:]))"
    plain = os.environ | {"COLUMNS": "96", "NO_COLOR": "1", "TERM": "dumb"}
    command = [sys.executable, "-c", code, verb, "--help"]
    return subprocess.run(command, env=plain, capture_output=True, text=True, check=True).stdout.rstrip()


# --- Indented blocks of module docstrings --------------------------------------------------------
def show_indented_blocks_as_they_are(
    app: object, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Legends and examples in module docstrings are indented, as in Markdown: make literal blocks of them."""
    if what != "module":
        return
    shown: list[str] = []
    inside = False
    for line in lines:
        indented = line.startswith("    ")
        if indented and not inside:
            if shown and shown[-1]:
                shown.append("")
            shown += ["::", ""]
        if line:
            if inside and not indented:
                shown.append("")
            inside = indented
        shown.append(line)
    lines[:] = shown


def skip_fields_of_tuples(app: object, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Named tuples call a field without words of its own `Alias for field number 0`; the signature says more."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def shorten_signature(
    app: object, what: str, name: str, obj: object, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Dataclasses spell the modules of types out in their signatures; names alone are easier to read."""
    return (re.sub(r"~(?:\w+\.)+", "", signature) if signature else signature), returns


def setup(app: object) -> None:
    app.connect("builder-inited", write_cli_pages)  # type: ignore[attr-defined]
    app.connect("autodoc-skip-member", skip_fields_of_tuples)  # type: ignore[attr-defined]
    app.connect("autodoc-process-signature", shorten_signature)  # type: ignore[attr-defined]
    app.connect("autodoc-process-docstring", show_indented_blocks_as_they_are, priority=400)  # type: ignore[attr-defined]

"""How the site is built: `make docs`, offline, with warnings as errors."""

import sys
from pathlib import Path

from fedpara_edge import __version__

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "fedpara-edge"
author = "the fedpara-edge authors"
copyright = f"2026, {author}"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "commands",
    "docstrings",
    "options",
    "public",
    "specification",
]
exclude_patterns = ["_build"]
nitpicky = False

html_theme = "furo"
html_title = f"fedpara-edge {version}"
html_static_path = ["style"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0f6e84", "color-brand-content": "#0f6e84"},
    "dark_css_variables": {"color-brand-primary": "#58c4dc", "color-brand-content": "#58c4dc"},
}

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 3

copybutton_prompt_text = "$ "
copybutton_line_continuation_character = "\\"

add_module_names = False
autodoc_default_options = {"member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

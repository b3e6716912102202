"""The documentation: `pip install ".[docs]" && sphinx-build -W -b html docs docs/_build/html`.

With `DOCS_NOTEBOOKS=force` before it the notebooks are run too, for minutes, and what they print
and draw is shown; without it they are shown as they stand in the repository.
"""

import os
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

import gradnorm_func  # noqa: E402

import pages  # noqa: E402  (beside this file)

project = "gradnorm_func"
author = "the authors of gradnorm_func"
copyright = author  # noqa: A001
version = release = gradnorm_func.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "pictures"]

# Pages
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = ">>> "

# Notebooks
nb_execution_mode = os.environ.get("DOCS_NOTEBOOKS", "off")
nb_execution_timeout = 600
nb_execution_raise_on_error = True

# Reference: docstrings say types and shapes in words, so that signatures need not.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autosummary_generate = False
default_role = "py:obj"  # `measure` in a docstring is a link; see pages.mark_code
python_maximum_signature_line_length = 140
napoleon_numpy_docstring = False
napoleon_use_param = False  # one entry for arguments that are described together
napoleon_custom_sections = [
    "Returns"
]  # prose, of which napoleon would take all before a colon for a type
add_module_names = False
toc_object_entries = False

# Appearance
html_theme = "furo"
html_title = f"gradnorm_func {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style, pygments_dark_style = "friendly", "monokai"


def setup(app):
    pages.write_reference(DOCS / "reference")
    pages.copy_notebooks(DOCS.parent / "notebooks", DOCS / "notebooks")
    app.connect("autodoc-process-docstring", pages.describe_fields)
    app.connect("autodoc-process-docstring", pages.mark_code)
    app.connect("autodoc-process-signature", pages.hide_constructors)

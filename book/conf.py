"""Configure Sphinx for `make book`, which needs no network."""

import importlib
import re
import sys
from pathlib import Path

from sphinx.ext.autodoc.mock import mock
from sphinx.util.nodes import make_refnode

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / folder) for folder in ("_ext", "experiments", "figures")]

import api  # noqa: E402 (the path comes first)
import browser_model  # noqa: E402
import make  # noqa: E402
import pages  # noqa: E402

project = "littlebit"
author = "the littlebit authors"
project_copyright = author
html_title = "littlebit"
html_theme = "furo"
html_show_sphinx = False
html_copy_source = False
html_show_search_summary = False  # they are fetched, which browsers refuse for files
# MathJax comes with a Python package and goes into the book, so that equations need no network either.
mathjax = Path(str(importlib.import_module("sphinx-mathjax-offline").__file__)).parent / "static"
html_static_path = ["_static", str(mathjax)]
html_css_files = ["book.css"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_figures/*.md", "examples", "experiments", "results"]
mathjax_path = "mathjax/tex-chtml.js"
myst_enable_extensions = ["amsmath", "attrs_block", "dollarmath"]
myst_heading_anchors = 3
# The notebooks are a link to ../notebooks. `make notebooks` fills the cache; what it does not hold is executed here.
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE.parent / "build" / "notebook-cache")
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # seconds for a cell
nb_output_stderr = "remove"  # progress bars
nb_merge_streams = True  # lines that were printed one after the other stay together

suppress_warnings = ["ref.python"]  # `weight` in a docstring may be the attribute of several classes
smartquotes = False  # U' is a matrix
default_role = "py:obj"  # in docstrings, `name` is a link where there is something of that name
add_module_names = False
toc_object_entries_show_parents = "hide"
maximum_signature_line_length = 90
autodoc_member_order = "bysource"
autodoc_mock_imports = ["peft", "vllm"]  # slow to import or not installed, and nothing here is shown of them
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_display_short_literal_types = True


def uncompile():
    """Replace each compiled kernel by its Python function: autodoc takes a compiled one for a constant."""
    with mock(autodoc_mock_imports):
        for name in api.modules("fast"):
            module = importlib.import_module(f"littlebit.fast.{name}")
            for attribute, value in list(vars(module).items()):
                if hasattr(value, "py_func"):
                    setattr(module, attribute, value.py_func)


def process_docstring(app, what, name, obj, options, lines):
    """Convert a docstring to reStructuredText; a module's docstring is on its page already."""
    lines[:] = [] if what == "module" else api.restructured(lines)


def fill_in(app, docname, source):
    """Fill numbers, tables and figures into the book's own pages, but not into docstrings and notebooks."""
    if Path(app.env.doc2path(docname)).suffix == ".md" and not docname.startswith(("api/", "notebooks/")):
        source[0] = pages.filled_in(source[0])
        for path in make.inputs():  # a page is read again when they change
            app.env.note_dependency(str(path), docname=docname)


def skip_member(app, what, name, obj, skip, options):
    """Skip the fields of named tuples: the docstring of the tuple describes them."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def resolve_in_package(app, env, node, contnode):
    """Resolve names such as `svd.truncated_svd` from any module, by looking them up in the whole package."""
    if node.get("refdomain") != "py" or "py:module" not in node:
        return None
    target = node["reftarget"].removesuffix("()")
    package = ".".join(str(node["py:module"]).split(".")[:2])
    objects = env.domains.python_domain.objects
    inside = re.compile(rf"{re.escape(package)}(\.\w+)*\.{re.escape(target.removeprefix(package + '.'))}")
    found = [name for name, entry in objects.items() if inside.fullmatch(name) and entry.objtype != "module"]
    if len(found) != 1:
        return None
    entry = objects[found[0]]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, found[0])


def write_browser_models(app, error):
    """Write the models that run in the browser beside the page, unless `-D browser_models=0` says no."""
    if error is None and app.config.browser_models and app.builder.format == "html":
        browser_model.write(Path(app.outdir) / "_static" / "model")


def setup(app):
    """Write the API pages, draw the figures, uncompile the kernels, and connect the functions above."""
    api.write_pages(HERE / "api")
    make.write_changed()
    uncompile()
    app.connect("source-read", fill_in)
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("missing-reference", resolve_in_package)
    app.add_config_value("browser_models", True, "", bool)
    app.connect("build-finished", write_browser_models)

"""The site that ``make docs`` builds: Sphinx, MyST for the Markdown pages, autodoc for the API reference. Nothing is loaded
from elsewhere when it is read: no fonts, no scripts, no mathematics service (formulas are Unicode text)."""

import inspect
import re
import shutil
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

project = "contraction-stability"
release = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
copyright = ""

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
smartquotes = False  # a prime is no quotation mark

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
maximum_signature_line_length = 90
python_use_unqualified_type_names = True
toc_object_entries = False
highlight_language = "none"  # indented blocks are formulas

html_theme = "furo"
html_title = "contraction-stability"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False


PAGES = [ROOT / "README.md", *sorted(HERE.glob("*.md"))]
MEASURED = ROOT / "benchmarks" / "results"


def write_pages(app) -> None:
    """The pages that are made: the API reference, and the benchmarks' own under their front page."""
    from docs.reference import write

    write(HERE / "api", [page.read_text(encoding="utf-8") for page in PAGES])
    (HERE / "measured").mkdir(exist_ok=True)
    contents = "# Measured\n\nWhat `make bench` wrote.\n\n```{toctree}\n:glob:\n\n*\n```\n"
    (HERE / "measured" / "index.md").write_text(contents, encoding="utf-8")
    for source in MEASURED.iterdir():
        shutil.copyfile(source, HERE / "measured" / source.name)


def inside(app, name, source) -> None:
    """Links that leave docs/, which the repository's pages have and the site has not."""
    for there, here in {
        "../README.md": "index.md",
        "../benchmarks/results/": "measured/",
        "../benchmarks/results)": "measured/index.md)",
    }.items():
        source[0] = source[0].replace(f"]({there}", f"]({here}")
    if name == "benchmarks":
        source[0] += "\n```{toctree}\n:hidden:\n\nmeasured/index\n```\n"


def docstring(app, what, name, thing, options, lines) -> None:
    from docs.docstrings import readable

    try:
        parameters = set(inspect.signature(thing).parameters)
    except (TypeError, ValueError):
        parameters = set()
    lines[:] = readable(lines, parameters)


def signature(app, what, name, thing, options, arguments, returned):
    """Short names where Sphinx cannot read the arguments (defaults such as <factory>), and would leave the long ones."""
    if arguments and "<" in arguments:
        return re.sub(r"~?(?:[A-Za-z_]\w*\.)+([A-Za-z_]\w*)", r"\1", arguments), returned
    return None


def set_indices(app, tree, name) -> None:
    """Indices and exponents of formulas in running text, where they belong."""
    from docutils import nodes
    from sphinx import addnodes

    from docs.formulas import pieces

    def set_in(text: str) -> list:
        made = {"": nodes.Text, "sub": nodes.subscript, "sup": nodes.superscript}
        found = []
        for kind, piece in pieces(text):
            found.append(nodes.Text(piece) if not kind else made[kind]("", "", *set_in(piece)))
        return found

    for block in list(tree.findall(nodes.literal_block)):
        if block.get("language", "none") in ("none", "default") and "```" not in block.rawsource:  # indented: a formula
            block.replace_self(nodes.paragraph("", block.astext(), classes=["formula"]))
        else:  # the empty line that ends a doctest
            block.rawsource = block.astext().rstrip("\n")
            block.clear()
            block += nodes.Text(block.rawsource)
    untouched = (nodes.FixedTextElement, nodes.literal, nodes.raw, addnodes.desc_signature)
    for text in list(tree.findall(nodes.Text)):
        above, inside_code = text.parent, False
        while above is not None and not inside_code:
            inside_code, above = isinstance(above, untouched), above.parent
        if not inside_code and ("_" in text or "^" in text):
            text.parent.replace(text, set_in(str(text)))


def setup(app) -> None:
    app.connect("builder-inited", write_pages)
    app.connect("source-read", inside)
    app.connect("autodoc-process-docstring", docstring)
    app.connect("autodoc-process-signature", signature)
    app.connect("doctree-resolved", set_indices)

"""The site of `make docs`. The pages lie where they lie in the repository, so that a link between them is the same in both."""

from sphinx.application import Sphinx

project = "safe_inplace"
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "benchmarks/results/*.md", "benchmarks/results/*/*.md"]
exclude_patterns = [".*", "build", "csrc", "dist", "safe_inplace", "tests"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

# Of headings, as on GitHub: a link to one that is not there is an error.
myst_heading_anchors = 3
# HTML's images, which may have the classes by which the theme shows one in light and another in dark.
myst_enable_extensions = ["html_image"]
nitpicky = True

autodoc_typehints = "none"
add_module_names = False

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_show_copyright = False
html_copy_source = False

CONTENTS = {
    "Use": [
        "docs/in-place",
        "docs/ops",
        "docs/guard",
        "docs/run",
        "docs/trainers",
        "docs/patch",
        "docs/advise",
        "docs/engines",
        "docs/performance",
        "docs/api",
    ],
    "Trust": ["docs/safety", "docs/testing", "docs/matrix", "docs/coverage"],
    "Build": ["docs/building", "docs/design", "docs/cuda", "docs/adding-a-backend", "CONTRIBUTING", "CHANGELOG"],
    "Results": ["benchmarks/results/README", "benchmarks/results/models/README"],
}


def add_contents(app: Sphinx, name: str, source: list[str]) -> None:
    """Gives the front page its table of contents, of which a reader of the file has no use."""
    if name == root_doc:
        for caption, pages in CONTENTS.items():
            source[0] += "\n".join(["\n```{toctree}", ":hidden:", f":caption: {caption}", *pages, "```\n"])


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_contents)

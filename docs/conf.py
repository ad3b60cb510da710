"""Sphinx configuration."""

project = "repmetrics"
author = "The repmetrics authors"
copyright = "The repmetrics authors"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["colon_fence", "dollarmath", "fieldlist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "repmetrics"
html_static_path: list[str] = []

napoleon_use_ivar = True  # named tuples describe their fields themselves
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}


def metrics_table() -> str:
    """Format METRICS as a Markdown table, so that the docs cannot differ from the code."""
    from repmetrics.measurement.registry import METRICS

    arrows = {"higher": "↑", "lower": "↓", "neither": "–"}
    rows = [
        f"| {{py:func}}`{name} <{m.function.__module__}.{m.function.__name__}>` | {arrows[m.direction]} "
        f"| {m.convention.replace('|', chr(92) + '|')} | {m.summary} | {m.reference} |"
        for name, m in METRICS.items()
    ]
    return "\n".join(["| name | better | convention | meaning | source |", "|---|---|---|---|---|", *rows])


def setup(app) -> None:
    """Replace the placeholder of the table in docs/metrics.md."""
    app.connect(
        "source-read",
        lambda _app, _page, source: source.__setitem__(0, source[0].replace("{{ METRICS_TABLE }}", metrics_table())),
    )

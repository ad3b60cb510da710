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
    functions = {name: getattr(m.function, "function", m.function) for name, m in METRICS.items()}  # deferred ones too
    rows = [
        f"| {{py:func}}`{name} <{functions[name].__module__}.{functions[name].__name__}>` | {arrows[m.direction]} "
        f"| {m.convention.replace('|', chr(92) + '|')} | {m.summary} | {m.reference} |"
        for name, m in METRICS.items()
    ]
    return "\n".join(["| name | better | convention | meaning | source |", "|---|---|---|---|---|", *rows])


def claims_table() -> str:
    """Format the false-claim rates of benchmarks/results/coverage.json as a Markdown table."""
    import json
    from pathlib import Path

    record = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "coverage.json").read_text())
    lines = [f"| slides, patches | {' | '.join(CLAIMS.values())} |", "|---" * (1 + len(CLAIMS)) + "|"]
    for name, rates in record["false claims"].items():
        cells = ("refused" if rates[kind] is None else f"{rates[kind]:.1%}" for kind in CLAIMS)
        lines.append(f"| {name.replace(' groups', '')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tutorial() -> str:
    """The notebook as Markdown, with its stored outputs."""
    import json
    from pathlib import Path

    parts = []
    for cell in json.loads((Path(__file__).parent / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text.removeprefix("# Tutorial: watch a run, judge it, choose between runs\n"))
            continue
        parts.append(f"```console\n$ {text[1:]}\n```" if text.startswith("!") else f"```python\n{text}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                parts.append(
                    f'<img alt="Output of the cell above" src="data:image/png;base64,{data["image/png"].strip()}">'
                )
            elif "text/html" in data:
                parts.append(f'<div style="overflow-x:auto">{"".join(data["text/html"])}</div>')
            else:
                parts.append(f"```text\n{''.join(data['text/plain']).strip()}\n```")
    return "\n\n".join(parts)


CLAIMS = {
    "compare": "`compare`: different",
    "score": "value outside its interval",
    "probe": "probe differs from chance",
    "probes": "probes differ",
}


def setup(app) -> None:
    """Replace the placeholders of the tables in docs/metrics.md, and of the notebook."""
    tables = {"{{ METRICS_TABLE }}": metrics_table, "{{ CLAIMS_TABLE }}": claims_table, "{{ TUTORIAL }}": tutorial}

    def insert(_app, _page, source: list[str]) -> None:
        for placeholder, table in tables.items():
            if placeholder in source[0]:
                source[0] = source[0].replace(placeholder, table())

    app.connect("source-read", insert)

"""HTML page of a collection: search, filter and sort run in the page, without files of others. No torch."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from urllib.parse import quote

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --dim: #666; --line: #ddd; --held: #fffaf0;
  --held-line: #b07000; --bad: #fff5f5; --bad-line: #b00020; --glass: #f4f4f4; }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --paper: #16181c; --dim: #9aa; --line: #3a3d44;
  --held: #2b2413; --held-line: #d9a441; --bad: #2d1719; --bad-line: #ff7b87; --glass: #24262b; } }
body { font: 14px/1.4 system-ui, sans-serif; margin: clamp(.8rem, 3vw, 2rem); color: var(--ink);
  background: var(--paper); overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; }
form { display: flex; flex-wrap: wrap; align-items: baseline; gap: .8rem; margin: 1rem 0; }
input { width: 14rem; }
input, select { font: inherit; padding: .2rem .4rem; }
main { display: grid; align-items: start; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1.2rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; padding: .6rem; content-visibility: auto;
  contain-intrinsic-size: auto 15rem; }
figure[hidden] { display: none; }
figure img { display: block; max-width: 100%; height: auto; background: var(--glass); margin-bottom: .4rem; }
.held_out { border-color: var(--held-line); background: var(--held); }
.problem { border-color: var(--bad-line); background: var(--bad); }
.problem i, .warning { color: var(--bad-line); }
small { color: var(--dim); }
a { color: inherit; }
"""
_SCRIPT = """
const main = document.querySelector("main"), figures = [...main.children], form = document.querySelector("form");
const count = document.querySelector("output");
function apply() {
  const words = form.text.value.toLowerCase().split(/\\s+/), state = form.state.value, key = form.sort.value;
  let shown = 0;
  for (const figure of figures) {
    const text = figure.textContent.toLowerCase();
    const fits = (state === "all" || figure.dataset.state === state) && words.every(word => text.includes(word));
    figure.hidden = !fits;
    shown += fits;
  }
  const value = figure => figure.dataset[key] ?? "";
  const last = figure => value(figure) === "" ? 1 : 0;
  const order = { name: (a, b) => last(a) - last(b) || value(a).localeCompare(value(b), undefined, { numeric: true }) };
  order.patient = order.name;
  const numeric = (a, b) => value(b) - value(a);
  main.append(...(key === "page" ? figures : [...figures].sort(order[key] ?? numeric)));
  count.value = `${shown} of ${figures.length} shown`;
}
form.addEventListener("input", apply);
form.addEventListener("submit", event => event.preventDefault());
apply();
"""
_FORM = """<form role="search">
<label>Search <input name="text" type="search" placeholder="name, patient, problem"></label>
<label>Show <select name="state"><option value="all">all slides</option><option value="train">train</option>
<option value="held_out">held out</option><option value="problem">with problems</option></select></label>
<label>Sort by <select name="sort"><option value="page">problems first</option><option value="name">name</option>
<option value="patient">patient</option><option value="tissue">tissue</option><option value="mpp">mpp</option>
</select></label> <output></output></form>"""


def collection_page(
    rows: Sequence[Mapping[str, str]],
    warnings: Sequence[str],
    thumbnails: Mapping[str, str],
    sizes: Mapping[str, tuple[int, int] | None],
    *,
    others: int,
) -> str:
    """HTML page: problems first; a thumbnail loads when it scrolls into view.

    Args:
        rows: Rows of the table, one per slide.
        warnings: Warnings on the collection.
        thumbnails: File of each slide's thumbnail, below the folder of thumbnails.
        sizes: (width, height) of each thumbnail; None for a slide without one.
        others: Number of files that are no slides.
    """
    faulty = [row for row in rows if row["problem"]]
    good = [row for row in rows if not row["problem"]]
    held_out = sum(row["split"] == "held_out" for row in good)
    area = sum(float(row["tissue_mm2"]) for row in good)
    patients = len({row["patient"] for row in good})
    figures = "\n".join(_figure(row, thumbnails[row["file"]], sizes[row["file"]]) for row in [*faulty, *good])
    notes = "".join(f"<li class='warning'>{html.escape(warning)}</li>" for warning in warnings)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>Slides</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<style>{_STYLE}</style></head>\n<body><h1>{len(rows)} slides</h1>\n"
        f"<p>{len(good)} in use, of {patients} patients, {area:.4g} mm² of tissue; "
        f"{held_out} slides held out (on yellow); "
        f"{len(faulty)} with problems. Left the slide, right its tissue. "
        f"The table is <a href='slides.csv'>slides.csv</a>; it also lists {others} other "
        f"file{'s' * (others != 1)}.</p>\n"
        f"<ul>{notes}</ul>\n{_FORM}\n<main>\n{figures}\n</main>\n<script>{_SCRIPT}</script></body></html>\n"
    )


def _figure(row: Mapping[str, str], thumbnail: str, size: tuple[int, int] | None) -> str:
    text = {key: html.escape(value, quote=True) for key, value in row.items()}
    kind = "problem" if row["problem"] else row["split"]
    picture = ""
    if size is not None and row["mpp"]:
        source = html.escape(f"thumbnails/{quote(thumbnail)}", quote=True)
        alt = f"{text['file']}: the slide, and its tissue"
        picture = f"<img loading='lazy' width='{size[0]}' height='{size[1]}' src='{source}' alt='{alt}'>"
    facts = []
    if row["mpp"]:
        facts.append(f"{text['width']}×{text['height']}, mpp {text['mpp']} ({text['mpp_source']})")
        quality = f", mask quality {text['mask_quality']}" if row["mask_quality"] else ""
        facts.append(f"{text['tissue_mm2']} mm² of tissue{quality}")
        facts.append(f"read by {text['reader']}" + (f" ({text['reader_reason']})" if row["reader_reason"] else ""))
    if row["split"]:
        patches = f", {text['held_out_patches']} patches" if row["split"] == "held_out" else ""
        facts.append(f"patient {text['patient']}, {text['split'].replace('_', ' ')}{patches}")
    problem = f"<br><i>{text['problem']}</i>" if row["problem"] else ""
    warning = f"<br><span class='warning'>{text['warnings']}</span>" if row["warnings"] else ""
    data = f"data-state='{kind}' data-name='{text['file']}' data-patient='{text['patient']}'"
    numbers = f"data-tissue='{text['tissue_mm2'] or 0}' data-mpp='{text['mpp'] or 0}'"
    return (
        f"<figure class='{kind}' {data} {numbers}>{picture}<figcaption><b>{text['file']}</b>{problem}{warning}"
        f"<br><small>{'<br>'.join(facts)}</small></figcaption></figure>"
    )

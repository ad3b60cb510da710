"""Overview of a collection: a CSV table, and one HTML page with every slide and its tissue."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from fmtrain.manifest.manifest import SlideEntry
from fmtrain.manifest.scan import ScanResult
from repmetrics.atomic_write import write_csv, write_text

COLUMNS = (
    *("file", "patient", "site", "split", "mpp", "mpp_source", "width", "height", "levels"),
    *("tissue_mm2", "held_out_patches", "reader", "reader_reason", "problem"),
)


def write_collection(
    folder: Path, examined: Sequence[ScanResult], entries: Sequence[SlideEntry], patches: Mapping[str, int]
) -> None:
    """Write `slides.csv` and `index.html`."""
    by_name = {entry.info.name: entry for entry in entries}
    rows = [_row(result, by_name.get(result.path.name), patches) for result in examined]
    write_csv(folder / "slides.csv", COLUMNS, rows)
    write_text(folder / "index.html", _page(rows))


def _row(result: ScanResult, entry: SlideEntry | None, patches: Mapping[str, int]) -> dict[str, str]:
    """One row of the table; unknown values stay empty."""
    row = dict.fromkeys(COLUMNS, "") | {"file": result.path.name, "problem": result.problem}
    if result.info is not None:
        info = result.info
        row |= {
            "mpp": f"{info.mpp:.6g}",
            "mpp_source": info.mpp_source,
            "width": str(info.size[0]),
            "height": str(info.size[1]),
            "levels": " ".join(f"{w}x{h}" for w, h in info.levels),
            "tissue_mm2": f"{result.tissue_mm2:.4g}",
            "reader": info.reader,
            "reader_reason": info.reader_reason,
        }
    if entry is not None:
        count = str(patches.get(entry.info.name, 0))
        row |= {"patient": entry.patient, "site": entry.site, "split": entry.split, "held_out_patches": count}
    return row


_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2rem; color: #222; }
main { display: grid; align-items: start; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1.2rem; }
figure { margin: 0; border: 1px solid #ddd; border-radius: 6px; padding: .6rem; }
figure img { width: 100%; height: 10rem; object-fit: contain; background: #f4f4f4; }
figcaption b { overflow-wrap: anywhere; }
.held_out { border-color: #b07000; background: #fffaf0; }
.problem { border-color: #b00020; background: #fff5f5; }
.problem i { color: #b00020; }
small { color: #666; }
"""


def _page(rows: Sequence[Mapping[str, str]]) -> str:
    """HTML page: problems first; a thumbnail loads when it scrolls into view."""
    faulty = [row for row in rows if row["problem"]]
    good = [row for row in rows if not row["problem"]]
    held_out = sum(row["split"] == "held_out" for row in good)
    area = sum(float(row["tissue_mm2"]) for row in good)
    patients = len({row["patient"] for row in good})
    figures = "\n".join(map(_figure, [*faulty, *good]))
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>Slides</title>"
        f"<style>{_STYLE}</style></head>\n<body><h1>{len(rows)} slides</h1>\n"
        f"<p>{len(good)} in use, of {patients} patients, {area:.4g} mm² of tissue; "
        f"{held_out} slides held out (on yellow); "
        f"{len(faulty)} with problems. Left the slide, right its tissue. "
        f"The table is <a href='slides.csv'>slides.csv</a>.</p>\n<main>\n{figures}\n</main></body></html>\n"
    )


def _figure(row: Mapping[str, str]) -> str:
    text = {key: html.escape(value, quote=True) for key, value in row.items()}
    kind = "problem" if row["problem"] else row["split"]
    picture = f"<img loading='lazy' src='thumbnails/{text['file']}.jpg' alt=''>" if row["mpp"] else ""
    facts = []
    if row["mpp"]:
        facts.append(f"{text['width']}×{text['height']}, mpp {text['mpp']} ({text['mpp_source']})")
        facts.append(f"{text['tissue_mm2']} mm² of tissue")
        facts.append(f"read by {text['reader']}" + (f" ({text['reader_reason']})" if row["reader_reason"] else ""))
    if row["split"]:
        patches = f", {text['held_out_patches']} patches" if row["split"] == "held_out" else ""
        facts.append(f"patient {text['patient']}, {text['split'].replace('_', ' ')}{patches}")
    problem = f"<br><i>{text['problem']}</i>" if row["problem"] else ""
    return (
        f"<figure class='{kind}'>{picture}<figcaption><b>{text['file']}</b>{problem}"
        f"<br><small>{'<br>'.join(facts)}</small></figcaption></figure>"
    )

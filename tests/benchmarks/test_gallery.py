"""docs/gallery.py: pictures for the page, and a run that collapses as the page says."""

from __future__ import annotations

import gallery
from paths import ROOT

FOLDER = ROOT / "docs" / "images" / "gallery"


def test_the_page_shows_every_chart() -> None:
    page = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    files = {path.stem: path for path in FOLDER.glob("*.svg")}
    assert files.keys() == gallery.SIGNATURES.keys()
    assert all(f"(images/gallery/{name}.svg)" in page for name in files)
    assert max(path.stat().st_size for path in files.values()) <= 40_000


def test_attraction_alone_collapses() -> None:
    svg, (healthy, collapsed) = gallery.chart("complete-collapse", steps=100)
    assert "mean direction" in svg
    assert not any(record.alarms for record in healthy.records)
    assert [alarm.kind for alarm in collapsed.records[-1].alarms][:1] == ["complete collapse"]

"""Values are shown with the digits their error supports, and every reason once."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console, RenderableType

from repmetrics.data.features import Features
from repmetrics.data.source import Source, Unreadable
from repmetrics.decisions import checkpoint_selection
from repmetrics.measurement.result import Measurement
from repmetrics.scoring import export, score, tables
from repmetrics.scoring.score import Score

X = torch.randn(320, 8, generator=torch.Generator().manual_seed(0))
GROUPS = tuple(f"slide {i // 10}" for i in range(320))
LABELS = (X[:, 0] > 0).long()


def measurement(value: float, error: float | None, *, reason: str | None = None, name: str = "rankme") -> Measurement:
    return Measurement(name, value, error, reason, "higher", 10, 4, None, "not centred", "float32")


def scored(features: Features) -> Score:
    return score.score(Source(Path("e.npy"), "embeddings", features=features))


def shown(what: RenderableType) -> str:
    console = Console(file=StringIO(), width=200)
    console.print(what)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (273.4213, 1.417, ("273.4", "1.4")),
        (0.123456, 0.00123, ("0.1235", "0.0012")),
        (701.6, 45.0, ("701.6", "45.0")),
        (3.14159265, None, ("3.14159", "–")),
        (8.0, 0.0, ("8", "0.0000")),
        (math.nan, None, ("–", "–")),
    ],
)
def test_digits_follow_the_error(value: float, error: float | None, shown: tuple[str, str]) -> None:
    m = measurement(value, error)
    assert (tables.format_value(m), tables.format_error(m)) == shown


def test_a_score_is_measured_probed_and_told() -> None:
    score = scored(Features(X, GROUPS, LABELS))
    assert list(score.measurements) == [
        "rankme", "rankme_centered", "effective_rank", "odcorr", "linear_probe", "knn"
    ]  # fmt: skip
    text = shown(tables.score_table(score))
    for name, m in score.measurements.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"│ {name} ")]
        cells = [cell.strip() for cell in row.split("│")]
        numbers = [tables.format_value(m), tables.format_error(m), tables.format_margin(m)]
        assert cells[2:8] == [*numbers, "320", "8", "32"]
        assert f"{name}: " in text.split("┘")[1]
        assert m.convention in text
    assert "independent features would give" in text
    assert "linear_probe: chance is 0.5" in text


def test_reasons_are_said_once_for_all_or_with_the_names() -> None:
    measurements = {name: measurement(1.0, None, reason="no groups", name=name) for name in ("rankme", "odcorr")}
    measurements["rankme"] = replace(measurements["rankme"], warnings=("too few rows",))
    lines = tables.footnotes(Score("a", None, None, "b", measurements))
    assert lines == ["no groups", "rankme: too few rows"]


def test_a_comparison_has_each_reason_once() -> None:
    plain = scored(Features(X, None))
    verdicts = checkpoint_selection.compare(plain.measurements, plain.measurements)
    reason = "no group ids: rows of one group are not independent, so no error is claimed"
    lines = shown(tables.comparison_table(plain, plain, verdicts)).splitlines()
    assert [line.strip() for line in lines if "no error is claimed" in line] == [reason]
    lines = shown(tables.comparison_table(plain, plain, [*verdicts[:-1], verdicts[-1]._replace(reason="other")])).split(
        "\n"
    )
    assert len(verdicts) == 4
    assert f"rankme, rankme_centered, effective_rank: {reason}" in [line.strip() for line in lines]
    assert "odcorr: other" in [line.strip() for line in lines]


def test_skipped_images_are_counted_and_named() -> None:
    items = tuple(Unreadable(f"{i}.png", "broken") for i in range(7))
    score = Score("a", None, None, "b", {}, unreadable=items)
    (line,) = tables.footnotes(score)
    assert line.startswith("skipped 7 unreadable images: 0.png (broken); ")
    assert line.endswith("4.png (broken); and 2 more")


def test_json_holds_every_digit_and_no_nan() -> None:
    score = scored(Features(X, GROUPS))
    score.measurements["bad"] = measurement(math.nan, None, reason="why")
    (read,) = json.loads(export.write_json([score]))["scores"]
    assert read["measurements"]["rankme"]["value"] == score.measurements["rankme"].value
    assert read["measurements"]["rankme"]["groups"] == 32
    assert read["measurements"]["bad"]["value"] is None


RUN = [
    replace(scored(Features(X * torch.linspace(1, scale, 8), GROUPS)), name=f"step={step}.ckpt", step=step)
    for step, scale in ((10, 4.0), (20, 1.0), (30, 2.0))
]


def test_several_scores_are_ranked_with_bars() -> None:
    text = shown(tables.ranking_table(tables.sorted_by(RUN, "rankme")))
    rows = [line for line in text.splitlines() if "step=" in line]
    assert [row.split("│")[2].strip() for row in rows] == ["20", "30", "10"]
    value = tables.format_value(RUN[1].measurements["rankme"])
    error = tables.format_error(RUN[1].measurements["rankme"])
    assert f"{value} ± {error} ███████" in rows[0]
    assert [s.step for s in tables.sorted_by(RUN, "odcorr")] == [
        s.step for s in sorted(RUN, key=lambda s: s.measurements["odcorr"].value)
    ]
    assert tables.sorted_by(RUN, None) == RUN
    with pytest.raises(ValueError, match="nothing to sort by: 'lidar' was not measured"):
        tables.sorted_by(RUN, "lidar")


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_column_is_lost_at_any_width(width: int) -> None:
    console = Console(file=StringIO(), width=width)
    verdicts = checkpoint_selection.compare(RUN[0].measurements, RUN[1].measurements)
    for table, headings in (
        (tables.score_table(RUN[0]), ["value", "± s.e.", "± 95 %", "N", "D", "groups"]),
        (tables.ranking_table(RUN), list(RUN[0].measurements)),
        (tables.comparison_table(RUN[0], RUN[1], verdicts), ["A", "B", "B − A", "± s.e.", "± 95 %", "B is"]),
    ):
        with console.capture() as capture:
            console.print(table)
        text = capture.get()
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text
        titles = [cell.strip().rstrip("↑↓ ") for line in text.splitlines() if "┃" in line for cell in line.split("┃")]
        assert [heading for heading in headings if heading not in titles] == []
        for m in RUN[0].measurements.values():
            assert tables.format_value(m) in text


def test_a_copy_is_named_once() -> None:
    text = shown(tables.ranking_table([replace(RUN[2], name="last.ckpt"), *RUN]))
    assert "last.ckpt is a copy of step=30.ckpt" in text
    assert sum("last.ckpt" in line for line in text.splitlines()) == 1
    assert "step=30.ckpt" in text.split("┘")[0]


def test_csv_reads_back() -> None:
    rows = list(csv.DictReader(StringIO(export.write_csv(RUN))))
    assert len(rows) == 3 * 4
    assert (rows[0]["name"], rows[0]["step"], rows[0]["metric"]) == ("step=10.ckpt", "10", "rankme")
    assert float(rows[0]["value"]) == RUN[0].measurements["rankme"].value
    assert float(rows[0]["standard_error"]) == RUN[0].measurements["rankme"].standard_error


def test_checkpoints_become_steps_of_a_board(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    export.write_events(RUN[::-1], tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload()
    for name in ("rankme", "odcorr"):
        points = [(e.step, e.value) for e in events.Scalars(f"repmetrics/{name}")]
        # TensorBoard keeps float32
        assert points == [(s.step, pytest.approx(s.measurements[name].value, rel=1e-6)) for s in RUN]
    m = RUN[0].measurements["rankme"]
    upper = events.Scalars("repmetrics/rankme_upper")[0].value
    assert upper == pytest.approx(m.value + (m.margin or 0), rel=1e-6)
    floor = RUN[0].measurements["odcorr"].details["null_floor"]
    assert events.Scalars("repmetrics/odcorr_null")[0].value == pytest.approx(floor, rel=1e-6)
    with pytest.raises(ValueError, match=r"one checkpoint per step: step=10.ckpt and other.ckpt both have step 10"):
        export.write_events([RUN[0], replace(RUN[0], name="other.ckpt")], tmp_path)
    with pytest.raises(ValueError, match=r"needs a step for each checkpoint, and step=10.ckpt has none"):
        export.write_events([replace(RUN[0], step=None)], tmp_path)


def test_a_comparison_is_told_in_words() -> None:
    verdicts = checkpoint_selection.compare(RUN[0].measurements, RUN[1].measurements)
    text = shown(tables.comparison_table(RUN[0], RUN[1], verdicts))
    assert "B = step=20.ckpt against A = step=10.ckpt" in text
    assert "B is better than A beyond noise on rankme" in text
    read = json.loads(export.comparison_json(RUN[0], RUN[1], verdicts))
    assert [v["name"] for v in read["b_against_a"]] == list(RUN[0].measurements)
    assert read["b_against_a"][0]["outcome"] == "better"


def test_a_choice_is_told_with_its_reason() -> None:
    choice = checkpoint_selection.select_checkpoint([score.measurements for score in RUN])
    text = shown(tables.choice_table(RUN, choice))
    assert "keep step=20.ckpt: it has the highest rankme" in text
    assert "how sure: " in text
    assert "adds nothing to training time" not in text
    assert json.loads(export.choice_json(RUN, choice))["choice"]["keep"] == "step=20.ckpt"
    last = checkpoint_selection.select_checkpoint([score.measurements for score in RUN[:2]])
    assert "adds nothing to training time" in shown(tables.choice_table(RUN[:2], last))


def test_one_class_is_no_reason_to_fail() -> None:
    score = scored(Features(X, None, torch.zeros(320, dtype=torch.int64)))
    assert "linear_probe" not in score.measurements
    assert score.notes[-1].startswith("no probe: all 320 labels are 0")


def test_images_need_an_encoder_and_features_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2 are needed"):
        scored(Features(X[:1]))
    source = Source(tmp_path, "image folder", images=[])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name a checkpoint to embed them with"):
        score.score(source)

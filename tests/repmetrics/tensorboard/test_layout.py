"""The board as plain data, as event files, and as a browser draws it."""

from __future__ import annotations

import json
import shutil
import sys
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import screenshot
import torch
from PIL import Image
from small_runs import LIGHTNING_NOISE, HeldOutImages, fit, loader, simclr
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from repmetrics.callbacks.representation_monitor import RepresentationMonitor
from repmetrics.measurement.registry import DEFAULT_METRICS
from repmetrics.monitoring.monitor import Monitor
from repmetrics.monitoring.record import Record
from repmetrics.tensorboard import server
from repmetrics.tensorboard.layout import layout, layouts
from repmetrics.tensorboard.writer import FLOOR, log_spectrum, spectrum_picture, summary_markdown

pytestmark = [pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE]


def history(*scales: float, groups: bool = True) -> list[Record]:
    """Evaluations of features whose last columns shrink with the scale."""
    monitor = Monitor(metrics=DEFAULT_METRICS)
    for step, scale in enumerate(scales):
        weights = torch.eye(48)[:8] * torch.tensor([1.0] * 4 + [scale] * 4)[:, None]
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, 8, bias=False))
        encoder[1].weight.data = weights
        monitor.measure(encoder, HeldOutImages(groups=groups), step=100 * step)
    return monitor.history


# ── plain data ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_values_with_bounds_get_bands_and_others_lines() -> None:
    keys = ["r/rankme", "r/rankme_se", "r/rankme_lower", "r/rankme_upper", "r/odcorr", "r/odcorr_null", "r/seconds"]
    titles = {"rankme": "RankMe ↑ (of 8)"}
    assert layout([*keys, "other/loss"], prefix="r", titles=titles) == {
        "Rank and probe": {"RankMe ↑ (of 8)": ["Margin", ["r/rankme", "r/rankme_lower", "r/rankme_upper"]]},
        "Further metrics": {
            "ODCorr": ["Multiline", ["^r/odcorr$"]],
            "ODCorr, next to independent features": ["Multiline", ["^r/odcorr$", "^r/odcorr_null$"]],
        },
        "Cost": {"seconds per evaluation": ["Multiline", ["^r/seconds$"]]},
    }


def test_alarms_come_first_and_the_probe_is_next_to_the_rank() -> None:
    keys = [f"r/{name}" for name in ("seconds", "odcorr", "linear_probe", "rankme", "lidar", "nonfinite", "alarm")]
    board = layout(keys, prefix="r")
    assert list(board) == ["Status", "Rank and probe", "Further metrics", "Cost"]
    assert list(board["Rank and probe"]) == ["RankMe", "linear probe"]
    assert list(board["Further metrics"]) == ["ODCorr", "LiDAR"]


def test_student_and_teacher_share_charts() -> None:
    keys = {prefix: [f"{prefix}/{name}" for name in ("rankme", "odcorr")] for prefix in ("student", "teacher")}
    board = layouts(keys, titles={"student": {"rankme": "RankMe ↑ (of 8)"}})
    assert board["student and teacher"] == {
        "RankMe ↑ (of 8)": ["Multiline", ["^student/rankme$", "^teacher/rankme$"]],
        "ODCorr": ["Multiline", ["^student/odcorr$", "^teacher/odcorr$"]],
    }


def test_tags_are_anchored_and_escaped() -> None:
    tags = layout(["r/blocks.8/rankme"], prefix="r")["Rank and probe of blocks.8"]["RankMe of blocks.8"][1]
    assert tags == [r"^r/blocks\.8/rankme$"]


def test_every_measured_name_has_a_chart() -> None:
    keys = list(history(1.0)[0].scalars())
    shown = json.dumps(layout(keys))
    for name in ("rankme", "rankme_centered", "effective_rank", "odcorr", "linear_probe", "knn", "seconds", "alarm"):
        assert f"repmetrics/{name}" in shown


def test_the_summary_states_alarms_trend_and_errors() -> None:
    first = summary_markdown(history(1.0))
    assert "**Step 0.** No alarm." in first
    assert "this is the first evaluation" in first
    assert "96 held-out samples, 12 groups, D = 8, float32." in first
    level = summary_markdown(history(1.0, 1.0))
    assert "level with its best so far" in level
    falling = summary_markdown(history(1.0, 1.0, 0.1))
    assert "below its best so far" in falling
    assert "errors)" in falling
    collapsed = summary_markdown(history(*[1.0] * 5, 1e-4, 1e-4))
    assert "**dimensional collapse: rankme_centered fell from" in collapsed
    assert "no groups known, hence no errors" in summary_markdown(history(1.0, groups=False))
    broken = summary_markdown([*history(1.0), Record(100, 0, 1.0, nonfinite=5)])
    assert "**Step 100.**" in broken


def test_the_spectrum_is_relative_and_floored() -> None:
    healthy, collapsed = history(1.0, 1e-12)
    assert log_spectrum(healthy)[0] == 0
    assert log_spectrum(healthy)[-1] > -1
    assert log_spectrum(collapsed)[-1] == FLOOR
    assert log_spectrum(Record(0, 0, 0.0)).size == 0


def test_collapse_is_dark_pixels_from_the_bottom() -> None:
    picture = spectrum_picture(history(1.0, 1e-12), height_px=64, column_px=4)
    assert picture.shape == (3, 64, 8)
    assert picture.dtype == np.uint8
    healthy, collapsed = picture[:, :, 0].astype(int).sum(0), picture[:, :, -1].astype(int).sum(0)
    assert healthy[-1] > 400
    assert collapsed[0] > 400
    assert collapsed[-1] == 0
    assert spectrum_picture([]).shape == (3, 256, 8)


# ── in TensorBoard ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dashboard")
    module = simclr()
    module.save_hyperparameters({"lr": 0.05, "arch": "mlp"})
    fit(root, module, RepresentationMonitor(HeldOutImages()), max_epochs=6, train=loader(96))
    return root


def test_summaries_histograms_and_images_are_in_the_event_file(run_dir: Path) -> None:
    (events,) = {path.parent for path in server.event_files(run_dir)}
    accumulator = EventAccumulator(str(events), {"images": 0, "tensors": 0, "histograms": 0})  # all of them
    accumulator.Reload()
    text = accumulator.Tensors("repmetrics/card/text_summary")
    assert [event.step for event in text] == [0, 6, 12, 18, 24, 30, 36]
    assert "| RankMe ↑ |".encode() in text[-1].tensor_proto.string_val[0]
    histogram = accumulator.Histograms("repmetrics/log10_singular_values")[-1].histogram_value
    assert (histogram.num, histogram.max) == (8, 0.0)
    picture = accumulator.Images("repmetrics/spectrum_over_time")[-1]
    assert (picture.height, picture.width) == (256 + 46, 7 * (320 // 7) + 118)  # with axes
    tags = accumulator.Tags()["images"]
    assert {f"repmetrics/{name}" for name in ("neighbors", "map", "farthest")} <= set(tags)
    assert [event.step for event in accumulator.Images("repmetrics/map")] == [0, 6, 12, 18, 30, 36]
    assert all(len(accumulator.Images(tag)[-1].encoded_image_string) < 1e6 for tag in tags)


def post(address: str, path: str, body: Any) -> Any:
    url = urllib.parse.urljoin(address, f"/data/{path}")
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


@pytest.mark.filterwarnings("ignore")  # TensorBoard's own threads and sockets
def test_hyperparameters_are_shown_with_the_final_signals(run_dir: Path) -> None:
    import time

    address = server.launch(run_dir, port=0)
    request = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
        "colParams": [{"metric": {"tag": "repmetrics/rankme", "group": ""}}, {"hparam": "lr"}],
        "startIndex": 0,
        "sliceSize": 10,
    }
    for _ in range(100):
        groups = post(address, "plugin/hparams/session_groups", request)["sessionGroups"]
        if groups and groups[0]["metricValues"]:
            break
        time.sleep(0.1)
    (group,) = groups
    assert group["hparams"] == {"lr": 0.05, "arch": "mlp"}
    values = {value["name"]["tag"]: value for value in group["metricValues"]}
    assert values["repmetrics/rankme"]["trainingStep"] == 36
    assert "repmetrics/linear_probe" in values
    assert "hp_metric" not in values


def test_held_out_samples_are_in_the_projector(tmp_path: Path) -> None:
    run = fit(tmp_path, simclr(), RepresentationMonitor(HeldOutImages(), projector=70), max_epochs=1)
    config = Path(run.log_dir, "projector_config.pbtxt").read_text()
    assert 'tensor_name: "repmetrics/held_out:00006"' in config
    (folder,) = Path(run.log_dir).glob("00006/*")
    assert len((folder / "tensors.tsv").read_text().splitlines()) == 70
    rows = (folder / "metadata.tsv").read_text().splitlines()
    assert rows[0] == "label\tgroup"
    assert rows[1].endswith("\tslide 0")
    with Image.open(folder / "sprite.png") as sprites:
        assert sprites.size == (9 * 32, 9 * 32)  # 70 images in a square


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_browser_draws_lines_and_bands(run_dir: Path, tmp_path: Path) -> None:
    browser = next(filter(shutil.which, screenshot.BROWSERS), None)
    if browser is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    screenshot.board_picture(run_dir, tmp_path / "board.png", browser=browser)
    with Image.open(tmp_path / "board.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)[:, 360:]  # right of the sidebar
    line = np.abs(pixels - [255, 112, 67]).sum(2) < 30  # TensorBoard's first run color
    band = (np.abs(pixels - [255, 212, 199]).sum(2) < 24) & ~line  # the same at 30 % over white
    below_the_header = slice(80, None)
    assert line[below_the_header].sum() > 500
    assert band[below_the_header].sum() > 3000


def test_the_screenshot_script_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["screenshot.py", str(tmp_path), str(tmp_path / "x.png"), "--browser", "no-such"])
    assert screenshot.main() == 1
    assert "no browser found: install one of chromium" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["screenshot.py", str(tmp_path), str(tmp_path / "x.png"), "--browser", "true"])
    assert screenshot.main() == 1
    assert "no TensorBoard event files" in capsys.readouterr().err

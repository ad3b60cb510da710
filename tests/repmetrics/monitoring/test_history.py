"""The history of a run in a notebook: text, table, data frame, plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from small_runs import HeldOutImages
from torch import nn

from repmetrics import History, measure
from repmetrics.monitoring.monitor import Monitor
from repmetrics.monitoring.record import append_jsonl


@pytest.fixture(scope="module")
def history() -> History:
    monitor = Monitor(metrics=["rankme", "odcorr"])
    torch.manual_seed(0)
    for step in (0, 50, 100, 1500):
        monitor.measure(nn.Sequential(nn.Flatten(), nn.Linear(48, 8)), HeldOutImages(), step=step)
    return monitor.history


def test_a_measurement_is_a_number() -> None:
    m = measure(torch.randn(64, 8), groups=[row // 4 for row in range(64)])["rankme"]
    assert float(m) == m.value
    assert f"{m:.2f}" == f"{m.value:.2f}"
    assert f"{m}" == str(m) == repr(m)
    assert repr(m).startswith("<rankme 7.")
    assert repr(m).endswith("(N = 64, D = 8, 16 groups)>")


def test_texts_are_short(history: History) -> None:
    assert repr(history) == "History of 4 evaluations, steps 0 to 1,500"
    assert repr(history[-1]).startswith("<Record of step 1,500: rankme ")
    assert repr(history[-1]).endswith(" and 1 more; no alarm>")
    assert max(len(repr(part)) for part in (history, *history, *history[0].measurements.values())) < 140
    table = history._repr_html_()
    assert "<th>RankMe ↑</th><th>ODCorr ↓</th>" in table
    assert table.count("<tr>") == 5


def test_a_frame_has_a_row_per_evaluation(history: History) -> None:
    frame = history.to_frame()
    assert list(frame.index) == [0, 50, 100, 1500]
    assert frame.loc[50, "rankme"] == history[1].measurements["rankme"].value
    assert {"rankme_lower", "odcorr_null", "seconds", "epoch", "linear_probe"} <= set(frame.columns)
    assert isinstance(History().to_frame(), pd.DataFrame)


def test_plots_show_the_values(history: History) -> None:
    figure: Any = history.plot()
    assert [ax.get_title() for ax in figure.axes] == ["RankMe ↑ (of 8)", "ODCorr ↓", "linear probe ↑"]
    assert figure._repr_png_().startswith(b"\x89PNG")  # a notebook shows it, also where pyplot was never imported
    line = figure.axes[0].lines[0]
    assert list(line.get_xdata()) == [0, 50, 100, 1500]
    assert list(line.get_ydata()) == [record.measurements["rankme"].value for record in history]
    both = history.plot("odcorr", others={"shorter": History(history[:2])})
    assert [text.get_text() for text in both.axes[0].get_legend().get_texts()] == ["this run", "shorter"]
    names = ["_old", "lr $1$"]
    named = history.plot("odcorr", others=dict.fromkeys(names, history)).axes[0].get_legend().get_texts()
    assert [text.get_text() for text in named] == ["this run", *names]
    assert not any(text.get_parse_math() for text in named)  # "$" would begin a formula
    with pytest.raises(ValueError, match="'lidar' was not measured: choose among knn, linear_probe, odcorr"):
        history.plot("lidar")
    spectrum = history.plot_spectrum().axes[0]
    assert [line.get_label() for line in spectrum.lines] == ["step 0", "step 100", "step 1,500"]
    assert max(spectrum.lines[0].get_ydata()) == 1
    assert not list(History().plot_spectrum().axes[0].lines)


def test_a_history_is_read_from_a_folder(history: History, tmp_path: Path) -> None:
    for record in history:
        append_jsonl(tmp_path / "measurements.jsonl", record)
    read = History.read(tmp_path)
    assert read[2].measurements["rankme"].value == history[2].measurements["rankme"].value
    assert read.plot_spectrum().axes[0].lines

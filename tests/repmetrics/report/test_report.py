"""The report page: the verdict, what it is made of, and the files it reads."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib import rc_context

from repmetrics.cli import main
from repmetrics.decisions.alarms import alarms, collapse_stats
from repmetrics.measurement.measure import measure
from repmetrics.monitoring.history import History
from repmetrics.monitoring.monitor import Monitor
from repmetrics.monitoring.pictures import Pictures, Stage
from repmetrics.monitoring.record import Record, append_jsonl, sample_spectrum, scalars
from repmetrics.report import pictures
from repmetrics.report.build import _verdict_parts, page, verdict_lines
from repmetrics.report.charts import _box, _clearance, charted_metrics, metric_chart, spectrum_chart
from repmetrics.report.page import items
from repmetrics.report.runs import Run, read_runs
from repmetrics.report.verdict import compare_runs, judge, signal
from repmetrics.trust.runs import read_runs as trust_runs

SVG = "{http://www.w3.org/2000/svg}"
GROUPS = [row // 8 for row in range(96)]
NAMES = ("rankme", "rankme_centered", "odcorr", "alpha_req", "mean_direction")


def history(widths: Sequence[float], *, run: str = "", every: int = 100) -> list[Record]:
    """Records of features whose number of strong directions is as given."""
    base = torch.randn(96, 24, generator=torch.Generator().manual_seed(0))
    records: list[Record] = []
    for k, width in enumerate(widths):
        x = base * torch.exp(-torch.arange(24) / width)
        values = torch.linalg.svdvals(x - x.mean(0)) / len(x) ** 0.5
        record = Record(
            k * every, 0, 0.5, measure(x, metrics=NAMES, groups=GROUPS), loss=1.0, collapse_stats=collapse_stats(x),
            spectrum=sample_spectrum(values.tolist()), run=run,
        )  # fmt: skip
        inputs = [past.alarm_input() for past in (*records, record)]
        records.append(replace(record, alarms=alarms(inputs)))
    return records


def write(folder: Path, records: Sequence[Record], config: str | None = None) -> Path:
    for record in records:
        append_jsonl(folder / "measurements.jsonl", record)
    if config is not None:
        (folder / "config.yaml").write_text(config, encoding="utf-8")
    return folder


class Page(HTMLParser):
    """Text, addresses and labels of a page; an element that is closed wrongly fails."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.addresses: list[str] = []
        self.labels: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("src", "href", "xlink:href"):
                self.addresses.append(str(value))
            if name == "aria-label":
                self.labels.append(str(value))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


GROWING = (4, 3, 4, 5, 6, 8, 10)


def test_the_verdict_of_a_healthy_run_names_the_step_to_keep() -> None:
    verdict = judge(Run("a", history(GROWING)), "rankme")
    assert verdict.sentence == "Healthy, still improving: keep step 600; no reason to stop."
    flat = judge(Run("a", history((4, 3, 6, 10, 9, 9, 8, 8, 8, 8))), "rankme")
    assert flat.sentence == (
        "Healthy, no longer improving: keep step 900; training may stop, by the rule with patience 5."
    )
    assert flat.reasons[1].startswith("Step 900 is the last without an alarm; no metric chose better")
    assert "Step 300 has the highest RankMe after step 0" in flat.reasons[2]
    assert "step 600" not in flat.reasons[2]
    best = judge(Run("a", history((4, 3, 6, 10, 9, 9, 8, 8, 8, 8))), "rankme", keep_best=True)
    assert "keep step 300" in best.sentence
    assert best.reasons == (flat.reasons[0], *flat.reasons[2:])


def test_the_step_to_keep_is_before_the_collapse() -> None:
    verdict = judge(Run("a", history((4, 6, 8, 3, 0.2, 0.2))), "rankme")
    assert verdict.sentence == "Alarm: dead features; dimensional collapse at step 500; keep step 300."
    always = judge(Run("a", history((4, 0.2, 0.2))), "rankme")
    assert always.sentence == "Alarm: dead features; dimensional collapse at step 200; no checkpoint to keep."


def test_a_probe_below_its_start_or_below_color_is_in_the_verdict() -> None:
    probe = replace(history((4,))[0].measurements["rankme"], name="linear_probe", value=0.3575, standard_error=None)

    def judged(start: float, end: float, *, error: float | None, floor: float, steps: bool = True) -> list[str]:
        probes = [
            replace(probe, value=value, standard_error=error, details={"null_floor": floor})
            for value in (start, 0.9, end)
        ]
        records = [
            replace(record, measurements={**record.measurements, "linear_probe": m})
            for record, m in zip(history((4, 3, 4)), probes, strict=True)
        ]
        run = Run("a", records, steps=steps)
        sentences = [reason for reason in judge(run, "rankme").reasons if "probe" in reason]
        assert verdict_lines([run], by="rankme")[1:] == sentences
        parts = _verdict_parts([run], [judge(run, "rankme")], "rankme")
        assert all(f"<li>{sentence}" in parts[0] for sentence in sentences)
        return sentences

    assert judged(0.3575, 0.3412, error=None, floor=math.nan) == [
        "At the end, the linear probe is below that of step 0, before training: 0.3412 against 0.3575."
    ]
    assert judged(0.3575, 0.3412, error=0.012, floor=0.4) == [
        "At the end, the linear probe is below that of step 0, before training: 0.341 ± 0.012 against 0.357 ± 0.012.",
        "At the end, the linear probe is below that of color statistics alone: 0.341 ± 0.012 against 0.4.",
    ]
    assert judged(0.3, 0.4, error=0.01, floor=0.2) == []
    assert judged(0.3, math.nan, error=None, floor=0.2) == []
    assert judged(0.4, 0.3, error=None, floor=0.2, steps=False) == []  # the first checkpoint may be trained


def test_a_missing_error_has_its_reason_once_below_the_charts() -> None:
    plain = measure(torch.randn(96, 8, generator=torch.Generator().manual_seed(0)), metrics=["rankme", "odcorr"])
    records = [Record(step, 0, 0.5, plain) for step in (0, 100, 200)]
    charts = page([Run("a", records)]).partition("<h2>Values</h2>")[0]
    assert charts.count("no error is claimed") == 1
    reason = "no group ids: rows of one group are not independent, so no error is claimed"
    assert f"No intervals: {reason}." in charts
    other = {**plain, "odcorr": replace(plain["odcorr"], reason="too few groups")}
    charts = page([Run("a", [replace(record, measurements=other) for record in records])])
    assert f"No intervals of RankMe: {reason}." in charts
    assert "No intervals of ODCorr: too few groups." in charts


@pytest.mark.parametrize(("grouped", "labeled"), [(True, True), (False, True), (True, False), (False, False)])
def test_captions_and_switches_name_what_is_known(grouped: bool, labeled: bool) -> None:
    codes, unknown = np.arange(4), np.full(4, -1)
    shown = Pictures(
        thumbnails=np.zeros((4, 3, 8, 8), np.uint8), groups=codes if grouped else unknown,
        labels=codes if labeled else unknown, queries=np.array([0]), positions=np.eye(4)[:, :2],
        stages=[Stage(0, np.array([[1, 2, 3, -1, -1]]), None, None)],
    )  # fmt: skip
    drawn = pictures._map(shown, "map0")
    assert drawn.count("type=radio") == (2 if grouped and labeled else 0)
    assert ("Colors show the label of each image." in drawn) is (labeled and not grouped)
    assert ("One tight cloud per group" in drawn) is grouped
    colors = set(re.findall(r"--g:(#\w+)", drawn))
    assert len(colors) == (4 if grouped or labeled else 1)
    caption = pictures._neighbors(shown).partition("<figcaption>")[2]
    start = "Neighbors: each row begins with a held-out image; its five nearest images "
    end = "of other groups follow, by cosine similarity."
    if not grouped:
        end = "follow, by cosine similarity. No groups are known, so these may be of the same group as the first image."
    assert caption.startswith(start + end)
    assert "slide" not in caption


def test_runs_are_compared_by_value_and_error_and_unfair_comparisons_are_named() -> None:
    runs = [Run("a", history((4, 3, 6))), Run("b", history((4, 3, 9))), Run("c", history((4, 3, 0.2, 0.2)))]
    best, excluded = compare_runs(runs, "rankme")
    assert re.fullmatch(r"b has the highest RankMe at its end, .* ± .*, beyond noise\.", best)
    assert excluded == "Left out, since they end with an alarm: c."
    settings = [{"model.koleo_weight": "0"}, {"model.koleo_weight": "1"}]
    runs = [run._replace(settings=each) for run, each in zip(runs, settings, strict=False)]
    assert "Koleo_weight raises the rank directly" in compare_runs(runs, "rankme")[1]
    same = [Run("a", history((4, 6))), Run("b", history((4, 6)))]
    assert "noise cannot distinguish it from b" in compare_runs(same, "rankme")[0]


def test_the_deciding_metric_is_one_that_every_run_has() -> None:
    runs = [Run("a", history((4, 5)))]
    assert signal(runs) == "rankme"
    assert charted_metrics(runs, "rankme") == ["rankme", "odcorr"]
    without = [replace(r, measurements={n: replace(m, value=math.nan) if n == "odcorr" else m
               for n, m in r.measurements.items()}) for r in runs[0].records]  # fmt: skip
    assert "odcorr" not in charted_metrics([Run("a", without)], "rankme")  # it never has a value
    with pytest.raises(ValueError, match="not every run has a value of lidar: decide --by one of rankme,"):
        signal(runs, "lidar")
    with pytest.raises(ValueError, match="not every run has a value of alpha_req"):
        signal(runs, "alpha_req")  # NaN: 24 features are too few


def test_the_page_of_two_runs_is_complete_and_loads_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "runs" / "low", history(GROWING), "model: {init_args: {lr: 0.1, depth: 2}}\n")
    write(tmp_path / "runs" / "high", history((4, 6, 8, 3, 0.2, 0.2)), "model: {init_args: {lr: 0.9, depth: 2}}\n")
    out = tmp_path / "new" / "report.html"
    main_ok(["report", str(tmp_path / "runs"), "--out", str(out)])
    printed = capsys.readouterr().out
    assert "low: Healthy, still improving: keep step 600; no reason to stop." in printed
    assert printed.splitlines()[-1] == str(out)
    text = out.read_text(encoding="utf-8")
    shown = Page(text)
    assert all(address.startswith("#") for address in shown.addresses)
    cells = [cell.strip() for cell in shown.text]
    assert {"lr", "0.1", "0.9", "dimensional collapse", "keep step"} <= set(cells)
    assert "depth" not in cells
    assert [label.partition(":")[0] for label in shown.labels] == [
        "RankMe ↑",
        "ODCorr ↓",
        "Singular values by rank, smallest over largest",
    ]
    assert "low from" in shown.labels[0]
    assert "color-scheme" in text
    assert len(text) < 300_000
    ids = re.findall(r' id="([^"]+)"', text)
    assert all(f"#{name}" in text for name in ids)


def test_pictures_are_in_the_page_unless_turned_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)  # without UMAP, wherever it is installed
    monitor = Monitor(metrics=["rankme"], pictures=True)
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, 4), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    images = torch.rand(600, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    batches = [(images, torch.arange(600) % 3, [f"patient {row // 25}" for row in range(600)])]
    for step in (0, 10, 200):
        monitor.measure(encoder, batches, step=step)
    write(tmp_path / "<run>", monitor.history)
    assert monitor.pictures is not None
    monitor.pictures.save(tmp_path / "<run>" / "pictures.npz")
    runs = read_runs([tmp_path / "<run>"])
    text = page(runs)
    shown = Page(text)
    assert text.count("<i title=") + text.count("<i class=e title=") == 512
    assert "group 3, label 0" in text
    assert "patient" not in text  # no name of a group
    assert [address[:22] for address in shown.addresses if not address.startswith("#")] == [
        "data:image/png;base64,"
    ] * 8
    urls = re.findall(r"data:image/\w+;base64,([\w+/=]+)", text)
    assert len(urls) == 9
    assert max(map(len, urls)) < 1e6  # noise is the hardest to compress
    assert {"Image", "Step 0", "Step 10", "Step 200"} <= {part.strip() for part in shown.text}
    assert "Pictures" not in page(runs, pictures=False)
    elsewhere = [run._replace(id="of another run") for run in runs]
    assert "Pictures" not in page(elsewhere)


@pytest.mark.slow  # UMAP compiles its code
@pytest.mark.filterwarnings("ignore::ImportWarning")
def test_the_map_is_also_drawn_by_umap(tmp_path: Path) -> None:
    pytest.importorskip("umap", reason="umap-learn is not installed")
    monitor = Monitor(metrics=["rankme"], pictures=True)
    images = torch.cat([torch.rand(20, 3, 8, 8), torch.rand(20, 3, 8, 8) + 3])
    monitor.measure(torch.nn.Flatten(), [images], step=0)
    write(tmp_path, monitor.history)
    assert monitor.pictures is not None
    monitor.pictures.save(tmp_path / "pictures.npz")
    text = page(read_runs([tmp_path]))
    assert "first two principal components and by UMAP" in text
    plot = text.partition("40 held-out images, UMAP'>")[2].partition("</div>")[0]
    places = [(float(x), float(y)) for x, y in re.findall(r"left:([\d.]+)%;top:([\d.]+)%", plot)]
    assert len(places) == 40
    assert all(0 <= value <= 100 for place in places for value in place)
    near = [min(range(40), key=lambda j: math.dist(places[i], places[j]) + 1e9 * (i == j)) for i in range(40)]
    assert sum((i < 20) == (j < 20) for i, j in enumerate(near)) >= 36  # the two kinds stay apart


def test_records_of_several_monitors_are_runs_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, width in (("student", 3.0), ("teacher", 6.0)):
        for record in history([2, width]):
            append_jsonl(tmp_path / "dino" / f"measurements-{name}.jsonl", record)
    assert [run.name for run in read_runs([tmp_path])] == ["student", "teacher"]
    assert [run.name for run in read_runs([tmp_path / "dino" / "measurements-teacher.jsonl"])] == ["teacher"]
    main_ok(["report", str(tmp_path), "--out", str(tmp_path / "r.html"), "--by", "rankme"])
    assert capsys.readouterr().out.startswith("teacher has the highest RankMe")
    with pytest.raises(FileNotFoundError, match=r"give one of .*measurements-student.jsonl, .*-teacher.jsonl"):
        History.read(tmp_path / "dino")
    with pytest.raises(ValueError, match=r"dino has records of several monitors, which are no separate runs"):
        trust_runs(tmp_path)
    (tmp_path / "dino" / "measurements-student.jsonl").unlink()
    assert {item.run for item in trust_runs(tmp_path)} == {"dino"}


def test_code_in_a_sentence_is_marked_up_and_escaped() -> None:
    assert items(["run `score <x>` & `select`"]) == (
        "<ul><li>run <code>score &lt;x&gt;</code> &amp; <code>select</code></ul>"
    )
    assert items([]) == ""


def test_a_name_that_is_no_utf_8_is_shown(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xfcn"))
    write(folder, history(GROWING))
    runs = read_runs([folder])
    assert [run.name for run in runs] == ["r\ufffdn"]
    page(runs).encode("utf-8")


def test_the_scores_of_a_folder_are_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = history(GROWING)[1:]
    scores = [
        {"name": f"step={r.step}.ckpt", "run": "", "step": r.step, "seconds": 1.0, "data": "d",
         "measurements": {name: m.to_json() for name, m in r.measurements.items()}}
        for r in (*records, records[-1])  # the last twice, as "last.ckpt" is
    ]  # fmt: skip
    file = tmp_path / "scores.json"
    file.write_text(json.dumps({"scores": scores}), encoding="utf-8")
    (run,) = read_runs([file])
    assert [record.step for record in run.records] == [100, 200, 300, 400, 500, 600]
    assert judge(run, "rankme").sentence == "Healthy, still improving: keep step 600; no reason to stop."
    assert spectrum_chart([run], [judge(run, "rankme")]) is None
    for score in scores:
        score["step"] = None
    file.write_text(json.dumps({"scores": scores[:3]}), encoding="utf-8")
    main_ok(["report", str(file), "--out", str(tmp_path / "r.html")])
    assert "step=300.ckpt has the highest RankMe at its end" in capsys.readouterr().out


def test_runs_of_one_file_and_nested_runs_have_names(tmp_path: Path) -> None:
    write(tmp_path / "a" / "x", [*history((4, 5), run="1"), *history((4, 6), run="2")])
    write(tmp_path / "b" / "x", history((4, 5)))
    assert [run.name for run in read_runs([tmp_path])] == ["a/x (1)", "a/x (2)", "b/x"]
    assert [run.name for run in read_runs([tmp_path / "b" / "x"])] == ["x"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("measurements.jsonl", "", "contains no evaluation yet"),
        ("measurements.jsonl", '{"step": 1}\n', "is no record of a run: KeyError: 'vitals'"),
        ("scores.json", "{}", "is no output of `repmetrics score --json`"),
        ("scores.json", '{"scores": []}', "holds no score"),
        ("notes.txt", "", "is no run: expected a folder"),
    ],
)
def test_what_is_no_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path / name), "--out", str(tmp_path / "report.html")])
    assert ended.value.code == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_a_configuration_that_is_not_yaml_is_a_note(tmp_path: Path) -> None:
    (run,) = read_runs([write(tmp_path, history((4, 5)), "a: [")])
    assert "the settings of" in run.notes[0]


def test_names_are_shown_as_they_are_whatever_a_matplotlibrc_says(tmp_path: Path) -> None:
    names = ["_hidden", "lr=$1e-3", r"a$\frac$b", "日本"]
    for name in [*names, "c\x01d"]:
        write(tmp_path / name, history([3, 4, 5], run=name))
    with rc_context({"text.usetex": True, "axes.facecolor": "black"}):
        runs = read_runs([tmp_path])
        chart = metric_chart(runs, "rankme", [judge(run, by="rankme") for run in runs])
        single = [run._replace(records=run.records[-1:], steps=False) for run in runs]
        dots = metric_chart(single, "rankme", [judge(run, by="rankme") for run in single])
        spectrum = spectrum_chart(runs, [judge(run, by="rankme") for run in runs])
    assert spectrum is not None
    for svg in (chart.svg, dots.svg, spectrum.svg):
        labels = [text.text for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
        assert {*names, "c\N{REPLACEMENT CHARACTER}d"} <= set(labels)
        assert "#000000" not in svg
        assert not any("$\\math" in str(label) for label in labels)  # ticks such as 10⁻² are set as formulas


def probed(values: Sequence[float], *, floor: float, steps: bool = True, name: str = "a") -> Run:
    """A run with a linear probe, and the probe of color statistics alone."""
    m = replace(history((4,))[0].measurements["rankme"], name="linear_probe", margin=None)
    measured = [replace(m, value=value, details={"null_floor": floor, "chance": 0.1}) for value in values]
    return Run(name, [Record(100 * k, 0, 0.5, {"linear_probe": m}) for k, m in enumerate(measured)], steps=steps)


def reference(run: Sequence[Run]) -> tuple[list[tuple[float, float]], dict[str, str]]:
    """Ends of the line of the reference in a chart of linear probes, and texts with their styles."""
    root = ElementTree.fromstring(metric_chart(run, "linear_probe", [judge(r, by="linear_probe") for r in run]).svg)
    dashed = [e for e in root.iter(f"{SVG}path") if "stroke-dasharray: 3.7" in e.get("style", "")]
    numbers = [float(part) for part in re.findall(r"[\d.]+", dashed[0].get("d", ""))]
    texts = {str(e.text): e.get("style", "") for e in root.iter(f"{SVG}text")}
    return [(numbers[0], numbers[1]), (numbers[-2], numbers[-1])], texts


def test_the_name_of_a_reference_is_where_no_line_crosses_it() -> None:
    rising, falling = probed((0.3, 0.7, 0.8, 0.9), floor=0.5), probed((0.9, 0.8, 0.7, 0.3), floor=0.5)
    for run, right in ((rising, True), (falling, False)):
        ends, texts = reference([run])
        assert ends[0][1] == ends[1][1]  # horizontal
        assert ("text-anchor: end" in texts["color statistics alone"]) is right


def test_the_name_of_a_reference_has_a_place_among_lines() -> None:
    line = np.linspace(0, 1, 201)
    crossed = _box("chance", 0.5, 0.0, True)
    assert _clearance(crossed, [line], []) == pytest.approx(0.5 - crossed.right, abs=0.01)
    assert _clearance(crossed, [np.full(201, 0.52)], []) < 0
    assert _clearance(crossed, [np.full(201, np.nan)], [crossed]) < 0  # another name is there
    assert _clearance(_box("chance", 0.98, 0.0, True), [line], []) < 0  # beyond the axes


def test_the_reference_of_checkpoints_without_steps_is_on_their_axis() -> None:
    runs = [probed((value,), floor=0.5, steps=False, name=f"{value}.pt") for value in (0.3, 0.7, 0.9)]
    ends, texts = reference(runs)
    assert ends[0][0] == ends[1][0]  # vertical, as values are on the horizontal axis
    assert {"0.3.pt", "0.7.pt", "0.9.pt"} <= texts.keys()


def test_the_interval_of_a_share_ends_at_its_limits_and_that_of_a_rank_does_not() -> None:
    m = measure(torch.randn(64, 8), metrics=["rankme"], groups=[k // 8 for k in range(64)])["rankme"]
    probe = replace(m, name="projector/linear_probe", value=0.98, standard_error=0.02, margin=0.05)
    values = scalars({"rankme": m, "probe": probe, "low": replace(probe, value=0.01)}, prefix="r")
    assert values["r/rankme_upper"] == m.value + (m.margin or math.nan)
    assert (values["r/probe_lower"], values["r/probe_upper"]) == pytest.approx((0.93, 1.0))
    assert (values["r/low_lower"], values["r/low_upper"]) == pytest.approx((0.0, 0.06))


def test_equal_runs_give_equal_pages_and_names_may_hold_markup() -> None:
    runs = [Run("<b>&", history((4, 5, 6)))]
    text = page(runs)
    assert text == page(runs)
    assert "<b>&" not in text
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    titles = [
        title.text
        for svg in drawings
        for title in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}title")
    ]
    assert [title for title in titles if str(title).endswith(" (keep)")] == [titles[2], titles[5]]


def main_ok(args: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code in (0, None)

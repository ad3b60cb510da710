"""The trust report against oracles without shared code, on runs whose truth is known, and from the command line."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import stats

from repmetrics.cli import main
from repmetrics.measurement.registry import METRICS
from repmetrics.trust.agreement import agreement
from repmetrics.trust.bootstrap import Interval, RunTable
from repmetrics.trust.charts import charts
from repmetrics.trust.html import QUESTIONS, overview_table, page
from repmetrics.trust.multiplicity import shown_signs
from repmetrics.trust.rank_correlation import centered_ranks, kendall, partial_correlation, spearman
from repmetrics.trust.regret import noise_regret, regret, selection_regret
from repmetrics.trust.report import analyze
from repmetrics.trust.runs import Evaluation, read_runs, write_table
from repmetrics.trust.summary import lead, multiplicity_note, report_summary, summarize

STEPS = range(0, 500, 100)


def evaluation(
    run: str, step: int, *, method: str = "DINO", loss: float = 1.0, alarms: int = 0, **values: float
) -> Evaluation:
    return Evaluation(run, method, step, loss, alarms, values, {}, {})


def tau_b(a: list[float], b: list[float]) -> float:
    """Kendall's τ-b by its definition, pair by pair."""
    score = ties_a = ties_b = 0.0
    pairs = [(i, j) for i in range(len(a)) for j in range(i)]
    for i, j in pairs:
        score += np.sign(a[i] - a[j]) * np.sign(b[i] - b[j])
        ties_a += a[i] == a[j]
        ties_b += b[i] == b[j]
    return score / math.sqrt((len(pairs) - ties_a) * (len(pairs) - ties_b))


def partial_by_regression(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> float:
    """Correlation of the residuals of ranks after a regression on the third's ranks."""
    ra, rb, rc = (stats.rankdata(x) for x in (a, b, c))
    design = np.stack([np.ones_like(rc), rc], axis=1)
    left = [x - design @ np.linalg.lstsq(design, x, rcond=None)[0] for x in (ra, rb)]
    return float(np.corrcoef(*left)[0, 1])


def test_kendall_is_its_definition_with_ties_and_when_weighted():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 15).astype(float), rng.integers(0, 6, 15).astype(float)
    assert kendall(a, b)[0] == pytest.approx(tau_b(a.tolist(), b.tolist()), abs=1e-12)
    drawn = rng.integers(0, 15, 15)
    weights = np.bincount(drawn, minlength=15)[None].astype(float)
    assert kendall(a, b, weights)[0] == pytest.approx(tau_b(a[drawn].tolist(), b[drawn].tolist()), abs=1e-12)


def partial(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    x, y, z = (centered_ranks(v) for v in (a, b, c))
    return partial_correlation(x @ y, x @ z, y @ z, x @ x, y @ y, z @ z)


def test_spearman_plain_and_partial():
    rng = np.random.default_rng(1)
    a, b, c = rng.normal(size=(3, 20))
    assert float(spearman(a, b)) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
    assert float(partial(a, b + c, c)) == pytest.approx(partial_by_regression(a, b + c, c), abs=1e-12)
    assert math.isnan(float(partial(c, b, c)))  # no variance of the first remains


def test_regret_of_a_choice_by_brute_force():
    values, target = np.array([[1.0, 3.0, math.nan, 2.0]]), np.array([[0.5, 0.6, 0.9, 0.7]])
    assert selection_regret(values, target)[0] == pytest.approx(0.9 - 0.6)
    assert math.isnan(selection_regret(np.full((1, 3), math.nan), np.ones((1, 3)))[0])


def simulated(*, runs: int, noise: float, seed: int, method: str = "DINO") -> list[Evaluation]:
    """Runs with a level and a peak of quality each; rankme is quality plus noise, odcorr falls with the step alone."""
    rng = np.random.default_rng(seed)
    evaluations = []
    for k in range(runs):
        level, peak = rng.normal(0, 0.05), rng.integers(1, 5)
        for position, step in enumerate(STEPS):
            quality = 0.7 + level - 0.02 * abs(position - peak)
            evaluations.append(evaluation(
                f"{method}-{k}", step, method=method, loss=5 - position, probe=quality,
                rankme=quality + noise * rng.normal(), odcorr=0.5 - 0.05 * position,
            ))  # fmt: skip
    return evaluations


def test_a_signal_of_quality_is_trusted_and_one_of_the_step_is_not():
    evaluations = simulated(runs=24, noise=0.005, seed=0)
    report = analyze(evaluations, targets=["probe"], draws=500)[0]
    result = {a.metric: a for a in report.agreements}
    assert result["rankme"].within.low > 0.5
    assert result["rankme"].beyond_time.low > 0.5
    assert result["rankme"].across.low > 0.5
    assert math.isnan(result["odcorr"].beyond_time.value)  # it moves with the step alone
    costs = {r.signal: r for r in report.regrets}
    assert costs["rankme"].against_last.low > 0
    assert costs["odcorr"].checkpoint.value == pytest.approx(costs["last"].checkpoint.value)
    assert costs["rankme"].run.value < costs["random"].run.value
    gain = costs["rankme"].against_random
    assert gain.value == pytest.approx(costs["random"].run.value - costs["rankme"].run.value)
    assert gain.low > 0
    within, checkpoints, among = report_summary(report, "probe")
    assert "rankme, borda cost less" in among
    assert "rankme" in within
    assert "odcorr" not in within  # its interval alone excludes zero, but not with all the others
    clear = [a._replace(within=Interval(0.5, 0.4, 0.6, 1e-9)) for a in report.agreements]
    within, *_ = report_summary(report._replace(agreements=clear), "probe")
    assert "no information beyond the step is shown for odcorr" in within
    assert "rankme" in checkpoints
    assert "cost less" in checkpoints


def test_the_report_leads_with_one_sentence_and_one_table():
    reports = analyze(simulated(runs=24, noise=0.005, seed=0), targets=["probe"], draws=300)
    sentence, _, heads, first, *rest = summarize(reports, ["probe"])
    best = reports[-1].selections["probe"][0]
    assert sentence.startswith("Choosing the best of 5 random runs by rankme loses 0.0")
    assert sentence.endswith(f"of probe, a random choice {best.regret.value + best.gain.value:.4f}.")
    assert heads.split()[0] == "signal"
    assert first.split()[0] == "rankme"
    assert [row.split()[0] for row in rest[:3]] == [s.signal for s in reports[-1].selections["probe"][1:4]]
    assert "4 signals are compared" in rest[4]


def test_a_lead_claims_nothing_of_noise_or_of_few_runs():
    noise = analyze(simulated(runs=12, noise=50.0, seed=3), targets=["probe"], metrics=["rankme"], draws=300)[-1]
    worst = max(noise.selections["probe"], key=lambda s: s.regret.value)
    assert worst.gain.sign() < 1
    assert "not shown to be better" in lead(noise._replace(selections={"probe": [worst]}), "probe")
    few = analyze(simulated(runs=4, noise=0.005, seed=0), targets=["probe"], draws=300)[-1]
    assert "too few to tell" in lead(few, "probe")


def test_a_signal_of_noise_is_seldom_trusted():
    """Of 100 signals of noise, about five have an interval that misses zero; more than twelve come once in 300."""
    evaluations, misses = simulated(runs=24, noise=0, seed=3), 0
    rng = np.random.default_rng(3)
    for _ in range(100):
        drawn = [x._replace(values=x.values | {"rankme": rng.normal()}) for x in evaluations]
        misses += agreement(RunTable(drawn, draws=300, seed=0), "rankme", "probe").within.sign() != 0
    assert misses <= 12


def test_many_signals_of_noise_are_seldom_named() -> None:
    """Thirteen metrics of noise: pointwise, 6 of 10 such reports name one. Of 12 reports, 3 or more do in 2 %."""
    names = [name for name, metric in METRICS.items() if metric.direction != "neither"][:13]
    naming = 0
    for seed in range(12):
        random = np.random.default_rng(seed)
        evaluations = [
            Evaluation(
                run, "DINO", 50 * step, 0.0, 0,
                {**{name: random.normal() for name in names}, "probe": 0.7 + 0.01 * random.normal()}, {}, {},
            )
            for run in "abcdefghijkl" for step in range(7)
        ]  # fmt: skip
        (report,) = analyze(evaluations, targets=["probe"], draws=200)
        naming += any(shown_signs(report, "probe").values())
        assert "hold together at 95 %" in multiplicity_note(report, "probe")
    assert naming < 3


def test_too_few_runs_that_deviate_from_the_step_give_no_interval_beyond_it():
    """In five of eight runs the metric is not the step's order: one run fewer than an interval needs."""
    for deviating, known in ((5, False), (6, True)):
        evaluations = [
            evaluation(f"r{k}", step, probe=0.5 + 0.01 * ((position * 3 + k) % 5),
                       rankme=[0, 1, 2, 4, 3][position] if k < deviating else position)
            for k in range(8) for position, step in enumerate(STEPS)
        ]  # fmt: skip
        result = agreement(RunTable(evaluations, draws=300, seed=0), "rankme", "probe")
        assert not math.isnan(result.beyond_time.value)
        assert math.isnan(result.beyond_time.low) != known
        assert not math.isnan(result.within.low)


def test_the_overview_answers_every_question():
    evaluations = simulated(runs=24, noise=0.005, seed=0)
    reports = analyze(evaluations, targets=["probe"], draws=500)
    cells = Cells()
    cells.feed(overview_table(reports[0], ["probe"]))
    text = [text.strip() for text in cells.text if text.strip()]
    assert text[: text.index("rankme")] == ["probe", "metric", *QUESTIONS]
    assert text[text.index("rankme") + 1 : text.index("odcorr")] == ["+", "+", "+", "+", "+"]
    assert text[text.index("odcorr") + 2 :][0] == "·"  # no information beyond the step


def test_plots_of_few_runs_hold_no_nan():
    evaluations = simulated(runs=3, noise=0.01, seed=0)
    for drawing in charts(analyze(evaluations, targets=["probe"], draws=100), evaluations, targets=["probe"]).values():
        assert "nan" not in drawing


def test_plots_show_names_of_methods_and_metrics_as_they_are():
    """Matplotlib leaves "_…" out of legends, and reads "$…$" as a formula."""
    methods, target = ["_own", "lr $1$", "DINO"], "probe $x$"
    evaluations = [
        evaluation(f"run-{k}", step, method=methods[k % 3], rankme=k + step / 1000, **{target: k + step / 900})
        for k in range(9)
        for step in STEPS
    ]
    drawn = charts(analyze(evaluations, targets=[target], draws=100), evaluations, targets=[target])
    scatter = ElementTree.fromstring(drawn[f"scatter-{target}.svg"])
    assert {*methods, target, "rankme"} <= {e.text for e in scatter.iter() if e.tag.endswith("}text")}
    assert f"{target}: agreement with the probe (Kendall's τ)" in drawn[f"agreement-{target}.svg"]


def test_signs_within_and_among_runs_may_differ():
    """Simpson's paradox: within each run the metric rises with the probe, among runs it falls."""
    evaluations = [
        evaluation(f"r{k}", step, probe=0.5 + 0.1 * k + 0.01 * position, rankme=50 - 5 * k + position)
        for k in range(8)
        for position, step in enumerate(STEPS)
    ]
    result = agreement(RunTable(evaluations, draws=300, seed=0), "rankme", "probe")
    assert result.within.value == pytest.approx(1)
    assert result.across.value == pytest.approx(-1)
    within, _, among = report_summary(analyze(evaluations, targets=["probe"], draws=300)[0], "probe")
    assert within.endswith("correlates with the probe; no information beyond the step is shown for rankme.")
    assert "correlates negatively" in among


def test_the_interval_covers_as_often_as_it_says():
    """Mean τ within runs, 200 experiments of 12 runs, 95 % nominal: three standard errors are 4.6 %."""
    truth = agreement(
        RunTable(simulated(runs=2000, noise=0.02, seed=99), draws=100, seed=0), "rankme", "probe"
    ).within.value
    hits = 0
    for seed in range(200):
        result = agreement(
            RunTable(simulated(runs=12, noise=0.02, seed=seed), draws=300, seed=0), "rankme", "probe"
        ).within
        hits += result.low <= truth <= result.high
    assert 0.90 <= hits / 200 <= 0.996


def test_a_noisy_probe_costs_even_a_perfect_selector():
    evaluations = [x._replace(errors={"probe": 0.02}) for x in simulated(runs=6, noise=0, seed=5)]
    table = RunTable(evaluations, draws=100, seed=0)
    assert 0 < noise_regret(table, "probe", seed=0) < 0.04
    quiet = RunTable([x._replace(errors={"probe": 1e-9}) for x in evaluations], draws=100, seed=0)
    assert noise_regret(quiet, "probe", seed=0) == pytest.approx(0, abs=1e-12)
    assert math.isnan(noise_regret(RunTable(simulated(runs=6, noise=0, seed=5), draws=100, seed=0), "probe", seed=0))


def test_an_evaluation_with_an_alarm_is_excluded_from_the_count():
    evaluations = []
    for k in range(6):
        for position, step in enumerate(STEPS):
            collapsed = position == 4
            evaluations.append(evaluation(
                f"r{k}", step, alarms=int(collapsed), probe=0.2 if collapsed else 0.6 + 0.01 * position,
                rankme=99.0 if collapsed else 10.0 + position, odcorr=0.1 if collapsed else 0.5 - 0.01 * position,
            ))  # fmt: skip
    table = RunTable(evaluations, draws=100, seed=0)
    directed = ["rankme", "odcorr"]
    assert regret(table, "borda", "probe", directed=directed).checkpoint.value == pytest.approx(0)
    assert regret(table, "rankme", "probe", directed=directed).checkpoint.value == pytest.approx(0.43)


def test_few_runs_give_estimates_without_intervals():
    report = analyze(simulated(runs=3, noise=0.01, seed=0), targets=["probe"])[0]
    assert not math.isnan(report.agreements[0].within.value)
    assert math.isnan(report.agreements[0].within.low)
    assert "too few" in report.notes[0]


def test_methods_are_reported_separately_and_together():
    evaluations = simulated(runs=6, noise=0.01, seed=0) + simulated(runs=6, noise=0.01, seed=1, method="DINOv2")
    reports = analyze(evaluations, targets=["probe"], draws=200)
    assert [r.scope for r in reports] == ["DINO", "DINOv2", "all methods"]
    colored = [x._replace(values=x.values | {"probe_colour": 0.1}) for x in evaluations]
    heads = re.findall(r"<h3>(.*?)</h3>", page(reports, colored, targets=["probe"], title="t"))
    assert [re.findall(r"(\d+ of \d+) runs", head) for head in heads] == [["12 of 12"], ["6 of 6"], ["6 of 6"]]
    assert any("methods differ" in note for note in reports[-1].notes)
    assert not any("methods differ" in note for note in reports[0].notes)


@pytest.mark.parametrize(
    ("evaluations", "targets", "message"),
    [
        (simulated(runs=2, noise=0, seed=0), ["probe"], "at least 3 runs, got 2"),
        ([x for x in simulated(runs=4, noise=0, seed=0) if x.step < 200], ["probe"], "at least 3 evaluations per run"),
        (simulated(runs=4, noise=0, seed=0), ["prob"], "no evaluation has 'prob': there are probe, rankme, odcorr"),
        (simulated(runs=4, noise=0, seed=0), ["rankme"], "rankme is a label-free metric and no target: name a probe"),
        (
            [x._replace(step=x.step - 400) for x in simulated(runs=4, noise=0, seed=0)],
            ["probe"],
            "selects among evaluations after step 0, and DINO-0 has none",
        ),
    ],
)
def test_too_little_is_refused(evaluations: list[Evaluation], targets: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        analyze(evaluations, targets=targets)


def test_a_constant_metric_is_left_out_and_named():
    evaluations = [x._replace(values=x.values | {"dead_features": 0.0}) for x in simulated(runs=6, noise=0.01, seed=0)]
    report = analyze(evaluations, targets=["probe"], draws=100)[0]
    assert any(note.startswith("dead_features has the same value") for note in report.notes)
    assert "dead_features" not in {a.metric for a in report.agreements}


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_alpha_req_has_a_direction_in_the_table(tmp_path: Path):
    table = tmp_path / "table.csv"
    rows = [
        f"{run},{step},{1.5 - step / 100},0.1,{0.5 + step / 100 + run / 50}" for run in range(3) for step in (0, 5, 9)
    ]
    table.write_text("run,step,alpha_req,alpha_req_se,probe\n" + "\n".join(rows) + "\n", encoding="utf-8")
    evaluations = read_runs(table)
    assert evaluations[1].values["alpha_distance"] == pytest.approx(0.45)
    assert evaluations[1].errors["alpha_distance"] == 0.1
    report = analyze(evaluations, targets=["probe"], draws=100)[-1]
    assert "alpha_distance" in {s.signal for s in report.selections["probe"]}
    assert "<td>alpha_distance" in overview_table(report, ["probe"])


def test_a_table_becomes_a_page_plots_and_a_board(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("repmetrics.progress.LINE_SECONDS", 0.0)
    table = tmp_path / "table.csv"
    evaluations = [x._replace(settings={"lr": f"0.{x.run[-1]}"}) for x in simulated(runs=6, noise=0.01, seed=0)]
    write_table(evaluations, table)
    again = read_runs(table)
    assert [x.values["rankme"] for x in again] == pytest.approx([x.values["rankme"] for x in evaluations], rel=1e-5)
    assert again[0].settings == {"lr": "0.0"}
    html_file, plots, board = tmp_path / "page.html", tmp_path / "plots", tmp_path / "board"
    options = ["--target", "probe", "--draws", "100", "--out", str(html_file), "--plots", str(plots)]
    main_ok(["trust", str(table), *options, "--tensorboard", str(board)])
    shown = capsys.readouterr()
    assert "rankme" in shown.out
    assert re.search(r"bootstrap: 12/12 · [\d.e+]+ signals/s · 0:00 left\n$", shown.err)
    cells = Cells()
    cells.feed(html_file.read_text(encoding="utf-8"))
    assert {"rankme", "odcorr", "borda", "last", "random"} <= {text.strip() for text in cells.text}
    drawn = sorted(path.name for path in plots.iterdir())
    assert drawn == ["agreement-probe.svg", "regret-probe.svg", "scatter-probe.svg"]
    for path in plots.iterdir():
        texts = [e.text for e in ElementTree.parse(path).iter() if e.tag.endswith(("}text", "}title"))]
        assert len(texts) > 6
    titles = [e.text for e in ElementTree.parse(plots / "scatter-probe.svg").iter() if e.tag.endswith("}title")]
    assert len(titles) == 2 * 6  # two metrics of six runs
    assert len(list(board.glob("*/events*"))) == 6
    with pytest.raises(SystemExit):
        main(
            ["trust", str(table), "--target", "probe", "--tensorboard", str(board), "--table", str(tmp_path / "b.csv")]
        )
    assert "is not empty" in capsys.readouterr().err
    assert not (tmp_path / "b.csv").exists()


def test_runs_are_read_with_method_and_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for k in range(3):
        run = tmp_path / f"run{k}"
        run.mkdir()
        (run / "config.yaml").write_text(
            f"model: {{class_path: fmtrain.methods.DINO, init_args: {{regularizer_weight: {k}}}}}\n", encoding="utf-8"
        )
        with (run / "measurements.jsonl").open("w", encoding="utf-8") as file:
            for step in (0, 10, 20, 30):
                entry = {
                    "step": step, "loss": None if step == 0 else 3.0, "alarms": [],
                    "measurements": {
                        "rankme": measured(10 + step + k), "linear_probe": measured(0.6 + step / 100 + k / 100),
                    },
                }  # fmt: skip
                file.write(json.dumps(entry) + "\n")
    main_ok(["trust", str(tmp_path), "--json"])
    result = json.loads(capsys.readouterr().out)[0]
    assert result["scope"] == "DINO"
    assert result["agreements"][0]["within"]["value"] == pytest.approx(1)
    assert result["agreements"][0]["within"]["low"] is None
    assert any("raises the rank directly" in note for note in result["notes"])


def write_run(folder: Path, *lines: str, config: str = "model: {}\n") -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    (folder / "measurements.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("lines", "config", "message"),
    [
        ([], "model: {}", r"run.measurements\.jsonl contains no evaluation yet"),
        (['{"loss": 1.0}'], "model: {}", r"run.measurements\.jsonl is no record of a run: a line has no 'step'"),
        (['{"step": 1}'], "model: {}", "a line has no 'measurements'"),
        (["[1]"], "model: {}", "is no record of a run"),
        (["{"], "model: {}", "is no record of a run"),
        ([], "model: {a: [", r"run.config\.yaml is not YAML"),
        ([], "[1, 2]", r"run.config\.yaml is no configuration: expected a mapping, got a list"),
    ],
)
def test_a_run_that_cannot_be_read_is_named(tmp_path: Path, lines: list[str], config: str, message: str):
    with pytest.raises(ValueError, match=message):
        read_runs(write_run(tmp_path / "run", *lines, config=config).parent)


def test_a_configuration_without_a_model_is_none(tmp_path: Path):
    entry = {"step": 1, "loss": None, "alarms": [], "measurements": {"rankme": measured(1.0)}}
    (result,) = read_runs(write_run(tmp_path / "run", json.dumps(entry), config="model: null\n").parent)
    assert (result.method, result.settings) == ("", {})


@pytest.mark.parametrize(
    "args",
    [
        ["--target", ""],
        ["--target", "probe,"],
        ["--metrics", ""],
        ["--plots", __file__],
        ["--tensorboard", __file__],
        ["--out", "."],
        ["--table", "."],
    ],
)
def test_wrong_usage_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str]):
    write_table(simulated(runs=6, noise=0.01, seed=0), tmp_path / "evaluations.csv")
    table = ["--table", str(tmp_path / "again.csv")] if "--table" not in args else []
    with pytest.raises(SystemExit) as stopped:
        main(["trust", str(tmp_path / "evaluations.csv"), "--target", "probe", *table, *args])
    assert stopped.value.code == 2
    assert [file.name for file in tmp_path.iterdir()] == ["evaluations.csv"]
    capsys.readouterr()


def test_a_target_named_twice_is_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_table(simulated(runs=6, noise=0.01, seed=0), tmp_path / "evaluations.csv")
    main_ok(["trust", str(tmp_path / "evaluations.csv"), "--target", "probe, probe", "--json", "--draws", "100"])
    agreements = json.loads(capsys.readouterr().out)[0]["agreements"]
    assert sorted(a["metric"] for a in agreements) == ["odcorr", "rankme"]


def measured(value: float) -> dict[str, object]:
    return {"value": value, "standard_error": 0.1, "d": 8, "details": {}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("run,metric\na,1\n", "has no column step"),
        ("run,step,rankme\na,one,2\n", "line 2"),
    ],
)
def test_a_malformed_table_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str):
    table = tmp_path / "t.csv"
    table.write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        main(["trust", str(table)])
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err


def test_a_folder_without_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["trust", str(tmp_path)])
    assert "holds no run" in capsys.readouterr().err


def main_ok(args: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code in (0, None)

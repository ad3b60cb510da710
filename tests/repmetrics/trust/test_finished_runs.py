"""`repmetrics select RUNS/`: finished runs of any origin are ranked from their measurements."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from repmetrics.cli import main
from repmetrics.report.settings import find_settings
from repmetrics.scoring.run_table import MOST_SETTINGS
from repmetrics.trust.finished_runs import choose


def write(folder: Path, value: float | None, *, name: str = "rankme", step: int = 200, **fields: Any) -> Path:
    """A run whose metric rises to this value at its last step."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for at in (0, step // 2, step):
        measured = value if value is None or at == step else value / 2
        measured = 1.0 if measured is None and at < step else measured
        convention = fields.get("convention", "centred; natural: crop")
        m = {"value": measured, "standard_error": 0.5, "d": 64, "details": {}, "convention": convention}
        entry = {"step": at, "loss": 1.0, "alarms": fields.get("alarms", []) if at == step else []}
        lines.append(json.dumps(entry | {"measurements": {name: m, "odcorr": {**m, "value": 0.5}}}))
    (folder / "measurements.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_many_or_long_settings_stay_out_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for k in (0, 1):
        run = write(tmp_path / str(k), 30.0 + k)
        entries = {f"option_{n:02}": k for n in range(MOST_SETTINGS + 2)} | {
            "a_list": f"[{k}, '/a/long/path/of/a/file']"
        }
        (run / "hparams.yaml").write_text(json.dumps(entries))
    with pytest.raises(SystemExit):
        main(["select", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "a_list" not in shown
    assert "3 more settings differ: --csv shows them" in shown


def test_settings_are_found_beside_runs_of_any_origin(tmp_path: Path) -> None:
    places = {
        "lightning/0/lightning_logs/version_0": {"lightning/0/lightning_logs/version_0/hparams.yaml": "lr: 0.1\n"},
        "hydra/0/lightning_logs/version_0": {
            "hydra/0/.hydra/config.yaml": "lr: 0.1\n",
            "hydra/0/lightning_logs/version_0/hparams.yaml": "{}\n",  # Lightning writes it for every run
        },
        "wandb/run-1": {
            "wandb/run-1/files/config.yaml": "wandb_version: 1\nlr: {desc: null, value: 0.1}\n_wandb: {}\n"
        },
        "ray/trial_1": {"ray/trial_1/params.json": '{"lr": 0.1}'},
        "sweep/trials/0000/run": {
            "sweep/trials/0000/trial.json": '{"number": 0, "params": {"lr": 0.1}, "command": []}'
        },
        "tagged/a": {"tagged/a/hparams.yaml": "lr: 0.1\nmodel: !!python/object:nn.Linear {}\n"},
        "bare/a": {},
    }
    for run, files in places.items():
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        (tmp_path / "config.yaml").write_text("lr: 7\n")  # beside all runs: not of one
        root = tmp_path / run.split("/")[0]
        settings = find_settings(tmp_path / run / "measurements.jsonl", root=root)[1]
        assert settings.get("lr") == ("0.1" if files else None), run


def test_settings_of_runs_that_are_named_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra's configuration lies in the folder that the command names."""
    for k, value in enumerate((30.0, 45.0)):
        write(tmp_path / f"{k}" / "lightning_logs" / "version_0", value)
        (tmp_path / f"{k}" / ".hydra").mkdir()
        (tmp_path / f"{k}" / ".hydra" / "config.yaml").write_text(f"lr: {k}\n")
    monkeypatch.chdir(tmp_path)
    for paths in ([Path("0"), Path("1")], [tmp_path / "0", tmp_path / "1"], [Path()]):
        assert [run.settings for run in choose(paths).runs] == [{"lr": 0.0}, {"lr": 1.0}]
    monkeypatch.chdir(tmp_path / "1")
    assert [run.settings for run in choose([Path("../0"), Path()]).runs] == [{"lr": 0.0}, {"lr": 1.0}]


def test_a_value_that_is_no_number_is_none(tmp_path: Path) -> None:
    """Python writes NaN and Infinity, which JSON does not have."""
    for name, value in {"a": 30.0, "b": 45.0, "nan": math.nan, "inf": math.inf}.items():
        write(tmp_path / name, value)
    for path in (tmp_path / "a", tmp_path / "b"):
        lines = [json.loads(line) for line in (path / "measurements.jsonl").read_text().splitlines()]
        lines[1]["measurements"]["rankme"]["value"] = math.nan  # it recovers
        lines[2] |= {"alarms": None, "loss": math.nan}
        (path / "measurements.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    choice = choose([tmp_path], by="rankme")
    assert {"nan has no value to rank", "inf has no value to rank"} <= set(choice.lines)
    assert [setting.name for setting in choice.ranking.settings] == ["b", "a"]


def test_finished_runs_are_ranked_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for k, (lr, value) in enumerate([(0.01, 30.0), (0.1, 45.0), (1.0, 12.0)]):
        write(tmp_path / "runs" / f"{k}", value)
        (tmp_path / "runs" / f"{k}" / "hparams.yaml").write_text(f"lr: {lr}\nwd: 0.1\n")
    write(tmp_path / "runs" / "alarmed", 90.0, alarms=[["complete collapse", "…"]])
    write(tmp_path / "runs" / "diverged", None)
    with pytest.raises(SystemExit, match="0"):
        main(["select", str(tmp_path / "runs"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["by"], found["best"], found["level"], found["confidence"]) == ("rankme", "1", ["1"], 1.0)
    assert [run["settings"].get("lr") for run in found["runs"]] == [0.01, 0.1, 1.0, None, None]
    assert "not all runs have view_retrieval_whitened, so that rankme decides" in " ".join(found["conclusion"])
    assert "excluded, alarm at its end: alarmed (complete collapse): inspect before using it" in found["conclusion"]
    assert "diverged diverged: rankme has no value at its end" in found["conclusion"]
    with pytest.raises(SystemExit, match="0"):
        main(["select", *(str(tmp_path / "runs" / f"{k}") for k in (0, 1)), "--by", "loss"])
    out = capsys.readouterr().out
    assert "losses compare only if their definition is the same" in " ".join(out.split())
    table = tmp_path / "settings.csv"
    table.write_text("run,tau\n0,0.5\n1,0.2\n")
    with pytest.raises(SystemExit, match="0"):
        main(["select", str(tmp_path / "runs"), "--settings", str(table), "--csv"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {row["run"]: row["param.tau"] for row in rows}["1"] == "0.2"
    assert rows[0].keys() >= {"run", "rankme", "rankme_se", "loss"}


def test_the_rule_of_the_experiment_decides_over_the_views_of_the_domain(tmp_path: Path) -> None:
    for k, value in enumerate((0.3, 0.6)):
        write(tmp_path / str(k), value, name="view_retrieval_whitened")
    choice = choose([tmp_path], domain="natural")
    assert choice.ranking.metric == "view_retrieval_whitened"
    assert choice.ranking.settings[0].name == "1"
    assert not any("needs" in line for line in choice.lines)
    assert any("stained domain needs 'stain'" in line for line in choose([tmp_path], domain="stained").lines)
    write(tmp_path / "2", 0.9, name="view_retrieval_whitened", convention="centred; weak: crop", step=100)
    with pytest.raises(ValueError, match="measured over different views"):
        choose([tmp_path])
    assert any("runs end at steps 100 to 200" in line for line in choose([tmp_path], by="odcorr").lines)


def test_bad_input_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "runs" / "a", 3.0)
    with pytest.raises(ValueError, match="needs at least 2 runs, got 1"):
        choose([tmp_path / "runs"])
    write(tmp_path / "runs" / "b", 3.0)
    with pytest.raises(ValueError, match="no run has 'lidar': there are odcorr, rankme, loss"):
        choose([tmp_path / "runs"], by="lidar")
    for option in (["--labels", "few.csv"], ["--view-set", "geometry"], ["--batch-size", "8"], ["--no-cache"]):
        with pytest.raises(SystemExit, match="2"):  # nothing would read them
            main(["select", str(tmp_path / "runs"), *option])
    table = tmp_path / "settings.csv"
    table.write_text("run,tau\nc,0.5\n")
    with pytest.raises(ValueError, match="names 'c', which is no run; there are a, b"):
        choose([tmp_path / "runs"], settings=table)
    table.write_text("tau\n0.5\n")
    with pytest.raises(ValueError, match="has no column run"):
        choose([tmp_path / "runs"], settings=table)

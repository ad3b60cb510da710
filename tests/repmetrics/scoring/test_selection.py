"""Selection without --by: the last checkpoint of a run without an alarm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from repmetrics import measure
from repmetrics.decisions.alarms import RANK_METRIC, collapse_stats
from repmetrics.decisions.run_selection import Domain
from repmetrics.scoring.score import Score
from repmetrics.scoring.selection import default_metric, labels_line, select, view_set_of

HEALTHY = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
COLLAPSED = torch.ones(200, 8) + 1e-4 * HEALTHY
FLAT = HEALTHY[:, :1].expand(200, 64) + 1e-3 * torch.randn(200, 64, generator=torch.Generator().manual_seed(1))


def scores(features: Sequence[Tensor], steps: Sequence[int | None]) -> list[Score]:
    return [
        Score(f"{k}.pt", None, step, "images", measure(x, metrics=[RANK_METRIC]), collapse_stats=collapse_stats(x))
        for k, (x, step) in enumerate(zip(features, steps, strict=True))
    ]


@pytest.mark.parametrize("bad", [COLLAPSED, FLAT])
def test_the_last_checkpoint_before_a_collapse(bad: Tensor) -> None:
    kept, choice = select(scores([bad, HEALTHY + 0.1, HEALTHY], [30, 20, 10]), by="last")
    assert [score.step for score in kept] == [10, 20, 30]
    assert (choice.position, choice.by) == (1, "last")
    assert "the last checkpoint without an alarm; the later one raises: " in choice.reason
    _, choice = select(scores([HEALTHY, HEALTHY + 0.1], [10, 20]), by="last")
    assert choice.position == 1
    _, choice = select(scores([bad, 2 * bad], [10, 20]), by="last")
    assert choice.position == 1
    assert "the last checkpoint, but every one raises an alarm, the last: " in choice.reason


def test_an_order_that_is_assumed_is_named() -> None:
    kept, choice = select(scores([HEALTHY, HEALTHY + 0.1], [None, 20]), by="last")
    assert [score.name for score in kept] == ["0.pt", "1.pt"]
    assert choice.reason.endswith("the order of training is assumed from the file names")


def test_two_checkpoints_of_one_step_are_of_several_runs() -> None:
    runs = scores([HEALTHY, 2 * HEALTHY + 0.1, HEALTHY], [10, 20, 20])
    with pytest.raises(ValueError, match=r"1\.pt and 2\.pt are both of step 20, .* a folder of its own"):
        select(runs, by="last")
    kept, _ = select([runs[0], runs[1], replace(runs[1], name="last.ckpt")], by="last")  # a copy is no other run
    assert [score.step for score in kept] == [10, 20]
    assert len(select(runs, by=RANK_METRIC)[0]) == 3


def test_the_rule_depends_on_the_files() -> None:
    run, runs = [Path("a/1.pt"), Path("a/2.pt")], [Path("a/1.pt"), Path("b/1.pt")]
    rules = [default_metric(run, checkpoints=True), default_metric(runs, checkpoints=True)]
    assert [*rules, default_metric(run, checkpoints=False)] == ["last", "view_retrieval_whitened", "rankme"]


def test_a_domain_without_effect_is_refused() -> None:
    assert view_set_of("stained", view_set=None, data=Path("d"), by="view_retrieval_whitened") == "stain"
    with pytest.raises(ValueError, match="--domain names the views of view retrieval, but the choice is by last"):
        view_set_of("stained", view_set=None, data=Path("d"), by="last")


def test_labels_choose_among_runs_only_where_they_are_worth_more_than_views(tmp_path: Path) -> None:
    runs = [Path("a/1.pt"), Path("b/1.pt")]
    few = tmp_path / "few.csv"
    few.write_text("file,label\n" + "".join(f"{k}.png,{k % 2}\n" for k in range(150)))

    def rule(domain: Domain | None, files: Sequence[Path] = runs) -> str:
        return default_metric(files, checkpoints=True, labels=str(few), domain=domain)

    assert [rule("natural"), rule("stained"), rule("custom")] == ["view_retrieval_whitened"] * 2 + ["linear_probe"]
    assert rule(None, [Path("a/1.pt"), Path("a/2.pt")]) == "last"
    with pytest.raises(ValueError, match="name the --domain, which tells whether these labels or the views choose"):
        rule(None)
    assert labels_line(str(few), by="linear_probe", domain="custom") == (
        "150 labels choose: above 100 a probe chose better than this domain's views (docs/trust.md)"
    )
    assert (labels_line(str(few), by=rule("natural"), domain="natural") or "").startswith("150 labels do not choose")
    assert labels_line("column", by=rule("natural"), domain="natural") is None

"""Choice among finished runs from their measurements alone, by the default rule or by one metric."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from repmetrics.decisions.comparability import comparison_warnings
from repmetrics.decisions.run_ranking import Ranking, RunSummary, borda_winner, conclusions, rank_runs
from repmetrics.decisions.run_selection import CONSENSUS, CONSENSUS_METRIC, DOMAIN_VIEW_SETS, Domain
from repmetrics.measurement.registry import METRICS
from repmetrics.monitoring.record import record_files
from repmetrics.report.settings import read_settings_table, varying_settings
from repmetrics.trust.runs import Evaluation, read_runs

EVIDENCE = (
    "whitened view retrieval chose best among runs on three domains, with views that suit the domain (docs/trust.md)"
)


class Choice(NamedTuple):
    """Choice among runs.

    Attributes:
        runs: All runs, in the order of the table.
        ranking: Ranking of those that can be chosen.
        lines: Conclusions and warnings, in sentences.
    """

    runs: tuple[RunSummary, ...]
    ranking: Ranking
    lines: tuple[str, ...]


def holds_runs(paths: Sequence[Path]) -> bool:
    """Whether every path is a folder with measurements of a run."""
    return all(path.is_dir() and record_files(path) for path in paths)


def read_all(paths: Sequence[Path]) -> list[Evaluation]:
    """Evaluations of the runs in one folder, or in several whose names tell them apart."""
    if len(paths) == 1:
        return read_runs(paths[0])
    return [
        item._replace(run=str(path / item.run) if item.run != "." else str(path))
        for path in paths
        for item in read_runs(path)
    ]


def choose(
    paths: Sequence[Path], *, by: str = CONSENSUS, domain: Domain | None = None, settings: Path | None = None
) -> Choice:
    """Rank the finished runs in these folders without labels.

    Args:
        paths: Folders with ``measurements.jsonl`` at any depth.
        by: Metric, "loss", or "consensus" for the default rule.
        domain: Kind of images, which says what views may ignore. Default: whatever the runs were measured with.
        settings: CSV table of settings, with a column `run`.

    Raises:
        ValueError: There are no two runs, or none has the metric.
    """
    evaluations = read_all(paths)
    if settings is not None:
        evaluations = with_settings(evaluations, read_settings_table(settings), table_path=settings)
    last = last_evaluations(evaluations)
    if len(last) < 2:
        raise ValueError(f"a choice needs at least 2 runs, got {len(last)}: with --data, it is made among checkpoints")
    metric, notes = metric_of_rule(evaluations, by=by, domain=domain)
    direction = "lower" if metric == "loss" else METRICS[metric.rpartition("/")[2]].direction
    varying = varying_settings([item.settings for item in evaluations])
    runs = [run_summary(item, [e for e in evaluations if e.run == item.run], metric, varying) for item in last]
    ranking = rank_runs(runs, metric=metric, direction=direction)
    lines = conclusions(ranking)
    if (winner := borda_winner(ranking)) is not None and winner[0] != ranking.settings[0].name:
        lines.append(f"Borda's count over {', '.join(winner[1])} prefers {winner[0]}")
    return Choice(tuple(runs), ranking, (*lines, *notes, *unfairness(last, varying, metric)))


def last_evaluations(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Last evaluation of each run."""
    return list({item.run: item for item in evaluations}.values())


def metric_of_rule(evaluations: Sequence[Evaluation], *, by: str, domain: Domain | None) -> tuple[str, list[str]]:
    """Metric that decides, and what is said about it. A run that diverged has it at an earlier evaluation."""
    measured: dict[str, set[str]] = {}
    for item in evaluations:
        measured.setdefault(item.run, set()).update(item.values)
    known, common = sorted(set.union(*measured.values())), set.intersection(*measured.values())
    if by != CONSENSUS:
        if by != "loss" and by not in known:
            raise ValueError(f"no run has {by!r}: there are {', '.join(known)}, loss")
        if by != "loss" and by.rpartition("/")[2] not in METRICS:
            raise ValueError(f"{by} is no label-free metric with a direction: choose among {', '.join(METRICS)}")
        return by, []
    if CONSENSUS_METRIC in common:
        return CONSENSUS_METRIC, [EVIDENCE, *view_notes(evaluations, domain=domain)]
    candidates = [name for name in ("rankme", *METRICS) if name in common and METRICS[name].direction != "neither"]
    metric = candidates[0] if candidates else "loss"
    note = (
        f"not all runs have {CONSENSUS_METRIC}, so that {metric} decides; in docs/trust.md RankMe beat a random "
        "choice on one of three domains, and the loss on none"
    )
    return metric, [note]


def view_notes(evaluations: Sequence[Evaluation], *, domain: Domain | None) -> list[str]:
    """Whether the views of all runs are those of the domain.

    Raises:
        ValueError: The runs were measured with different views.
    """
    with_views = [item for item in evaluations if CONSENSUS_METRIC in item.values]
    used = sorted({item.conventions.get(CONSENSUS_METRIC, "") for item in with_views})
    names = sorted({convention.rpartition("; ")[2].partition(":")[0] for convention in used})
    if len(used) > 1:
        raise ValueError(
            f"the runs were measured over different views ({', '.join(used)}): their values do not compare"
        )
    if domain is None:
        return [f"the views are {names[0]!r}: --domain says which suit the images"] if names[0] else []
    wanted = DOMAIN_VIEW_SETS[domain]
    if wanted is not None and names[0] != wanted:
        return [f"the views are {names[0]!r}, but a {domain} domain needs {wanted!r}: measure again with those views"]
    return []


def run_summary(last: Evaluation, evaluations: Sequence[Evaluation], metric: str, varying: Sequence[str]) -> RunSummary:
    """One run of the table."""
    signals = {name: (value, last.errors.get(name)) for name, value in last.values.items()}
    if not math.isnan(last.loss):
        signals["loss"] = (last.loss, None)
    had_value = any(metric in e.values or (metric == "loss" and not math.isnan(e.loss)) for e in evaluations)
    diverged = metric not in signals and had_value
    return RunSummary(
        name=last.run,
        state="diverged" if diverged else "complete",
        settings={name: _plain(last.settings[name]) for name in varying if name in last.settings},
        step=last.step,
        signals=signals,
        alarms=last.alarm_kinds or (() if not last.alarms else (f"{last.alarms} active",)),
        reason=f"{metric} has no value at its end" if diverged else "",
    )


def unfairness(last: Sequence[Evaluation], varying: Sequence[str], metric: str) -> list[str]:
    """Reasons why the runs do not compare."""
    widths = [item.width for item in last]
    lines = comparison_warnings(varying, methods=[e.method for e in last], widths=widths, metrics=[metric])
    steps = sorted({item.step for item in last})
    if len(steps) > 1:
        lines.append(f"the runs end at steps {steps[0]} to {steps[-1]}: metrics change with training by themselves")
    return lines


def with_settings(
    evaluations: Sequence[Evaluation], table: Mapping[str, Mapping[str, str]], *, table_path: Path
) -> list[Evaluation]:
    """Evaluations with the settings of a table.

    Raises:
        ValueError: A run of the table does not exist.
    """
    names = {item.run for item in evaluations}
    if unknown := sorted(set(table) - names):
        raise ValueError(
            f"{table_path.name} names {unknown[0]!r}, which is no run; there are {', '.join(sorted(names))}"
        )
    return [item._replace(settings={**item.settings, **table.get(item.run, {})}) for item in evaluations]


def to_json(choice: Choice) -> dict[str, Any]:
    """Plain types for JSON."""
    ranking = choice.ranking
    return {
        "by": ranking.metric,
        "best": ranking.settings[0].name if ranking.settings else None,
        "level": [setting.name for setting in ranking.tied] if ranking.settings else [],
        "confidence": ranking.confidence,
        "conclusion": list(choice.lines),
        "runs": [run._asdict() for run in choice.runs],
    }


def _plain(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text

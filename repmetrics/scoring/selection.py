"""Selection of a checkpoint from scores: by the last one without an alarm, or by a metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from repmetrics.data.few_labels import count_labels, is_label_table
from repmetrics.decisions.alarms import RANK_METRIC, RETRIEVAL_METRICS, Alarm, AlarmInput, alarms
from repmetrics.decisions.checkpoint_selection import Choice, last_without_alarm, select_checkpoint
from repmetrics.decisions.run_selection import (
    CONSENSUS_METRIC,
    DOMAIN_VIEW_SETS,
    WORTH_IN_LABELS,
    Domain,
    metric_for_labels,
)
from repmetrics.measurement.registry import DEFAULT_METRICS, PROBES
from repmetrics.scoring.file_names import in_natural_order
from repmetrics.scoring.score import Score, drop_duplicates

LAST = "last"
"""Name of the rule that selects the last checkpoint without an alarm."""


def files_to_compare(names: Sequence[Path], *, checkpoints: bool) -> list[Path]:
    """The checkpoints that the names stand for, or the files of embeddings, in natural order."""
    if not checkpoints:
        return in_natural_order(names)
    from repmetrics.scoring.checkpoints import find_checkpoints  # needs more packages than files of embeddings

    return find_checkpoints(names)


def default_metric(
    files: Sequence[Path], *, checkpoints: bool, labels: str | None = None, domain: Domain | None = None
) -> str:
    """Rule of the experiment (docs/trust.md) for these files.

    The last checkpoint within one folder, whitened view retrieval among several folders, or a linear probe if a CSV has
    more labels than the views are worth. Files of embeddings have neither views nor an order of training: RankMe.

    Raises:
        ValueError: A CSV of labels without the domain, which tells what they are worth.
    """
    if not checkpoints:
        return "rankme"
    if len({file.parent for file in files}) == 1:
        return LAST
    if labels is None or not is_label_table(labels):
        return CONSENSUS_METRIC
    if domain is None:
        raise ValueError(f"--labels {labels}: name the --domain, which tells whether these labels or the views choose")
    return metric_for_labels(count_labels(Path(labels)), domain)


def labels_line(labels: str | None, *, by: str, domain: Domain | None) -> str | None:
    """What a CSV of labels has to do with the choice among runs, for the reader; None if it has nothing to do with it.

    Example:
        >>> labels_line(None, by="last", domain=None) is None
        True
    """
    if labels is None or domain is None or not is_label_table(labels):
        return None
    count, worth = count_labels(Path(labels)), WORTH_IN_LABELS[domain]
    if by == "linear_probe":
        return f"{count:,} labels choose: above {worth:,} a probe chose better than this domain's views (docs/trust.md)"
    return (
        f"{count:,} labels do not choose: up to {worth:,} a probe chose no better than this domain's views "
        "(docs/trust.md); their probe is in the table"
    )


class Rule(NamedTuple):
    """What decides a choice.

    Attributes:
        by: Metric, or :data:`LAST`.
        view_set: View set to measure with; None: that of the images.
        note: What a CSV of labels has to do with it, or None.
    """

    by: str
    view_set: str | None
    note: str | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics to measure; probes come with the labels."""
        return tuple(dict.fromkeys((*DEFAULT_METRICS, *(() if self.by in (LAST, *PROBES) else (self.by,)))))


def find_rule(
    files: Sequence[Path],
    *,
    by: str | None,
    data: Path | None,
    labels: str | None,
    domain: Domain | None,
    view_set: str | None,
) -> Rule:
    """The rule that the user names, or that of the experiment.

    Raises:
        ValueError: An option that would have no effect, or one that is missing.
    """
    if by is not None:
        return Rule(by, view_set_of(domain, view_set=view_set, data=data, by=by))
    by = default_metric(files, checkpoints=data is not None, labels=labels, domain=domain)
    note = labels_line(labels, by=by, domain=domain)
    if by in PROBES:  # the domain has told what the labels are worth
        return Rule(by, view_set, note)
    return Rule(by, view_set_of(domain, view_set=view_set, data=data, by=by), note)


def view_set_of(domain: Domain | None, *, view_set: str | None, data: Path | None, by: str) -> str | None:
    """View set to measure with: the one given, or that of the domain.

    Raises:
        ValueError: The domain would have no effect.
    """
    if domain is None:
        return view_set
    if data is None or by not in RETRIEVAL_METRICS:
        raise ValueError(f"--domain names the views of view retrieval, but the choice is by {by}: leave it out")
    if view_set is not None:
        raise ValueError("--domain and --view-set exclude each other")
    return DOMAIN_VIEW_SETS[domain]


def select(results: Sequence[Score], *, by: str) -> tuple[list[Score], Choice]:
    """The scores in the order of training, without copies, and the choice among them.

    Raises:
        ValueError: The choice is the last of one run, and two checkpoints are of one step: they are of several runs.
    """
    scores = drop_duplicates(results)
    ordered = all(score.step is not None for score in scores)
    if ordered:
        scores.sort(key=lambda score: score.step or 0)
    if by != LAST:
        return scores, select_checkpoint([score.measurements for score in scores], by=by)
    for a, b in combinations(scores, 2):
        if a.step is not None and a.step == b.step:
            raise ValueError(
                f"{a.name} and {b.name} are both of step {a.step}, so the folder holds several runs, of which none is "
                f"the last: put each run into a folder of its own, or choose by a metric, as --by {CONSENSUS_METRIC}"
            )
    choice = select_last(scores)
    if not ordered:
        choice = choice._replace(reason=f"{choice.reason}; the order of training is assumed from the file names")
    return scores, choice


def select_last(scores: Sequence[Score]) -> Choice:
    """The last checkpoint of a run without an alarm; `scores` are in the order of training."""
    history = [_alarm_input(score, step=position + 1) for position, score in enumerate(scores)]
    raised: list[tuple[Alarm, ...]] = [alarms(history[: k + 1], consecutive=1) for k in range(len(history))]
    return last_without_alarm(raised)


def _alarm_input(score: Score, *, step: int) -> AlarmInput:
    """What the alarms read, at the checkpoint's own step if it is known."""
    views = [score.measurements[name] for name in RETRIEVAL_METRICS if name in score.measurements]
    known = len(views) == len(RETRIEVAL_METRICS) and not any(math.isnan(m.value) for m in views)
    return AlarmInput(
        step=step if score.step is None else score.step,
        rank=score.measurements.get(RANK_METRIC),
        collapse_stats=score.collapse_stats,
        nonfinite=0,
        retrieval=tuple(views) if known else (),
    )

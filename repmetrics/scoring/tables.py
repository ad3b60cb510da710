"""Show scores, comparisons and choices as tables and sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from repmetrics.decisions.checkpoint_selection import Choice, Comparison
from repmetrics.measurement.result import Measurement
from repmetrics.measurement.titles import names_by_text
from repmetrics.scoring.fitted_table import FittedTable
from repmetrics.scoring.score import Score, drop_duplicates, is_copy

ARROWS = {"higher": "↑", "lower": "↓", "neither": "·"}


def format_value(measurement: Measurement) -> str:
    """The value, to the decimal place of the second significant digit of its error; six digits without an error."""
    value, error = measurement.value, measurement.standard_error
    if math.isnan(value):
        return "–"
    if not error:
        return f"{value:.6g}"
    return f"{value:.{error_places(error)}f}"


def format_error(measurement: Measurement) -> str:
    """The standard error to two significant digits, or a dash."""
    error = measurement.standard_error
    return "–" if error is None else f"{error:.{error_places(error)}f}"


def format_margin(measurement: Measurement) -> str:
    """Half-width of the 95 % interval with the decimals of the standard error, or a dash."""
    error, margin = measurement.standard_error, measurement.margin
    return "–" if error is None or margin is None else f"{margin:.{error_places(error)}f}"


def error_places(error: float) -> int:
    """Number of decimals that show two significant digits of `error`, at least one.

    Example:
        >>> error_places(0.0123), error_places(45.0)
        (3, 1)
    """
    return 4 if error == 0 else min(max(1 - math.floor(math.log10(error)), 1), 12)


def score_table(score: Score) -> RenderableType:
    """One score: a row per metric; below, the conventions and what limits the values."""
    headings = ("metric", "value", "± s.e.", "± 95 %", "N", "D", "groups")
    rows = [
        (
            f"{m.name} {ARROWS[m.direction]}",
            format_value(m),
            format_error(m),
            format_margin(m),
            f"{m.n}",
            f"{m.d}",
            "–" if m.groups is None else f"{m.groups}",
        )
        for m in score.measurements.values()
    ]
    lines = [*conventions([score]), *footnotes(score), *_speed(score)]
    return _with_notes(_title(score), FittedTable(headings, rows), lines)


def _speed(score: Score) -> list[str]:
    """Device and rate of the encoder, if it computed features."""
    if score.images_per_second is None:
        return []
    return [f"embedded on {score.device}, {score.images_per_second:.3g} images/s"]


def conventions(scores: Sequence[Score]) -> list[str]:
    """Direction and convention of each metric, in one line."""
    measured = {m.name: m for score in scores for m in score.measurements.values()}
    better = {"higher": "↑ higher is better", "lower": "↓ lower is better", "neither": "· neither direction is better"}
    return [f"{m.name}: {better[m.direction]}; {m.convention}" for m in measured.values()]


def _title(score: Score) -> str:
    step = "" if score.step is None else f" · step {score.step}"
    encoder = "" if score.encoder is None else f" · {score.encoder}"
    return f"{score.name}{encoder}{step} on {score.data}"


def ranking_table(scores: Sequence[Score]) -> RenderableType:
    """Several scores on the same data: a row per checkpoint and a column per metric, with errors and bars.

    Of scores that are copies of one another, one is shown, with a note.
    """
    scores, copies = without_copies(scores)
    names = list(dict.fromkeys(name for score in scores for name in score.measurements))
    headings = ["checkpoint", "step"]
    for name in names:
        direction = next(s.measurements[name].direction for s in scores if name in s.measurements)
        headings.append(f"{name} {ARROWS[direction]}")
    tops = {name: max(_upper(s.measurements[name]) for s in scores if name in s.measurements) for name in names}
    rows: list[tuple[str | Text, ...]] = [
        (
            score.name,
            "–" if score.step is None else str(score.step),
            *(_cell(score.measurements.get(name), tops[name]) for name in names),
        )
        for score in scores
    ]
    shared = dict.fromkeys(line for score in scores for line in footnotes(score))
    lines = [*copies, *conventions(scores), *shared]
    count = f"{len(scores)} score{'s' * (len(scores) > 1)}"
    return _with_notes(f"{count} on {scores[0].data}", FittedTable(headings, rows, keys=2), lines)


def without_copies(scores: Sequence[Score]) -> tuple[list[Score], list[str]]:
    """Scores without those that repeat another one, and a note about each of these.

    Of two copies, the one whose name has a number stays: "step=300.ckpt", not "last.ckpt".
    """
    by_name = sorted(scores, key=lambda score: not any(c.isdigit() for c in Path(score.name).name))
    kept = drop_duplicates(by_name)
    notes = []
    for score in scores:
        if not any(score is other for other in kept):
            original = next(other for other in kept if is_copy(score, other))
            notes.append(f"{score.name} is a copy of {original.name}")
    return [score for score in scores if any(score is other for other in kept)], notes


def _with_notes(title: str, table: RenderableType, lines: Sequence[str]) -> RenderableType:
    """Title, table and notes; title and notes are not wrapped to the table's width."""
    return Group(Text(title, style="bold"), table, *(Text(line) for line in lines))


def sorted_by(scores: Sequence[Score], metric: str | None) -> list[Score]:
    """Scores, best first by a metric; those without it, or with NaN, last."""
    if metric is None:
        return list(scores)
    direction = next((s.measurements[metric].direction for s in scores if metric in s.measurements), None)
    if direction is None:
        raise ValueError(f"nothing to sort by: {metric!r} was not measured")
    if direction == "neither":
        raise ValueError(f"{metric} has no better direction: sort by another metric")
    sign = -1 if direction == "higher" else 1

    def rank(score: Score) -> float:
        m = score.measurements.get(metric)
        return math.inf if m is None or math.isnan(m.value) else sign * m.value

    return sorted(scores, key=rank)


def comparison_table(first: Score, second: Score, verdicts: Sequence[Comparison]) -> RenderableType:
    """B compared with A: a row per metric, and a summary."""
    headings = ("metric", "A", "B", "B − A", "± s.e.", "± 95 %", "B is")
    rows = []
    for v in verdicts:
        places = 4 if not v.standard_error else error_places(v.standard_error)
        errors = ("–" if e is None else f"{e:.{places}f}" for e in (v.standard_error, v.margin))
        values = (format_value(score.measurements[v.name]) for score in (first, second))
        arrow = ARROWS[first.measurements[v.name].direction]
        rows.append((f"{v.name} {arrow}", *values, f"{v.change:+.{places}f}", *errors, v.outcome))
    title = f"B = {second.name} against A = {first.name} on {first.data}"
    lines = _once([(v.reason, v.name) for v in verdicts if v.reason is not None], total=len(verdicts))
    freedom = {v.degrees_of_freedom for v in verdicts if v.degrees_of_freedom is not None}
    if freedom:
        lines.append(
            "errors are those of the paired difference over the same groups; the 95 % interval has "
            f"{', '.join(f'{f:.3g}' for f in sorted(freedom))} degrees of freedom"
        )
    return _with_notes(title, FittedTable(headings, rows), [*lines, comparison_sentence(verdicts)])


def comparison_sentence(verdicts: Sequence[Comparison]) -> str:
    """Summary of comparisons in one sentence.

    Example:
        >>> better, same = Comparison("rankme", 3.0, 0.5, "better"), Comparison("odcorr", 0.0, 0.1, "no difference")
        >>> comparison_sentence([better, same])
        'B is better than A beyond noise on rankme; no difference on odcorr.'
    """
    outcomes = {
        outcome: [v.name for v in verdicts if v.outcome == outcome]
        for outcome in ("better", "worse", "no difference", "unknown")
    }
    parts = [
        f"{start}{', '.join(outcomes[outcome])}"
        for outcome, start in (
            ("better", "B is better than A beyond noise on "),
            ("worse", "B is worse than A beyond noise on "),
            ("no difference", "no difference on "),
            ("unknown", "not known on "),
        )
        if outcomes[outcome]
    ]
    return "; ".join(parts) + "."


def choice_table(scores: Sequence[Score], choice: Choice) -> RenderableType:
    """The checkpoints, and the one to keep with the reason, the confidence and the limits of the choice."""
    kept = scores[choice.position]
    lines = [f"keep {kept.name}: {choice.reason}", f"how sure: {choice.confidence}"]
    runs = list(dict.fromkeys(score.run or "." for score in scores))
    if len(runs) > 1:
        lines.append(
            f"a choice among {len(runs)} folders ({', '.join(runs)}): if they are separate training runs, another seed "
            "may change the metric by more than these errors; name one folder to choose within its run"
        )
    else:
        if choice.position == len(scores) - 1:
            lines.append("this is also the last checkpoint: the metric adds nothing to training time here")
        lines.append("a choice within one training run: another seed may change the metric by more than these errors")
    return Group(ranking_table(scores), *(Text(line) for line in lines))


def _upper(m: Measurement) -> float:
    value = abs(m.value) + (m.standard_error or 0.0)
    return 0.0 if math.isnan(value) else value


def _cell(m: Measurement | None, top: float) -> Text:
    if m is None or math.isnan(m.value):
        return Text("–")
    error = "" if m.standard_error is None else f" ± {format_error(m)}"
    return Text(f"{format_value(m)}{error} ").append(size_bar(m.value, m.standard_error or 0.0, top=top), style="dim")


def size_bar(value: float, error: float, *, top: float, width: int = 8) -> str:
    """Bar whose length is the value; the range of the error is shaded.

    Example:
        >>> size_bar(6.0, 1.0, top=8.0)
        '█████▒▒ '
    """
    scale = width / top if top > 0 else 0.0
    lower, upper = (min(max(round((abs(value) + e) * scale), 0), width) for e in (-error, error))
    return ("█" * lower + "▒" * (upper - lower)).ljust(width)


def footnotes(score: Score) -> list[str]:
    """Reasons, warnings, assumptions and unreadable images of a score, each once, with the metrics it concerns."""
    measured = score.measurements.values()
    pairs = [(line, m.name) for m in measured for line in (*((m.reason,) if m.reason else ()), *m.warnings)]
    lines = _once(pairs, total=len(measured))
    for m in score.measurements.values():
        lines.extend(_baseline_notes(m))
    freedom = {(m.groups, m.degrees_of_freedom) for m in score.measurements.values() if m.margin is not None}
    lines.extend(f"errors of {g} groups: the 95 % interval has {f:.3g} degrees of freedom" for g, f in freedom)
    lines.extend(score.notes)
    if score.unreadable:
        listed = "; ".join(f"{item.name} ({item.reason})" for item in score.unreadable[:5])
        more = f"; and {len(score.unreadable) - 5} more" if len(score.unreadable) > 5 else ""
        lines.append(f"skipped {len(score.unreadable)} unreadable images: {listed}{more}")
    return lines


def _once(lines: Iterable[tuple[str, str]], *, total: int) -> list[str]:
    """Each line once, with the names of its metrics if it does not concern all.

    Example:
        >>> _once([("no groups", "rankme"), ("no groups", "odcorr"), ("few rows", "odcorr")], total=2)
        ['no groups', 'odcorr: few rows']
    """
    return [
        line if len(names) == total else f"{', '.join(names)}: {line}" for line, names in names_by_text(lines).items()
    ]


def _baseline_notes(m: Measurement) -> list[str]:
    """Value to expect without any learning."""
    if "null_floor" in m.details:
        return [f"{m.name}: independent features would give {m.details['null_floor']:.4g} at N = {m.n}"]
    if "chance" in m.details:
        return [f"{m.name}: chance is {m.details['chance']:.4g}, classes: {m.details['classes']:.0f}"]
    return []

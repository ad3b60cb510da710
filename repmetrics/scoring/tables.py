"""Scores, comparisons and choices → tables and sentences for people."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from repmetrics.decisions.checkpoint_selection import Choice, Comparison
from repmetrics.measurement.result import Measurement
from repmetrics.scoring.score import Score

ARROWS = {"higher": "↑", "lower": "↓", "neither": "·"}
PIPE_WIDTH = 400  # columns where the output is no terminal: tables are no wider than they need


def format_value(measurement: Measurement) -> str:
    """The value with as many digits as its error supports, six where there is none.

    Two significant digits of the error are kept, and the value to the same place.
    """
    value, error = measurement.value, measurement.standard_error
    if math.isnan(value):
        return "–"
    if not error:
        return f"{value:.6g}"
    return f"{value:.{error_places(error)}f}"


def format_error(measurement: Measurement) -> str:
    """The standard error to two significant digits, or a dash: the reason stands below the table."""
    error = measurement.standard_error
    return "–" if error is None else f"{error:.{error_places(error)}f}"


def error_places(error: float) -> int:
    """Decimals that show two significant digits of `error`, at least one.

    Example:
        >>> error_places(0.0123), error_places(45.0)
        (3, 1)
    """
    return 4 if error == 0 else min(max(1 - math.floor(math.log10(error)), 1), 12)


def score_table(score: Score) -> RenderableType:
    """One score: a row a metric, and below it every reason, warning and assumption once."""
    table = Table()
    for heading in ("metric", "better"):
        table.add_column(heading, no_wrap=True)
    for heading in ("value", "± s.e.", "N", "D", "groups"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("convention", style="dim", overflow="fold")
    for m in score.measurements.values():
        table.add_row(
            m.name,
            f"{ARROWS[m.direction]} {m.direction}",
            format_value(m),
            format_error(m),
            f"{m.n}",
            f"{m.d}",
            "–" if m.groups is None else f"{m.groups}",
            m.convention,
        )
    return _with_notes(_title(score), table, footnotes(score))


def _title(score: Score) -> str:
    step = "" if score.step is None else f" · step {score.step}"
    encoder = "" if score.encoder is None else f" · {score.encoder}"
    return f"{score.name}{encoder}{step} on {score.data}"


def ranking_table(scores: Sequence[Score]) -> RenderableType:
    """Several scores of the same data: a row a checkpoint, a column a metric, with errors and bars of their sizes."""
    names = list(dict.fromkeys(name for score in scores for name in score.measurements))
    table = Table()
    table.add_column("checkpoint", overflow="fold")
    table.add_column("step", justify="right")
    for name in names:
        better = next(s.measurements[name].direction for s in scores if name in s.measurements)
        table.add_column(f"{name} {ARROWS[better]}", justify="right", no_wrap=True)
    tops = {name: max(_upper(s.measurements[name]) for s in scores if name in s.measurements) for name in names}
    for score in scores:
        cells = [_cell(score.measurements.get(name), tops[name]) for name in names]
        table.add_row(score.name, "–" if score.step is None else str(score.step), *cells)
    shared = dict.fromkeys(line for score in scores for line in footnotes(score))
    return _with_notes(f"{len(scores)} scores on {scores[0].data}", table, list(shared))


def _with_notes(title: str, table: Table, lines: Sequence[str]) -> RenderableType:
    """A table between its title and what is to be said of it, neither of which is folded to its width."""
    return Group(Text(title, style="bold"), table, *(Text(line) for line in lines))


def sorted_by(scores: Sequence[Score], metric: str | None) -> list[Score]:
    """Best first by a metric; scores without it, or where it is NaN, last.

    Raises:
        ValueError: no score has that metric, or it has no better direction.
    """
    if metric is None:
        return list(scores)
    found = [score.measurements[metric] for score in scores if metric in score.measurements]
    if not found:
        raise ValueError(f"nothing to sort by: {metric!r} was not measured")
    better = found[0].direction
    if better == "neither":
        raise ValueError(f"{metric} has no better direction: sort by another")
    sign = -1 if better == "higher" else 1

    def place(score: Score) -> float:
        m = score.measurements.get(metric)
        return math.inf if m is None or math.isnan(m.value) else sign * m.value

    return sorted(scores, key=place)


def comparison_table(first: Score, second: Score, verdicts: Sequence[Comparison]) -> RenderableType:
    """B against A: a row a metric, and a sentence that says what it comes to."""
    table = Table()
    table.add_column("metric", no_wrap=True)
    for heading in ("A", "B", "B − A", "± s.e. (paired)", "z"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("B is")
    for v in verdicts:
        places = 4 if not v.standard_error else error_places(v.standard_error)
        error, z = ("–", "–") if v.standard_error is None else (f"{v.standard_error:.{places}f}", f"{v.z:+.1f}")
        values = (format_value(score.measurements[v.name]) for score in (first, second))
        told = v.outcome if v.reason is None else f"{v.outcome}: {v.reason}"
        table.add_row(v.name, *values, f"{v.change:+.{places}f}", error, z, told)
    title = f"B = {second.name} against A = {first.name} on {first.data}"
    return _with_notes(title, table, [summarize(verdicts)])


def summarize(verdicts: Sequence[Comparison]) -> str:
    """What the verdicts come to, in one sentence.

    Example:
        >>> summarize([Comparison("rankme", 3.0, 0.5, "better"), Comparison("odcorr", 0.0, 0.1, "no difference")])
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
    """The checkpoints with the chosen one named, why, how sure, and the baseline it has to beat."""
    kept = scores[choice.position]
    lines = [f"keep {kept.name}: {choice.reason}", f"how sure: {choice.confidence}"]
    runs = list(dict.fromkeys(score.run or "." for score in scores))
    if len(runs) > 1:
        lines.append(
            f"a choice among {len(runs)} folders ({', '.join(runs)}): if they are training runs of their own, another "
            "seed may move the metric more than these errors; name one folder to choose within its run"
        )
    else:
        if choice.position == len(scores) - 1:
            lines.append("this is also the last checkpoint: here the metric chose as a clock would")
        lines.append("a choice within one training run; another seed may move the metric more than these errors")
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
    """A bar as long as the value, shaded where the error leaves it open.

    Example:
        >>> size_bar(6.0, 1.0, top=8.0)
        '█████▒▒ '
    """
    scale = width / top if top > 0 else 0.0
    solid, open_end = (min(max(round((abs(value) + e) * scale), 0), width) for e in (-error, error))
    return ("█" * solid + "▒" * (open_end - solid)).ljust(width)


def footnotes(score: Score) -> list[str]:
    """Why an error is missing, what to beware of, what was assumed, what was left out; each once, with its metrics."""
    told: dict[str, list[str]] = {}
    for m in score.measurements.values():
        for line in (*((m.reason,) if m.reason else ()), *m.warnings):
            told.setdefault(line, []).append(m.name)
    lines = [
        line if len(names) == len(score.measurements) else f"{', '.join(names)}: {line}" for line, names in told.items()
    ]
    for m in score.measurements.values():
        lines.extend(_baseline_notes(m))
    lines.extend(score.notes)
    if score.unreadable:
        named = "; ".join(f"{item.name} ({item.reason})" for item in score.unreadable[:5])
        more = f"; and {len(score.unreadable) - 5} more" if len(score.unreadable) > 5 else ""
        lines.append(f"skipped {len(score.unreadable)} unreadable images: {named}{more}")
    return lines


def _baseline_notes(m: Measurement) -> list[str]:
    """What the value would be if nothing had been learnt."""
    if "null_floor" in m.details:
        return [f"{m.name}: independent features would give {m.details['null_floor']:.4g} at N = {m.n}"]
    if "chance" in m.details:
        return [f"{m.name}: chance is {m.details['chance']:.4g}, classes: {m.details['classes']:.0f}"]
    return []


def results_console() -> Console:
    """Standard output; wide where it is no terminal, so that a pipe or a file gets whole lines."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)

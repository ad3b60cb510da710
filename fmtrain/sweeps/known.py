"""What is known before a study begins: settings to try first, and finished runs of any origin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from optuna import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from fmtrain.sweeps.config import Sweep
from fmtrain.sweeps.parameters import choice_label, is_inside
from repmetrics.trust.runs import Evaluation, read_runs


def add_known(study: Study, sweep: Sweep, *, log: Callable[[str], None]) -> None:
    """Queue the known settings and add the finished runs, each once."""
    trials = study.get_trials(deepcopy=False)
    queued = [t.system_attrs.get("fixed_params") for t in trials] + [t.params for t in trials]
    for setting in sweep.first:
        if dict(setting) not in queued:
            study.enqueue_trial(dict(setting))
    present = {t.user_attrs.get("imported") for t in trials}
    for folder in sweep.finished:
        runs: dict[str, list[Evaluation]] = {}
        for item in read_runs(folder):
            runs.setdefault(str(folder.resolve() / item.run), []).append(item)
        for name, evaluations in runs.items():
            if name not in present:
                study.add_trial(imported_trial(name, evaluations, sweep))
                log(f"imported {name}")


def imported_trial(name: str, evaluations: list[Evaluation], sweep: Sweep) -> FrozenTrial:
    """Completed trial of a finished run, with its last evaluation."""
    last = evaluations[-1]
    params = {key: setting(last.settings, key, sweep=sweep, run=name) for key in sweep.parameters}
    if absent := [metric for metric in sweep.metrics if metric not in signals(last)]:
        raise ValueError(f"{name} has no {' and '.join(absent)} at its end: it cannot be imported")
    measured = signals(last)
    summary = {"step": last.step, "alarms": last.alarms, "signals": measured}
    marked = {"ending": ["collapsed", "alarm at its end"]} if last.alarms else {}
    return create_trial(
        state=TrialState.COMPLETE,
        values=[measured[metric][0] for metric in sweep.metrics],
        params=params,
        distributions=dict(sweep.parameters),
        user_attrs={"look": summary, "folder": str(Path(name)), "imported": name, **marked},
    )


def signals(evaluation: Evaluation) -> dict[str, tuple[float, float | None]]:
    """Values with errors, and the loss."""
    values = {key: (value, evaluation.errors.get(key)) for key, value in evaluation.values.items()}
    return values if evaluation.loss != evaluation.loss else values | {"loss": (evaluation.loss, None)}


def setting(settings: Mapping[str, str], key: str, *, sweep: Sweep, run: str) -> Any:
    """Value of a parameter in the settings of a run, in the type that the sweep gives it."""
    import yaml

    candidates = [name for name in settings if name == key or name.replace(".init_args", "") == key]
    if not candidates:
        raise ValueError(f"{run} states no {key}: it cannot be imported")
    text = settings[candidates[0]]
    for value in (text, choice_label(yaml.safe_load(text)), *_numbers(text)):
        if is_inside(value, sweep.parameters[key]):
            return value
    raise ValueError(f"{run} has {key} = {text}, outside the range of the sweep: extend the range to import it")


def _numbers(text: str) -> list[float]:
    try:
        return [float(text)]
    except ValueError:
        return []

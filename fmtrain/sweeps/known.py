"""What is known before a study begins: settings to try first, and finished runs of any origin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from optuna import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from fmtrain.sweeps.parameters import choice_label, is_inside
from fmtrain.sweeps.settings import Sweep

if TYPE_CHECKING:
    from repmetrics.trust.runs import Evaluation


def add_known(study: Study, sweep: Sweep, *, log: Callable[[str], None]) -> None:
    """Queue the known settings and add the finished runs, each once."""
    trials = study.get_trials(deepcopy=False)
    queued = [t.system_attrs.get("fixed_params") for t in trials] + [t.params for t in trials]
    for setting in sweep.first:
        if dict(setting) not in queued:
            study.enqueue_trial(dict(setting))
    present = {t.user_attrs.get("imported") for t in trials}
    for folder in sweep.finished:
        from repmetrics.trust.runs import read_runs  # loads torch

        runs: dict[str, list[Evaluation]] = {}
        for item in read_runs(folder):
            runs.setdefault(str(folder.resolve() / item.run), []).append(item)
        for name, evaluations in runs.items():
            if name not in present:
                study.add_trial(imported_trial(name, evaluations, sweep))
                log(f"imported {name}")


def imported_trial(name: str, evaluations: list[Evaluation], sweep: Sweep) -> FrozenTrial:
    """Trial of a finished run, with its last evaluation. One that diverged or collapsed ranks below complete ones."""
    last = evaluations[-1]
    params = {key: setting(last.settings, key, sweep=sweep, run=name) for key in sweep.parameters}
    measured = signals(last)
    absent = [metric for metric in sweep.metrics if metric not in measured]
    if never := [metric for metric in absent if not any(metric in signals(e) for e in evaluations)]:
        raise ValueError(f"{name} has no {' and '.join(never)}: it cannot be imported")
    ending = None
    if absent:
        ending = ["diverged", f"{' and '.join(absent)} has no value at its end"]
    elif last.alarms:
        ending = ["collapsed", "alarm at its end"]
    metric = sweep.metrics[0]
    history = {e.step: signals(e) for e in evaluations if e.step > 0 and len(sweep.metrics) == 1}
    return create_trial(
        state=TrialState.COMPLETE if ending is None else TrialState.PRUNED,
        values=[measured[metric][0] for metric in sweep.metrics] if ending is None else None,
        params=params,
        distributions=dict(sweep.parameters),
        intermediate_values={step: values[metric][0] for step, values in history.items() if metric in values},
        user_attrs={
            "look": {"step": last.step, "alarms": last.alarms, "signals": measured},
            "folder": name,
            "imported": name,
            **({} if ending is None else {"ending": ending}),
        },
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

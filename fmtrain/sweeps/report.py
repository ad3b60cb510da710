"""What `fmtrain sweep` prints: the trials of a study as a table, as JSON or as CSV."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

from optuna.trial import FrozenTrial
from rich.console import Console
from rich.live import Live

from fmtrain.sweeps import results
from fmtrain.sweeps.config import Sweep
from fmtrain.sweeps.study import open_existing, open_storage
from repmetrics.scoring.tables import results_console

Form = Literal["table", "json", "csv"]


@contextmanager
def live_table(sweep: Sweep, console: Console) -> Iterator[Callable[[Sequence[FrozenTrial]], None]]:
    """Show the trials below the messages as long as the block runs, if the console is a terminal.

    Yields:
        Function that shows these trials from now on.
    """
    if not console.is_terminal:
        yield lambda trials: None
        return
    with Live(console=console, transient=True, auto_refresh=False) as live:

        def show_trials(trials: Sequence[FrozenTrial]) -> None:
            live.update(results.table(results.rows(trials, sweep, running=True), sweep, {}), refresh=True)

        yield show_trials


def show(sweep: Sweep, *, form: Form, log: Callable[[str], None], probe: bool = True) -> None:
    """Print the trials so far.

    Args:
        sweep: Sweep.
        form: Form of the output.
        log: Called with a line where there is nothing to show.
        probe: Whether to probe the best trials, if the sweep has labels.
    """
    at_once = replace(sweep, storage=replace(sweep.storage, patience_seconds=0.0))
    study = open_existing(sweep, open_storage(at_once, log=log))
    rows = results.rows(study.get_trials(deepcopy=False), sweep)
    if not rows:
        log("no trial is finished yet")
        return
    probes = results.probe_best(rows, sweep, sweep.probe) if probe and sweep.probe is not None else {}
    if form == "json":
        print(json.dumps(results.to_json(rows, sweep, probes), indent=2))
    elif form == "csv":
        print(results.to_csv(rows), end="")
    else:
        results_console().print(results.table(rows, sweep, probes))
        for line in results.importance(study, sweep):
            results_console().print(line)

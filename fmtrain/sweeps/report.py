"""What `fmtrain sweep` prints: messages, and the trials of a study as a table, as JSON or as CSV."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from optuna.trial import FrozenTrial
from rich.console import Console
from rich.live import Live

from fmtrain.sweeps import results
from fmtrain.sweeps.driver import NoTrialCompletedError, run_sweep
from fmtrain.sweeps.preflight import check_runs_apart
from fmtrain.sweeps.settings import Sweep
from fmtrain.sweeps.study import open_existing
from repmetrics.decisions.comparability import comparison_warnings
from repmetrics.scoring.fitted_table import results_console

Form = Literal["table", "json", "csv"]


def run_and_show(
    sweep: Sweep, *, form: Form, again: str, retry_crashed: bool = False, seconds: float | None = None
) -> None:
    """Check and drive a sweep with messages on stderr, and print its trials at its end, also after Ctrl-C.

    Args:
        sweep: Sweep.
        form: Form of the output.
        again: Name of the sweep file, for the message after Ctrl-C.
        retry_crashed: Whether to run the trials again that crashed in earlier calls.
        seconds: Time after which the trials save and the driver ends, or None.
    """
    start = time.monotonic()
    console = Console(stderr=True)
    log = logger(console)
    sweep = check_runs_apart(sweep)
    log(f"study {sweep.study} in {sweep.out}")
    for warning in comparison_warnings(list(sweep.parameters), metrics=sweep.metrics):
        log(f"warning: {warning}")
    if sweep.command is not None and sweep.view_set is not None:
        log(f"warning: the rule needs views {sweep.view_set!r}; whether the command measures with them is not checked")
    try:
        with live_table(sweep, console) as show_trials:
            left = None if seconds is None else seconds - (time.monotonic() - start)
            run_sweep(sweep, log=log, again=again, on_change=show_trials, retry_crashed=retry_crashed, seconds=left)
    except (KeyboardInterrupt, NoTrialCompletedError):
        show(sweep, form=form, log=log, probe=False)
        raise
    show(sweep, form=form, log=log)


def logger(console: Console) -> Callable[[str], None]:
    """Function that prints a line as it is, above a live table."""
    return lambda line: console.print(line, soft_wrap=True, highlight=False, markup=False)


@contextmanager
def live_table(sweep: Sweep, console: Console) -> Iterator[Callable[[Sequence[FrozenTrial]], None] | None]:
    """Show the trials below the messages as long as the block runs, if the console is a terminal.

    Yields:
        Function that shows these trials from now on; None if the console is no terminal.
    """
    if not console.is_terminal:
        yield None
        return
    with Live(console=console, transient=True, auto_refresh=False) as live:

        def show_trials(trials: Sequence[FrozenTrial]) -> None:
            rows = results.rows(trials, sweep, running=True)
            live.update(results.table(rows, sweep, {}, height=console.height), refresh=True)

        yield show_trials


def show(sweep: Sweep, *, form: Form, log: Callable[[str], None], probe: bool = True) -> None:
    """Print the trials so far, with those that are running.

    Args:
        sweep: Sweep.
        form: Form of the output.
        log: Called with a line where there is nothing to show.
        probe: Whether to probe the best trials, if the sweep has labels.
    """
    trials = open_existing(sweep, log=log).get_trials(deepcopy=False)
    rows = results.rows(trials, sweep, running=True)
    probes = results.probe_best(rows, sweep, sweep.probe) if probe and sweep.probe is not None else {}
    if form == "json":
        print(json.dumps(results.to_json(rows, sweep, probes), indent=2))
    elif not rows:
        log("no trial is finished yet")
    elif form == "csv":
        print(results.to_csv(rows), end="")
    else:
        results_console().print(results.table(rows, sweep, probes))
        for line in results.importance(trials, sweep):
            results_console().print(line)

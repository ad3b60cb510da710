"""`fmtrain demo`: synthetic slides, then the commands that a user runs on real ones."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fmtrain.slides.synthetic import write_slides
from repmetrics.atomic_write import write_text
from repmetrics.measurement.result import format_value
from repmetrics.monitoring.record import read_jsonl

COLUMNS = {
    "rankme": "RankMe ↑",
    "rankme_centered": "RankMe, centered ↑",
    "odcorr": "ODCorr ↓",
    "linear_probe": "linear probe ↑",
}
MARKER = "demo.txt"
"""File that is written first, so that --overwrite also deletes an interrupted demo."""
REL_TOL = 1e-9  # the monitor and `repmetrics score` measure the same features
Row = Mapping[str, Any]  # one line of measurements.jsonl


def demo(
    out: Path, *, slides: int, slide_px: int, held_out: int, steps: int, config: str, extra: Sequence[str]
) -> None:
    """Run all commands once, and show each as a user would type it.

    Args:
        out: Empty or new folder.
        slides: Number of slides to draw.
        slide_px: Side of a slide in pixels, at 0.5 µm per pixel.
        held_out: Number of held-out patches.
        steps: Number of training steps.
        config: Name of the training configuration.
        extra: Further arguments of `fmtrain fit`.
    """
    console = Console(stderr=True)
    write_text(out / MARKER, "Written by fmtrain demo. --overwrite deletes this folder.\n")
    console.print(f"drawing {slides} slides of {slide_px} px into {out / 'slides'}", highlight=False)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("slides", total=slides)
        write_slides(
            out / "slides", count=slides, size_px=slide_px, mpp=0.5, seed=0, on_slide=lambda _: progress.advance(task)
        )

    manifest, run = out / "manifest.json", out / "run"
    checkpoint = run / "checkpoints" / "last.ckpt"
    run_program(
        ["fmtrain", "manifest", str(out / "slides"), "--out", str(manifest), "--held-out", str(held_out),
         "--size-px", "64"],
        console,
    )  # fmt: skip
    run_program(
        ["fmtrain", "fit", "--config", config, "--out", str(run), "--data.manifest", str(manifest),
         "--trainer.max_steps", str(steps), *extra],
        console,
    )  # fmt: skip
    run_program(["repmetrics", "score", str(checkpoint), "--data", str(manifest)], console)
    scored = out / "score.json"
    run_program(["repmetrics", "score", str(checkpoint), "--data", str(manifest), "--json"], console, output=scored)

    report = out / "report.html"
    run_program(["repmetrics", "report", str(run), "--out", str(report)], console)

    rows = read_jsonl(run / "measurements.jsonl")
    Console().print(table(rows), *footnotes(rows), sep="\n")
    (score,) = json.loads(scored.read_text(encoding="utf-8"))["scores"]
    if different := differences(rows[-1]["measurements"], score["measurements"]):
        raise RuntimeError(f"the checkpoint's score differs from the monitor's last row: {'; '.join(different)}")
    console.print(agreement(checkpoint), highlight=False)
    console.print(f"Open the report in a browser:  [bold]{shlex.quote(str(report))}", highlight=False, soft_wrap=True)
    command = shlex.join([typed_name("repmetrics"), "board", str(run)])
    console.print(f"Open the board:  [bold]{command}", highlight=False, soft_wrap=True)


def agreement(checkpoint: str | Path) -> str:
    """What the comparison of the last row with `repmetrics score` holds for, and what it does not."""
    return (
        f"The values of the last row are those that `repmetrics score` prints for {checkpoint}, to {REL_TOL:g}. "
        "Their errors may differ: the score has exact jackknife errors, and the monitor has errors to first order."
    )


def typed_name(program: str) -> str:
    """Name of an installed program that works in the terminal: its path if it is not on PATH."""
    installed = Path(sysconfig.get_path("scripts")) / program
    return program if shutil.which(program) == str(installed) else os.path.relpath(installed)


def run_program(command: Sequence[str], console: Console, *, output: Path | None = None) -> None:
    """Show a command and run it from this installation. With `output`, write its output into a file."""
    redirection = "" if output is None else f" > {shlex.quote(str(output))}"
    console.print(f"\n[bold]$ {shlex.join(command)}{redirection}", highlight=False, soft_wrap=True)
    program = Path(sysconfig.get_path("scripts")) / command[0]
    pipe = None if output is None else subprocess.PIPE
    done = subprocess.run([program, *command[1:]], stdout=pipe, text=True, check=False)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        raise ChildProcessError(
            f"`{command[0]} {command[1]}` failed with exit code {done.returncode}: the reason is above"
        )
    if output is not None:
        write_text(output, done.stdout)


def table(rows: Sequence[Row]) -> Table:
    """One row per evaluation, each value with its standard error."""
    result = Table(title="The representation of held-out patients during training", title_justify="left")
    result.add_column("step", justify="right")
    for heading in COLUMNS.values():
        result.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        result.add_row(str(row["step"]), *(cell(row["measurements"].get(name)) for name in COLUMNS))
    return result


def cell(measurement: Mapping[str, Any] | None) -> str:
    """A value with its standard error. Without an error, an asterisk refers to the reason below the table.

    Example:
        >>> cell({"value": 43.21, "standard_error": 1.234}), cell({"value": 0.5, "standard_error": None})
        ('43.2 ± 1.2', '0.5 *')
    """
    if measurement is None or measurement["value"] is None:
        return "–"
    value, error = measurement["value"], measurement["standard_error"]
    return format_value(value, error) + (" *" if error is None else "")


def footnotes(rows: Sequence[Row]) -> list[str]:
    """Reference values of the table, and reasons for missing errors."""
    last = rows[-1]["measurements"]
    notes = [f"* {name}: {m['reason']}" for name, m in last.items() if name in COLUMNS and m["reason"]]
    m = last["rankme"]
    lines = [
        f"{m['n']} patches of {m['groups']} held-out patients, D = {m['d']}; ± is the standard error over patients"
    ]
    if "null_floor" in last["odcorr"]["details"]:
        lines.append(f"ODCorr of independent features would be {last['odcorr']['details']['null_floor']:.3f}")
    if "linear_probe" in last:
        details = last["linear_probe"]["details"]
        color = f", color statistics alone give {details['null_floor']:.3f}" if "null_floor" in details else ""
        lines.append(f"the probe's chance is {details['chance']:.3f}{color}")
    return [*lines, *notes]


def differences(monitored: Mapping[str, Any], scored: Mapping[str, Any]) -> list[str]:
    """Values of the table whose relative difference exceeds `REL_TOL`. An absent value differs.

    Example:
        >>> differences({"rankme": {"value": 4.0}}, {"rankme": {"value": 4.1}})
        ['rankme 4.0 in the run, 4.1 in the score']
    """
    pairs = {n: (monitored[n]["value"], scored.get(n, {}).get("value")) for n in COLUMNS if n in monitored}
    return [
        f"{name} {in_run} in the run, {in_score} in the score"
        for name, (in_run, in_score) in pairs.items()
        if in_run is None or in_score is None or not math.isclose(in_run, in_score, rel_tol=REL_TOL)
    ]

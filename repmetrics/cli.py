"""The command line: score, compare, board … Wiring only; what takes long to import is imported by its command."""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # importing it would import torch
    from repmetrics.scoring.score import Score

app = typer.Typer(
    name="repmetrics",
    help="RankMe, ODCorr and their family, exact and with error bars, for any checkpoint or file of embeddings.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit codes: 0 done; 1 failed, one line says why (--debug: the traceback); 2 wrong usage; 130 interrupted.",
)

DEBUG = "--debug"
EXTRAS = {
    **dict.fromkeys(("timm", "safetensors", "PIL", "torchvision"), "repmetrics[score]"),
    **dict.fromkeys(("lightning", "tensorboard"), "repmetrics[lightning]"),
    **dict.fromkeys(("optuna", "psycopg"), "repmetrics[sweep]"),
    "h5py": "h5py",
    "yaml": "pyyaml",
    "pyarrow": "pyarrow",
}


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the ``repmetrics`` command."""
    run_app(app, sys.argv[1:] if args is None else args)


def run_app(application: typer.Typer, args: Sequence[str]) -> None:
    """Run a typer application; a failure becomes one sentence on stderr and exit code 1, unless ``--debug``."""
    debug = DEBUG in args
    try:
        application(args=[arg for arg in args if arg != DEBUG])
    except Exception as error:
        if debug:
            raise
        name = application.info.name
        print(f"{name}: {format_error(error)}", file=sys.stderr)
        if not isinstance(error, ValueError | OSError):
            print(f"run '{name} {DEBUG} ...' for the traceback", file=sys.stderr)
        raise SystemExit(1) from None


def format_error(error: Exception) -> str:
    """An exception as one sentence.

    Example:
        >>> format_error(FileNotFoundError(2, "No such file or directory", "x.pt"))
        'x.pt: No such file or directory'
        >>> format_error(KeyError("a"))
        "KeyError: 'a'"
    """
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return f"this needs {error.name}: pip install '{EXTRAS[error.name]}'"
    text = " ".join(_unwrap_worker_error(str(error)).split())
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"


def _unwrap_worker_error(text: str) -> str:
    r"""A DataLoader's worker sends its whole traceback as the message: its last line is what went wrong.

    Example:
        >>> _unwrap_worker_error("Caught SlideError in DataLoader worker 0.\nOriginal Traceback ...\nSlideError: no")
        'SlideError: no'
    """
    return text.strip().splitlines()[-1] if text.startswith("Caught ") and "Original Traceback" in text else text


def show_version(asked: bool) -> None:
    """Print the version and end, when --version is read."""
    if asked:
        from repmetrics import __version__

        print(__version__)
        raise typer.Exit


Debug = Annotated[bool, typer.Option(DEBUG, help="Show the traceback of a failure.")]
Version = Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=show_version)]


@app.callback()
def options(debug: Debug = False, version: Version = False) -> None:
    """Options of every command. `main` takes --debug out before typer reads the rest."""


Files = Annotated[
    list[Path],
    typer.Argument(
        help="Checkpoints, globs, folders of a run; without --data: files of embeddings.", metavar="FILE..."
    ),
]
Metrics = Annotated[str | None, typer.Option(help="Names with commas between; default: the standard four.")]
Json = Annotated[bool, typer.Option("--json", help="JSON instead of the table.")]


@dataclass(frozen=True)
class ScoringOptions:
    """What `score`, `compare` and `select` are all told: what is embedded, by which encoder, and where."""

    data: Annotated[Path | None, typer.Option(help="What to embed: image folder, CSV of files, manifest.json.")] = None
    labels: Annotated[str | None, typer.Option(help="Column or key of the labels; 'folder'; 'none'.")] = None
    groups: Annotated[str | None, typer.Option(help="Column or key of the slides; 'folder'; 'none'.")] = None
    arch: Annotated[str | None, typer.Option(help="timm architecture, instead of inferring it.")] = None
    arch_kwargs: Annotated[str | None, typer.Option(help="Its arguments, as JSON.")] = None
    prefix: Annotated[str | None, typer.Option(help="Where in the file the encoder's weights stand.")] = None
    teacher: Annotated[bool, typer.Option("--teacher/--student", help="Which, where the file holds both.")] = True
    mean: Annotated[str | None, typer.Option(help="Three numbers (or one) on the scale 0 to 1.")] = None
    std: Annotated[str | None, typer.Option(help="Likewise.")] = None
    image_size: Annotated[int | None, typer.Option(min=1, help="Side of the images; default: the encoder's.")] = None
    batch_size: Annotated[int, typer.Option(min=1, help="As in the monitor.")] = 64
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode images.")] = 0
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu"
    views: Annotated[int, typer.Option(min=2, help="Augmented views an image, for LiDAR and alignment.")] = 10
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep features in ~/.cache/repmetrics for a second run.")
    ] = True

    def scorer(self, metrics: str | None) -> Callable[[Path], Score]:
        """A function that scores a file. Usage is checked before anything is imported."""
        branch = "teacher" if self.teacher else "student"
        overrides = {"arch": self.arch, "prefix": self.prefix, "branch": branch, "arch_kwargs": _json(self.arch_kwargs)}
        channels = {"mean": _channels(self.mean, "--mean"), "std": _channels(self.std, "--std")}
        asked = None if metrics is None else _names(metrics, "--metrics")
        from repmetrics.data.open import open_data
        from repmetrics.measurement.registry import DEFAULT_METRICS
        from repmetrics.scoring import feature_cache, score
        from repmetrics.scoring.score import EmbedSettings, check_device, check_measurable

        names = DEFAULT_METRICS if asked is None else asked
        check_measurable(names)
        check_device(self.device)
        folder = feature_cache.default_folder() if self.cache else None
        settings = EmbedSettings(self.image_size, self.batch_size, self.workers, self.device, self.views, folder)
        to_read: dict[str, Any] = {"labels": self.labels, "groups": self.groups}
        if self.data is None:
            return lambda file: score.score_embeddings(file, metrics=names, settings=settings, **to_read)
        source = open_data(self.data, **to_read)
        return lambda file: score.score_checkpoint(
            file, source, overrides=overrides, channels=channels, metrics=names, settings=settings
        )


def told_how(command: Callable[..., None]) -> Callable[..., None]:
    """A command with an option for every field of `ScoringOptions`, which it takes as its one argument `how`."""
    fields = inspect.signature(ScoringOptions, eval_str=True).parameters
    own = inspect.signature(command, eval_str=True).parameters
    parameters = [p for name, p in own.items() for p in (fields.values() if name == "how" else (p,))]

    @functools.wraps(command)
    def told(**given: Any) -> None:
        how = ScoringOptions(**{name: given.pop(name) for name in fields})
        command(how=how, **given)

    told.__signature__ = inspect.Signature([p.replace(kind=p.KEYWORD_ONLY) for p in parameters])  # type: ignore[attr-defined]
    told.__annotations__ = {p.name: p.annotation for p in parameters}
    return told


@app.command()
@told_how
def score(
    files: Files,
    how: ScoringOptions,
    metrics: Metrics = None,
    sort: Annotated[str | None, typer.Option(help="Best first by this metric.")] = None,
    json: Json = False,
    csv: Annotated[bool, typer.Option("--csv", help="CSV instead of the table.")] = False,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Write the checkpoints as steps of their runs here.", file_okay=False)
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Score each new checkpoint of a folder; Ctrl-C ends it.")
    ] = False,
    poll_seconds: Annotated[float, typer.Option(min=0.1, help="How often --watch looks.")] = 10.0,
) -> None:
    """Measure a checkpoint's features of some images, or a file of embeddings. No labels are needed."""
    if json and csv:
        raise typer.BadParameter("--json and --csv exclude each other")
    if watch and (len(files) != 1 or how.data is None or csv or sort or tensorboard):
        raise typer.BadParameter("--watch takes one folder and --data, and no --csv, --sort or --tensorboard")
    if tensorboard is not None and how.data is None:
        raise typer.BadParameter("--tensorboard takes checkpoints, which state their steps, and --data")
    one = how.scorer(metrics)
    from repmetrics.measurement.registry import check_metric_names
    from repmetrics.probes.common import PROBES
    from repmetrics.scoring import checkpoints, export, score, tables

    check_metric_names([] if sort is None or sort in PROBES else [sort])
    if watch:
        appearing = checkpoints.watch_checkpoints(files[0], poll_seconds=poll_seconds, until=lambda: False)
        for one_score in _score_each(one, appearing, base=files[0]):
            _show([one_score], json=json)
        return
    named = files if how.data is None else checkpoints.find_checkpoints(files)
    scores = _score_all(one, named)
    if csv:
        print(export.write_csv(scores), end="")
    else:
        _show(tables.sorted_by(scores, sort), json=json)
    if tensorboard is not None:
        export.write_events(score.drop_duplicates(scores), tensorboard)
    if len(scores) < len(named):
        raise typer.Exit(1)


@app.command()
@told_how
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Checkpoint, or with --data left out: embeddings.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="The same, of the same rows.")],
    how: ScoringOptions,
    metrics: Metrics = None,
    json: Json = False,
) -> None:
    """Say whether B is better than A beyond noise: paired differences over the same slides."""
    one = how.scorer(metrics)
    from repmetrics.decisions import checkpoint_selection
    from repmetrics.scoring import checkpoints, export, score, tables

    base = checkpoints.common_folder([first, second])
    a, b = (score.with_run_name(one(file), file, base=base) for file in (first, second))
    verdicts = checkpoint_selection.compare(a.measurements, b.measurements)
    if json:
        print(export.comparison_json(a, b, verdicts))
    else:
        tables.results_console().print(tables.comparison_table(a, b, verdicts))


@app.command()
@told_how
def select(
    runs_or_files: Files,
    how: ScoringOptions,
    by: Annotated[str, typer.Option(help="The metric that chooses.")] = "rankme",
    json: Json = False,
) -> None:
    """Name the checkpoint to keep, the reason, and how sure; no labels are used."""
    from repmetrics.measurement.registry import DEFAULT_METRICS

    one = how.scorer(",".join(dict.fromkeys((*DEFAULT_METRICS, by))))
    from repmetrics.decisions import checkpoint_selection
    from repmetrics.scoring import checkpoints, export, score, tables

    files = runs_or_files if how.data is None else checkpoints.find_checkpoints(runs_or_files)
    found = _score_all(one, files)
    scores = sorted(score.drop_duplicates(found), key=lambda score: score.step or 0)
    choice = checkpoint_selection.select_checkpoint([score.measurements for score in scores], by=by)
    if json:
        print(export.choice_json(scores, choice))
    else:
        tables.results_console().print(tables.choice_table(scores, choice))
    if len(found) < len(files):
        raise typer.Exit(1)


def _score_all(one: Callable[[Path], Score], files: Sequence[Path]) -> list[Score]:
    """The score of the one file, or of those among several that can be scored; ends the command if none can."""
    if len(files) == 1:
        return [one(files[0])]
    from repmetrics.scoring import checkpoints

    scores = list(_score_each(one, files, base=checkpoints.common_folder(files)))
    if not scores:
        raise typer.Exit(1)
    return scores


def _score_each(one: Callable[[Path], Score], files: Iterable[Path], *, base: Path) -> Iterator[Score]:
    """The scores of several files, named from `base`; one that fails is named on stderr, and the others go on."""
    from repmetrics.scoring import score

    for file in files:
        try:
            yield score.with_run_name(one(file), file, base=base)
        except (ValueError, OSError) as error:
            print(f"skipped {file}: {format_error(error)}", file=sys.stderr)


def _show(scores: Sequence[Score], *, json: bool) -> None:
    from repmetrics.scoring import export, tables

    if json:
        print(export.write_json(scores), flush=True)
    elif len(scores) == 1:
        tables.results_console().print(tables.score_table(scores[0]))
    else:
        tables.results_console().print(tables.ranking_table(scores))


def _json(text: str | None) -> dict[str, Any] | None:
    import json

    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"--arch-kwargs is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f"""--arch-kwargs must be a JSON object like '{{"depth": 4}}', got {text}""")
    return value


def _names(text: str, option: str) -> tuple[str, ...]:
    """Names with commas between, each once."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if "" in names:
        raise typer.BadParameter(f"{option} must be names with commas between, got {text!r}")
    return names


def _channels(text: str | None, option: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (1, 3) or not all(math.isfinite(value) for value in values):
        raise typer.BadParameter(f"{option} must be one number or three like 0.5,0.5,0.5, got {text!r}")
    if option == "--std" and min(values) <= 0:
        raise typer.BadParameter(f"--std must be above 0, got {text!r}")
    return values * 3 if len(values) == 1 else values


@app.command()
def board(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, with TensorBoard's files.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 6006,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "localhost",
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open it in the browser.")] = True,
) -> None:
    """Open TensorBoard, already laid out: RankMe and ODCorr with their bands beside the probe's accuracy."""
    from repmetrics.tensorboard.server import serve

    serve(run_folder, host=host, port=port, open_browser=open_browser)


@app.command()
def trust(
    runs: Annotated[Path, typer.Argument(help="A folder of runs with measurements.jsonl, or a .csv table of looks.")],
    target: Annotated[str, typer.Option(help="Probes to compare with, commas between.")] = "linear_probe",
    metrics: Annotated[str | None, typer.Option(help="Label-free metrics; default: all that were measured.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the report as one HTML page.", dir_okay=False)] = None,
    plots: Annotated[Path | None, typer.Option(help="Write its plots as SVG files here.", file_okay=False)] = None,
    table: Annotated[Path | None, typer.Option(help="Write the looks as a compact .csv table.", dir_okay=False)] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Write the runs for TensorBoard's HParams tab.", file_okay=False)
    ] = None,
    draws: Annotated[int, typer.Option(min=100, help="Of the bootstrap over runs.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    json: Json = False,
) -> None:
    """Say how far each label-free metric can be trusted, from runs that were probed with labels too."""
    targets, names = _names(target, "--target"), _names(metrics, "--metrics") if metrics is not None else ()
    from repmetrics.trust import hparams, html, report, summary, svg
    from repmetrics.trust.runs import read_runs, write_table

    if tensorboard is not None:
        hparams.check_new(tensorboard)
    found = read_runs(runs)
    reports = report.analyze(found, targets=targets, metrics=names, draws=draws, seed=seed)
    if table is not None:
        write_table(found, table)
    if out is not None:
        html.write(html.page(reports, found, targets=targets, title=f"Trust: {runs.name}"), out)
    if plots is not None:
        for name, drawing in svg.plots(reports, found, targets=targets).items():
            html.write(drawing, plots / name)
    if tensorboard is not None:
        hparams.write_board(found, tensorboard, targets=targets)
    print(summary.to_json(reports, targets) if json else "\n".join(summary.summarize(reports, targets)))

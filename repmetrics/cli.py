"""The command line: score, board. Wiring only; what takes long to import is imported by the command that needs it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # importing it would import torch
    from repmetrics.scoring import Score

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
    run(app, sys.argv[1:] if args is None else args)


def run(application: typer.Typer, args: Sequence[str]) -> None:
    """Run a typer application; a failure becomes one sentence on stderr and exit code 1, unless ``--debug``."""
    debug = DEBUG in args
    try:
        application(args=[arg for arg in args if arg != DEBUG])
    except Exception as error:
        if debug:
            raise
        name = application.info.name
        print(f"{name}: {explain(error)}", file=sys.stderr)
        if not isinstance(error, ValueError | OSError):
            print(f"run '{name} {DEBUG} ...' for the traceback", file=sys.stderr)
        raise SystemExit(1) from None


def explain(error: Exception) -> str:
    """An exception as one sentence.

    Example:
        >>> explain(FileNotFoundError(2, "No such file or directory", "x.pt"))
        'x.pt: No such file or directory'
        >>> explain(KeyError("a"))
        "KeyError: 'a'"
    """
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return f"this needs {error.name}: pip install '{EXTRAS[error.name]}'"
    text = " ".join(_told_by_worker(str(error)).split())
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"


def _told_by_worker(text: str) -> str:
    r"""A DataLoader's worker sends its whole traceback as the message: its last line is what went wrong.

    Example:
        >>> _told_by_worker("Caught SlideError in DataLoader worker 0.\nOriginal Traceback ...\nSlideError: no")
        'SlideError: no'
    """
    return text.strip().splitlines()[-1] if text.startswith("Caught ") and "Original Traceback" in text else text


@app.callback()
def options(
    debug: Annotated[bool, typer.Option(DEBUG, help="Show the traceback of a failure.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True)] = False,
) -> None:
    """Options of every command. `main` takes --debug out before typer reads the rest."""
    if version:
        from repmetrics import __version__

        print(__version__)
        raise typer.Exit


Files = Annotated[
    list[Path],
    typer.Argument(
        help="Checkpoints, globs, folders of a run; without --data: files of embeddings.", metavar="FILE..."
    ),
]
Data = Annotated[Path | None, typer.Option(help="What to embed: image folder, .csv of files, or manifest.json.")]
Metrics = Annotated[str | None, typer.Option(help="Names with commas between; default: the standard four.")]
Labels = Annotated[str | None, typer.Option(help="Column or key of the labels; 'folder'; 'none'.")]
Groups = Annotated[str | None, typer.Option(help="Column or key of the slides; 'folder'; 'none'.")]
Arch = Annotated[str | None, typer.Option(help="timm architecture, instead of inferring it.")]
ArchKwargs = Annotated[str | None, typer.Option(help="Its arguments, as JSON.")]
Prefix = Annotated[str | None, typer.Option(help="Where in the file the encoder's weights stand.")]
BranchName = Annotated[str, typer.Option(help="teacher or student.")]
Channels = Annotated[str | None, typer.Option(help="Three numbers (or one) on the scale 0 to 1.")]
ImageSize = Annotated[int | None, typer.Option(min=1, help="Side of the images; default: the encoder's.")]
BatchSize = Annotated[int, typer.Option(min=1, help="As in the monitor.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that decode images.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
ViewCount = Annotated[int, typer.Option("--views", min=2, help="Augmented views an image, for LiDAR and alignment.")]
Cache = Annotated[
    bool, typer.Option("--cache/--no-cache", help="Keep features in ~/.cache/repmetrics for a second run.")
]
Json = Annotated[bool, typer.Option("--json", help="JSON instead of the table.")]


@app.command()
def score(
    files: Files,
    data: Data = None,
    metrics: Metrics = None,
    labels: Labels = None,
    groups: Groups = None,
    arch: Arch = None,
    arch_kwargs: ArchKwargs = None,
    prefix: Prefix = None,
    branch: BranchName = "teacher",
    mean: Channels = None,
    std: Channels = None,
    image_size: ImageSize = None,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    device: Device = "cpu",
    views: ViewCount = 10,
    cache: Cache = True,
    sort: Annotated[str | None, typer.Option(help="Best first by this metric.")] = None,
    json: Json = False,
    csv: Annotated[bool, typer.Option("--csv", help="CSV instead of the table.")] = False,
    tensorboard: Annotated[Path | None, typer.Option(help="Write the checkpoints as steps of a run here.")] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Score each new checkpoint of a folder; Ctrl-C ends it.")
    ] = False,
    poll_seconds: Annotated[float, typer.Option(min=0.1, help="How often --watch looks.")] = 10.0,
) -> None:
    """Measure a checkpoint's features of some images, or a file of embeddings. No labels are needed."""
    if json and csv:
        raise typer.BadParameter("--json and --csv exclude each other")
    if watch and (len(files) != 1 or data is None or csv or sort or tensorboard):
        raise typer.BadParameter("--watch takes one folder and --data, and no --csv, --sort or --tensorboard")
    one = _scorer(**_how(locals()))
    from repmetrics import export, report, runs

    if watch:
        for one_score in _score_each(one, runs.follow(files[0], poll_seconds=poll_seconds, until=lambda: False)):
            _show([one_score], json=json)
        return
    named = files if data is None else runs.find_checkpoints(files)
    scores = [one(named[0])] if len(named) == 1 else list(_score_each(one, named))
    if not scores:
        raise typer.Exit(1)
    if tensorboard is not None:
        export.write_events(scores, tensorboard)
    if csv:
        print(export.write_csv(scores), end="")
    else:
        _show(report.sorted_by(scores, sort), json=json)
    if len(scores) < len(named):
        raise typer.Exit(1)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Checkpoint, or with --data left out: embeddings.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="The same, of the same rows.")],
    data: Data = None,
    metrics: Metrics = None,
    labels: Labels = None,
    groups: Groups = None,
    arch: Arch = None,
    arch_kwargs: ArchKwargs = None,
    prefix: Prefix = None,
    branch: BranchName = "teacher",
    mean: Channels = None,
    std: Channels = None,
    image_size: ImageSize = None,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    device: Device = "cpu",
    views: ViewCount = 10,
    cache: Cache = True,
    json: Json = False,
) -> None:
    """Say whether B is better than A beyond noise: paired differences over the same slides."""
    one = _scorer(**_how(locals()))
    from repmetrics import export, report, selection

    a, b = one(first), one(second)
    verdicts = selection.compare(a.measurements, b.measurements)
    if json:
        print(export.comparison_json(a, b, verdicts))
    else:
        report.results_console().print(report.comparison_table(a, b, verdicts))


@app.command()
def select(
    runs_or_files: Files,
    data: Data = None,
    by: Annotated[str, typer.Option(help="The metric that chooses.")] = "rankme",
    labels: Labels = None,
    groups: Groups = None,
    arch: Arch = None,
    arch_kwargs: ArchKwargs = None,
    prefix: Prefix = None,
    branch: BranchName = "teacher",
    mean: Channels = None,
    std: Channels = None,
    image_size: ImageSize = None,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    device: Device = "cpu",
    views: ViewCount = 10,
    cache: Cache = True,
    json: Json = False,
) -> None:
    """Name the checkpoint to keep, the reason, and how sure; no labels are used."""
    from repmetrics.catalogue import DEFAULT_METRICS

    metrics = ",".join(dict.fromkeys((*DEFAULT_METRICS, by)))
    one = _scorer(**_how(locals()))
    from repmetrics import export, report, runs, selection

    files = runs_or_files if data is None else runs.find_checkpoints(runs_or_files)
    scores = sorted((one(file) for file in files), key=lambda score: score.step or 0)
    choice = selection.choose([score.measurements for score in scores], by=by)
    if json:
        print(export.choice_json(scores, choice))
    else:
        report.results_console().print(report.choice_table(scores, choice))


HOW = (
    *("data", "metrics", "labels", "groups", "arch", "arch_kwargs", "prefix", "branch", "mean", "std"),
    *("image_size", "batch_size", "workers", "device", "views", "cache"),
)


def _how(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in HOW}


def _scorer(
    *,
    data: Path | None,
    metrics: str | None,
    labels: str | None,
    groups: str | None,
    arch: str | None,
    arch_kwargs: str | None,
    prefix: str | None,
    branch: str,
    mean: str | None,
    std: str | None,
    image_size: int | None,
    batch_size: int,
    workers: int,
    device: str,
    views: int,
    cache: bool,
) -> Callable[[Path], Score]:
    """The options of a command → a function that scores a file. Usage is checked before anything is imported."""
    overrides = {"arch": arch, "arch_kwargs": _json(arch_kwargs), "prefix": prefix, "branch": _branch(branch)}
    channels = {"mean": _channels(mean, "--mean"), "std": _channels(std, "--std")}
    from repmetrics import cache as features_cache
    from repmetrics import runs
    from repmetrics.catalogue import DEFAULT_METRICS
    from repmetrics.scoring import Settings, check_device, check_measurable
    from repmetrics.sources import open_source

    names = tuple(name.strip() for name in metrics.split(",")) if metrics else DEFAULT_METRICS
    check_measurable(names)
    check_device(device)
    folder = features_cache.default_folder() if cache else None
    settings = Settings(image_size, batch_size, workers, device, views, folder)
    if data is None:
        return lambda file: runs.score_embeddings(file, labels=labels, groups=groups, metrics=names, settings=settings)
    source = open_source(data, labels=labels, groups=groups)
    return lambda file: runs.score_checkpoint(
        file, source, overrides=overrides, channels=channels, metrics=names, settings=settings
    )


def _score_each(one: Callable[[Path], Score], files: Iterable[Path]) -> Iterator[Score]:
    """The scores of several files; one that fails is named on stderr, and the others go on."""
    for file in files:
        try:
            yield one(file)
        except (ValueError, OSError) as error:
            print(f"skipped {file}: {explain(error)}", file=sys.stderr)


def _show(scores: Sequence[Score], *, json: bool) -> None:
    from repmetrics import export, report

    if json:
        print(export.write_json(scores), flush=True)
    elif len(scores) == 1:
        report.results_console().print(report.score_table(scores[0]))
    else:
        report.results_console().print(report.ranking_table(scores))


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


def _branch(text: str) -> str:
    if text not in ("teacher", "student"):
        raise typer.BadParameter(f"--branch must be teacher or student, got {text!r}")
    return text


def _channels(text: str | None, option: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (1, 3):
        raise typer.BadParameter(f"{option} must be one number or three like 0.5,0.5,0.5, got {text!r}")
    return values * 3 if len(values) == 1 else values


@app.command()
def board(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, with TensorBoard's files.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 6006,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "localhost",
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open it in the browser.")] = True,
) -> None:
    """Open TensorBoard, already laid out: RankMe and ODCorr with their bands beside the probe's accuracy."""
    from repmetrics.board import serve

    serve(run_folder, host=host, port=port, open_browser=open_browser)


@app.command()
def trust(
    runs: Annotated[Path, typer.Argument(help="A folder of runs with measurements.jsonl, or a .csv table of looks.")],
    target: Annotated[str, typer.Option(help="Probes to compare with, commas between.")] = "linear_probe",
    metrics: Annotated[str | None, typer.Option(help="Label-free metrics; default: all that were measured.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the report as one HTML page.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Write its plots as SVG files into this folder.")] = None,
    table: Annotated[Path | None, typer.Option(help="Write the looks as a compact .csv table.")] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Write the runs for TensorBoard's HParams tab.")] = None,
    draws: Annotated[int, typer.Option(min=100, help="Of the bootstrap over runs.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    json: Json = False,
) -> None:
    """Say how far each label-free metric can be trusted, from runs that were probed with labels too."""
    from repmetrics import looks, trust, trust_page, trust_plots, verdict

    found, targets = looks.read_looks(runs), [name for name in target.split(",") if name]
    names = [name for name in (metrics or "").split(",") if name]
    reports = trust.trust(found, targets=targets, metrics=names, draws=draws, seed=seed)
    if table is not None:
        looks.write_table(found, table)
    if out is not None:
        trust_page.write(trust_page.page(reports, found, targets=targets, title=f"Trust: {runs.name}"), out)
    if plots is not None:
        for name, drawing in trust_plots.plots(reports, found, targets=targets).items():
            trust_page.write(drawing, plots / name)
    if tensorboard is not None:
        from repmetrics.trust_board import write_board

        write_board(found, tensorboard, targets=targets)
    print(verdict.to_json(reports, targets) if json else "\n".join(verdict.in_words(reports, targets)))


if __name__ == "__main__":
    main()

"""Command line of repmetrics. Each command imports what takes long to import."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from repmetrics.cli_options import (
    DEBUG,
    EXIT_CODES,
    Arch,
    ArchKwargs,
    BatchSize,
    Cache,
    Command,
    Dask,
    Data,
    Debug,
    Device,
    Files,
    Gpus,
    Groups,
    ImageSize,
    Json,
    Labels,
    Mean,
    Metrics,
    Pool,
    Prefix,
    Processes,
    Std,
    Teacher,
    Version,
    Views,
    ViewSetName,
    Workers,
    computation_option,
    data_option,
    examples,
    metric_option,
    output_option,
    watch_option,
)

if TYPE_CHECKING:  # at run time, it would import torch
    from repmetrics.scoring.score import Score
    from repmetrics.trust.finished_runs import Choice as FinishedRunsChoice

app = typer.Typer(
    name="repmetrics",
    help="RankMe, ODCorr and related metrics, exact and with error bars, of a checkpoint or a file of embeddings.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=EXIT_CODES,
)

EXTRAS = {
    **dict.fromkeys(("h5py", "timm", "safetensors", "PIL", "torchvision"), "repmetrics[score]"),
    **dict.fromkeys(("lightning", "tensorboard"), "repmetrics[lightning]"),
    **dict.fromkeys(("optuna", "psycopg"), "repmetrics[sweep]"),
    **dict.fromkeys(("matplotlib", "yaml"), "repmetrics[report]"),
    "distributed": "repmetrics[dask]",
    "pyarrow": "pyarrow",
    "zarr": "zarr",
}


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the ``repmetrics`` command."""
    run_app(app, sys.argv[1:] if args is None else args)


def run_app(application: typer.Typer, args: Sequence[str], *, extras: Mapping[str, str] = EXTRAS) -> None:
    """Run a typer application. Without ``--debug``, an error becomes one sentence on stderr and exit code 1.

    Args:
        application: The application.
        args: Its arguments.
        extras: What to install for a module that is absent.
    """
    debug = DEBUG in args
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without "±" must not end a command
    try:
        application(args=[arg for arg in args if arg != DEBUG], prog_name=application.info.name)
    except Exception as error:
        if debug:
            raise
        name = application.info.name
        print(f"{name}: {format_error(error, extras=extras)}", file=sys.stderr)
        if not isinstance(error, ValueError | OSError):
            print(f"run '{name} {DEBUG} ...' for the traceback", file=sys.stderr)
        raise SystemExit(1) from None


def format_error(error: Exception, *, extras: Mapping[str, str] = EXTRAS) -> str:
    """An exception as one sentence.

    Example:
        >>> format_error(FileNotFoundError(2, "No such file or directory", "x.pt"))
        'x.pt: No such file or directory'
        >>> format_error(KeyError("a"))
        "KeyError: 'a'"
    """
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError) and (remedy := extras.get(error.name or "")):
        return f"this needs {error.name}: pip install '{remedy}'"
    text = " ".join(_unwrap_worker_error(str(error)).split())
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"


def _unwrap_worker_error(text: str) -> str:
    r"""Error message without the traceback that a DataLoader's worker puts before it.

    Example:
        >>> _unwrap_worker_error("Caught SlideError in DataLoader worker 0.\nOriginal Traceback ...\nSlideError: no")
        'SlideError: no'
    """
    return text.strip().splitlines()[-1] if text.startswith("Caught ") and "Original Traceback" in text else text


@app.callback()
def options(debug: Debug = False, version: Version = False) -> None:
    """Options of every command. `run_app` removes --debug before typer parses the rest."""


@app.command(
    cls=Command, epilog=examples("repmetrics score last.ckpt --data images/", "repmetrics score embeddings.npy --json")
)
def score(
    files: Files,
    data: Data = None, labels: Labels = None, groups: Groups = None, arch: Arch = None, arch_kwargs: ArchKwargs = None,
    prefix: Prefix = None, teacher: Teacher = True, pool: Pool = None, mean: Mean = None, std: Std = None,
    image_size: ImageSize = None,
    batch_size: BatchSize = 64, workers: Workers = 0, device: Device = None,
    processes: Processes = None, gpus: Gpus = None, dask: Dask = None, views: Views = 10,
    view_set: ViewSetName = None, cache: Cache = True,
    metrics: Metrics = None,
    sort: Annotated[str | None, output_option(help="Metric to sort by, best first.")] = None,
    json: Json = False,
    csv: Annotated[bool, output_option("--csv", help="Print CSV instead of the table.")] = False,
    tensorboard: Annotated[
        Path | None, output_option(help="Folder for TensorBoard runs with the checkpoints as steps.", file_okay=False)
    ] = None,
    features_out: Annotated[
        Path | None, output_option(help="Folder for the features as HDF5: a file per slide, or one.", file_okay=False)
    ] = None,
    watch: Annotated[bool, watch_option("--watch", help="Score each new checkpoint of a folder until Ctrl-C.")] = False,
    poll_seconds: Annotated[float, watch_option(min=0.1, help="Seconds between polls of --watch.")] = 10.0,
) -> None:  # fmt: skip
    """Measure a checkpoint's features of images, or a file of embeddings. No labels are needed."""
    if json and csv:
        raise typer.BadParameter("--json and --csv exclude each other")
    if watch and (len(files) != 1 or data is None or csv or sort or tensorboard or features_out):
        raise typer.BadParameter(
            "--watch takes one folder and --data, and no --csv, --sort, --tensorboard or --features-out"
        )
    if watch and (processes or gpus or dask):
        raise typer.BadParameter("--watch scores one checkpoint at a time: leave --processes, --gpus and --dask out")
    if features_out is not None and data is None:
        raise typer.BadParameter("--features-out takes checkpoints and --data: a file of embeddings is one already")
    if tensorboard is not None and data is None:
        raise typer.BadParameter("--tensorboard takes checkpoints, which contain their steps, and --data")
    score_file = _scorer(
        metrics, data=data, labels=labels, groups=groups, arch=arch, arch_kwargs=arch_kwargs, prefix=prefix,
        teacher=teacher, pool=pool, mean=mean, std=std, image_size=image_size, batch_size=batch_size, workers=workers,
        device=_device(device, data, processes, gpus, dask), views=views, view_set=view_set, cache=cache,
    )  # fmt: skip
    from repmetrics.measurement.registry import PROBES, check_metric_names
    from repmetrics.scoring import export, file_names, score, tables

    check_metric_names([] if sort is None or sort in PROBES else [sort])
    if watch:
        _watch(score_file, files[0], poll_seconds=poll_seconds, json=json)
        return
    paths = file_names.in_natural_order(files) if data is None else _find_checkpoints(files)
    with _executor(processes, gpus, dask) as executor:
        scores = _score_all(score_file, paths, executor, features_out)
    if csv:
        print(export.write_csv(scores), end="")
    else:
        _show(tables.sorted_by(scores, sort), json=json)
    if tensorboard is not None:
        export.write_events(score.drop_duplicates(scores), tensorboard)
    if len(scores) < len(paths):
        raise typer.Exit(1)


@app.command(cls=Command, epilog=examples("repmetrics compare a.ckpt b.ckpt --data images/"))
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Checkpoint, or without --data: file of embeddings.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Checkpoint, or file of embeddings of the same rows.")],
    data: Data = None, labels: Labels = None, groups: Groups = None, arch: Arch = None, arch_kwargs: ArchKwargs = None,
    prefix: Prefix = None, teacher: Teacher = True, pool: Pool = None, mean: Mean = None, std: Std = None,
    image_size: ImageSize = None,
    batch_size: BatchSize = 64, workers: Workers = 0, device: Device = None,
    processes: Processes = None, gpus: Gpus = None, dask: Dask = None, views: Views = 10,
    view_set: ViewSetName = None, cache: Cache = True,
    metrics: Metrics = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Test whether B is better than A beyond noise, by paired differences over the same slides."""
    score_file = _scorer(
        metrics, data=data, labels=labels, groups=groups, arch=arch, arch_kwargs=arch_kwargs, prefix=prefix,
        teacher=teacher, pool=pool, mean=mean, std=std, image_size=image_size, batch_size=batch_size, workers=workers,
        device=_device(device, data, processes, gpus, dask), views=views, view_set=view_set, cache=cache,
    )  # fmt: skip
    from repmetrics.decisions import checkpoint_selection
    from repmetrics.scoring import export, file_names, fitted_table, score, score_files, tables

    base = file_names.common_folder([first, second])
    with _executor(processes, gpus, dask) as executor:
        both = score_files.score_both(score_file, first, second, executor)
    a, b = (score.with_run_name(x, file, base=base) for x, file in zip(both, (first, second), strict=True))
    comparisons = checkpoint_selection.compare(a.measurements, b.measurements)
    if json:
        print(export.comparison_json(a, b, comparisons))
    else:
        fitted_table.results_console().print(tables.comparison_table(a, b, comparisons))


@app.command(cls=Command, epilog=examples("repmetrics select checkpoints/ --data images/", "repmetrics select runs/"))
def select(
    context: typer.Context,
    runs_or_files: Files,
    data: Data = None, labels: Labels = None, groups: Groups = None, arch: Arch = None, arch_kwargs: ArchKwargs = None,
    prefix: Prefix = None, teacher: Teacher = True, pool: Pool = None, mean: Mean = None, std: Std = None,
    image_size: ImageSize = None,
    batch_size: BatchSize = 64, workers: Workers = 0, device: Device = None,
    processes: Processes = None, gpus: Gpus = None, dask: Dask = None, views: Views = 10,
    view_set: ViewSetName = None, cache: Cache = True,
    by: Annotated[
        str | None, metric_option(help="Metric to choose by. Default: the rule that docs/trust.md supports.")
    ] = None,
    domain: Annotated[
        Literal["natural", "stained", "custom"] | None, metric_option(help="Kind of images, for the views.")
    ] = None,
    settings: Annotated[Path | None, data_option(help="CSV of the runs' settings, with a column run.")] = None,
    json: Json = False,
    csv: Annotated[bool, output_option("--csv", help="Print CSV of the runs instead of the table.")] = False,
) -> None:  # fmt: skip
    """Name the checkpoint to keep, or without --data the run, with the reason and the confidence.

    Folders of runs with measurements.jsonl need no --data: the choice is made from what the runs measured. No labels
    are needed. With a CSV of --labels and a --domain, a probe on them chooses where they are worth more than views.
    """
    if json and csv:
        raise typer.BadParameter("--json and --csv exclude each other")
    from repmetrics.trust import finished_runs

    if data is None and finished_runs.holds_runs(runs_or_files):
        _refuse_options_of_data(context, allowed={"runs_or_files", "by", "domain", "settings", "json", "csv"})
        choice = finished_runs.choose(runs_or_files, by=by or "consensus", domain=domain, settings=settings)
        _show_runs(choice, json=json, csv=csv)
        return
    if csv or settings is not None:
        raise typer.BadParameter("--csv and --settings are for folders of runs, without --data")
    from repmetrics.scoring import export, fitted_table, selection, tables

    files = selection.files_to_compare(runs_or_files, checkpoints=data is not None)
    rule = selection.find_rule(files, by=by, data=data, labels=labels, domain=domain, view_set=view_set)
    score_file = _scorer(
        ",".join(rule.metrics), data=data, labels=labels, groups=groups, arch=arch, arch_kwargs=arch_kwargs,
        prefix=prefix,
        teacher=teacher, pool=pool, mean=mean, std=std, image_size=image_size, batch_size=batch_size, workers=workers,
        device=_device(device, data, processes, gpus, dask), views=views, view_set=rule.view_set, cache=cache,
    )  # fmt: skip
    with _executor(processes, gpus, dask) as executor:
        results = _score_all(score_file, files, executor)
    scores, selected = selection.select(results, by=rule.by)
    if rule.note is not None:
        selected = selected._replace(reason=f"{selected.reason}; {rule.note}")
    if json:
        print(export.choice_json(scores, selected))
    else:
        fitted_table.results_console().print(tables.choice_table(scores, selected))
    if len(results) < len(files):
        raise typer.Exit(1)


def _refuse_options_of_data(context: typer.Context, *, allowed: Collection[str]) -> None:
    """Refuse the options given that only the scoring of checkpoints reads."""
    sources = {name: context.get_parameter_source(name) for name in context.params if name not in allowed}
    typed = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if names := [f"--{name.replace('_', '-')}" for name in typed]:
        raise typer.BadParameter(f"{', '.join(names)} needs --data: a choice among runs reads their measurements")


def _show_runs(choice: FinishedRunsChoice, *, json: bool, csv: bool) -> None:
    from repmetrics.scoring import fitted_table, run_table
    from repmetrics.trust import finished_runs

    ranking = choice.ranking
    if json:
        import json as json_format

        print(json_format.dumps(finished_runs.to_json(choice), indent=2))
    elif csv:
        print(run_table.runs_csv(choice.runs), end="")
    else:
        runs = run_table.ordered(choice.runs, [ranking.metric], direction=ranking.direction)
        table = run_table.runs_table(runs, [ranking.metric], choice.lines, ranking=ranking)
        fitted_table.results_console().print(table)


def _scorer(
    metrics: str | None, *, data: Path | None, labels: str | None, groups: str | None, arch: str | None,
    arch_kwargs: str | None, prefix: str | None, teacher: bool, pool: str | None, mean: str | None, std: str | None,
    image_size: int | None, batch_size: int, workers: int, device: str | None, views: int, view_set: str | None,
    cache: bool,
) -> Callable[..., Score]:  # fmt: skip
    """Function that scores a file; with ``features_out``, it writes the features of a checkpoint there.

    Usage is checked before anything is imported.
    """
    overrides = encoder_options(arch, arch_kwargs, prefix=prefix, teacher=teacher, pool=pool, mean=mean, std=std)
    requested = None if metrics is None else _names(metrics, "--metrics")
    from repmetrics.data.open import open_data
    from repmetrics.data.views import find_view_set
    from repmetrics.measurement.registry import DEFAULT_METRICS
    from repmetrics.scoring import score
    from repmetrics.scoring.score import check_measurable
    from repmetrics.scoring.settings import EmbedSettings, cache_folder, choose_device

    names = DEFAULT_METRICS if requested is None else requested
    check_measurable(names)
    device = choose_device(device)
    if view_set is not None:
        find_view_set(view_set)
    settings = EmbedSettings(
        image_size, batch_size, workers, device, views, cache_folder() if cache else None, view_set
    )
    if data is None:
        return partial(score.score_embeddings, labels=labels, groups=groups, metrics=names, settings=settings)
    source = open_data(data, labels=labels, groups=groups)
    return partial(
        score.score_checkpoint,
        source=source,
        overrides=overrides,
        metrics=names,
        settings=settings,
        open_source=partial(open_data, data, labels=labels, groups=groups),
    )


def _find_checkpoints(names: Sequence[Path]) -> list[Path]:
    from repmetrics.scoring.checkpoints import find_checkpoints

    return find_checkpoints(names)


def _device(
    device: str | None, data: Path | None, processes: int | None, gpus: int | None, dask: str | None
) -> str | None:
    """The device to check: with --gpus that of each process. Usage is checked."""
    if data is None and (processes or gpus or dask):
        raise typer.BadParameter("--processes, --gpus and --dask take checkpoints and --data")
    if sum(option is not None for option in (processes, gpus, dask)) > 1:
        raise typer.BadParameter("--processes, --gpus and --dask exclude each other")
    if gpus is not None and device not in (None, "cuda"):
        raise typer.BadParameter(f"--gpus gives each process a GPU of its own: leave --device {device} out")
    return "cuda" if gpus is not None else device


def _executor(processes: int | None, gpus: int | None, dask: str | None) -> AbstractContextManager[Executor | None]:
    from repmetrics.executor import open_executor

    available = 0
    if gpus is not None:
        import torch

        available = torch.cuda.device_count()
    return open_executor(processes=processes or 0, gpus=gpus, available_gpus=available, dask=dask)


def _score_all(
    score_file: Callable[..., Score], files: Sequence[Path], executor: Executor | None, features_out: Path | None = None
) -> list[Score]:
    """Scores of all files that can be scored; exits if none can. An error of a single file is raised."""
    from repmetrics.scoring.file_names import common_folder, export_folder

    tasks: list[tuple[Path, dict[str, Any]]] = [
        (file, {} if features_out is None else {"features_out": export_folder(features_out, file, files=files)})
        for file in files
    ]
    if len(files) == 1:
        file, arguments = tasks[0]
        return [score_file(file, **arguments, **({} if executor is None else {"executor": executor}))]
    scores = list(_score_each(score_file, tasks, base=common_folder(files), executor=executor))
    if not scores:
        raise typer.Exit(1)
    return scores


def _score_each(
    score_file: Callable[..., Score],
    tasks: Sequence[tuple[Path, dict[str, Any]]],
    *,
    base: Path,
    executor: Executor | None = None,
) -> Iterator[Score]:
    """Scores of several files, named relative to `base`. Files that fail are reported on stderr and skipped."""
    from repmetrics.scoring.score import with_run_name
    from repmetrics.scoring.score_files import score_files

    for (file, _), result in zip(tasks, score_files(score_file, tasks, executor), strict=True):
        if isinstance(result, Exception):
            print(f"skipped {file}: {format_error(result)}", file=sys.stderr)
        else:
            yield with_run_name(result, file, base=base)


def _watch(score_file: Callable[[Path], Score], folder: Path, *, poll_seconds: float, json: bool) -> None:
    """Score each new checkpoint of a folder, and show it as JSON, in a table, or as lines outside of terminals."""
    from repmetrics.scoring import checkpoints, fitted_table, watch

    new_checkpoints = checkpoints.watch_checkpoints(folder, poll_seconds=poll_seconds, until=lambda: False)
    console = fitted_table.results_console()

    def score_new(file: Path) -> Iterator[Score]:
        return _score_each(score_file, [(file, {})], base=folder)

    if json:
        for file in new_checkpoints:
            for result in score_new(file):
                _show([result], json=True)
        return

    if console.is_terminal:
        watch.show_table(new_checkpoints, score_new, console)
    else:
        watch.show_lines(new_checkpoints, score_new, partial(print, flush=True))


def _show(scores: Sequence[Score], *, json: bool) -> None:
    from repmetrics.scoring import export, fitted_table, tables

    if json:
        print(export.write_json(scores), flush=True)
    elif len(scores) == 1:
        fitted_table.results_console().print(tables.score_table(scores[0]))
    else:
        fitted_table.results_console().print(tables.ranking_table(scores))


def encoder_options(
    arch: str | None, arch_kwargs: str | None, *, prefix: str | None, teacher: bool, pool: str | None,
    mean: str | None, std: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of `repmetrics.encoders.checkpoint.identify` from the options of a command."""
    return {
        "arch": arch,
        "arch_kwargs": _json(arch_kwargs),
        "prefix": prefix,
        "branch": "teacher" if teacher else "student",
        "pool": pool,
        "mean": _channels(mean, "--mean"),
        "std": _channels(std, "--std"),
    }


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
    """Names separated by commas, each once."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if "" in names:
        raise typer.BadParameter(f"{option} must be names separated by commas, got {text!r}")
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


@app.command(cls=Command, epilog=examples("repmetrics board runs/dino"))
def board(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run with TensorBoard's files.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the server; 0: any free port.")] = 6006,
    host: Annotated[str, typer.Option(help="Address of the server.")] = "localhost",
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
) -> None:
    """Open TensorBoard with a layout: RankMe and ODCorr with error bands, next to the accuracy of the probe."""
    from repmetrics.monitoring.record import record_files
    from repmetrics.report import build
    from repmetrics.report.runs import read_runs
    from repmetrics.tensorboard.server import event_files, serve

    event_files(run_folder)
    if record_files(run_folder):
        try:
            lines = build.verdict_lines(read_runs([run_folder]))
        except ValueError as error:  # runs without a common metric, or a first line not yet written
            lines = [f"no verdict: {error}"]
        print(*lines, sep="\n", file=sys.stderr)
    serve(run_folder, host=host, port=port, open_browser=open_browser)


@app.command(cls=Command, epilog=examples("repmetrics report runs/ --out report.html", "repmetrics report scores.json"))
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders of runs, or .json files of `repmetrics score --json`."),
    ],
    out: Annotated[Path, output_option(help="HTML file to write.", dir_okay=False)] = Path("report.html"),
    by: Annotated[
        str | None, metric_option(help="Metric that decides; default: whitened view retrieval, or RankMe.")
    ] = None,
    pictures: Annotated[
        bool, output_option("--pictures/--no-pictures", help="Show held-out images of up to three runs in the page.")
    ] = True,
) -> None:
    """Write one page about runs that needs no server: verdict, charts, pictures, comparison, alarms and cost."""
    from repmetrics.atomic_write import write_text
    from repmetrics.report import build
    from repmetrics.report.runs import read_runs

    evaluated = read_runs(runs)
    write_text(out, build.page(evaluated, by=by, pictures=pictures))
    print("\n".join([*build.verdict_lines(evaluated, by=by), str(out)]))


@app.command(
    cls=Command,
    epilog=examples("repmetrics trust runs/ --out trust.html", "repmetrics trust runs.csv --target pcam --json"),
)
def trust(
    runs: Annotated[Path, typer.Argument(help="Folder of runs with measurements.jsonl, or .csv table of evaluations.")],
    target: Annotated[str, metric_option(help="Probes to compare with, separated by commas.")] = "linear_probe",
    metrics: Annotated[str | None, metric_option(help="Label-free metrics; default: all that were measured.")] = None,
    out: Annotated[Path | None, output_option(help="HTML file for the report.", dir_okay=False)] = None,
    plots: Annotated[Path | None, output_option(help="Folder for the plots as SVG files.", file_okay=False)] = None,
    table: Annotated[Path | None, output_option(help=".csv file for a table of evaluations.", dir_okay=False)] = None,
    tensorboard: Annotated[
        Path | None, output_option(help="Folder for the runs, for TensorBoard's HParams tab.", file_okay=False)
    ] = None,
    draws: Annotated[int, computation_option(min=100, help="Draws of the bootstrap over runs.")] = 2000,
    seed: Annotated[int, computation_option(help="Seed of the bootstrap.")] = 0,
    json: Json = False,
) -> None:
    """Report how far each label-free metric can be trusted, from runs that were also probed with labels."""
    targets, names = _names(target, "--target"), _names(metrics, "--metrics") if metrics is not None else ()
    from repmetrics.progress import progress
    from repmetrics.trust import charts, hparams, html, report, summary
    from repmetrics.trust.runs import read_runs, write_table

    if tensorboard is not None:
        hparams.check_new(tensorboard)
    evaluations = read_runs(runs)
    with progress("bootstrap", unit="signals") as meter:
        reports = report.analyze(evaluations, targets=targets, metrics=names, draws=draws, seed=seed, meter=meter)
    if table is not None:
        write_table(evaluations, table)
    if out is not None:
        html.write(html.page(reports, evaluations, targets=targets, title=f"Trust: {runs.name}"), out)
    if plots is not None:
        for name, drawing in charts.charts(reports, evaluations, targets=targets).items():
            html.write(drawing, plots / name)
    if tensorboard is not None:
        hparams.write_board(evaluations, tensorboard, targets=targets)
    print(summary.to_json(reports, targets) if json else "\n".join(summary.summarize(reports, targets)))

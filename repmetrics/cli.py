"""Command line of repmetrics. Each command imports what takes long to import."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from repmetrics.cli_errors import run_app
from repmetrics.cli_options import (
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
from repmetrics.cli_scoring import (
    checked_device,
    executor_of,
    make_scorer,
    score_all,
    show_scores,
    split_names,
    watch_folder,
)

if TYPE_CHECKING:  # at run time, it would import torch
    from repmetrics.trust.finished_runs import Choice as FinishedRunsChoice

app = typer.Typer(
    name="repmetrics",
    help="RankMe, ODCorr and related metrics, exact and with error bars, of a checkpoint or a file of embeddings.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=EXIT_CODES,
)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the ``repmetrics`` command."""
    run_app(app, sys.argv[1:] if args is None else args)


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
    score_file = make_scorer(
        metrics, data=data, labels=labels, groups=groups, arch=arch, arch_kwargs=arch_kwargs, prefix=prefix,
        teacher=teacher, pool=pool, mean=mean, std=std, image_size=image_size, batch_size=batch_size, workers=workers,
        device=checked_device(device, data, processes, gpus, dask), views=views, view_set=view_set, cache=cache,
    )  # fmt: skip
    from repmetrics.measurement.registry import PROBES, check_metric_names
    from repmetrics.scoring import export, score, selection, tables

    check_metric_names([] if sort is None or sort in PROBES else [sort])
    if watch:
        watch_folder(score_file, files[0], poll_seconds=poll_seconds, json=json)
        return
    paths = selection.files_to_compare(files, checkpoints=data is not None)
    with executor_of(processes, gpus, dask) as executor:
        scores = score_all(score_file, paths, executor, features_out)
    if csv:
        print(export.write_csv(scores), end="")
    else:
        show_scores(tables.sorted_by(scores, sort), json=json)
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
    """Test whether B is better than A beyond noise, by paired differences over the same groups."""
    score_file = make_scorer(
        metrics, data=data, labels=labels, groups=groups, arch=arch, arch_kwargs=arch_kwargs, prefix=prefix,
        teacher=teacher, pool=pool, mean=mean, std=std, image_size=image_size, batch_size=batch_size, workers=workers,
        device=checked_device(device, data, processes, gpus, dask), views=views, view_set=view_set, cache=cache,
    )  # fmt: skip
    from repmetrics.decisions import checkpoint_selection
    from repmetrics.scoring import export, file_names, fitted_table, score, score_files, tables

    base = file_names.common_folder([first, second])
    with executor_of(processes, gpus, dask) as executor:
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
    score_file = make_scorer(
        ",".join(rule.metrics), data=data, labels=labels, groups=groups, arch=arch, arch_kwargs=arch_kwargs,
        prefix=prefix,
        teacher=teacher, pool=pool, mean=mean, std=std, image_size=image_size, batch_size=batch_size, workers=workers,
        device=checked_device(device, data, processes, gpus, dask), views=views, view_set=rule.view_set, cache=cache,
    )  # fmt: skip
    with executor_of(processes, gpus, dask) as executor:
        results = score_all(score_file, files, executor)
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
    targets, names = split_names(target, "--target"), split_names(metrics, "--metrics") if metrics is not None else ()
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

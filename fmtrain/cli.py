"""The command line: demo, fit, sweep, manifest … Wiring only; what takes long to import is imported by its command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from repmetrics.cli import Debug, Version, run_app

app = typer.Typer(
    name="fmtrain",
    help="Train pathology foundation models by online patching, watched by repmetrics.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit codes: 0 done; 1 failed, one line says why (--debug: the traceback); 2 wrong usage; 130 interrupted.",
)
Out = Annotated[Path, typer.Option(help="Folder for everything the command leaves behind.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete what an earlier call left in --out.")]
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the ``fmtrain`` command."""
    run_app(app, sys.argv[1:] if args is None else args)


@app.callback()
def options(debug: Debug = False, version: Version = False) -> None:
    """Options of every command. `main` takes --debug out before typer reads the rest."""


@app.command(context_settings=PASSED_ON)
def demo(
    context: typer.Context,
    out: Out = Path("demo"),
    slides: Annotated[int, typer.Option(min=10, help="Slides to draw.")] = 48,
    slide_px: Annotated[int, typer.Option(min=1024, help="Their side, at 0.5 µm a pixel.")] = 1536,
    held_out: Annotated[int, typer.Option(min=2, help="Held-out patches.")] = 1024,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 300,
    overwrite: Overwrite = False,
) -> None:
    """Draw slides and go the whole way with them: manifest, fit, score, board. Needs no data and no GPU.

    Further arguments are passed to `fmtrain fit`.
    """
    from fmtrain import demo as demonstration
    from fmtrain.training.output_dir import prepare_output_dir

    prepare_output_dir(
        out, overwrite=overwrite, marker="manifest.json", flags="--overwrite deletes an earlier demo in it"
    )
    demonstration.demo(
        out, slides=slides, slide_px=slide_px, held_out=held_out, steps=steps, config="demo", extra=context.args
    )


@app.command(context_settings=PASSED_ON)
def fit(
    context: typer.Context,
    out: Out,
    config: Annotated[list[str], typer.Option(help="A YAML file, or the name of one that ships. Later ones win.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Train. Anything in the configuration can be set here too: --data.manifest M --trainer.max_steps 1000.

    `--print_config` shows all of it, with defaults.
    """
    from fmtrain.training.fit import fit as train

    train(context.args, configs=config, out=out, resume=resume, overwrite=overwrite)


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="TOML or YAML: study, fit, metric, parameters, trials …")],
    json: Annotated[bool, typer.Option("--json", help="JSON instead of the table.")] = False,
) -> None:
    """Search settings by a metric that needs no labels; each trial is a run of `fmtrain fit`. Again: it goes on.

    Several of these, on one machine or many, work one study.
    """
    import json as text

    from rich.console import Console

    from fmtrain.sweeps import results
    from fmtrain.sweeps.config import parse_sweep, read
    from fmtrain.sweeps.driver import run_sweep
    from fmtrain.sweeps.preflight import check_runs
    from repmetrics.decisions.run_selection import comparison_warnings
    from repmetrics.scoring.tables import results_console

    console = Console(stderr=True)

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False, markup=False)

    stated = parse_sweep(read(file))
    check_runs(stated)
    for doubt in comparison_warnings(list(stated.parameters), metrics=stated.metrics):
        say(f"warning: {doubt}")
    trials = run_sweep(stated, say=say, again=str(file))
    found = results.rows(trials, stated)
    probes = results.probe_best(found, stated, stated.probe) if stated.probe else {}
    if json:
        print(text.dumps(results.to_json(found, stated, probes), indent=2))
    else:
        results_console().print(results.table(found, stated, probes))


@app.command()
def manifest(
    slides: Annotated[Path, typer.Argument(help="Folder of slides, searched with all below it.")],
    out: Annotated[Path, typer.Option(help="The manifest's file, or a folder for manifest.json.")],
    mpp: Annotated[float | None, typer.Option(help="µm per pixel of slides that do not say it believably.")] = None,
    held_out: Annotated[int, typer.Option(min=2, help="Held-out patches: ten times the width of the features.")] = 3840,
    held_out_fraction: Annotated[float, typer.Option(min=0, max=1, help="Of the patients or sites.")] = 0.2,
    split_by: Annotated[Literal["patient", "site"], typer.Option(help="What is held out as a whole.")] = "patient",
    size_px: Annotated[int, typer.Option(min=1, help="Side of the held-out patches.")] = 256,
    mpps: Annotated[str, typer.Option(help="Their magnifications, µm per pixel, with commas between.")] = "0.5",
    table: Annotated[Path | None, typer.Option(help="CSV: file and any of patient, site, mpp, split.")] = None,
    labels: Annotated[Path | None, typer.Option(help="CSV of labelled squares. Default: labels.csv in SLIDES.")] = None,
    label: Annotated[str | None, typer.Option(help="Its column with the label.")] = None,
    min_tissue: Annotated[float, typer.Option(min=0, max=1, help="Least share of tissue in a patch.")] = 0.4,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that examine slides. Default: all cores.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the split and the patches.")] = 0,
) -> None:
    """Examine slides, split them by patient, freeze the held-out patches."""
    from rich.console import Console
    from rich.progress import Progress

    from fmtrain.manifest.build import build_manifest, summary
    from fmtrain.manifest.scan import cores

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("slides")

        def show(done: int, total: int, examined: Any) -> None:
            progress.update(task, completed=done, total=total)

        built = build_manifest(
            slides,
            out,
            mpp=mpp,
            held_out=held_out,
            held_out_fraction=held_out_fraction,
            split_by=split_by,
            size_px=size_px,
            mpps=_numbers(mpps),
            table=table,
            labels=labels,
            label=label,
            min_tissue=min_tissue,
            workers=workers or cores(),
            seed=seed,
            on_slide=show,
        )
    for line in summary(built):
        print(line)


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Any that `repmetrics score` reads.", exists=True, dir_okay=False)],
    data: Annotated[
        Path, typer.Option(help="Folder of the data set as its publisher ships it; a manifest for slides.")
    ],
    task: Annotated[str | None, typer.Option(help="bach, crc, mhist, pcam or consep.")] = None,
    slide_labels: Annotated[Path | None, typer.Option(help="CSV of slides and labels, instead of a task.")] = None,
    label: Annotated[str | None, typer.Option(help="Its column with the label.")] = None,
    protocol: Annotated[Literal["paper", "now"], typer.Option(help="eva's, of the paper (2024-04) or of now.")] = "now",
    runs: Annotated[int, typer.Option(min=1, help="Heads trained, with different seeds.")] = 5,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Of each head. Default: the protocol's 12,500.")] = None,
    arch: Annotated[str | None, typer.Option(help="timm architecture, instead of inferring it.")] = None,
    prefix: Annotated[str | None, typer.Option(help="Where in the file the encoder's weights stand.")] = None,
    teacher: Annotated[bool, typer.Option("--teacher/--student", help="Where the file holds both.")] = True,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode images.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="JSON instead of the table.")] = False,
) -> None:
    """Linear probe of a checkpoint's frozen features on a labelled task, beside the published numbers."""
    if (task is None) == (slide_labels is None):
        raise typer.BadParameter("give either --task or --slide-labels")
    import json as text

    from fmtrain.evaluation import evaluate
    from repmetrics.scoring.feature_cache import default_folder
    from repmetrics.scoring.score import EmbedSettings, check_device
    from repmetrics.scoring.tables import results_console

    check_device(device)
    settings = EmbedSettings(num_workers=workers, device=device, cache=default_folder())
    common: dict[str, Any] = {"data": data, "settings": settings, "arch": arch, "prefix": prefix}
    common["branch"] = "teacher" if teacher else "student"
    if slide_labels is not None:
        m = evaluate.evaluate_slides(checkpoint, labels=slide_labels, label=label, **common)
        error = f" ± {m.standard_error:.3f}" if m.standard_error is not None else f" ({m.reason})"
        told = f"balanced accuracy {m.value:.3f}{error} over {m.n} slides; chance {m.details['chance']:.3f}"
        print(text.dumps(m.to_json(), indent=2) if json else told)
        return
    if task == "consep":
        if protocol == "paper":
            raise typer.BadParameter("consep has no --protocol paper: leave it out")
        dice = evaluate.evaluate_segmentation(checkpoint, runs=runs, max_steps=max_steps, **common)
        print(dice.to_json()) if json else results_console().print(evaluate.table(dice))
        return
    found = evaluate.evaluate(checkpoint, task=str(task), protocol=protocol, runs=runs, max_steps=max_steps, **common)
    if json:
        print(found.to_json())
    else:
        results_console().print(evaluate.table(found))


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Any whose architecture is stated, or named with --arch.")],
    out: Annotated[Path, typer.Option(help="Folder for the files.")],
    to: Annotated[
        Literal["safetensors", "timm", "eva"] | None,
        typer.Option(help="timm: a plain state dict. Default: eva with --data, else safetensors."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="For eva: where it will find the data set.")] = None,
    task: Annotated[str | None, typer.Option(help="For eva: bach, crc, mhist or pcam.")] = None,
    arch: Annotated[str | None, typer.Option(help="timm architecture of a checkpoint that states none.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="For eva: heads that it trains.")] = 5,
) -> None:
    """Write the encoder alone: for timm and others with a model card, or with what kaiko-eva evaluates it by."""
    to = to or ("safetensors" if data is None and task is None else "eva")
    if to == "eva":
        from fmtrain.export.eva import export_eva

        if data is None or task is None:
            raise typer.BadParameter("--to eva needs --task and --data")
        config = export_eva(checkpoint, out, task=task, data=data, arch=arch, runs=runs)
        print(f"eva predict_fit --config {config}")
        return
    from fmtrain.export.encoder import export_encoder
    from fmtrain.training.output_dir import prepare_output_dir

    prepare_output_dir(out, overwrite=False, marker="config.json", flags="name another folder")
    for path in export_encoder(checkpoint, out, to=to, arch=arch):
        print(path)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--mpps must be numbers with commas between, like 0.25,0.5, got {text!r}") from None

"""Command line of fmtrain. Each command imports what takes long to import."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import chdir
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer

from fmtrain.training.output_dir import ResumeMode
from fmtrain.training.shipped import shipped_configs
from repmetrics.cli_errors import EXTRAS as COMMON_EXTRAS
from repmetrics.cli_errors import run_app
from repmetrics.cli_options import (
    EXIT_CODES,
    Arch,
    ArchKwargs,
    Command,
    Dask,
    Debug,
    Device,
    ImageSize,
    Json,
    Mean,
    Pool,
    Prefix,
    Std,
    Teacher,
    Version,
    Workers,
    computation_option,
    data_option,
    examples,
)
from repmetrics.cli_scoring import encoder_options

app = typer.Typer(
    name="fmtrain",
    help="Train pathology foundation models by online patching, monitored by repmetrics.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=EXIT_CODES,
)
Out = Annotated[Path, typer.Option(help="Folder for all files of the command.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the files of an earlier call in --out.")]
Configs = Annotated[
    list[str],
    typer.Option(help=f"YAML file, or a shipped configuration: {', '.join(shipped_configs())}. Later ones win."),
]
slide_option = partial(typer.Option, rich_help_panel="Slides")
split_option = partial(typer.Option, rich_help_panel="Split and held-out patches")
probe_option = partial(typer.Option, rich_help_panel="Heads")
TRAIN_MODULES = ("imagecodecs", "jsonargparse", "lightly", "openslide", "pydicom", "tifffile")
PARTS_OF_TRAIN = ("repmetrics[score]", "repmetrics[lightning]", "repmetrics[report]")
EXTRAS = {
    **{name: "repmetrics[train]" if remedy in PARTS_OF_TRAIN else remedy for name, remedy in COMMON_EXTRAS.items()},
    **dict.fromkeys(TRAIN_MODULES, "repmetrics[train]"),
    "submitit": "repmetrics[slurm]",
}
"""What to install for a module that is absent. Every command of fmtrain needs more than one part of ``[train]``."""
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the ``fmtrain`` command."""
    run_app(app, complete_resume(sys.argv[1:] if args is None else args), extras=EXTRAS)


def complete_resume(args: Sequence[str]) -> list[str]:
    """Give a ``--resume`` without a value the value "continue": typer has no options with an optional value.

    Example:
        >>> complete_resume(["fit", "--resume", "--out", "run"]), complete_resume(["--resume", "auto"])
        (['fit', '--resume=continue', '--out', 'run'], ['--resume', 'auto'])
        >>> complete_resume([])
        []
    """
    following = [*args, ""][1:]
    return [
        "--resume=continue" if arg == "--resume" and after not in get_args(ResumeMode) else arg
        for arg, after in zip(args, following, strict=True)
    ]


@app.callback()
def options(debug: Debug = False, version: Version = False) -> None:
    """Options of every command. `run_app` removes --debug before typer parses the rest."""


@app.command(cls=Command, context_settings=PASSED_ON, epilog=examples("fmtrain demo --out demo"))
def demo(
    context: typer.Context,
    out: Out = Path("demo"),
    slides: Annotated[int, typer.Option(min=10, help="Number of slides to draw.")] = 48,
    slide_px: Annotated[int, typer.Option(min=1024, help="Side of a slide in pixels, at 0.5 µm per pixel.")] = 1536,
    held_out: Annotated[int, typer.Option(min=2, help="Number of held-out patches.")] = 1024,
    steps: Annotated[int, typer.Option(min=1, help="Number of training steps.")] = 300,
    overwrite: Overwrite = False,
) -> None:
    """Draw slides and run all commands on them: manifest, fit, score, report. No data and no GPU are needed.

    Further arguments are passed to `fmtrain fit`.
    """
    from fmtrain import demo as demonstration
    from fmtrain.training.output_dir import prepare_output_dir

    prepare_output_dir(
        out, overwrite=overwrite, marker=demonstration.MARKER, flags="--overwrite deletes an earlier demo in it"
    )
    demonstration.demo(
        out, slides=slides, slide_px=slide_px, held_out=held_out, steps=steps, config="demo", extra=context.args
    )


@app.command(
    cls=Command,
    context_settings=PASSED_ON,
    epilog=examples(
        "fmtrain fit --config tissue-small --out run/ \\",
        "    --data.manifest manifest.json",
        "fmtrain fit --config tissue-small --print_config",
    ),
)
def fit(
    context: typer.Context,
    config: Configs,
    out: Annotated[Path | None, typer.Option(help="Folder for all files of the run.")] = None,
    resume: Annotated[
        ResumeMode | None,
        typer.Option(metavar="[auto]", help="Continue the run in --out; with auto, begin it if there is none."),
    ] = None,
    allow_change: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Setting that may differ from the run to continue.")
    ] = None,
    overwrite: Overwrite = False,
    check: Annotated[
        bool, typer.Option("--check", help="Read and step for a minute, report speed, memory and disk, and stop.")
    ] = False,
) -> None:
    """Train. Options can set anything in the configuration: --data.manifest M --trainer.max_steps 1000.

    `--print_config` shows the whole configuration with its defaults; it needs no --out.
    """
    from fmtrain.training.fit import fit as train

    if out is None and not any(arg.startswith("--print_config") for arg in context.args):
        raise typer.BadParameter("give the folder of the run", param_hint="--out")
    train(
        context.args,
        configs=config,
        out=out or Path("run"),
        resume=resume,
        overwrite=overwrite,
        allow_change=allow_change or (),
        check_only=check,
    )


@app.command(
    cls=Command,
    epilog=examples(
        "fmtrain sweep sweep.toml",
        "fmtrain sweep sweep.toml --slurm 16 --until 11h30m",
    ),
)
def sweep(
    file: Annotated[Path, typer.Argument(help="TOML or YAML file: study, fit, parameters, trials …")],
    table: Annotated[bool, typer.Option("--table", help="Show the trials so far and run none.")] = False,
    json: Json = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV instead of the table.")] = False,
    retry_crashed: Annotated[
        bool, typer.Option("--retry-crashed", help="Run the trials again that crashed in earlier calls.")
    ] = False,
    until: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Save and end after this time, such as 11h30m.")
    ] = None,
    slurm: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Print a script of SLURM: an array of N drivers, one a node.")
    ] = None,
    submit: Annotated[
        bool, typer.Option("--submit", help="With --slurm: submit the drivers, through submitit.")
    ] = False,
) -> None:
    """Search settings by a metric that needs no labels. Each trial is a run of `fmtrain fit`. Run again to resume.

    Several processes, on one machine or many, can work on one study. Paths in the file are relative to its folder.
    """
    if json and csv:
        raise typer.BadParameter("--json and --csv exclude each other")
    if submit and slurm is None:
        raise typer.BadParameter("--submit needs --slurm with the number of drivers")
    if slurm is not None and (table or json or csv or retry_crashed):
        raise typer.BadParameter("--slurm starts drivers elsewhere: leave out --table, --json, --csv, --retry-crashed")
    from fmtrain.sweeps.array_job import print_or_submit
    from fmtrain.sweeps.config import parse_sweep, read
    from fmtrain.sweeps.report import run_and_show, show
    from repmetrics.progress import parse_duration

    seconds = None if until is None else parse_duration(until)
    config = parse_sweep(read(file), base=file.resolve().parent)
    form: Literal["table", "json", "csv"] = "json" if json else "csv" if csv else "table"
    with chdir(file.resolve().parent):  # to which all paths in the file are relative
        if table:
            show(config, form=form, log=lambda line: print(line, file=sys.stderr))
        elif slurm is not None:
            print_or_submit(file, config, slurm, until=until, submitted=submit)
        else:
            run_and_show(config, form=form, again=str(file), retry_crashed=retry_crashed, seconds=seconds)


@app.command(
    cls=Command,
    epilog=examples("fmtrain manifest slides/ --out manifest.json", "fmtrain manifest slides/ --out study/ --mpp 0.25"),
)
def manifest(
    slides: Annotated[Path, typer.Argument(help="Folder of slides, searched recursively.")],
    out: Annotated[Path, typer.Option(help="Manifest file, or folder for manifest.json.")],
    mpp: Annotated[float | None, slide_option(help="µm per pixel of slides without a plausible value.")] = None,
    mpp_override: Annotated[
        list[str] | None, slide_option(metavar="PATTERN=MPP", help="µm per pixel that replaces the file's, for names.")
    ] = None,
    held_out: Annotated[int, split_option(min=2, help="Held-out patches: ten times the width of the features.")] = 3840,
    held_out_fraction: Annotated[float, split_option(help="Fraction of the patients or sites, between 0 and 1.")] = 0.2,
    split_by: Annotated[Literal["patient", "site"], split_option(help="Unit that is held out as a whole.")] = "patient",
    size_px: Annotated[int, split_option(min=1, help="Side of the held-out patches.")] = 256,
    mpps: Annotated[str, split_option(help="µm per pixel of the held-out patches, separated by commas.")] = "0.5",
    table: Annotated[Path | None, slide_option(help="CSV: file and any of patient, site, mpp, split.")] = None,
    labels: Annotated[
        Path | None, split_option(help="CSV of labeled squares. Default: labels.csv in SLIDES if it holds squares.")
    ] = None,
    label: Annotated[str | None, split_option(help="Column of the label.")] = None,
    patient: Annotated[
        str | None,
        slide_option(metavar="REGEX", help="Patient in the path below SLIDES; 'folder': the first folder of it."),
    ] = None,
    include: Annotated[list[str] | None, slide_option(metavar="PATTERN", help="Names or folders to use.")] = None,
    exclude: Annotated[list[str] | None, slide_option(metavar="PATTERN", help="Names or folders to leave out.")] = None,
    masks: Annotated[
        Path | None, slide_option(help="Folder of tissue masks, PNG or GeoJSON, named as the slides.")
    ] = None,
    pseudonyms: Annotated[
        Path | None, slide_option(metavar="KEYFILE", help="Replace names of patients and slides by keyed hashes.")
    ] = None,
    min_tissue: Annotated[float, split_option(min=0, max=1, help="Minimum share of tissue in a patch.")] = 0.4,
    workers: Annotated[
        int | None, computation_option(min=1, help="Processes that scan slides. Default: all cores.")
    ] = None,
    dask: Dask = None,
    shard: Annotated[
        str | None, computation_option(metavar="K/N", help="Scan share K of N only, as a job of an array.")
    ] = None,
    decode: Annotated[
        bool, computation_option("--decode", help="Decode the held-out patches now, not at the start of the first run.")
    ] = False,
    merge: Annotated[bool, computation_option("--merge", help="Build from the shares that --shard scanned.")] = False,
    seed: Annotated[int, split_option(min=0, help="Seed of the split and of the patches.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Build anew. Default: add new slides.")] = False,
) -> None:
    """Scan slides, split them by patient, and freeze the held-out patches. An existing manifest is extended."""
    if shard is not None and merge:
        raise typer.BadParameter("--shard and --merge exclude each other: merge after all shards")
    if shard is not None and decode:
        raise typer.BadParameter("--decode follows the scan of all shards: give it with --merge")
    from fmtrain.manifest.build import build_manifest, scan_shard, summary
    from fmtrain.manifest.collection import parse_overrides
    from fmtrain.manifest.scan import ScanResult
    from fmtrain.manifest.shards import Shard
    from repmetrics.executor import cores, open_executor
    from repmetrics.progress import print_line, progress

    options: dict[str, Any] = {
        "mpp": mpp, "mpp_override": parse_overrides(mpp_override or ()), "held_out": held_out,
        "held_out_fraction": held_out_fraction, "split_by": split_by, "size_px": size_px, "mpps": _numbers(mpps),
        "table": table, "labels": labels, "label": label, "patient": patient, "include": include or (),
        "exclude": exclude or (), "masks": masks, "pseudonyms": pseudonyms, "min_tissue": min_tissue, "seed": seed,
        "overwrite": overwrite,
    }  # fmt: skip
    share = None if shard is None else Shard.parse(shard)
    with (
        open_executor(processes=workers or cores(), dask=dask) as executor,
        progress("slides", unit="slides", tenths=True) as meter,
    ):

        def show(done: int, total: int, result: ScanResult) -> None:
            meter.total = total
            meter.advance(1)

        if share is not None:
            results = scan_shard(slides, out, share, executor=executor, on_slide=show, **options)
        else:
            built = build_manifest(slides, out, executor=executor, on_slide=show, merge=merge, **options)
            if decode:
                from fmtrain.patches.dataset import HeldOutPatches

                HeldOutPatches(built.path).build_cache(executor=executor, write=print_line)
    if share is not None:
        problems = [result for result in results if result.problem]
        print(
            f"shard {shard}: {len(results)} slides scanned, {len(problems)} with a problem; --merge follows all shards"
        )
        return
    for warning in built.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for line in summary(built):
        print(line)


@app.command(cls=Command, epilog=examples("fmtrain clear-cache manifest.json"))
def clear_cache(
    manifest: Annotated[Path, typer.Argument(help="Manifest file.", exists=True, dir_okay=False)],
) -> None:
    """Delete the decoded held-out patches beside a manifest; the next run decodes them again."""
    from fmtrain.patches.held_out_cache import remove_caches

    typer.echo(f"{remove_caches(manifest) / 1e6:.1f} MB freed")


@app.command(
    cls=Command,
    epilog=examples(
        "fmtrain evaluate last.ckpt --task crc --data crc/",
        "fmtrain evaluate last.ckpt --data manifest.json \\",
        "    --slide-labels grades.csv --label grade",
    ),
)
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint for `repmetrics score`.")],
    data: Annotated[Path, data_option(help="Folder of the data set in its publisher's layout; for slides: manifest.")],
    task: Annotated[str | None, data_option(help="Task: bach, crc, mhist, pcam or consep.")] = None,
    slide_labels: Annotated[Path | None, data_option(help="CSV of slides and labels, instead of a task.")] = None,
    label: Annotated[str | None, data_option(help="Column of the label in that CSV.")] = None,
    protocol: Annotated[
        Literal["paper", "v0.4"], probe_option(help="Protocol of eva: of the paper (2024-04), or of eva 0.4.")
    ] = "v0.4",
    runs: Annotated[int, probe_option(min=1, help="Number of heads trained, with different seeds.")] = 5,
    max_steps: Annotated[
        int | None, probe_option(min=1, help="Steps per head. Default: the protocol's 12,500.")
    ] = None,
    arch: Arch = None,
    arch_kwargs: ArchKwargs = None,
    prefix: Prefix = None,
    teacher: Teacher = True,
    pool: Pool = None,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    workers: Workers = 0,
    device: Device = None,
    json: Json = False,
) -> None:
    """Linear probe of a checkpoint's frozen features on a labeled task, next to the published numbers."""
    if (task is None) == (slide_labels is None):
        raise typer.BadParameter("give either --task or --slide-labels")
    import json as json_format

    from fmtrain.evaluation import evaluate
    from repmetrics.scoring.fitted_table import results_console
    from repmetrics.scoring.settings import EmbedSettings, cache_folder, choose_device

    settings = EmbedSettings(image_size, num_workers=workers, device=choose_device(device), cache=cache_folder())
    overrides = encoder_options(arch, arch_kwargs, prefix=prefix, teacher=teacher, pool=pool, mean=mean, std=std)
    common: dict[str, Any] = {"data": data, "settings": settings, **overrides}
    if slide_labels is not None:
        m = evaluate.evaluate_slides(checkpoint, labels=slide_labels, label=label, **common)
        error = f" ± {m.standard_error:.3f}" if m.standard_error is not None else f" ({m.reason})"
        text = f"balanced accuracy {m.value:.3f}{error} over {m.n} slides; chance {m.details['chance']:.3f}"
        print(json_format.dumps(m.to_json(), indent=2) if json else "\n".join([text, *m.warnings]))
        return
    if task == "consep" and (protocol == "paper" or pool is not None):
        raise typer.BadParameter("consep has no --protocol paper, and its head reads all tokens: leave --pool out")
    common |= {"runs": runs, "max_steps": max_steps}
    if task == "consep":
        result = evaluate.evaluate_segmentation(checkpoint, **common)
    else:
        result = evaluate.evaluate(checkpoint, task=str(task), protocol=protocol, **common)
    if json:
        print(result.to_json())
    else:
        results_console().print(evaluate.table(result))


@app.command(cls=Command, epilog=examples("fmtrain free-labels last.ckpt --data manifest.json"))
def free_labels(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint for `repmetrics score`.", exists=True, dir_okay=False)],
    data: Annotated[Path, typer.Option(help="Manifest whose held-out patches to use.", exists=True)],
    arch: Arch = None,
    prefix: Prefix = None,
    teacher: Teacher = True,
    workers: Workers = 0,
    device: Device = None,
    json: Json = False,
) -> None:
    """Measure what features tell of tissue beyond color, and of its slide, patient and site. No labels are needed."""
    import json as json_format

    from fmtrain.evaluation.battery import measure_free_labels
    from fmtrain.manifest.manifest import Manifest
    from repmetrics.encoders.checkpoint import load_encoder
    from repmetrics.progress import progress
    from repmetrics.scoring.fitted_table import results_console
    from repmetrics.scoring.score import Score
    from repmetrics.scoring.settings import choose_device
    from repmetrics.scoring.tables import score_table

    device = choose_device(device)
    encoder = load_encoder(checkpoint, arch=arch, prefix=prefix, branch="teacher" if teacher else "student").to(device)
    with progress(f"embedding {data.name}", total=2 * len(Manifest.load(data).held_out)) as meter:
        measured = measure_free_labels(encoder, data, num_workers=workers, device=device, on_batch=meter.advance)
    if json:
        print(json_format.dumps({name: m.to_json() for name, m in measured.items()}, indent=2))
    else:
        score = Score(encoder.source, encoder.arch, encoder.step, f"{data.name} (slides manifest)", measured)
        results_console().print(score_table(score))


@app.command(
    cls=Command,
    epilog=examples(
        "fmtrain export last.ckpt --out encoder/",
        "fmtrain export last.ckpt --to timm --out encoder/",
    ),
)
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint that states its architecture, or any with --arch.")],
    out: Annotated[Path, typer.Option(help="Folder for the files.")],
    to: Annotated[
        Literal["safetensors", "timm", "eva"] | None,
        typer.Option(help="Format; timm: a plain state dict. Default: eva with --data, else safetensors."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="For eva: folder of the data set.")] = None,
    task: Annotated[str | None, typer.Option(help="For eva: task, bach, crc, mhist or pcam.")] = None,
    arch: Arch = None,
    arch_kwargs: ArchKwargs = None,
    prefix: Prefix = None,
    teacher: Teacher = True,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    runs: Annotated[int, typer.Option(min=1, help="For eva: number of heads to train.")] = 5,
) -> None:
    """Write the encoder alone: for timm and others with a model card, or with a configuration for kaiko-eva."""
    to = to or ("safetensors" if data is None and task is None else "eva")
    if to == "eva" and (data is None or task is None):
        raise typer.BadParameter("--to eva needs --task and --data")
    overrides = encoder_options(arch, arch_kwargs, prefix=prefix, teacher=teacher, pool=None, mean=mean, std=std)
    from fmtrain.export.encoder import export_encoder, exportable_encoder
    from fmtrain.training.output_dir import prepare_output_dir

    encoder = exportable_encoder(checkpoint, image_size=image_size, classes=to != "eva", **overrides)
    for note in encoder.notes:
        print(f"export: {note}", file=sys.stderr)
    if to == "eva":
        from fmtrain.export.eva import export_eva

        config = export_eva(encoder, out, task=str(task), data=Path(str(data)), runs=runs)
        print(f"eva predict_fit --config {config}")
        return
    prepare_output_dir(out, overwrite=False, marker="config.json", flags="name another folder")
    for path in export_encoder(encoder, checkpoint, out, to=to):
        print(path)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--mpps must be numbers separated by commas, like 0.25,0.5, got {text!r}") from None

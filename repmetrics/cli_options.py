"""Options that commands share, and help with groups of options and examples, as plain text for narrow terminals."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

DEBUG = "--debug"
EXIT_CODES = "Exit codes: 0 done; 1 failed, one line says why (--debug: traceback); 2 wrong usage; 130 interrupted."


class Command(TyperCommand):
    """A command whose help lists its options by their `rich_help_panel`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a section per group, in the order of their first options."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                rest = "Arguments" if parameter.param_type_name == "argument" else "Options"
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or rest, []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


def examples(*lines: str) -> str:
    r"""Text below the help of a command, which is not wrapped.

    Example:
        >>> examples("repmetrics board runs/a")
        '\x08\nExamples:\n  repmetrics board runs/a'
    """
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def show_version(requested: bool) -> None:
    """Print the version and exit, if --version is given."""
    if requested:
        from repmetrics import __version__

        print(__version__)
        raise typer.Exit


# Options of each group of the help.
data_option = partial(typer.Option, rich_help_panel="Data")
encoder_option = partial(typer.Option, rich_help_panel="Encoder")
metric_option = partial(typer.Option, rich_help_panel="Metrics")
computation_option = partial(typer.Option, rich_help_panel="Computation")
output_option = partial(typer.Option, rich_help_panel="Output")
watch_option = partial(typer.Option, rich_help_panel="Watching")

Debug = Annotated[bool, typer.Option(DEBUG, help="Show the traceback of a failure.")]
Version = Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=show_version)]
Files = Annotated[
    list[Path],
    typer.Argument(metavar="FILE...", help="Checkpoints, globs, folders of runs; without --data: files of embeddings."),
]
Data = Annotated[Path | None, data_option(help="Images to embed: image folder, CSV of files, manifest.json.")]
Labels = Annotated[
    str | None, data_option(help="Column or key of the labels; 'folder'; 'none'; a CSV of some images' labels.")
]
Groups = Annotated[str | None, data_option(help="Column or key of the groups (slides); folder; none; independent.")]
Arch = Annotated[str | None, encoder_option(help="Name of a timm architecture; default: inferred.")]
ArchKwargs = Annotated[str | None, encoder_option(help="Arguments of the architecture, as JSON.")]
Prefix = Annotated[str | None, encoder_option(help="Prefix of the encoder's weights; default: found by name.")]
Teacher = Annotated[
    bool,
    encoder_option("--teacher/--student", help="Network to load from a file that contains both."),
]
Pool = Annotated[
    Literal["cls", "mean", "cls+mean"] | None,
    encoder_option(
        help="Features of a ViT: class token, mean of the patch tokens, or both; default: the network's own."
    ),
]
Mean = Annotated[
    str | None,
    encoder_option(help="Mean of the channels on the scale 0 to 1: three numbers, or one."),
]
Std = Annotated[str | None, encoder_option(help="Standard deviation of the channels: three numbers, or one.")]
ImageSize = Annotated[
    int | None,
    encoder_option(min=1, help="Side of the images in pixels; default: the encoder's."),
]
Metrics = Annotated[
    str | None,
    metric_option(help="Names of metrics, separated by commas; default: the standard four."),
]
Views = Annotated[int, metric_option(min=2, help="Augmented views of each image, for LiDAR and alignment.")]
ViewSetName = Annotated[
    str | None,
    metric_option("--view-set", help="View set: geometry (default), turned, natural, weak, stain (slides)."),
]
BatchSize = Annotated[int, computation_option(min=1, help="Images per batch; the default is the monitor's.")]
Workers = Annotated[int, computation_option(min=0, help="Processes that decode images.")]
Device = Annotated[
    str | None,
    computation_option(help="Device of the encoder: cpu, cuda, cuda:1 ...; default: the accelerator, if any."),
]
Processes = Annotated[
    int | None, computation_option(min=1, help="Score in so many processes at the same time. Default: in this one.")
]
Gpus = Annotated[int | None, computation_option(min=1, help="Score in so many processes, each with one GPU.")]
Dask = Annotated[
    str | None,
    computation_option(metavar="ADDRESS", help="Run on the workers of this dask scheduler, tcp://host:8786."),
]
Cache = Annotated[bool, computation_option("--cache/--no-cache", help="Cache features in ~/.cache/repmetrics.")]
Json = Annotated[bool, output_option("--json", help="Print JSON instead of the table.")]

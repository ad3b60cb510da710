"""Whether `fmtrain fit` would accept the trials of a sweep, and log what they are judged by: asked beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution

from fmtrain.sweeps.config import Sweep
from repmetrics.probes.common import PROBES


def check_runs(sweep: Sweep) -> None:
    """Have `fmtrain fit` read what trials at the ends of every range would give it, and look for metrics and labels.

    Raises:
        ValueError: An unknown key, with names near it; a value of the wrong kind; no manifest; a metric that is never
            measured; a probe without labels.
    """
    from fmtrain.manifest.manifest import Manifest
    from fmtrain.sweeps.process import cli_value
    from fmtrain.training.config import parse_config
    from fmtrain.training.fit import silence_lightning

    silence_lightning()
    args, configs = split_config_args(sweep.fit)
    for corner in boundary_params(sweep.parameters):
        drawn = [part for name, value in corner.items() for part in (f"--{name}", cli_value(value))]
        config = parse_config([*args, *drawn], configs=configs, out=sweep.out)
        labelled = bool(config["data"]["probe"] or Manifest.load(Path(config["data"]["manifest"])).classes)
        if absent := [
            name for name in sweep.metrics if name not in (known := logged_metrics(config, labelled=labelled))
        ]:
            raise ValueError(
                f"{', '.join(absent)} will never be logged by these runs: choose among {', '.join(known)}, or "
                + ("give them labels by --data.probe" if set(absent) & set(PROBES) else "add it to --monitor.metrics")
                + " in fit"
            )
    if sweep.probe is not None:
        from fmtrain.training.datamodule import labeled_images

        labeled_images(Path(sweep.probe.data))


def split_config_args(fit: Sequence[str]) -> tuple[list[str], list[str]]:
    """Other arguments, and the names of the configurations.

    Example:
        >>> split_config_args(["--config", "demo", "--trainer.max_steps", "3", "--config=mine.yaml"])
        (['--trainer.max_steps', '3'], ['demo', 'mine.yaml'])
    """
    args: list[str] = []
    configs: list[str] = []
    rest = iter(fit)
    for part in rest:
        name, _, value = part.partition("=")
        if name == "--config":
            configs.append(value or next(rest, ""))
        else:
            args.append(part)
    return args, configs


def boundary_params(space: Mapping[str, BaseDistribution]) -> list[dict[str, Any]]:
    """Settings in which every choice and both ends of every range occur.

    Example:
        >>> from optuna.distributions import FloatDistribution
        >>> boundary_params({"lr": FloatDistribution(0.1, 0.2), "spread": CategoricalDistribution(["koleo", "kde", "none"])})
        [{'lr': 0.1, 'spread': 'koleo'}, {'lr': 0.2, 'spread': 'kde'}, {'lr': 0.2, 'spread': 'none'}]
    """
    ends = {name: d.choices if isinstance(d, CategoricalDistribution) else (d.low, d.high) for name, d in space.items()}  # type: ignore[attr-defined]
    count = max(len(values) for values in ends.values())
    return [{name: values[min(i, len(values) - 1)] for name, values in ends.items()} for i in range(count)]


def logged_metrics(config: Mapping[str, Any], *, labelled: bool) -> list[str]:
    """What a run of this configuration writes into measurements.jsonl."""
    names = [*config["monitor"]["metrics"], *(PROBES if labelled else ())]
    layers = config["monitor"]["layers"] or []
    return [*names, *(f"{layer}/{name}" for layer in layers for name in names), "loss"]

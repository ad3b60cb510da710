"""Check before the sweep starts that `fmtrain fit` accepts its trials and logs the target metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution

from fmtrain.sweeps.config import Sweep
from repmetrics.probes.common import PROBES


def check_runs(sweep: Sweep) -> None:
    """Have `fmtrain fit` parse trials at the ends of every range, and check metrics and labels."""
    from fmtrain.manifest.manifest import Manifest
    from fmtrain.sweeps.process import cli_value
    from fmtrain.training.config import parse_config
    from fmtrain.training.fit import silence_lightning

    silence_lightning()
    args, configs = split_config_args(sweep.fit)
    for params in boundary_params(sweep.parameters):
        settings = [part for name, value in params.items() for part in (f"--{name}", cli_value(value))]
        config = parse_config([*args, *settings], configs=configs, out=sweep.out)
        labeled = bool(config["data"]["probe"] or Manifest.load(Path(config["data"]["manifest"])).classes)
        known = logged_metrics(config, labeled=labeled)
        if absent := [name for name in sweep.metrics if name not in known]:
            raise ValueError(
                f"{', '.join(absent)} will never be logged by these runs: choose among {', '.join(known)}, or "
                + ("give them labels by --data.probe" if set(absent) & set(PROBES) else "add it to --monitor.metrics")
                + " in fit"
            )
    if sweep.probe is not None:
        from fmtrain.training.datamodule import labeled_images

        labeled_images(Path(sweep.probe.data))


def split_config_args(fit: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments of `fmtrain fit` into other arguments and the names of the configurations.

    Example:
        >>> split_config_args(["--config", "demo", "--trainer.max_steps", "3", "--config=small.yaml"])
        (['--trainer.max_steps', '3'], ['demo', 'small.yaml'])
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
        >>> boundary_params({"lr": FloatDistribution(0.1, 0.2), "loss": CategoricalDistribution(["a", "b", "c"])})
        [{'lr': 0.1, 'loss': 'a'}, {'lr': 0.2, 'loss': 'b'}, {'lr': 0.2, 'loss': 'c'}]
    """
    ends = {name: d.choices if isinstance(d, CategoricalDistribution) else (d.low, d.high) for name, d in space.items()}  # type: ignore[attr-defined]
    count = max(len(values) for values in ends.values())
    return [{name: values[min(i, len(values) - 1)] for name, values in ends.items()} for i in range(count)]


def logged_metrics(config: Mapping[str, Any], *, labeled: bool) -> list[str]:
    """Names that a run of this configuration writes into measurements.jsonl."""
    names = [*config["monitor"]["metrics"], *(PROBES if labeled else ())]
    layers = config["monitor"]["layers"] or []
    return [*names, *(f"{layer}/{name}" for layer in layers for name in names), "loss"]

"""The runs of the experiment: settings drawn at random, settings that break training, and runs for figures.

Each random run belongs to one half, fixed by a hash of its name: rules are explored on one half, and tested once on the
other.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping
from typing import Any, NamedTuple

METHODS = ("SimCLR", "VICReg", "BYOL", "DINO", "DINOv2")
RANDOM_RUNS = {"cifar10": 16, "cells": 10, "nuclei": 10}
"""Number of random settings of each method, by domain."""

DEFAULTS: Mapping[str, Any] = {"lr": 2e-3, "weight_decay": 0.05, "min_area": 0.2, "jitter": 0.5, "grayscale": 0.0}
METHOD_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "SimCLR": {"temperature": 0.2},
    "VICReg": {"variance_weight": 25.0, "covariance_weight": 1.0},
    "BYOL": {"momentum": 0.99, "predictor": True},
    "DINO": {"momentum": 0.99, "teacher_temp": 0.04, "center_momentum": 0.9},
    "DINOv2": {
        "momentum": 0.99,
        "teacher_temp": 0.04,
        "center_momentum": 0.9,
        "patch_weight": 1.0,
        "koleo_weight": 0.1,
    },
}
BROKEN: Mapping[str, Mapping[str, Any]] = {
    "SimCLR": {"lr": 0.3},
    "VICReg": {"variance_weight": 0.0, "covariance_weight": 0.0},
    "BYOL": {"momentum": 0.0, "predictor": False},
    "DINO": {"center_momentum": 1.0, "teacher_temp": 0.02},
    "DINOv2": {"lr": 0.1},
}
"""One setting of each method that destroys the representation: divergence, or collapse."""


class Run(NamedTuple):
    """One run.

    Attributes:
        kind: "random", "broken", or "figure".
        half: "explore" or "confirm"; "" for runs that are not random.
        fraction: Share of the training images.
        pretrain: Domain to train on before, or "".
    """

    name: str
    domain: str
    method: str
    kind: str
    half: str
    seed: int
    settings: Mapping[str, Any]
    fraction: float = 1.0
    pretrain: str = ""


def plan() -> list[Run]:
    """All runs, in an order in which domains, methods and halves alternate."""
    order: list[tuple[float, Run]] = []
    for domain, count in RANDOM_RUNS.items():
        for method in METHODS:
            names = [f"{domain}-{method}-{k:02}" for k in range(count)]
            explore = sorted(names, key=_hash)[: count // 2]
            for k, name in enumerate(names):
                half = "explore" if name in explore else "confirm"
                run = Run(name, domain, method, "random", half, _hash(name) % 2**31, draw(method, name))
                order.append(((k + 0.5) / count, run))
            broken = defaults(method) | BROKEN[method]
            order.append((0.5, Run(f"{domain}-{method}-broken", domain, method, "broken", "", 0, broken)))
    order += [(0.5, run) for run in _figure_runs()]
    return [run for _, run in sorted(order, key=lambda item: item[0])]


def defaults(method: str) -> dict[str, Any]:
    """Settings of a run on which nothing is varied."""
    return {**DEFAULTS, **METHOD_DEFAULTS[method]}


def draw(method: str, name: str) -> dict[str, Any]:
    """Random settings of a run, a function of its name."""
    generator = random.Random(f"settings of {name}")

    def log_uniform(low: float, high: float) -> float:
        return float(f"{math.exp(generator.uniform(math.log(low), math.log(high))):.3g}")

    settings: dict[str, Any] = defaults(method) | {
        "lr": log_uniform(3e-4, 1e-2),
        "weight_decay": log_uniform(1e-4, 1.0),
        "min_area": generator.choice([0.08, 0.2, 0.4, 0.7]),
        "jitter": generator.choice([0.0, 0.25, 0.5, 1.0]),
        "grayscale": generator.choice([0.0, 0.2]),
    }
    if method == "SimCLR":
        settings["temperature"] = log_uniform(0.05, 1.0)
    elif method == "VICReg":
        settings["variance_weight"], settings["covariance_weight"] = log_uniform(5, 50), log_uniform(0.1, 10)
    else:
        settings["momentum"] = generator.choice([0.9, 0.97, 0.99, 0.996])
    if method in ("DINO", "DINOv2"):
        settings["teacher_temp"] = generator.choice([0.02, 0.04, 0.07])
    if method == "DINOv2":
        settings["patch_weight"] = generator.choice([0.0, 0.5, 1.0])
        settings["koleo_weight"] = generator.choice([0.0, 0.1])
    return settings


def _figure_runs() -> list[Run]:
    """Runs for the figures of arXiv 2404.15217: initialization (1) and number of training images (2)."""
    runs = [
        Run(f"nuclei-{m}-pretrained", "nuclei", m, "figure", "", 0, defaults(m), pretrain="cifar10")
        for m in ("DINO", "DINOv2")
    ]
    runs += [Run(f"nuclei-{m}-default", "nuclei", m, "figure", "", 0, defaults(m)) for m in ("DINO", "DINOv2")]
    return runs + [
        Run(f"nuclei-DINO-fraction{f:g}", "nuclei", "DINO", "figure", "", 0, defaults("DINO"), fraction=f)
        for f in (0.03, 0.3)
    ]


def _hash(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)

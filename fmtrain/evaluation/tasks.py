"""Labeled data sets of pathology with eva's protocols and published numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from fmtrain.evaluation.datasets import (
    BACH_CLASSES,
    CRC_CLASSES,
    MHIST_CLASSES,
    PCAM_CLASSES,
    Splits,
    bach,
    crc,
    mhist,
    pcam,
)
from repmetrics.probes.eva import Protocol, eva_v0_4, paper


class Task(NamedTuple):
    """A data set with its protocols.

    Attributes:
        name: "bach", "crc", "mhist" or "pcam".
        classes: Class names by index, in eva's order.
        open: Function from the folder of the data to its splits: "train", "val", and "test" if eva selects nothing on
            it.
        paper: Protocol of eva at the time of arXiv 2404.15217.
        v0_4: Protocol of eva 0.4.
        published: Balanced accuracies in that paper, by encoder.
        rows: Images per split as published; the published numbers are computed on all of them.
        remark: Caveat of the numbers.
    """

    name: str
    classes: tuple[str, ...]
    open: Callable[[Path], Splits]
    paper: Protocol
    v0_4: Protocol
    published: Mapping[str, float]
    rows: Mapping[str, int]
    remark: str


ENCODERS = ("random S/16", "ImageNet S/16", *(f"kaiko {size}" for size in ("S/16", "S/8", "B/16", "B/8", "L/14")))


def _published(*values: float) -> dict[str, float]:
    return dict(zip(ENCODERS, values, strict=True))


SELECTED = "the epoch is selected on the reported split, as in eva: optimistic"

TASKS: Mapping[str, Task] = {
    "bach": Task(
        "bach",
        BACH_CLASSES,
        bach,
        paper(256, patience=400),
        eva_v0_4(256, patience=1250),
        _published(0.410, 0.695, 0.797, 0.834, 0.810, 0.865, 0.870),
        {"train": 268, "val": 132},
        SELECTED,
    ),
    "crc": Task(
        "crc",
        CRC_CLASSES,
        crc,
        paper(4096, patience=24),
        eva_v0_4(256, patience=7),
        _published(0.617, 0.935, 0.943, 0.946, 0.960, 0.956, 0.930),
        {"train": 100_000, "val": 7_180},
        SELECTED,
    ),
    "mhist": Task(
        "mhist",
        MHIST_CLASSES,
        mhist,
        paper(256, patience=51),
        eva_v0_4(256, patience=278),
        _published(0.501, 0.831, 0.828, 0.832, 0.826, 0.809, 0.809),
        {"train": 2_175, "val": 977},
        SELECTED,
    ),
    "pcam": Task(
        "pcam",
        PCAM_CLASSES,
        pcam,
        paper(4096, patience=9),
        eva_v0_4(256, patience=3),
        _published(0.728, 0.849, 0.893, 0.887, 0.898, 0.921, 0.898),
        {"train": 262_144, "val": 32_768, "test": 32_768},
        "the epoch is selected on val; nothing is selected on test",
    ),
}

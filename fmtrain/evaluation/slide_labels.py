"""Labels per slide, and features pooled per slide."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from repmetrics.data.features import Features
from repmetrics.data.labels import GROUP_KEYS, encode_labels
from repmetrics.data.read_csv import read_csv
from repmetrics.functional.ids import factorize


def pool_slides(
    features: Features, labels: Mapping[str, Hashable], *, slides: Sequence[str] | None = None
) -> tuple[Features, tuple[str, ...]]:
    """Mean features of each slide's patches, with the slide's label; slides with the label −1 are left out.

    Example:
        >>> patches = Features(torch.tensor([[0.0], [2.0], [5.0]]), ("a", "a", "b"), None)
        >>> pooled, classes = pool_slides(patches, {"a": "wild", "b": "mutated"})
        >>> pooled.values.tolist(), pooled.labels.tolist(), classes
        ([[1.0], [5.0]], [1, 0], ('mutated', 'wild'))
    """
    if features.groups is None:
        raise ValueError("slide labels need slides: the patches have no groups")
    stems = [Path(slide).stem for slide in slides or ()]
    candidates = (slides or features.groups, stems, features.groups)
    units = next((ids for ids in candidates if any(name in labels for name in ids)), candidates[0])
    rows, names = factorize(units, key=str)
    if missing := [name for name in names if name not in labels]:
        raise ValueError(f"{len(missing)} of {len(names)} slides have no label, first {missing[0]!r}")
    sums = torch.zeros(len(names), features.values.shape[1]).index_add_(0, rows, features.values.float())
    means: Tensor = sums / torch.bincount(rows)[:, None]
    classes, indices = encode_labels([labels[name] for name in names])
    group_of = dict(zip(units, features.groups, strict=True))
    return Features(means, tuple(group_of[name] for name in names), indices).labeled(), classes


def read_slide_labels(path: Path, *, column: str | None = None) -> dict[str, str]:
    """Labels by slide (or patient), from a CSV; rows with an empty label are left out."""
    columns, rows = read_csv(path)
    slides = next((c for key in GROUP_KEYS for c in columns if c.lower() == key), None)
    others = [c for c in columns if c != slides]
    label = column or (others[0] if len(others) == 1 else None)
    if slides is None or label is None or label not in columns:
        raise ValueError(
            f"{path.name} needs a column of slides ({', '.join(GROUP_KEYS)}) and one of labels "
            f"(--label names it if there are several): found {', '.join(columns) or 'nothing'}"
        )
    labels: dict[str, str] = {}
    for row in rows:
        if row[label] and labels.setdefault(row[slides], row[label]) != row[label]:
            raise ValueError(f"{path.name} gives {row[slides]!r} two labels: {labels[row[slides]]} and {row[label]}")
    return labels

"""Labels per slide, and features pooled per slide."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fmtrain.evaluation.datasets import _read_csv
from repmetrics.data.features import Features


def pool_slides(
    features: Features, labels: Mapping[str, Hashable], *, slides: Sequence[str] | None = None
) -> tuple[Features, tuple[str, ...]]:
    """Mean of the patches of each slide, with the slide's label.

    Args:
        features: of patches, with groups.
        labels: of slides, with or without the ending of their files, or of groups.
        slides: of each patch; None: its group.

    Returns:
        One row a slide (a group, if `labels` are theirs), in the order of names, with its group; the names of the
        classes, by index.

    Raises:
        ValueError: no groups, or slides without a label.

    Example:
        >>> patches = Features(torch.tensor([[0.0], [2.0], [5.0]]), ("a", "a", "b"), None)
        >>> pooled, classes = pool_slides(patches, {"a": "wild", "b": "mutated"})
        >>> pooled.values.tolist(), pooled.labels.tolist(), classes
        ([[1.0], [5.0]], [1, 0], ('mutated', 'wild'))
    """
    from repmetrics.data.labels import factorize

    if features.groups is None:
        raise ValueError("slide labels need slides: the patches have no groups")
    stems = [Path(slide).stem for slide in slides or ()]
    ways = (slides or features.groups, stems, features.groups)
    units = next((way for way in ways if any(name in labels for name in way)), ways[0])
    group_of = dict(zip(units, features.groups, strict=True))
    names = sorted(group_of)
    if lacking := [name for name in names if name not in labels]:
        raise ValueError(f"{len(lacking)} of {len(names)} slides have no label, first {lacking[0]!r}")
    place = {name: i for i, name in enumerate(names)}
    rows = torch.tensor([place[name] for name in units])
    sums = torch.zeros(len(names), features.values.shape[1]).index_add_(0, rows, features.values.float())
    means: Tensor = sums / torch.bincount(rows)[:, None]
    classes, ids = factorize([labels[name] for name in names])
    return Features(means, tuple(group_of[name] for name in names), ids), classes


def read_slide_labels(path: Path, *, column: str | None = None) -> dict[str, str]:
    """A CSV of slides (or patients) and their labels → label by name; rows with an empty label are left out.

    Args:
        path: with a header; a column of slides or patients and one of labels.
        column: of the labels, where there are several.
    """
    from repmetrics.data.labels import GROUP_KEYS

    rows = _read_csv(path)
    columns = list(rows[0]) if rows else []
    names = next((c for key in GROUP_KEYS for c in columns if c.lower() == key), None)
    others = [c for c in columns if c != names]
    chosen = column or (others[0] if len(others) == 1 else None)
    if names is None or chosen is None or chosen not in columns:
        raise ValueError(
            f"{path.name} needs a column of slides ({', '.join(GROUP_KEYS)}) and one of labels "
            f"(--label where there are several): found {', '.join(columns) or 'nothing'}"
        )
    found: dict[str, str] = {}
    for row in rows:
        if row[chosen] and found.setdefault(row[names], row[chosen]) != row[chosen]:
            raise ValueError(f"{path.name} gives {row[names]!r} two labels: {found[row[names]]} and {row[chosen]}")
    return found

"""Images, labels and groups of one batch of held-out data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Number
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from repmetrics.data.labels import GROUP_KEYS, LABEL_KEYS, UNLABELED
from repmetrics.functional.ids import check_ids

IMAGE_KEYS = ("image", "images", "pixel_values", "img", "imgs", "x")
PARTS = {"image": IMAGE_KEYS, "label": LABEL_KEYS, "group": GROUP_KEYS}

Keys = Mapping[str, str | int | None]
"""Key in a mapping, or position in a sequence, of the parts "image", "label", "group"; None leaves a part out."""


class Batch(NamedTuple):
    """Content of one batch of held-out data.

    Attributes:
        images: Images (B, …).
        labels: Labels (B, …) int64, or B class names; ``UNLABELED`` or "" where there is none.
        groups: Slide or patient of each image.
    """

    images: Tensor
    labels: Tensor | tuple[str, ...] | None
    groups: tuple[str, ...] | None


def check_keys(keys: Keys | None) -> Keys | None:
    """The keys, if they name known parts.

    Raises:
        ValueError: A part is unknown.
    """
    if unknown := [part for part in keys or () if part not in PARTS]:
        raise ValueError(f"keys= has the unknown part {unknown[0]!r}: choose among {', '.join(PARTS)}")
    return keys


def parse_batch(batch: Any, *, keys: Keys | None = None) -> Batch:
    """Read a batch: a tensor, (images, labels), (images, labels, groups), or a mapping.

    Images may be a list of views of each image: the first view is taken, with a warning.

    Args:
        batch: Batch of a loader.
        keys: Keys or positions of the parts. Without it, the parts of a mapping are found by the names in ``PARTS``.

    Raises:
        TypeError: The batch is none of these, or a single sample.
        ValueError: A key is not in the batch, several keys may be meant, or the labels are not whole numbers.

    Example:
        >>> parse_batch({"pixel_values": torch.zeros(2, 3, 8, 8), "slide_id": ["a", "b"]}).groups
        ('a', 'b')
        >>> parse_batch((torch.zeros(2), torch.zeros(2, 3, 8, 8)), keys={"image": 1}).images.shape
        torch.Size([2, 3, 8, 8])
    """
    keys = {} if keys is None else keys
    if isinstance(batch, Mapping):
        images, labels, groups = (_find_part(batch, part, keys) for part in PARTS)
    elif _is_sequence(batch) and keys:
        images, labels, groups = _parts_at(batch, keys)
    elif _is_sequence(batch) and not _are_views(batch) and 1 <= len(batch) <= 3:
        images, labels, groups = (*batch, None, None)[:3]
    else:
        images, labels, groups = batch, None, None
    images = _first_view(images)
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images)
    if not isinstance(images, Tensor):
        raise TypeError(
            "a batch must be a tensor, (images, labels), (images, labels, groups) or a mapping with 'image', "
            f"got {_contents(batch)}: name the parts with keys=, such as keys={{'image': 0}}"
        )
    if images.ndim < 2 and _is_sequence(batch) and len(batch) > 1 and not keys:
        raise TypeError(f"images must be (B, …), got {_contents(batch)}: name them with {_hint(batch)}")
    if _is_scalar(labels) or _is_scalar(groups):
        raise TypeError(
            f"expected a batch, got a single sample, {_contents(batch)}: "
            "a list is read as batches, hence give samples as DataLoader(samples, batch_size=64)"
        )
    return Batch(
        images,
        None if labels is None else parse_labels(labels),
        None if groups is None else parse_groups(groups),
    )


def parse_groups(groups: Iterable[Any]) -> tuple[str, ...]:
    """Group ids of a batch as texts.

    Raises:
        ValueError: An id is missing: None, NaN or "", which would become a group of its own.
    """
    ids = [group.item() if isinstance(group, Tensor | np.generic) else group for group in groups]
    check_ids(ids, name="groups")
    return tuple(map(str, ids))


def parse_labels(labels: Any) -> Tensor | tuple[str, ...]:
    """Labels of a batch as whole numbers (B, …), or as class names; a column (B, 1) becomes (B,).

    Labels of −1, None, NaN and "" are those of samples without a label.

    Raises:
        ValueError: A number is not whole.

    Example:
        >>> parse_labels(["tumor", None]), parse_labels(torch.tensor([[1.0], [torch.nan]]))
        (('tumor', ''), tensor([ 1, -1]))
    """
    if not isinstance(labels, Tensor):
        values = labels.tolist() if isinstance(labels, np.ndarray) else list(labels)
        values = [value.item() if isinstance(value, Tensor | np.generic) else value for value in values]
        if any(isinstance(value, str | bytes) for value in values):
            return tuple("" if _is_missing(value) else str(value) for value in values)
        labels = torch.as_tensor([UNLABELED if _is_missing(value) else value for value in values])
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.is_floating_point():
        labels = labels.nan_to_num(nan=UNLABELED)
    whole = labels.to(torch.int64)
    if labels.is_floating_point() and not torch.equal(whole.to(labels.dtype), labels):
        odd = labels[whole.to(labels.dtype) != labels].flatten()[0]
        raise ValueError(
            f"labels must be whole numbers or names, one for each class, got {float(odd):g}: "
            "leave them out with keys={'label': None}"
        )
    return whole


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or value == UNLABELED or (isinstance(value, float) and math.isnan(value))


def _find_part(batch: Mapping[Any, Any], part: str, keys: Keys) -> Any:
    """The part of a mapping, by the user's key or by a known name; None without labels or groups."""
    if part in keys:
        key: Any = keys[part]
        if key is not None and key not in batch:
            raise ValueError(f"keys= names the {part} {key!r}, which a batch lacks: it has {_names(batch)}")
        return None if key is None else batch[key]
    known = [key for key in PARTS[part] if key in batch]
    if part == "image" and not known:
        raise TypeError(f"a batch mapping must have the key 'image', got {_names(batch)}: name it with {_hint(batch)}")
    if part == "image" and len(known) > 1:
        raise ValueError(f"images may be under {' or '.join(known)}: choose with keys={{'image': {known[0]!r}}}")
    if len(known) > 1:
        warnings.warn(
            f"{part}s are those under {known[0]!r}; keys={{{part!r}: {known[1]!r}}} takes the others", stacklevel=3
        )
    return batch[known[0]] if known else None


def _parts_at(batch: Sequence[Any], keys: Keys) -> list[Any]:
    """The parts of a sequence at the user's positions; where images are the first, the others may follow as usual."""
    usual = 0 if "image" in keys else len(batch) if len(batch) <= len(PARTS) else 1
    positions: dict[str, Any] = dict(zip(PARTS, range(usual), strict=False)) | dict(keys)
    for part, position in positions.items():
        if position is not None and position not in range(len(batch)):
            raise ValueError(
                f"keys= names the {part} {position!r}, and a batch is a sequence of {len(batch)}: give its position"
            )
    return [None if (position := positions.get(part)) is None else batch[position] for part in PARTS]


def _first_view(images: Any) -> Any:
    """The first of several views of the images, with a warning; anything else unchanged."""
    if not _is_sequence(images) or not (len(images) == 1 or _are_views(images)):
        return images
    if len(images) > 1:
        warnings.warn(
            f"a held-out batch has {len(images)} views of each image, and the first is measured: "
            "give held-out images without augmentation",
            stacklevel=3,
        )
    return images[0]


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | bytes | Number) or (isinstance(value, Tensor | np.ndarray) and value.ndim == 0)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _are_views(parts: Sequence[Any]) -> bool:
    """Whether these are several views of one batch: tensors (B, C, …) of the same B, C and dtype."""
    tensors = [part for part in parts if isinstance(part, Tensor) and part.ndim >= 3]
    return 1 < len(tensors) == len(parts) and len({(part.shape[:2], part.dtype) for part in tensors}) == 1


def _contents(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with {_names(batch)}"
    if _is_sequence(batch):
        return f"a {type(batch).__name__} of {', '.join(map(_shape, batch))}"
    return f"a {type(batch).__name__}"


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _names(batch: Mapping[Any, Any]) -> str:
    return ", ".join(map(str, batch)) or "nothing"


def _hint(batch: Mapping[Any, Any] | Sequence[Any]) -> str:
    """``keys=`` with the part that most looks like images."""
    items = list(batch.items() if isinstance(batch, Mapping) else enumerate(batch))
    ranked = [key for key, value in items if isinstance(value, Tensor) and value.ndim >= 3]
    ranked += [key for key, value in items if _is_sequence(value) and _are_views(value)]
    ranked += [key for key, value in items if isinstance(value, Tensor) and value.ndim == 2]
    return f"keys={{'image': {[*ranked, *(key for key, _ in items), 0][0]!r}}}"

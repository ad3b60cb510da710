"""Batches of images through an encoder as features, with their groups and labels."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repmetrics.data.labels import UNLABELED, encode_labels
from repmetrics.data.parse_batch import Batch, parse_batch

Encode = Callable[[Tensor], dict[str, Tensor]]
"""Images (B, …) → features (B, …) by name; those of the encoder's output are under ""."""


class Features(NamedTuple):
    """Features of held-out data, in its order.

    Attributes:
        values: Features (N, D) on the CPU, in the encoder's dtype.
        groups: Slide or patient of each row, or None.
        labels: Labels (N,) int64, ``UNLABELED`` where a row has none, or None.
    """

    values: Tensor
    groups: tuple[str, ...] | None = None
    labels: Tensor | None = None

    def labeled(self) -> Features:
        """The rows that have a label."""
        if self.labels is None or self.labels.ndim > 1 or bool((kept := self.labels != UNLABELED).all()):
            return self
        groups = None if self.groups is None else tuple(g for g, keep in zip(self.groups, kept, strict=True) if keep)
        return Features(self.values[kept], groups, self.labels[kept])


class FeatureDict(NamedTuple):
    """Tensors (N, …) of the same held-out data by name, each in its own dtype; otherwise as :class:`Features`.

    Labels of one batch may be class names.
    """

    values: dict[str, Tensor]
    groups: tuple[str, ...] | None = None
    labels: Tensor | tuple[str, ...] | None = None

    def select(self, name: str) -> Features:
        """Features under one name, with groups and labels."""
        labels = None if self.labels is None else _join_labels([self.labels])
        return Features(self.values[name], self.groups, labels)


def embed(
    encoder: Callable[[Tensor], Tensor],
    batches: Iterable[Any],
    *,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], None] | None = None,
) -> Features:
    """Run an encoder over batches and keep its features.

    The encoder is called as it is: set evaluation mode first. The features are not pooled, normalized or cast.

    Args:
        encoder: Function or module: images (B, …) → features (B, D).
        batches: Batches that :func:`parse_batch` reads.
        device: Device of the images.
        on_batch: Function called with the number of samples of each batch, to show progress.

    Raises:
        TypeError: The encoder did not return one tensor.
        ValueError: There are no batches, the encoder cannot take the images, the features are not (B, D), or only
            some batches have labels or groups.
    """

    def encode(images: Tensor) -> dict[str, Tensor]:
        return {"": _check_output(encoder(images), images)}

    parts = []
    for item in batches:
        parts.append(embed_batch(encode, parse_batch(item), device=device))
        if on_batch is not None:
            on_batch(len(parts[-1].values[""]))
    if not parts:
        raise ValueError("the held-out set yielded no batch: give it at least 2 samples")
    return concatenate(parts).select("")


@torch.no_grad()
def embed_batch(encode: Encode, batch: Batch, *, device: torch.device | str) -> FeatureDict:
    """Features of one batch, by name, on the CPU."""
    images = batch.images.to(device)
    try:
        values = encode(images)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:  # timm asserts the image size
        if str(error).startswith("DataLoader worker"):  # raised by a signal handler, wherever the process is
            raise
        shape, dtype = tuple(images.shape), str(images.dtype).removeprefix("torch.")
        raise ValueError(f"the encoder failed on held-out images {shape} of {dtype}: {error}") from error
    return FeatureDict({name: value.cpu() for name, value in values.items()}, batch.groups, batch.labels)


def _check_output(output: Any, images: Tensor) -> Tensor:
    if not isinstance(output, Tensor):
        keys = f" with keys {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        raise TypeError(
            f"the encoder must return one tensor (B, D), got {type(output).__name__}{keys}: "
            "wrap it in a function that picks one"
        )
    if output.ndim != 2 or len(output) != len(images):
        hint = ": pool the tokens, or take the CLS token" if output.ndim == 3 else ""
        raise ValueError(f"the encoder must return ({len(images)}, D), got {tuple(output.shape)}{hint}")
    return output


def concatenate(batches: Sequence[FeatureDict], *, partial: Collection[str] = ()) -> FeatureDict:
    """Features of one or more batches as those of one set, in the order given.

    Args:
        batches: Features of each batch.
        partial: Names that only some batches need to have.

    Raises:
        ValueError: D differs between batches, or only some batches have a feature, labels or groups.
    """
    values = {}
    for name in dict.fromkeys(name for batch in batches for name in batch.values):
        parts = [batch.values[name] for batch in batches if name in batch.values]
        if len(parts) < len(batches) and name not in partial:
            raise ValueError(f"{len(batches) - len(parts)} of {len(batches)} held-out batches gave no {name!r}")
        if len(shapes := sorted({part.shape[1:] for part in parts})) > 1:
            raise ValueError(f"the encoder must give one D for all held-out batches, got {[s[-1] for s in shapes]}")
        values[name] = torch.cat(parts)
    sizes = [len(next(iter(batch.values.values()))) for batch in batches]
    for kind in ("groups", "labels"):
        counts = [0 if (ids := getattr(batch, kind)) is None else len(ids) for batch in batches]
        if any(counts) and counts != sizes:
            covered = f"{sum(map(min, counts, sizes))} of {sum(sizes)}"
            raise ValueError(f"{kind} cover {covered} held-out samples: give them for all or for none")
    groups = tuple(group for batch in batches for group in batch.groups or ())
    labels = [batch.labels for batch in batches if batch.labels is not None]
    return FeatureDict(values, groups or None, _join_labels(labels) if labels else None)


def _join_labels(parts: Sequence[Tensor | tuple[str, ...]]) -> Tensor:
    """Labels of several batches as one tensor; class names become their index in natural order."""
    if all(isinstance(part, Tensor) for part in parts):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    rows = [value for part in parts for value in (part.tolist() if isinstance(part, Tensor) else part)]
    return encode_labels([UNLABELED if value == "" else value for value in rows])[1]

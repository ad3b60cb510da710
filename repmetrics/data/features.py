"""Batches of images through an encoder as features, with their groups and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Encode = Callable[[Tensor], dict[str, Tensor]]
"""Images (B, …) → features (B, …) by name; those of the encoder's output are under ""."""


class Batch(NamedTuple):
    """Content of one batch of held-out data."""

    images: Tensor
    labels: Tensor | None
    groups: tuple[str, ...] | None


class Features(NamedTuple):
    """Features of held-out data, in its order.

    Attributes:
        values: Features (N, D) on the CPU, in the encoder's dtype.
        groups: Slide or patient of each row, or None.
        labels: Labels (N,) int64, or None.
    """

    values: Tensor
    groups: tuple[str, ...] | None = None
    labels: Tensor | None = None


class FeatureDict(NamedTuple):
    """Tensors (N, …) of the same held-out data by name, each in its own dtype; otherwise as :class:`Features`."""

    values: dict[str, Tensor]
    groups: tuple[str, ...] | None = None
    labels: Tensor | None = None

    def select(self, name: str) -> Features:
        """Features under one name, with groups and labels."""
        return Features(self.values[name], self.groups, self.labels)


def parse_batch(batch: Any) -> Batch:
    """Read a batch: a tensor, (images, labels), (images, labels, groups), or a mapping with image, label?, group?.

    Raises:
        TypeError: The batch is none of these.
        ValueError: The labels are not whole numbers.

    Example:
        >>> parse_batch({"image": torch.zeros(2, 3, 8, 8), "group": ["a", "b"]}).groups
        ('a', 'b')
    """
    if isinstance(batch, Mapping):
        if "image" not in batch:
            raise TypeError(f"a batch mapping must have the key 'image', got {', '.join(map(str, batch))}")
        images, labels, groups = batch["image"], batch.get("label"), batch.get("group")
    elif isinstance(batch, Sequence) and not isinstance(batch, str) and 1 <= len(batch) <= 3:
        images, labels, groups = (*batch, None, None)[:3]
    else:
        images, labels, groups = batch, None, None
    if not isinstance(images, Tensor):
        raise TypeError(
            "a batch must be a tensor, (images, labels), (images, labels, groups) or a mapping with 'image', "
            f"got {type(batch).__name__} holding {type(images).__name__}"
        )
    return Batch(
        images,
        None if labels is None else _int_labels(torch.as_tensor(labels)),
        None if groups is None else tuple(str(g.item() if isinstance(g, Tensor) else g) for g in groups),
    )


def _int_labels(labels: Tensor) -> Tensor:
    whole = labels.to(torch.int64)
    if labels.is_floating_point() and not torch.equal(whole.to(labels.dtype), labels):
        odd = labels[whole.to(labels.dtype) != labels].flatten()[0]
        raise ValueError(f"labels must be whole numbers, one for each class, got {float(odd):g}")
    return whole


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
        parts.append(embed_batch(encode, item, device=device))
        if on_batch is not None:
            on_batch(len(parts[-1].values[""]))
    if not parts:
        raise ValueError("the held-out set yielded no batch: give it at least 2 samples")
    return concatenate(parts).select("")


@torch.no_grad()
def embed_batch(encode: Encode, item: Any, *, device: torch.device | str) -> FeatureDict:
    """Features of one batch, by name, on the CPU."""
    batch = parse_batch(item)
    images = batch.images.to(device)
    try:
        values = encode(images)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:  # timm asserts the image size
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


def concatenate(batches: Sequence[FeatureDict]) -> FeatureDict:
    """Features of one or more batches as those of one set, in the order given.

    Raises:
        ValueError: D differs between batches, or only some batches have labels or groups.
    """
    values = {}
    for name in batches[0].values:
        parts = [batch.values[name] for batch in batches]
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
    return FeatureDict(values, groups or None, torch.cat(labels) if labels else None)

"""Encoder + batches of images → features with their groups and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """What one batch of a held-out set may hold."""

    images: Tensor
    labels: Tensor | None
    groups: tuple[str, ...] | None


class Features(NamedTuple):
    """Features of a held-out set, in its order.

    Attributes:
        values: (N, D) on the CPU, in the dtype the encoder gave.
        groups: slide or patient of each row, or None.
        labels: (N,) int64, or None.
    """

    values: Tensor
    groups: tuple[str, ...] | None = None
    labels: Tensor | None = None


def parse_batch(batch: Any) -> Batch:
    """Read a batch: a tensor, (images, labels), (images, labels, groups), or a mapping with image, label?, group?.

    Raises:
        TypeError: none of these.
        ValueError: labels that are no classes.

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
        None if labels is None else _classes(torch.as_tensor(labels)),
        None if groups is None else tuple(str(g.item() if isinstance(g, Tensor) else g) for g in groups),
    )


def _classes(labels: Tensor) -> Tensor:
    whole = labels.to(torch.int64)
    if labels.is_floating_point() and not torch.equal(whole.to(labels.dtype), labels):
        odd = labels[whole.to(labels.dtype) != labels].flatten()[0]
        raise ValueError(f"labels must be whole numbers, one for each class, got {float(odd):g}")
    return whole


@torch.no_grad()
def embed(
    encoder: Callable[[Tensor], Tensor],
    batches: Iterable[Any],
    *,
    device: torch.device | str = "cpu",
    limit_batches: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Features:
    """Run an encoder over batches and keep its features.

    The encoder is called as it is: put it in evaluation mode first. Nothing is pooled, normalised or cast.

    Args:
        encoder: images (B, …) → features (B, D).
        batches: anything :func:`parse_batch` reads.
        device: where the images go.
        limit_batches: stop after so many.
        on_batch: called with the number of samples of each batch, to show progress.

    Raises:
        TypeError: the encoder did not return one tensor.
        ValueError: no batches, images that the encoder cannot take, features not (B, D), or labels/groups in some
            batches only.
    """
    values: list[Tensor] = []
    labels: list[Tensor] = []
    groups: list[str] = []
    for index, item in enumerate(batches):
        if index == limit_batches:
            break
        batch = parse_batch(item)
        values.append(_features_of(encoder, batch.images.to(device)).cpu())
        labels.extend([] if batch.labels is None else [batch.labels])
        groups.extend(batch.groups or ())
        if on_batch is not None:
            on_batch(len(batch.images))
    if not values:
        raise ValueError("the held-out set yielded no batch: give it at least 2 samples")
    features = torch.cat(values)
    for name, count in (("labels", sum(len(x) for x in labels)), ("groups", len(groups))):
        if count not in (0, len(features)):
            raise ValueError(f"{name} cover {count} of {len(features)} samples: give them for all or for none")
    return Features(features, tuple(groups) or None, torch.cat(labels) if labels else None)


def _features_of(encoder: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    try:
        output: Any = encoder(images)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:  # timm asserts what sizes it takes
        shape, dtype = tuple(images.shape), str(images.dtype).removeprefix("torch.")
        raise ValueError(f"the encoder failed on held-out images {shape} of {dtype}: {error}") from error
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

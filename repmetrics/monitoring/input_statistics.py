"""Mean and standard deviation of an encoder's inputs: do held-out images look to it as training images do?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MAX_STD_RATIO = 3.0
"""Largest ratio of two standard deviations of one kind of image; normalized and plain images differ by 4 and more."""
MAX_SHIFT = 2.0
"""Largest difference of two means of one kind of image, in the larger standard deviation."""


class InputStatistics(NamedTuple):
    """Mean and standard deviation over all values of a batch of images."""

    mean: float
    std: float


@torch.no_grad()
def input_statistics(images: Tensor) -> InputStatistics:
    """Statistics of a batch (B, …).

    Example:
        >>> input_statistics(torch.tensor([[0, 2], [0, 2]], dtype=torch.uint8))
        InputStatistics(mean=1.0, std=1.0)
    """
    std, mean = torch.std_mean(images.detach().float(), correction=0)
    return InputStatistics(float(mean), float(std))


def describe_mismatch(training: InputStatistics, held_out: InputStatistics) -> str | None:
    """What differs, and the remedy; None where training and held-out images have a like scale.

    Example:
        >>> describe_mismatch(InputStatistics(0.0, 1.0), InputStatistics(0.1, 0.8)) is None
        True
    """
    low, high = sorted((training.std, held_out.std))
    shift = abs(training.mean - held_out.mean)
    if high <= MAX_STD_RATIO * low and shift <= MAX_SHIFT * high:
        return None
    return (
        f"the encoder's images have mean {training.mean:.3g}, standard deviation {training.std:.3g} in training, but "
        f"{held_out.mean:.3g} and {held_out.std:.3g} in an evaluation: normalize the held-out images as in training, "
        "or give transform=, a function of a batch of images"
    )


class InputCheck:
    """Compares, once in a run, the encoder's first training images with its first held-out images.

    Training images are read where they enter the encoder, by a hook that is removed at its first call. If the encoder
    is a part that training does not run or compiles, the training batch is read instead. A function as encoder is not
    checked: what it does to its images is unknown.

    Args:
        on_mismatch: Function called with the message of :func:`describe_mismatch`.
    """

    def __init__(self, on_mismatch: Callable[[str], None]) -> None:
        self._on_mismatch = on_mismatch
        self._held_out: InputStatistics | None = None
        self._batch: InputStatistics | None = None
        self._hook: Any = None
        self._done = False

    def observe_held_out(self, images: Tensor | None) -> None:
        """Images as the encoder gets them in an evaluation."""
        if self._held_out is None and images is not None and images.ndim >= 3:
            self._held_out = input_statistics(images)

    def observe_training(self, module: Callable[[], nn.Module | None], batch: Any) -> None:
        """A training batch, before it is used; ``module()`` is the encoder."""
        if self._done or self._held_out is None:
            return
        if self._hook is not None or self._batch is not None:  # the second batch: nothing passed through the encoder
            self._compare(self._batch)
            return
        encoder, images = module(), first_image_tensor(batch)
        if encoder is None:
            self._done = True
            return
        self._batch = None if images is None else input_statistics(images)
        if not _is_compiled(encoder):
            self._hook = encoder.register_forward_pre_hook(self._read, with_kwargs=True)

    def _read(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        images = first_image_tensor([args, kwargs])
        if images is not None:
            self._compare(input_statistics(images))

    def _compare(self, training: InputStatistics | None) -> None:
        self._done = True
        if self._hook is not None:
            self._hook.remove()
        if training is None or self._held_out is None:
            return
        if (message := describe_mismatch(training, self._held_out)) is not None:
            self._on_mismatch(message)


def _is_compiled(module: nn.Module) -> bool:
    """Whether a hook would make a part compile again."""
    return any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in module.modules())


def first_image_tensor(batch: Any) -> Tensor | None:
    """The first tensor (B, C, …) in a batch, at any nesting; None without one.

    Example:
        >>> first_image_tensor((torch.arange(2), [torch.zeros(2, 3, 8, 8)], torch.zeros(2))).shape
        torch.Size([2, 3, 8, 8])
    """
    if isinstance(batch, Tensor):
        return batch if batch.ndim >= 3 else None
    parts: Iterable[Any] = batch.values() if isinstance(batch, Mapping) else ()
    if isinstance(batch, list | tuple):
        parts = batch
    return next((images for part in parts if (images := first_image_tensor(part)) is not None), None)

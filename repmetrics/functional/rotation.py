"""Rotation: how well a linear probe reads the quarter-turn of an image from its features."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from repmetrics.functional.checks import check_tokens
from repmetrics.functional.discriminant import cross_predict, folds_of
from repmetrics.functional.ids import count_blocks, means_without_blocks

TURNS = 4


def rotation_probe(turned: Tensor, *, groups: Sequence[Hashable] | Tensor | None = None) -> Tensor:
    r"""Rotation probe: accuracy of a linear probe that predicts by how many quarter-turns an image was rotated.

    The label costs nothing. It is a poor signal where the augmentation includes turns, and where objects have no
    upright direction, as in tissue.

    Convention: linear discriminant with a shrunk covariance, cross-fitted in 5 folds; all turns of an image, and all
    images of a group, are in one fold.

    Args:
        turned: (N, 4, D) features of each image turned by 0, 90, 180 and 270 degrees, any floating dtype.
        groups: One id per image (slide, patient).

    Returns:
        0-dim float64 in 0 … 1; higher is better; chance is 0.25.

    Raises:
        TypeError: Features are not floating.
        ValueError: Not (N, 4, D), fewer than two images or groups, ids that do not match, NaN or Inf.

    Source:
        Gidaris et al. 2018, arXiv 1803.07728; as a criterion: Reed et al. 2020, arXiv 2009.07724.

    Example:
        >>> noise = torch.randn(20, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> rotation_probe(torch.eye(4) + 0.1 * noise).item()
        1.0
    """
    return predicted_turns(turned, groups=groups).mean()


def predicted_turns(turned: Tensor, *, groups: Sequence[Hashable] | Tensor | None = None) -> Tensor:
    """(N,) float64: share of the four turns of each image that the probe predicts; see :func:`rotation_probe`."""
    check_tokens(turned)
    n = len(turned)
    if turned.shape[1] != TURNS:
        raise ValueError(f"features must be (N, 4, D), one row per quarter-turn, got {tuple(turned.shape)}")
    ids = groups.tolist() if isinstance(groups, Tensor) else groups
    if ids is not None and len(ids) != n:
        raise ValueError(f"groups must hold one id per image, got {len(ids)} for {n} images")
    if n < 2 or (ids is not None and len(set(ids)) < 2):
        raise ValueError("the rotation probe needs at least two images, and two groups: it is tested on other groups")
    fold = folds_of(np.zeros(n, dtype=np.int64), groups=ids).repeat(TURNS)
    target = np.tile(np.arange(TURNS, dtype=np.int64), n)
    predicted = cross_predict(turned.detach().flatten(0, 1), target, fold)
    correct = torch.from_numpy(predicted == target).to(turned.device, torch.float64)
    return correct.reshape(n, TURNS).mean(1)


def mean_accuracy(turned: Tensor, *, blocks: Tensor | None = None) -> Tensor:
    """Accuracies (1 + G,): of all images, and of those outside of each block, by the probe of all images.

    Args:
        turned: (N, 4, D) features of each image turned by 0, 90, 180 and 270 degrees.
        blocks: (N,) int64 in 0 … G − 1, the block of each image. None: G = 0.
    """
    return means_without_blocks(predicted_turns(turned), blocks, count=count_blocks(blocks))

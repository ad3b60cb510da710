"""Blocks of rows that the jackknife leaves out. Importing this file does not import torch."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

MAX_BLOCKS = 32
"""Largest number of blocks: more replicates cost more and improve the error little."""

Independent = Literal["independent"]
"""Value of ``groups`` by which a user declares that no two samples have a common source."""

INDEPENDENT_SAMPLES = (
    "errors hold for independent samples, as groups='independent' declares: they are too small where samples have a "
    "common source, such as a patient, a slide, a scene or a video"
)


def declared_independent(groups: object) -> bool:
    """Whether ``groups`` is the declaration that all samples are independent, and no sequence of ids."""
    return isinstance(groups, str) and groups == "independent"


@dataclass(frozen=True)
class Blocks:
    """Partition of rows into blocks of whole groups.

    Attributes:
        index: (N,) int64, the block of each row.
        sizes: Rows of each block.
        groups: Number of distinct groups.
        digest: Hash of ``index``. Differences can be paired exactly where it is equal.
        variances: Σ (rows of a group / rows of the block)² over the groups of each block. It is the variance of the
            block's mean in units of that of a group's mean, if the rows of one group are equal.
    """

    index: Tensor
    sizes: tuple[int, ...]
    groups: int
    digest: str
    variances: tuple[float, ...]

    @classmethod
    def from_groups(cls, groups: Iterable[Hashable], *, count: int = MAX_BLOCKS) -> Blocks:
        """Assign groups to at most ``count`` blocks of nearly equal size, without splitting a group.

        The largest group is assigned first, to the smallest block; ties are broken by name. So the same rows always
        give the same blocks.

        Example:
            >>> Blocks.from_groups(["a", "b", "b", "c", "a", "d"], count=2).index.tolist()
            [0, 1, 1, 0, 0, 1]
        """
        import torch

        from repmetrics.functional.ids import factorize

        group_of_row, names = factorize(groups)
        group_sizes = torch.bincount(group_of_row).tolist()
        sizes = [0] * min(count, len(names))
        block_of_group = [0] * len(names)
        for group in sorted(range(len(names)), key=lambda group: (-group_sizes[group], str(names[group]))):
            block_of_group[group] = sizes.index(min(sizes))
            sizes[block_of_group[group]] += group_sizes[group]
        return cls._of(group_of_row, torch.tensor(block_of_group, dtype=torch.int64))

    @classmethod
    def from_independent(cls, samples: Iterable[Hashable], *, count: int = MAX_BLOCKS) -> Blocks:
        """Assign samples that are independent of one another to at most ``count`` blocks of nearly equal size.

        They are drawn at random, since rows may be sorted, by class for example. As many samples always give the same
        blocks.

        Args:
            samples: The sample's id of each row: several rows are views of one sample.
            count: Largest number of blocks.

        Example:
            >>> Blocks.from_independent(range(10), count=3).sizes
            (4, 3, 3)
        """
        import torch

        from repmetrics.functional.ids import factorize

        sample_of_row, names = factorize(samples)
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))
        block_of_sample = torch.empty(len(names), dtype=torch.int64)
        block_of_sample[order] = torch.arange(len(names)) % min(count, len(names))
        return cls._of(sample_of_row, block_of_sample)

    @classmethod
    def _of(cls, group_of_row: Tensor, block_of_group: Tensor) -> Blocks:
        index = block_of_group[group_of_row]
        sizes: list[int] = index.bincount().tolist()
        digest = hashlib.sha256(repr(index.tolist()).encode()).hexdigest()[:16]
        variances = [0.0] * len(sizes)
        for rows, block in zip(group_of_row.bincount().tolist(), block_of_group.tolist(), strict=True):
            variances[block] += (rows / sizes[block]) ** 2
        return cls(index, tuple(sizes), len(block_of_group), digest, tuple(variances))

    @cached_property
    def degrees_of_freedom(self) -> float:
        r"""Satterthwaite's degrees of freedom of the squared error; g − 1 for g equal blocks.

        For a mean θ = Σ w_j·x_j of blocks, the square of the error in
        :func:`~repmetrics.measurement.jackknife.margin` is the quadratic form Σ a_j·(x_j − θ)² with
        a_j = (g−1)/g·(w_j/(1 − w_j))². Its degrees of freedom are 2·mean²/variance, where the x_j are independent and
        have the variances above. One block with most of the rows leaves about one, however many others there are.

        Source:
            Satterthwaite 1946, "An approximate distribution of estimates of variance components"; Bell & McCaffrey
            2002, "Bias reduction in standard errors for linear regression with multi-stage samples".

        Example:
            >>> [round(Blocks.from_groups(ids).degrees_of_freedom, 1) for ids in ("aabbccdd", "aaaaaaaabcd")]
            [3.0, 1.1]
        """
        import torch

        g = len(self.sizes)
        w = torch.tensor(self.sizes, dtype=torch.float64) / sum(self.sizes)
        deviations = torch.eye(g, dtype=torch.float64) - w
        scales = torch.tensor(self.variances, dtype=torch.float64).sqrt()
        form = (deviations * (w / (1 - w)).square()[:, None]).T @ deviations * scales * scales[:, None]
        return float(form.trace().square() / form.square().sum())

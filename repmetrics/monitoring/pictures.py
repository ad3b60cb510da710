"""Pictures of a representation: neighbors, patch tokens as colors, a map, and the images farthest from the rest.

They show fixed held-out images, and are made from the forward pass of an evaluation. Nothing is drawn at random.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from repmetrics.atomic_write import atomic_path
from repmetrics.data.features import Encode, FeatureDict
from repmetrics.data.held_out import rank_and_world
from repmetrics.encoders.token_grid import TokenReader
from repmetrics.functional.ids import factorize

MAPPED, QUERIES, NEIGHBORS, FARTHEST, WITH_TOKENS = 512, 6, 5, 8, 6
THUMBNAIL_PX = 48
KEPT_COMPONENTS = 16
"""Principal components of an evaluation's tokens that are kept, from which the basis of the run is computed."""
MAP_COMPONENTS = 32

# Names in a batch's features in addition to layers; a submodule's path has no spaces.
SHOWN = "images shown"
THUMBNAILS = "thumbnails of images"
TOKENS = "tokens of images"
TOKEN_ROWS = "images with tokens"
PARTS = (SHOWN, THUMBNAILS, TOKENS, TOKEN_ROWS)

Array = NDArray[Any]


class Stage(NamedTuple):
    """One evaluation in the pictures: the first, the second, or the last.

    Attributes:
        step: Optimizer steps before it.
        neighbors: Rows (Q, 5) of the nearest images of other groups of each query, nearest first; −1 where none is.
        scores: Tokens (P, h, w, K) as their first K principal components, of mean energy 1; h = 0 without tokens.
        axes: Directions (K, D) of these components.
    """

    step: int
    neighbors: Array
    scores: Array
    axes: Array


@dataclass
class Pictures:
    """What the pictures of a run show, at most :data:`MAPPED` of its held-out images. Filled on rank 0.

    Attributes:
        run: Id of the run.
        thumbnails: RGB images (M, 3, S, S), uint8; empty before the first evaluation, or where inputs are no images.
        groups: Code (M,) of each image's group, or −1 where groups are not known.
        labels: Label (M,) of each image, or −1.
        queries: Rows (Q,) whose neighbors are shown, of different groups as far as there are any.
        token_rows: Rows (P,) whose tokens are shown.
        stages: The first evaluation, the second, and the last.
        positions: First principal components (M, K) of the unit features at the last evaluation.
        farthest: Rows of the images that are least like their nearest neighbors of other groups, the least first.
        path: Submodule whose tokens are read.
    """

    run: str = ""
    thumbnails: Array = field(default_factory=lambda: np.empty((0, 3, THUMBNAIL_PX, THUMBNAIL_PX), np.uint8))
    groups: Array = field(default_factory=lambda: np.empty(0, np.int64))
    labels: Array = field(default_factory=lambda: np.empty(0, np.int64))
    queries: Array = field(default_factory=lambda: np.empty(0, np.int64))
    token_rows: Array = field(default_factory=lambda: np.empty(0, np.int64))
    stages: list[Stage] = field(default_factory=list)
    positions: Array = field(default_factory=lambda: np.empty((0, 2)))
    farthest: Array = field(default_factory=lambda: np.empty(0, np.int64))
    path: str | None = None

    def update(self, features: FeatureDict, parts: Mapping[str, Tensor], *, step: int, run: str) -> None:
        """Add an evaluation: its features, and the parts that :func:`add_pictures` adds. Nothing without images."""
        shown = parts[SHOWN]
        if not bool(shown.any()):
            return
        if not len(self.thumbnails):
            self._choose_images(features, parts, run=run)
        unit = torch.nn.functional.normalize(features.values[""][shown].float(), dim=1).numpy()
        similarity = compare_groups(unit, self.groups)
        closeness = np.sort(similarity, axis=1)[:, -NEIGHBORS:].mean(1)
        order = np.argsort(closeness, kind="stable")
        self.farthest = order[np.isfinite(closeness[order])][:FARTHEST]
        self._place(unit)
        scores, axes = reduce_tokens(parts[TOKENS].float().numpy() if TOKENS in parts else None)
        stage = Stage(step, nearest_rows(similarity, NEIGHBORS)[self.queries], scores, axes)
        self.stages = [*(earlier for earlier in self.stages[:2] if earlier.step < step), stage]

    def _choose_images(self, features: FeatureDict, parts: Mapping[str, Tensor], *, run: str) -> None:
        self.run = run
        self.thumbnails = as_rgb(parts[THUMBNAILS].numpy())
        rows = parts[SHOWN].nonzero().flatten().numpy()
        unknown = np.full(len(rows), -1)
        self.groups = unknown if features.groups is None else factorize(features.groups)[0].numpy()[rows]
        labels = features.select("").labels
        self.labels = unknown if labels is None or labels.ndim > 1 else labels.numpy()[rows]
        self.queries = spread_rows(self.groups, QUERIES)
        self.token_rows = np.searchsorted(rows, parts[TOKEN_ROWS].nonzero().flatten().numpy())

    def _place(self, unit: Array) -> None:
        """Positions of the images on the map, turned so that they are nearest to those before."""
        centered = unit - unit.mean(0)
        before, positions = self.positions[:, :2], centered @ principal_axes(centered, MAP_COMPONENTS).T
        if len(before) == len(positions) and min(before.shape[1], positions.shape[1]) == 2:
            left, _, right = np.linalg.svd(positions[:, :2].T @ before)  # 2 × 2
            positions[:, :2] = positions[:, :2] @ (left @ right)
        self.positions = positions

    def token_colors(self) -> list[Array]:
        """Tokens of each stage as RGB (P, h, w, 3), uint8, by their first three principal components.

        All stages share one basis and one range, so that equal colors are equal directions. Each stage is centered.
        """
        tokens = [stage.scores @ stage.axes for stage in self.stages if stage.scores.size]
        if not tokens:
            return []
        rows = np.concatenate([t.reshape(-1, t.shape[-1]) for t in tokens])
        basis = principal_axes(rows, 3).T
        low, high = np.percentile(rows @ basis, (2, 98), axis=0)
        scaled = [(t @ basis - low) / np.maximum(high - low, 1e-6) for t in tokens]
        colors = [np.concatenate([s, np.full((*s.shape[:-1], 3 - s.shape[-1]), 0.5)], -1) for s in scaled]
        return [(255 * c.clip(0, 1)).astype(np.uint8) for c in colors]

    def save(self, path: Path) -> None:
        """Write all of it as one file of arrays."""
        arrays: dict[str, Any] = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        for k, stage in enumerate(self.stages):
            arrays |= {f"{name}_{k}": value for name, value in stage._asdict().items() if name != "step"}
        known = json.dumps({"run": self.run, "path": self.path, "steps": [stage.step for stage in self.stages]})
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez(file, known=np.array(known), **arrays)

    @classmethod
    def load(cls, path: Path) -> Pictures:
        """Read the file of :meth:`save`.

        Raises:
            ValueError: The file is damaged, or something else.
        """
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
                known = json.loads(str(content["known"]))
                stages = [
                    Stage(step, *(content[f"{name}_{k}"] for name in Stage._fields[1:]))
                    for k, step in enumerate(known["steps"])
                ]
                names = [name for name, value in vars(cls()).items() if isinstance(value, np.ndarray)]
                arrays = {name: content[name] for name in names}
        except (ValueError, KeyError, TypeError, OSError, EOFError, BadZipFile) as error:
            raise ValueError(f"{path} holds no pictures of a run: {type(error).__name__}: {error}") from error
        return cls(run=known["run"], path=known["path"], stages=stages, **arrays)


def add_pictures(
    encode: Encode, pictures: Pictures, root: nn.Module, *, size: int | None, again: bool, together: bool
) -> Encode:
    """Images → features of ``encode``, and what :meth:`Pictures.update` reads, in the same forward pass.

    Args:
        encode: Function: images → features.
        pictures: Those of the run; the submodule that its tokens come from is added.
        root: Module that ``encode`` runs, or runs a part of.
        size: Number of held-out images; None if unknown: the first ones are shown.
        again: Whether the thumbnails are known already.
        together: Whether every rank reads all data.
    """
    rank, world = (0, 1) if together else rank_and_world()
    batches, batch_size = itertools.count(rank, world), 0
    stride = 1 if size is None else max(1, -(-size // MAPPED))

    def encode_with_pictures(images: Tensor) -> dict[str, Tensor]:
        nonlocal batch_size
        batch_size = batch_size or len(images)
        shown, with_tokens = torch.zeros(2, len(images), dtype=torch.bool)
        if images.ndim != 4:
            return encode(images) | {SHOWN: shown, TOKEN_ROWS: with_tokens}
        rows = next(batches) * batch_size + torch.arange(len(images))
        shown |= (rows % stride == 0) & (rows < stride * MAPPED)
        step = stride * max(1, min(-(-(size or batch_size) // stride), MAPPED) // WITH_TOKENS)
        with_tokens |= (rows % step == 0) & (rows < step * WITH_TOKENS)
        features = encode(images) if not with_tokens.any() else _with_tokens(encode, images, with_tokens)
        features |= {SHOWN: shown, TOKEN_ROWS: with_tokens}
        return features if again else features | {THUMBNAILS: thumbnails(images[shown.to(images.device)])}

    def _with_tokens(encode: Encode, images: Tensor, rows: Tensor) -> dict[str, Tensor]:
        with TokenReader(root, pictures.path) as reader:
            features = dict(encode(images))
        grid = reader.grid(images)
        pictures.path = reader.path
        return features if grid is None else features | {TOKENS: grid[rows.to(grid.device)]}

    return encode_with_pictures


def thumbnails(images: Tensor, *, side: int = THUMBNAIL_PX) -> Tensor:
    """Images (B, C, H, W) as (B, 3, S, S) on the CPU, uint8 or float as they are; without a third channel gray."""
    channels = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    whole = channels.detach().float().cpu()
    shrinks = min(whole.shape[-2:]) >= side
    small = (
        torch.nn.functional.adaptive_avg_pool2d(whole, side)
        if shrinks
        else torch.nn.functional.interpolate(whole, (side, side))
    )
    return small.round().to(torch.uint8) if images.dtype == torch.uint8 else small


def as_rgb(images: Array) -> Array:
    """Images (N, 3, S, S) as uint8: floats in 0 … 1 times 255; normalized ones from each channel's 1 % to its 99 %.

    Example:
        >>> as_rgb(np.array([0.0, 1.0]).reshape(2, 1, 1, 1)).ravel().tolist()
        [0, 255]
    """
    if images.dtype == np.uint8 or not images.size:
        return images.astype(np.uint8)
    if images.min() < 0 or images.max() > 1:
        low, high = np.nanpercentile(images, (1, 99), axis=(0, 2, 3), keepdims=True)
        images = (images - low) / np.maximum(high - low, 1e-12)
    return (255 * np.nan_to_num(images).clip(0, 1)).round().astype(np.uint8)


def compare_groups(unit: Array, groups: Array) -> Array:
    """Cosines (M, M) of unit rows; −∞ within a group, and of a row with itself."""
    similarity = unit @ unit.T
    same = np.eye(len(unit), dtype=bool)
    same |= (groups[:, None] == groups) & (groups[:, None] >= 0)
    similarity[same] = -np.inf
    return similarity


def nearest_rows(similarity: Array, count: int) -> Array:
    """Columns (M, count) of the largest entries of each row, the largest first; −1 where only −∞ is left.

    Example:
        >>> nearest_rows(np.array([[-np.inf, 0.2, 0.9], [0.2, -np.inf, -np.inf]]), 2)
        array([[ 2,  1],
               [ 0, -1]])
    """
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
    return np.where(np.isfinite(np.take_along_axis(similarity, order, axis=1)), order, -1)


def spread_rows(groups: Array, count: int) -> Array:
    """Up to ``count`` rows, of groups at equal distances; without as many groups, several rows of each.

    Example:
        >>> spread_rows(np.array([0, 0, 1, 1, 2, 2, 3, 3]), 2).tolist(), spread_rows(np.full(4, -1), 2).tolist()
        ([0, 4], [0, 2])
    """
    distinct, first = np.unique(groups, return_index=True)
    rows = np.sort(first) if len(distinct) >= count else np.arange(len(groups))
    return rows[np.linspace(0, len(rows), min(count, len(rows)), endpoint=False).astype(int)]


def principal_axes(rows: Array, count: int, *, sample: int = 512) -> Array:
    """First principal axes (K, D) of centered rows, from at most ``sample`` of them; the largest entry is positive."""
    subset = rows[np.linspace(0, len(rows), min(sample, len(rows)), endpoint=False).astype(int)]
    square = torch.from_numpy(np.ascontiguousarray(subset)).double()
    if len(subset) >= subset.shape[1]:
        axes = torch.linalg.eigh(square.T @ square).eigenvectors.T
    else:
        axes = torch.linalg.eigh(square @ square.T).eigenvectors.T @ square
        axes /= axes.norm(dim=1, keepdim=True).clamp_min(1e-300)
    axes = axes.flip(0)[:count].numpy()
    largest = np.take_along_axis(axes, np.abs(axes).argmax(1, keepdims=True), axis=1)
    return axes * np.where(largest < 0, -1, 1)


def reduce_tokens(tokens: Array | None) -> tuple[Array, Array]:
    """Tokens (P, h, w, D) as centered scores (P, h, w, K) of mean energy 1, and their axes (K, D)."""
    if tokens is None or not tokens.size or not np.isfinite(tokens).all():
        return np.empty((0, 0, 0, 0), np.float32), np.empty((0, 0), np.float32)
    rows = tokens.reshape(-1, tokens.shape[-1])
    rows = rows - rows.mean(0)
    energy = float((rows.astype(np.float64) ** 2).sum(1).mean()) ** 0.5
    axes = principal_axes(rows, KEPT_COMPONENTS)
    scores = (rows @ axes.T / (energy or 1.0)).reshape(*tokens.shape[:-1], -1)
    return scores.astype(np.float32), axes.astype(np.float32)


def is_drawn(evaluations: int) -> bool:
    """Whether the board gets the pictures of this evaluation, the n-th: of 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on.

    A board keeps ten pictures of a kind, and each may take a megabyte.

    Example:
        >>> [n for n in range(1, 30) if is_drawn(n)]
        [1, 2, 3, 4, 6, 8, 12, 16, 24]
    """
    while evaluations > 4 and evaluations % 2 == 0:
        evaluations //= 2
    return evaluations <= 4


def pictures_name(records: str) -> str:
    """Name of the file with the pictures of a run, from that of its records, beside which it is.

    Example:
        >>> pictures_name("measurements.jsonl"), pictures_name("measurements-teacher.jsonl")
        ('pictures.npz', 'pictures-teacher.npz')
    """
    return records.replace("measurements", "pictures", 1).removesuffix(".jsonl") + ".npz"

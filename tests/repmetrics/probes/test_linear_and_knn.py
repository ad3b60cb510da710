"""The probes against oracles: textbook formulas typed again, closed forms, and leakage between groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from repmetrics.functional.discriminant import cross_predict, discriminant, folds_of
from repmetrics.probes.knn import knn_probe
from repmetrics.probes.linear import linear_probe


def blobs(n: int, *, classes: int = 3, distance: float = 8.0, d: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centers = distance * torch.eye(classes, d)
    return centers[labels] + torch.randn(n, d, generator=generator), labels


@pytest.mark.parametrize("probe", [linear_probe, knn_probe])
def test_separable_classes_are_read_off(probe) -> None:
    features, labels = blobs(150)
    result = probe(features, labels)
    assert result.value > 0.99
    assert (result.n, result.d, result.direction) == (150, 6, "higher")
    assert result.details["chance"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("probe", [linear_probe, knn_probe])
def test_labels_of_no_relation_give_chance(probe) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2000, 16, generator=generator)
    labels = torch.randint(0, 2, (2000,), generator=generator)
    # binomial sd 0.011; a probe that saw its test rows would be far above
    assert probe(features, labels).value == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("probe", [linear_probe, knn_probe])
def test_a_group_is_never_on_both_sides(probe) -> None:
    """Rows give away their slide, slides have random labels: only a leak could read them."""
    generator = torch.Generator().manual_seed(0)
    slide = torch.arange(40).repeat_interleave(25)
    labels = torch.randint(0, 2, (40,), generator=generator)[slide]
    features = 10 * torch.randn(40, 30, generator=generator)[slide] + torch.randn(1000, 30, generator=generator)
    assert probe(features, labels).value > 0.95  # without groups, the leak is complete
    grouped = probe(features, labels, groups=slide.tolist())
    assert grouped.value < 0.75
    assert grouped.groups == 40


def test_the_discriminant_is_the_textbook_formula() -> None:
    """Typed again in NumPy, entry by entry, from Ledoit & Wolf 2004 and the definition of LDA."""
    generator = np.random.default_rng(0)
    target = np.repeat([0, 1, 2], [5, 20, 15])
    rows = generator.normal(size=(40, 7)) @ generator.normal(size=(7, 7)) + target[:, None]
    means = np.array([rows[target == c].mean(0) for c in range(3)])
    within = np.array([row - means[c] for row, c in zip(rows, target, strict=True)])
    sample = sum(np.outer(r, r) for r in within) / 40
    m = np.trace(sample) / 7
    d2 = np.linalg.norm(sample - m * np.eye(7)) ** 2
    b2 = min(d2, sum(np.linalg.norm(np.outer(r, r) - sample) ** 2 for r in within) / 40**2)
    inverse = np.linalg.inv(b2 / d2 * m * np.eye(7) + (1 - b2 / d2) * sample)
    expected_bias = [-means[c] @ inverse @ means[c] / 2 for c in range(3)]
    norm4 = torch.tensor((np.square(within).sum(1) ** 2).mean())
    weights, bias = discriminant(torch.from_numpy(means), torch.from_numpy(sample), norm4, n=40)
    np.testing.assert_allclose(weights, inverse @ means.T, rtol=1e-9)
    np.testing.assert_allclose(bias, expected_bias, rtol=1e-9)


@pytest.mark.parametrize(("offset", "exact_rows"), [(0.0, 0), (1e3, 0), (0.0, 1024)])
def test_predictions_from_sums_are_those_of_a_fit_on_the_other_folds(
    offset: float, exact_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Standardized by the training rows; one class has no rows outside of its fold."""
    monkeypatch.setattr("repmetrics.functional.discriminant.EXACT_ROWS", exact_rows)
    generator = np.random.default_rng(1)
    target = np.repeat([0, 1, 2, 7], [60, 60, 60, 6])
    rows = generator.normal(size=(186, 9)) @ generator.normal(size=(9, 9)) + 0.7 * target[:, None] + offset
    fold = np.where(target == 7, 0, np.arange(186) % 4)
    predicted = cross_predict(torch.from_numpy(rows), target, fold)
    for k in range(4):
        train, classes = rows[fold != k], np.unique(target[fold != k])
        z, test = ((x - train.mean(0)) / train.std(0) for x in (train, rows[fold == k]))
        means = np.array([z[target[fold != k] == c].mean(0) for c in classes])
        within = z - means[np.searchsorted(classes, target[fold != k])]
        norm4 = torch.tensor((np.square(within).sum(1) ** 2).mean())
        scatter = torch.from_numpy(within.T @ within / len(z))
        weights, bias = discriminant(torch.from_numpy(means), scatter, norm4, n=len(z))
        assert (predicted[fold == k] == classes[(test @ weights.numpy() + bias.numpy()).argmax(1)]).all()


def test_a_column_that_varies_in_one_fold_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its training rows differ by 1e-9 of its range: a difference of sums would be rounding."""
    monkeypatch.setattr("repmetrics.functional.discriminant.EXACT_ROWS", 0)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    rows[:, 0] *= 1e-9
    rows[:10, 0] += 1
    target, fold = np.arange(40) % 2, np.arange(40) // 10
    assert set(cross_predict(rows, target, fold)) <= {0, 1}
    one_each = np.arange(4) % 2  # training rows: at most two of a class, whose covariance within classes may be 0
    assert set(cross_predict(torch.eye(4, dtype=torch.float64), one_each, np.array([0, 0, 1, 1]))) <= {0, 1}


@pytest.mark.parametrize("features", [torch.zeros(40, 3), torch.ones(40, 8), torch.eye(40)[:, :1].expand(-1, 5)])
def test_collapsed_features_score_chance(features: Tensor) -> None:
    labels = torch.arange(40) % 2
    assert linear_probe(features, labels).value == pytest.approx(0.5, abs=0.05)


def test_each_class_weighs_the_same() -> None:
    """Nine in ten rows are of class 0: a probe that always answers 0 scores one half."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(1000) % 10 == 0).long()
    features = torch.randn(1000, 1, generator=generator) + labels[:, None]
    # the best balanced threshold, halfway, gives Φ(1/2) = 0.691; sd over draws about 0.02
    assert linear_probe(features, labels).value == pytest.approx(0.691, abs=0.05)


def test_knn_by_hand() -> None:
    angles = torch.tensor([0.0, 10.0, 20.0, 90.0, 100.0, 14.0]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], 1)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    # nearest neighbor: 0→10 right; 10→14 wrong; 20→14 wrong; 90→100 right; 100→90 right; 14→10 wrong
    assert knn_probe(features, labels, k=1).value == pytest.approx((1 / 3 + 2 / 3) / 2)


def test_knn_in_blocks_is_knn_at_once() -> None:
    features, labels = blobs(2500, distance=1.5)
    order = torch.randperm(2500, generator=torch.Generator().manual_seed(0))
    assert knn_probe(features, labels).value == pytest.approx(knn_probe(features[order], labels[order]).value, abs=1e-3)


def test_knn_of_many_rows_takes_some_at_equal_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = blobs(300)
    slides = [i // 10 for i in range(300)]
    monkeypatch.setattr("repmetrics.probes.knn.MAX_ROWS", 150)
    some = knn_probe(features, labels, groups=slides)
    kept = torch.arange(0, 300, 2)
    assert some.value == knn_probe(features[kept], labels[kept], groups=slides[::2]).value
    assert (some.n, some.warnings[-1][:13]) == (150, "150 of 300 ro")


def test_the_error_matches_redrawn_slides() -> None:
    """Jackknife over slides against the true standard deviation over fresh draws of all slides.

    The predictor is fixed: features separate the classes along one axis. Forty draws estimate a deviation to about
    11 %; the ratio must be in 0.5 … 2.
    """
    values, errors = [], []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        slide = torch.arange(32).repeat_interleave(20)
        labels = (torch.arange(640) % 2).long()
        shift = 0.7 * torch.randn(32, 1, generator=generator)[slide]
        features = (2.0 * labels[:, None] - 1) + shift + 0.7 * torch.randn(640, 1, generator=generator)
        result = linear_probe(features, labels, groups=slide.tolist())
        assert result.standard_error is not None
        values.append(result.value)
        errors.append(result.standard_error)
    assert 0.5 < np.mean(errors) / np.std(values) < 2


@pytest.mark.parametrize("probe", [linear_probe, knn_probe])
def test_noise_is_at_chance_and_within_its_error(probe: Any) -> None:
    """Twenty slides, of which ten have each label, and features that know the slide but not the label.

    A vote that leaves out its own slide sees nine slides of its class and ten of the other; its mean is 0.455 where
    this is not corrected. The sd over draws is 0.08: the mean of 60 has the error 0.01. A rate of 5 % has 2.8 %.
    """
    slide = np.repeat(np.arange(20), 10)
    values, far = [], []
    for seed in range(60):
        random = np.random.default_rng(seed)
        features = torch.from_numpy(random.normal(size=(20, 16))[slide] + random.normal(size=(200, 16)))
        labels = torch.from_numpy(random.permutation([0, 1] * 10)[slide])
        m = probe(features, labels, groups=slide.tolist())
        assert m.standard_error is not None
        assert m.margin is not None
        values.append(m.value)
        far.append((abs(m.value - 0.5) > m.margin, abs(m.value - 0.5) > 2 * m.standard_error))
    assert np.mean(values) == pytest.approx(0.5, abs=0.03)
    assert (np.mean(far, axis=0) <= 0.12).all()


def test_no_error_where_few_slides_have_a_class() -> None:
    """With two slides a class, a probe without one of them leans to the other class: noise scores far below chance."""
    features = torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
    slide = torch.arange(80) // 20
    m = linear_probe(features, slide % 2, groups=slide.tolist())
    assert (m.standard_error, m.margin, m.replicates) == (None, None, None)
    assert "class number 0 occurs in 2 of 4 groups" in str(m.reason)
    assert linear_probe(features, torch.arange(80) % 2, groups=slide.tolist()).standard_error is not None


def test_folds_hold_every_class_and_split_no_group() -> None:
    labels = np.arange(300) % 3
    groups = [i // 10 for i in range(300)]
    for fold in (folds_of(labels), folds_of(labels, groups=groups)):
        counts = np.array([np.bincount(labels[fold == k], minlength=3) for k in range(5)])
        assert (counts == 20).all()
    assert len({(g, f) for g, f in zip(groups, folds_of(labels, groups=groups), strict=True)}) == 30
    assert set(folds_of(labels, groups=[i % 3 for i in range(300)]).tolist()) == {0, 1, 2}


def test_no_error_is_claimed_without_groups_or_with_a_class_in_one_block() -> None:
    features, labels = blobs(60)
    assert "no group ids" in str(linear_probe(features, labels).reason)
    lonely = linear_probe(features, labels, groups=labels.tolist())
    assert lonely.standard_error is None
    assert "class number 0 occurs in 1 of 3 groups" in str(lonely.reason)
    assert len(lonely.warnings) == 3


@pytest.mark.parametrize("probe", [linear_probe, knn_probe])
@pytest.mark.parametrize(
    ("labels", "groups", "message"),
    [
        (torch.zeros(8), None, "all 8 labels are 0: a probe needs at least two classes"),
        (torch.arange(7), None, r"labels must be \(8,\), one per row, got \(7,\)"),
        (torch.arange(8), ["a"] * 8, "all rows belong to one group"),
        (torch.arange(8), ["a"] * 7, "groups must hold one id per row, got 7 for 8 rows"),
    ],
)
def test_bad_input(probe, labels: Tensor, groups: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probe(torch.randn(8, 3), labels.long(), groups=groups)


def test_knn_of_groups_out_of_order_is_the_vote_of_all_other_groups() -> None:
    """Typed again row by row, over two blocks of rows, with groups of one to many rows that begin in either block."""
    features, labels = blobs(1100, distance=2.0)
    group = torch.randint(0, 12, (1100,), generator=torch.Generator().manual_seed(1)) ** 2
    unit = torch.nn.functional.normalize(features)
    classes = torch.bincount(labels)
    expected = []
    for row in range(0, 1100, 7):
        others = (group != group[row]).nonzero().flatten()
        near = others[(unit[others] @ unit[row]).topk(20).indices]
        weight = ((unit[near] @ unit[row]) / 0.07).exp()
        votes = torch.stack([weight[labels[near] == c].sum() for c in range(3)])
        expected.append(int((votes * classes / torch.bincount(labels[others])).argmax() == labels[row]))
    m = knn_probe(features, labels, groups=group.tolist())
    assert m.details["accuracy"] == pytest.approx(sum(expected) / len(expected), abs=0.05)

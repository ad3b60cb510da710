"""The ridge probe against the textbook formula, closed forms, and covariates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from repmetrics.probes.ridge import RELATIVE_PENALTIES, ridge, ridge_probe


def rows(n: int = 300, d: int = 12, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_penalty_minimizes_generalized_cross_validation() -> None:
    x = rows(80, 6) * torch.arange(1, 7) ** -1.5
    x = x - x.mean(0)
    y = x[:, 3] + 2 * rows(80, 1, seed=3)[:, 0]
    y = y - y.mean()
    a, b, n = x.numpy(), y.numpy(), 80
    solutions = []
    for relative in RELATIVE_PENALTIES:
        penalty = relative * np.trace(a.T @ a) / 6
        inverse = np.linalg.inv(a.T @ a + penalty * np.eye(6))
        hat = a @ inverse @ a.T
        residual = b - hat @ b
        # the mean is a further parameter
        solutions.append(((residual**2).sum() / (1 - (np.trace(hat) + 1) / n) ** 2, inverse @ a.T @ b))
    expected = min(solutions, key=lambda pair: pair[0])[1]
    np.testing.assert_allclose(ridge(x, y).numpy(), expected, rtol=1e-8, atol=1e-12)


def test_skill_of_noise_of_signal_and_of_both() -> None:
    x, noise = rows(2000, 5), rows(2000, 1, seed=1)[:, 0]
    assert abs(ridge_probe(x, noise).value) < 0.02
    assert ridge_probe(x, x[:, 0]).value > 0.9999
    assert ridge_probe(x, x[:, 0] + noise).value == pytest.approx(0.5, abs=0.06)  # sd of R² = √(.5²·…/2000) ≈ .016


def test_beyond_covariates_only_the_rest_counts() -> None:
    color, shape = rows(1500, 2, seed=4), rows(1500, 3, seed=5)
    target = 3 * color[:, 0] + shape[:, 0]
    features = torch.cat([color, shape], 1)
    assert ridge_probe(color, target).value > 0.85
    assert ridge_probe(color, target, beyond=color).value == pytest.approx(0, abs=0.02)
    assert ridge_probe(features, target, beyond=color).value > 0.99


def test_a_group_is_predicted_from_other_groups_and_gives_the_error() -> None:
    """Features that identify the group tell nothing of a target that differs between groups at random."""
    groups = [f"g{i % 30}" for i in range(600)]
    level = rows(30, 1, seed=6)[torch.arange(600) % 30, 0]
    one_hot = torch.eye(30, dtype=torch.float64)[torch.arange(600) % 30]
    assert ridge_probe(one_hot, level).value > 0.99
    held_out = ridge_probe(one_hot, level, groups=groups)
    assert held_out.value < 0.1
    assert held_out.groups == 30
    assert held_out.standard_error > 0


def test_what_cannot_be_measured_has_a_reason_or_an_error() -> None:
    constant = ridge_probe(rows(40, 3), torch.ones(40))
    assert math.isnan(constant.value)
    assert constant.reason == "the target is constant"
    assert ridge_probe(torch.ones(40, 3), rows(40, 1)[:, 0]).value == pytest.approx(0, abs=0.15)
    with pytest.raises(ValueError, match=r"target must be \(40,\) finite numbers, got \(39,\)"):
        ridge_probe(rows(40, 3), torch.ones(39))
    with pytest.raises(ValueError, match="at least two groups, got 1 distinct"):
        ridge_probe(rows(40, 3), torch.arange(40.0), groups=["a"] * 40)

"""The rotation probe: chance, certainty, and whole groups in one fold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from draws import gaussian

from repmetrics.functional.rotation import predicted_turns, rotation_probe
from repmetrics.probes.linear import linear_probe


def turned(n: int, d: int, *, signal: float, seed: int = 0) -> torch.Tensor:
    """(n, 4, d) features of an image, plus a direction per quarter-turn."""
    images = gaussian(n, d, seed=seed)[:, None] + 0.3 * gaussian(4 * n, d, seed=seed + 1).reshape(n, 4, d)
    return images + signal * torch.eye(4, d, dtype=torch.float64)


def test_chance_and_certainty() -> None:
    # 400 images: sd of the accuracy of chance is at most √(.25·.75/400) = .02
    assert rotation_probe(turned(400, 6, signal=0)).item() == pytest.approx(0.25, abs=0.06)
    assert rotation_probe(turned(100, 6, signal=30)).item() == 1


def test_it_is_the_linear_probe_with_images_as_groups() -> None:
    x = turned(60, 5, signal=1.0)
    value = rotation_probe(x).item()
    labels = torch.arange(4).repeat(60)
    images = np.repeat(np.arange(60), 4).tolist()
    probe = linear_probe(x.flatten(0, 1), labels, groups=images).value
    assert 0.4 < value < 0.9
    assert value == pytest.approx(probe, abs=0.03)  # other folds of the same images


def test_images_of_a_group_are_predicted_from_other_groups() -> None:
    """Two groups whose turns have opposite signs: fitted on the other one, the probe is always wrong."""
    x = turned(80, 6, signal=0)
    sign = torch.tensor([1.0, -1.0]).repeat(40)
    x = x + 20 * sign[:, None, None] * torch.tensor([-1.5, -0.5, 0.5, 1.5])[:, None] * torch.eye(6)[0]
    groups = ["a", "b"] * 40
    assert rotation_probe(x, groups=groups).item() == 0
    assert rotation_probe(x).item() > 0.2


def test_rows_are_shares_of_four_turns() -> None:
    shares = predicted_turns(turned(30, 5, signal=1.0))
    assert shares.shape == (30,)
    assert set(shares.tolist()) <= {0, 0.25, 0.5, 0.75, 1}


def test_bad_input_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"\(N, 4, D\), one row per quarter-turn, got \(5, 3, 2\)"):
        rotation_probe(torch.ones(5, 3, 2))
    with pytest.raises(ValueError, match="one id per image, got 2 for 5 images"):
        rotation_probe(torch.ones(5, 4, 2), groups=[0, 1])
    with pytest.raises(ValueError, match="at least two images, and two groups"):
        rotation_probe(turned(5, 4, signal=1), groups=["a"] * 5)

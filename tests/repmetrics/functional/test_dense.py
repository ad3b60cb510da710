"""Patch tokens: DSE, Gram drift, high-norm share."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import torch
from draws import gaussian, generator, orthonormal
from torch import Tensor

from repmetrics.functional.dense import (
    dense_structure,
    dse,
    dse_dimension,
    dse_inter,
    dse_intra,
    gram_drift,
    high_norm_share,
)


def segmented(images: int, tokens: int, d: int, *, classes: int, spread: float = 0.02) -> tuple[Tensor, Tensor]:
    """(B, T, D) tokens around ``classes`` orthogonal directions, as known clusters, and their (B, T) class."""
    labels = torch.arange(tokens).remainder(classes).expand(images, -1)
    centers = orthonormal(d, d, seed=5)[:classes]
    noise = spread * gaussian(images * tokens, d, seed=6).reshape(images, tokens, d)
    return (centers[labels] + noise) * torch.exp(gaussian(images, tokens, seed=7))[..., None], labels


def orders(images: int, tokens: int) -> np.ndarray:
    """Order of the tokens of each image: permutations of one generator with seed 0, image by image."""
    random = generator(0)
    return np.stack([torch.randperm(tokens, generator=random).numpy() for _ in range(images)])


@pytest.mark.parametrize(("images", "classes"), [(1, 2), (3, 3), (8, 3)])
def test_dse_equals_the_formula_where_the_clusters_are_known(images, classes) -> None:
    tokens, labels = segmented(images, 21, 10, classes=classes)
    expected = oracles.dse(tokens.numpy(), labels.numpy(), orders(images, 21))
    terms = dense_structure(tokens, local_clusters=classes, global_clusters=classes)
    for name, value in expected.items():
        assert getattr(terms, name).item() == pytest.approx(value, rel=1e-9), name
    assert dse(tokens, local_clusters=classes, global_clusters=classes).item() == terms.dse.item()


def test_images_beyond_eight_make_a_second_stack() -> None:
    tokens, labels = segmented(10, 12, 6, classes=3)
    terms = dense_structure(tokens, local_clusters=3, global_clusters=3)
    stacks = [
        oracles.dse(tokens[s].numpy(), labels[s].numpy(), orders(len(tokens[s]), 12))
        for s in (slice(0, 8), slice(8, 10))
    ]
    flat = torch.cat([image / image.norm(dim=1, keepdim=True) for image in tokens])
    whole = (flat - flat.mean(0)).norm(dim=1).mean().item()
    spreads = [(f - f.mean(0)).norm(dim=1).mean().item() for f in (flat[:96], flat[96:])]
    inter = sum(stack["inter"] * spread for stack, spread in zip(stacks, spreads, strict=True)) / 2 / whole
    assert terms.inter.item() == pytest.approx(inter, rel=1e-9)


def test_dse_falls_with_dimensional_collapse_and_with_blurred_classes() -> None:
    sharp, _ = segmented(4, 24, 12, classes=3)
    blurred, _ = segmented(4, 24, 12, classes=3, spread=0.5)
    sharp_terms, blurred_terms = dense_structure(sharp), dense_structure(blurred)
    assert blurred_terms.intra_image > sharp_terms.intra_image
    flat = torch.ones(4, 24, 12) * torch.arange(1, 97).reshape(4, 24, 1)
    assert dense_structure(flat).dimension.item() == pytest.approx(1 / 4, rel=1e-4)  # rank 1 of min(4, 12)
    assert dse(flat) < dse(sharp)


def test_dse_is_the_same_twice_and_ignores_length_and_rotation() -> None:
    tokens, _ = segmented(3, 20, 8, classes=3)
    assert dse(tokens).item() == dse(tokens).item()
    expected = dse(tokens, global_clusters=3).item()
    turned = 5 * tokens @ orthonormal(8, 8, seed=11)
    assert dse(turned, global_clusters=3).item() == pytest.approx(expected, rel=1e-9)


def test_identical_tokens_have_one_cluster_and_no_radius() -> None:
    terms = dense_structure(torch.ones(2, 5, 4))
    # The spread they are divided by is floored at 2⁻²³: rounding of 1e-16 must not become a radius.
    assert terms.inter.item() == 0
    assert terms.intra_image.item() == pytest.approx(0, abs=1e-6)
    assert terms.dse.item() == pytest.approx(0.5, abs=1e-6)


def mixed(b: int, t: int, d: int, *, seed: int) -> Tensor:
    """Tokens around six directions with a decaying spectrum: clusters overlap."""
    random = generator(seed)
    noise = torch.randn(b, t, d, generator=random) * torch.arange(1, d + 1) ** -0.5
    return noise + 2 * torch.randn(6, d, generator=random)[torch.arange(t) % 6]


@pytest.mark.parametrize(
    ("shape", "seed", "clusters", "expected"),
    [
        ((4, 40, 12), 0, (3, 24), (0.359487, 1.251058, 0.357606, 0.87645, 0.431605)),
        ((10, 30, 16), 1, (3, 24), (0.256041, 0.953226, 0.28005, 0.67906, 0.318464)),
        ((9, 50, 32), 2, (5, 20), (0.302692, 0.366894, 0.283399, 0.68968, 0.667225)),
    ],
    ids=str,
)
def test_compat_gives_the_numbers_of_the_authors_code(shape, seed, clusters, expected) -> None:
    """``compute_DSE`` of EldercatSAM/SSL-Degradation at b75fd51, normalize=True, after ``torch.manual_seed(0)``."""
    tokens = mixed(*shape, seed=seed)
    arguments = {"local_clusters": clusters[0], "global_clusters": clusters[1]}
    terms = dense_structure(tokens, **arguments, compat="authors")
    assert [term.item() for term in terms] == pytest.approx(expected, abs=2e-5)
    ours = dense_structure(tokens, **arguments)
    # The same terms by another k-means: the authors' starts leave clusters merged.
    assert [term.item() for term in ours] == pytest.approx(expected, rel=0.35)
    assert ours.dimension.item() == pytest.approx(expected[3], rel=0.02)


def test_the_terms_have_functions() -> None:
    tokens = mixed(3, 30, 8, seed=5)
    terms = dense_structure(tokens)
    assert dse_inter(tokens) == terms.inter
    assert dse_intra(tokens) == (terms.intra_image + terms.intra_batch) / 2
    assert dse_dimension(tokens) == terms.dimension
    with pytest.raises(ValueError, match="compat must be 'authors' or None, got 'lightly'"):
        dse(tokens, compat="lightly")


def test_gram_drift_equals_the_formula() -> None:
    tokens, anchor = gaussian(3 * 7, 5).reshape(3, 7, 5), gaussian(3 * 7, 4, seed=1).reshape(3, 7, 4)
    expected = oracles.gram_drift(tokens.numpy(), anchor.numpy())
    assert gram_drift(tokens, anchor=anchor).item() == pytest.approx(expected, rel=1e-10)
    assert gram_drift(tokens[:, :1], anchor=anchor[:, :1]).item() == pytest.approx(0, abs=1e-12)


def test_gram_drift_sees_no_rotation_and_no_length() -> None:
    tokens = gaussian(2 * 9, 6).reshape(2, 9, 6)
    turned = tokens @ orthonormal(6, 6) * torch.exp(gaussian(2, 9))[..., None]
    assert gram_drift(turned, anchor=tokens).item() == pytest.approx(0, abs=1e-12)
    opposite = torch.stack([torch.eye(2)[0], -torch.eye(2)[0]])[None]
    same = torch.stack([torch.eye(2)[0], torch.eye(2)[0]])[None]
    assert gram_drift(opposite, anchor=same).item() == pytest.approx(2, rel=1e-12)  # half of the entries move by 2


def test_high_norm_share() -> None:
    tokens = torch.ones(3, 7, 4)  # 21 tokens of length 2
    tokens[0, 3] *= 3.01
    tokens[2, 6] *= 2.99
    assert high_norm_share(tokens).item() == pytest.approx(1 / 21)
    assert high_norm_share(tokens, factor=2).item() == pytest.approx(2 / 21)
    assert high_norm_share(tokens * 1e-3).item() == pytest.approx(1 / 21)
    assert high_norm_share(torch.zeros(1, 3, 2)).item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes(dtype) -> None:
    tokens, labels = segmented(2, 12, 6, classes=3)
    tokens = tokens.to(dtype)
    z = tokens.double().numpy()
    # Unit rows of narrower dtypes are float32.
    value = dse(tokens, local_clusters=3, global_clusters=3).item()
    assert value == pytest.approx(oracles.dse(z, labels.numpy(), orders(2, 12))["dse"], rel=1e-5)
    assert gram_drift(tokens, anchor=tokens.flip(1)).item() == pytest.approx(
        oracles.gram_drift(z, z[:, ::-1].copy()), rel=1e-5
    )


@pytest.mark.parametrize(
    "function", [dse, high_norm_share, lambda t: gram_drift(t, anchor=t)], ids=["dse", "norm", "gram"]
)
def test_bad_tokens_are_refused_in_one_sentence(function) -> None:
    with pytest.raises(ValueError, match=r"tokens must be \(B, T, D\) without the CLS token, got \(4, 3\)"):
        function(torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"got \(0, 4, 3\)"):
        function(torch.ones(0, 4, 3))
    with pytest.raises(TypeError, match=r"floating tensor \(B, T, D\), got torch.int64"):
        function(torch.ones(2, 4, 3, dtype=torch.int64))
    poisoned = torch.ones(2, 4, 3)
    poisoned[0, 1, 2] = math.nan
    with pytest.raises(ValueError, match="tokens hold 1 NaN or Inf"):
        function(poisoned)


def test_gram_drift_is_of_the_same_images() -> None:
    with pytest.raises(ValueError, match=r"of the same images, got \(2, 4, 3\) and \(2, 5, 3\)"):
        gram_drift(torch.ones(2, 4, 3), anchor=torch.ones(2, 5, 3))

"""The free-label battery: labels of known images, adjacency on a grid, leakage by construction, restained patches."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fmtrain import cli
from fmtrain.evaluation.battery import measure_free_labels, places_of
from fmtrain.evaluation.free_labels import Places, adjacency, free_label_battery, image_labels, site_leakage
from fmtrain.evaluation.stain_margin import (
    StainMoments,
    choose_donors,
    patch_moments,
    restain_as,
    slide_moments,
    stain_margin,
)
from fmtrain.manifest.manifest import Manifest
from fmtrain.patches.stains import STAINS, stain_densities
from repmetrics.encoders.checkpoint import load_encoder


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def places(patients: int = 8, side: int = 5, *, sites: int = 2) -> Places:
    """Two slides per patient, each a grid of side × side adjacent patches of 100 µm; patients take sites in turn."""
    grid = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).reshape(-1, 2) * 100.0
    patient = [p for p in range(patients) for _ in range(2 * side**2)]
    return Places(
        patients=[f"p{p}" for p in patient],
        sites=[f"site {p % sites}" for p in patient],
        slides=[f"p{p} slide {s}" for p in range(patients) for s in range(2) for _ in range(side**2)],
        centers=grid.repeat(2 * patients, 1),
        mpp=torch.full((len(patient),), 0.5, dtype=torch.float64),
        side_px=200,
    )


def test_labels_of_images_are_their_definitions() -> None:
    amounts = 0.2 + torch.rand(4, 40, 40, 2, generator=torch.Generator().manual_seed(0))
    images = torch.exp(-amounts @ STAINS[:2]).movedim(-1, 1)
    mpp = torch.tensor([0.25, 0.5, 0.5, 1.0])
    labels = image_labels(images, mpp=mpp)
    hematoxylin = amounts[..., 0].double().flatten(1)
    torch.testing.assert_close(labels["hematoxylin"], hematoxylin.mean(1), rtol=1e-4, atol=0)
    torch.testing.assert_close(labels["hematoxylin_sd"], hematoxylin.std(1, correction=0), rtol=1e-3, atol=0)
    gray = np.einsum("bchw,c->bhw", images.double().numpy(), [0.299, 0.587, 0.114])
    for i, resolution in enumerate(mpp.tolist()):
        sigma = 1.0 / resolution
        smooth = gaussian_filter(gray[i], sigma, radius=math.ceil(3 * sigma), mode="nearest")
        energy = sum((np.diff(smooth, axis=axis) ** 2).mean() for axis in (0, 1)) / resolution**2
        assert labels["gradient_1um"][i].item() == pytest.approx(np.log(energy), abs=1e-3)
    torch.testing.assert_close(labels["magnification"], mpp.double().log())


def test_adjacency_is_certain_for_features_of_the_place_and_chance_for_noise() -> None:
    where = places()
    slide_offset = normal(16, 6, seed=1)[torch.arange(16).repeat_interleave(25)]
    angle = where.centers / 400 * math.pi / 2  # positions on arcs: cosine distance grows with distance
    smooth = torch.cat([angle.cos(), angle.sin()], 1)
    assert adjacency(smooth, where).value > 0.9
    noise = adjacency(normal(400, 8), where)
    assert noise.value == pytest.approx(0.5, abs=4 * noise.standard_error)
    offset = adjacency(normal(400, 6, seed=2) * 0.01 + slide_offset, where)
    assert offset.value == pytest.approx(0.5, abs=0.1)  # what a whole slide shares cancels
    apart = where._replace(centers=where.centers * 5)
    assert math.isnan(adjacency(smooth, apart).value)
    mixed = where._replace(mpp=0.5 + torch.arange(400, dtype=torch.float64))
    assert math.isnan(adjacency(smooth, mixed).value)


def test_adjacency_equals_a_count_over_triples() -> None:
    where, features = places(patients=2, side=4), normal(64, 5)
    z = features.numpy() - features.numpy().mean(0)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    shares = []
    for i in range(64):
        apart = (where.centers - where.centers[i]).abs().amax(1) / 100
        same = [s == where.slides[i] for s in where.slides]
        near = [j for j in range(64) if same[j] and 1 <= apart[j] <= 2]
        far = [j for j in range(64) if same[j] and apart[j] >= 3]
        if near and far:
            shares.append(np.mean([z[i] @ z[n] > z[i] @ z[f] for n in near for f in far]))
    assert 0 < len(shares) < 64  # inner patches have no far ones
    assert adjacency(features, where).value == pytest.approx(np.mean(shares), rel=1e-12)


def test_site_leakage_counts_other_patients_only() -> None:
    where = places(patients=8)
    site = torch.tensor([float(s[-1]) for s in where.sites])[:, None]
    patient = torch.eye(8, dtype=torch.float64)[torch.tensor([int(p[1:]) for p in where.patients])]
    leaky = torch.cat([10 * site.double(), 10 - 10 * site.double(), normal(400, 4)], 1)
    assert site_leakage(leaky, where).value == pytest.approx(
        7 / 3, rel=0.02
    )  # 3 of the 7 other patients share the site
    fair = site_leakage(100 * patient + normal(400, 8), where)
    assert fair.value == pytest.approx(1, abs=4 * fair.standard_error + 0.05)
    alone = where._replace(sites=where.patients)
    assert math.isnan(site_leakage(leaky, alone).value)


def test_the_battery_measures_skill_beyond_color_across_patients() -> None:
    where = places()
    colors, shape = normal(400, 6, seed=3), normal(400, 3, seed=4)
    hidden = colors[:, 0] * 2 + 0.1 * normal(400, 1, seed=5)[:, 0]
    labels = {
        "hematoxylin": colors[:, 0] * 2,
        "hematoxylin_sd": hidden,
        "gradient_1um": shape[:, 0] + colors[:, 1],
        "magnification": where.mpp,
    }
    features = torch.cat([colors, shape], 1)
    measured = free_label_battery(features, labels, colors, where)
    assert list(measured) == [
        *("hematoxylin_skill", "hematoxylin_sd_skill", "gradient_1um_skill"),
        *("adjacency", "site_leakage"),
    ]
    assert math.isnan(measured["hematoxylin_skill"].value)
    assert measured["hematoxylin_skill"].reason == "the covariates determine the target"
    assert measured["hematoxylin_sd_skill"].value < 0.1  # what color leaves is noise
    assert measured["gradient_1um_skill"].value > 0.9
    assert all(m.groups == 8 for m in measured.values())


def test_restained_patches_have_the_donors_moments() -> None:
    amounts = 0.3 + 0.4 * torch.rand(6, 24, 24, 2, generator=torch.Generator().manual_seed(0))
    images = torch.exp(-amounts @ STAINS[:2]).movedim(-1, 1)
    moments, index = slide_moments(patch_moments(images), ["a", "a", "b", "b", "c", "c"])
    densities = stain_densities(images)[:, :2].transpose(0, 1).reshape(2, 3, -1).double()
    torch.testing.assert_close(moments.mean, densities.mean(2).T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments.std, densities.std(2, correction=0).T, rtol=1e-3, atol=1e-6)
    donor = StainMoments(moments.mean[[2] * 6] + 0.2, moments.std[[2] * 6] * 0.8)
    source = StainMoments(moments.mean[index], moments.std[index])
    restained, _ = slide_moments(patch_moments(restain_as(images, source, donor)), ["a", "a", "b", "b", "c", "c"])
    torch.testing.assert_close(restained.mean, donor.mean[:3], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(restained.std, donor.std[:3], rtol=1e-2, atol=1e-3)
    assert restain_as((images * 255).to(torch.uint8), source, donor).dtype == torch.uint8


def test_donors_are_other_slides() -> None:
    index = torch.arange(40) % 7
    donors = choose_donors(index)
    assert donors.shape == (40, 5)
    assert (donors != index[:, None]).all()
    assert all(len(set(row)) == 5 for row in donors.tolist())
    assert choose_donors(torch.arange(10) % 3).shape == (10, 2)
    with pytest.raises(ValueError, match="at least two slides, got one"):
        choose_donors(torch.zeros(5, dtype=torch.int64))


def test_the_margin_tells_tissue_from_stain() -> None:
    tissue, stain = normal(60, 12, seed=1), normal(6, 12, seed=2)
    slides = torch.arange(60) % 6
    donors = choose_donors(slides)
    arguments = {"donors": donors, "slides": slides, "patients": [f"p{s}" for s in slides.tolist()]}
    invariant = tissue[:, None].expand(-1, 5, -1)
    assert stain_margin(tissue, invariant, **arguments).value == pytest.approx(1)
    stained = 0.1 * tissue + stain[slides]
    follows = stain_margin(stained, 0.1 * tissue[:, None] + stain[donors], **arguments)
    assert follows.value < -0.8
    assert follows.details["worst_tenth"] <= follows.value


def test_the_battery_of_a_manifest(manifest: Path) -> None:
    def encoder(images: Tensor) -> Tensor:
        small = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4)
        return small.flatten(1)

    counted: list[int] = []
    measured = measure_free_labels(encoder, manifest, batch_size=16, on_batch=counted.append)
    held_out = Manifest.load(manifest).held_out
    assert sum(counted) == 2 * len(held_out)
    assert {
        "hematoxylin_skill",
        "gradient_4um_skill",
        "adjacency",
        "site_leakage",
        "stain_margin",
        "neighbor_leakage",
    } <= set(measured)
    for m in measured.values():
        assert math.isfinite(m.value) or m.reason
        assert m.n == len(held_out)
    assert places_of(Manifest.load(manifest)).centers.shape == (len(held_out), 2)


def test_the_command_prints_what_the_function_measures(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size, checkpoint = Manifest.load(manifest).size_px, tmp_path / "model.pth"
    torch.manual_seed(0)
    tiny = VisionTransformer(img_size=size, patch_size=16, embed_dim=64, depth=1, num_heads=1, num_classes=0)
    torch.save(tiny.state_dict(), checkpoint)
    with pytest.raises(SystemExit) as stop:
        cli.main(["free-labels", str(checkpoint), "--data", str(manifest), "--json"])
    assert not stop.value.code
    measured = json.loads(capsys.readouterr().out)
    expected = measure_free_labels(load_encoder(checkpoint), manifest)
    assert list(measured) == list(expected)
    for name, m in expected.items():
        assert measured[name]["value"] == (None if math.isnan(m.value) else pytest.approx(m.value, rel=1e-6))

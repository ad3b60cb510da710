from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.loss import KoLeoLoss
from small_dino import CROPS, SCHEDULES, fit, patches
from small_runs import LIGHTNING_NOISE
from timm.layers.pos_embed import resample_abs_pos_embed

from fmtrain.methods.backbone import Resampling, resample_positions
from fmtrain.methods.dino import DINO
from fmtrain.methods.dinov2 import DINOv2
from fmtrain.methods.losses import KDELoss, SinkhornPatchLoss, in_float32, sinkhorn
from fmtrain.methods.masking import batch_masks, block_mask
from repmetrics.encoders.checkpoint import load_encoder

pytestmark = [pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(**changes: Any) -> DINOv2:
    torch.manual_seed(0)
    arch_kwargs = {"img_size": 16, "patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2, "reg_tokens": 2}
    defaults: dict[str, Any] = {
        "arch": "vit_tiny_patch16_224", "arch_kwargs": arch_kwargs, "augment": CROPS, "schedules": SCHEDULES,
        "n_prototypes": 64, "hidden_dim": 48, "bottleneck_dim": 16, "drop_path_rate": 0.0,
    }  # fmt: skip
    return DINOv2(**(defaults | changes))


@pytest.mark.parametrize(
    ("centering", "ibot_prototypes", "regularizer", "ffn_layer"),
    [("centering", None, "koleo", "mlp"), ("sinkhorn_knopp", 32, "kde", "swiglu")],
)
def test_a_run_learns_all_its_parts(
    centering: str, ibot_prototypes: int | None, regularizer: str, ffn_layer: str, tmp_path: Path
) -> None:
    model = tiny(centering=centering, ibot_prototypes=ibot_prototypes, regularizer=regularizer, ffn_layer=ffn_layer)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = fit(model, steps=6)
    after = dict(model.named_parameters())
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert unchanged == set()  # the lengths of the prototypes and the teacher's mask token change too
    assert {"train/dino_loss", "train/ibot_loss", "train/spread_loss"} <= set(model.logged)

    trainer.save_checkpoint(tmp_path / "run.ckpt")
    images = patches(4, seed=3)[:, :, :16, :16]
    with torch.no_grad():
        assert torch.equal(load_encoder(tmp_path / "run.ckpt")(images), model(images))


# dinov2/configs/ssl_default_config.yaml and train/vitl14.yaml; an epoch has 1250 steps
PUBLISHED = {
    "n_prototypes": 65536, "bottleneck_dim": 256, "hidden_dim": 2048, "head_layers": 3, "ibot_prototypes": None,
    "ibot_bottleneck_dim": 256, "ibot_weight": 1.0, "mask_sample_probability": 0.5, "mask_ratio_min_max": (0.1, 0.5),
    "regularizer": "koleo", "regularizer_weight": 0.1, "centering": "centering", "drop_path_rate": 0.3,
    "masks_per_rank": True, "teacher_temp_per_epoch": False, "class_token_position": True, "ffn_layer": "mlp",
    "interpolate_offset": 0.1, "interpolate_antialias": False, "drop_path_uniform": True,
    "drop_path_subset": True, "layer_scale": 1e-5, "norm_last_layer": False,
    "freeze_last_layer_by": "lr", "layerwise_decay": 0.9,
    "patch_embed_lr_mult": 0.2, "clip_grad": 3.0, "student_temp": 0.1,
    "global_crops_size": 224, "global_crops_scale": (0.32, 1.0), "local_crops_size": 96,
    "local_crops_scale": (0.05, 0.32), "local_crops_number": 8,
    "lr": 4e-3, "scaling_rule": "sqrt", "lr_batch_size": 1024, "lr_warmup_steps": 12_500, "min_lr": 1e-6,
    "weight_decay": 0.04, "weight_decay_end": 0.4, "momentum_teacher": 0.992, "momentum_end": 1.0, "teacher_temp": 0.07,
    "warmup_teacher_temp": 0.04, "teacher_temp_warmup_steps": 37_500, "freeze_last_layer_steps": 1_250,
}  # fmt: skip
VITL14 = PUBLISHED | {
    "n_prototypes": 131072, "bottleneck_dim": 384, "ibot_prototypes": 131072, "centering": "sinkhorn_knopp",
    "drop_path_rate": 0.4, "layerwise_decay": 1.0, "lr": 2e-4, "lr_warmup_steps": 100_000, "weight_decay_end": 0.2,
    "momentum_teacher": 0.994, "local_crops_size": 98, "ffn_layer": "swiglu",
    "interpolate_offset": 0.0, "interpolate_antialias": True,  # as in the published networks with registers
    "regularizer": "kde", "regularizer_weight": 0.05,  # as in Virchow2
}  # fmt: skip


def test_the_defaults_are_the_published_ones() -> None:
    parameters = dict(inspect.signature(DINO).parameters) | dict(inspect.signature(DINOv2).parameters)
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    defaults |= vars(defaults["augment"]) | vars(defaults["schedules"])
    assert {name: defaults[name] for name in PUBLISHED} == PUBLISHED


def test_the_large_model_that_ships_is_the_published_long_recipe() -> None:
    config = yaml.safe_load((files("fmtrain") / "configs" / "dinov2-vitl14.yaml").read_text())
    args = config["model"]["init_args"]
    args = {**args, **args["augment"], **args["schedules"]}
    configured = {name: tuple(v) if isinstance(v := args.get(name, PUBLISHED[name]), list) else v for name in PUBLISHED}
    assert configured == VITL14
    trainer = config["trainer"]
    assert trainer["devices"] * trainer["num_nodes"] * config["data"]["batch_size"] == 1024
    assert trainer["max_steps"] == 500 * 1250


def test_drop_path_is_equal_in_all_blocks_or_increases() -> None:
    def rates(model: DINOv2) -> list[float]:
        blocks: Any = model.student.backbone.blocks
        return [getattr(path, "drop_prob", 0.0) for block in blocks for path in (block.drop_path1, block.drop_path2)]

    assert rates(tiny(drop_path_rate=0.3)) == [0.3] * 4
    assert rates(tiny(drop_path_rate=0.3, drop_path_uniform=False)) == pytest.approx([0, 0, 0.3, 0.3])


def test_dropped_samples_are_not_computed() -> None:
    model = tiny(drop_path_rate=0.4, layer_scale=None)
    block: Any = model.student.backbone.blocks[0]
    seen: list[int] = []
    block.attn.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    block.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    x = torch.randn((10, 5, 32), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with torch.no_grad():
        out = block(x)
        assert seen == [6, 6], "both branches, an exact share of the batch"
        torch.manual_seed(0)
        first, second = torch.randperm(10)[:6], torch.randperm(10)[:6]
        expected = x.clone()
        expected[first] += block.attn(block.norm1(x[first])) * 10 / 6
        expected[second] += block.mlp(block.norm2(expected[second])) * 10 / 6
        torch.testing.assert_close(out, expected)
        model.eval()
        whole = x + block.attn(block.norm1(x))
        torch.testing.assert_close(block(x), whole + block.mlp(block.norm2(whole)))
    low: Any = tiny(drop_path_rate=0.1).student.backbone.blocks[0]
    assert "forward" not in vars(low), "up to 0.1 every sample is dropped on its own, as in DINOv2"


def test_the_parts_start_as_published() -> None:
    model = tiny()
    parameters = dict(model.student.named_parameters())
    assert {float(v.detach().unique()) for k, v in parameters.items() if k.endswith(".gamma")} == {
        float(np.float32(1e-5))
    }
    assert not parameters["mask_token"].any()
    lengths = parameters["head.last_layer.parametrizations.weight.original0"]
    assert lengths.requires_grad
    assert torch.equal(lengths, torch.ones_like(lengths))


def test_prototypes_frozen_by_the_learning_rate_keep_the_optimizers_averages() -> None:
    model = tiny()
    before = {name: p.clone() for name, p in model.student.head.last_layer.named_parameters()}
    trainer = fit(model, steps=3)  # SCHEDULES freeze three steps
    state = trainer.optimizers[0].state
    for name, parameter in model.student.head.last_layer.named_parameters():
        assert torch.equal(parameter, before[name])
        assert int(state[parameter]["step"]) == 3
        assert state[parameter]["exp_avg"].any()
    fit(model, steps=5)
    assert not torch.equal(model.student.head.last_layer.parametrizations.weight.original0, torch.ones(64, 1))


@pytest.mark.parametrize("options", [{"class_token": False, "global_pool": "avg"}, {"global_pool": "avg"}])
def test_one_pooling_serves_all_crops_and_the_encoder(options: dict[str, Any]) -> None:
    arch_kwargs = {"img_size": 16, "patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2, **options}
    model = tiny(arch_kwargs=arch_kwargs)
    fit(model, steps=2)
    model.eval()
    images = torch.rand((4, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pooled, tokens = model.student.tokens(images, None)
        torch.testing.assert_close(pooled, model.student.backbone(images))
        assert tokens.shape == (4, 8, 8, 32)


def test_the_student_does_not_see_what_is_masked() -> None:
    model = tiny().eval()
    images = torch.rand((2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[0, 2:4, 2:4] = True
    other = images.clone()
    other[0, :, 4:8, 4:8] = 0.1  # the pixels of the masked tokens
    with torch.no_grad():
        for a, b in zip(model.student.tokens(images, mask), model.student.tokens(other, mask), strict=True):
            assert torch.equal(a, b)
        unmasked = model.student.tokens(images, None)[0], model.student.tokens(other, None)[0]
        assert not torch.equal(*unmasked)
        torch.testing.assert_close(model.teacher.tokens(images, None)[0], model.teacher.backbone(images))


def test_one_step_is_the_sum_of_its_parts() -> None:
    # without layer scale: the tokens would be almost equal at the start, and the distances rounding
    model = tiny(mask_sample_probability=1.0, ibot_weight=0.7, regularizer_weight=0.2, layer_scale=None)
    fit(model, steps=1)  # afterwards there is a trainer, at step 1
    model.on_train_batch_start(patches(6), 0)
    views = model.views(patches(6), 0)
    parts = model.losses(patches(6), views, 0)
    crops = model._normalize(views.global_crops.flatten(0, 1))
    mask = model.masks(crops, 0)
    with torch.no_grad():
        _, target_tokens = model.teacher.tokens(crops, None)
    cls, tokens = model.student.tokens(crops, mask)
    koleo = 0.0
    for view in F.normalize(cls, dim=-1).chunk(2):
        distance = torch.cdist(view, view) + torch.eye(6) * 9
        koleo -= 0.2 * float(distance.detach().amin(1).log().mean())
    assert float(parts["spread"].detach()) == pytest.approx(koleo, rel=1e-4)

    total = 0.0
    teacher, student = model.teacher.head(target_tokens).detach(), model.student.head(tokens).detach()
    used = (model.ibot.center.value - 0.1 * teacher[mask].mean(0)) / 0.9  # before the call updated it
    for image in range(12):
        each = [
            float(-(((teacher[image, y, x] - used[0]) / model.step_values.teacher_temp).softmax(-1)
                    * (student[image, y, x] / 0.1).log_softmax(-1)).sum())
            for y, x in mask[image].nonzero().tolist()
        ]  # fmt: skip
        total += sum(each) / max(len(each), 1)
    assert float(parts["ibot"].detach()) == pytest.approx(0.7 * total / 12, rel=1e-4)


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_a_batch_without_masks_has_no_masked_loss(centering: str) -> None:
    model = tiny(centering=centering, mask_sample_probability=0.0)
    fit(model, steps=2)
    assert float(model.logged["train/ibot_loss"]) == 0.0
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


def test_a_batch_of_one_patch_is_refused() -> None:
    model = tiny()
    fit(model, steps=1)
    with pytest.raises(ValueError, match="batch_size must be 2 or more"):
        model.losses(patches(1), model.views(patches(1), 0), 0)


def test_sinkhorn_patch_loss_is_its_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand((5, 4, 4), generator=generator) < 0.3
    mask[3] = False
    teacher, student = torch.randn((2, int(mask.sum()), 8), generator=generator)
    targets, row, total = sinkhorn(teacher, temperature=0.3), 0, 0.0
    for image in range(5):
        count = int(mask[image].sum())
        for _ in range(count):
            total -= float((targets[row] * (student[row] / 0.1).log_softmax(-1)).sum()) / count / 5
            row += 1
    value = SinkhornPatchLoss()(teacher, student, mask, teacher_temp=0.3)
    assert float(value) == pytest.approx(total, rel=1e-5)


def test_lightlys_koleo_is_the_papers_in_full_precision() -> None:
    x = torch.randn((24, 16), generator=torch.Generator().manual_seed(0))
    unit = F.normalize(x.double(), dim=-1)
    nearest = [min(float((a - b).norm()) for j, b in enumerate(unit) if j != i) for i, a in enumerate(unit)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = in_float32(KoLeoLoss(), x, device=x.device)
    assert float(value) == pytest.approx(-np.mean(np.log(nearest)), rel=1e-5)


def test_kde_is_its_loop_and_spreads_points() -> None:
    x = torch.randn((12, 4), generator=torch.Generator().manual_seed(0)) * 0.1 + 1
    unit = F.normalize(x.double(), dim=-1).numpy()
    loop = [
        math.log(np.mean([math.exp(5 * float(unit[i] @ unit[j])) for j in range(12) if j != i])) / 5 for i in range(12)
    ]
    assert float(KDELoss()(x)) == pytest.approx(np.mean(loop), rel=1e-5)
    assert float(KDELoss()(torch.ones(5, 3))) == pytest.approx(1.0)

    def mean_cosine(points: torch.Tensor) -> float:
        unit = F.normalize(points.detach(), dim=-1)
        return float((unit @ unit.T).fill_diagonal_(0).sum() / (12 * 11))

    for sign, direction in ((1, -1), (-1, 1)):  # OpenMidnight's sign collapses the points
        points = x.clone().requires_grad_()
        optimizer = torch.optim.SGD([points], lr=1.0)
        for _ in range(200):
            optimizer.zero_grad()
            (sign * KDELoss()(points)).backward()
            optimizer.step()
        assert direction * (mean_cosine(points) - mean_cosine(x)) > 0
    assert mean_cosine(points) > 0.999


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.tuples(st.integers(2, 20), st.integers(2, 20)), st.floats(0, 1))
def test_a_block_mask_never_exceeds_its_count(seed: int, grid: tuple[int, int], share: float) -> None:
    count = int(share * grid[0] * grid[1])
    mask = block_mask(np.random.default_rng(seed), grid=grid, count=count)
    assert mask.shape == grid
    assert mask.sum() <= count


def test_masks_cover_what_they_should_in_blocks() -> None:
    options: dict[str, Any] = {"total": 200, "grid": (14, 14), "probability": 0.5, "ratio": (0.1, 0.5), "seed": 1}
    masks = batch_masks(range(200), step=0, **options)
    shares = masks.mean((1, 2))
    assert (shares > 0).sum() == 100
    masked = np.sort(shares[shares > 0])
    np.testing.assert_allclose(masked, np.linspace(0.1, 0.5, 100), atol=0.03)  # a last block may not fit
    right = (masks[:, :, 1:] & masks[:, :, :-1]).sum() / masks[:, :, 1:].sum()
    assert right > 0.75  # a scattered mask of the same size would have 0.35
    assert not np.array_equal(masks, batch_masks(range(200), step=1, **options))
    for rank, world in itertools.product(range(2), (2,)):
        assert np.array_equal(batch_masks(range(rank, 200, world), step=0, **options), masks[rank::world])


def test_each_rank_masks_the_published_share_of_its_own_samples() -> None:
    options: dict[str, Any] = {"total": 20, "grid": (8, 8), "probability": 0.5, "ratio": (0.1, 0.5), "seed": 1}
    ranks = [batch_masks(range(20), step=0, rank=rank, **options) for rank in range(3)]
    assert [int(masks.any((1, 2)).sum()) for masks in ranks] == [10, 10, 10]
    assert not np.array_equal(ranks[0], ranks[1])
    assert not np.array_equal(ranks[1], ranks[2])
    assert np.array_equal(ranks[0], batch_masks(range(20), step=0, **options))


def test_positions_of_local_crops_start_with_the_published_spread() -> None:
    positions = torch.nn.init.trunc_normal_(torch.empty(1, 196, 512), std=0.02)
    published = resample_positions(positions, (14, 14), (6, 6), Resampling())
    assert published.shape == (1, 36, 512)
    assert float(published.std()) == pytest.approx(0.0173, abs=3e-4)
    with_registers = resample_positions(positions, (14, 14), (6, 6), Resampling(0.0, antialias=True))
    assert float(with_registers.std()) == pytest.approx(0.0073, abs=3e-4)
    timms = resample_abs_pos_embed(positions, [6, 6], [14, 14], num_prefix_tokens=0)
    torch.testing.assert_close(with_registers, timms)


def test_measured_features_have_timms_positions_and_training_crops_the_published() -> None:
    model = tiny(layer_scale=None).eval()
    images = torch.rand((2, 3, 8, 8), generator=torch.Generator().manual_seed(0))  # another size than the network's
    with torch.no_grad():
        before = model.teacher.backbone(images)
        trained = model.teacher.tokens(images, None)[0]
        torch.testing.assert_close(model.teacher.backbone(images), before, atol=0, rtol=0)
        torch.testing.assert_close(model.teacher(images), model.teacher.head(trained), atol=0, rtol=0)
        assert not torch.allclose(trained, before, atol=1e-4)

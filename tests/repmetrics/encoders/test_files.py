"""Checkpoints as trainers and hubs leave them: folders, shards, parts of ranks, wrapped names, unknown types."""

from __future__ import annotations

import datetime
import functools
import json
import pickle
from collections import UserDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import constants
from omegaconf import OmegaConf
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from repmetrics.encoders.checkpoint import load_encoder
from repmetrics.encoders.files import read_checkpoint_file
from repmetrics.encoders.safe_load import read_checkpoint
from repmetrics.scoring.checkpoints import find_checkpoints

TINY: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1, "num_classes": 0}


def vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return VisionTransformer(**TINY).eval()


def under(prefix: str, model: nn.Module) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in model.state_dict().items()}


@torch.no_grad()
def assert_same(path: Path, model: nn.Module, **options: Any) -> tuple[str, ...]:
    """The encoder at the path is the model; its notes."""
    encoder = load_encoder(path, **options)
    x = torch.rand(2, 3, 16, 16)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (encoder.mean, encoder.std))
    torch.testing.assert_close(encoder(x), model((x - mean) / std), rtol=1e-5, atol=1e-5)
    return encoder.notes


class Settings(dict[str, Any]):
    """A mapping that is not known, like those of mmengine, yacs and easydict."""


class Items(list[Any]):
    """A list that is not known."""


class Unsafe:
    """Sets a flag if it is constructed or filled."""

    ran = False

    def __init__(self) -> None:
        Unsafe.ran = True

    def __setstate__(self, state: Any) -> None:
        Unsafe.ran = True


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_unknown_types_become_placeholders_and_are_listed(tmp_path: Path, new: bool) -> None:
    model = vit()
    content: dict[str, Any] = {
        "state_dict": under("net.", model),
        "hyper_parameters": {
            "cfg": OmegaConf.create({"lr": 1e-3, "layers": [1, 2]}),
            "norm": functools.partial(nn.LayerNorm, eps=1e-6),
            "started": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
            "counts": defaultdict(list, {"a": [1]}),
            "settings": Settings(depth=3),
            "items": Items([1, 2]),
            "user": UserDict({"a": 1}),
            "unsafe": Unsafe(),
        },
    }
    if not new:  # this format stores the source code of networks, which is refused
        torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=False)
        with pytest.raises(ValueError, match="holds the source code of a class"):
            load_encoder(tmp_path / "a.ckpt")
        content["hyper_parameters"]["norm"] = functools.partial(dict, eps=1e-6)
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=new)
    Unsafe.ran = False
    notes = assert_same(tmp_path / "a.ckpt", model)
    assert not Unsafe.ran
    (listed,) = [note for note in notes if note.startswith("not read, and never called")]
    assert "omegaconf" in listed
    file = read_checkpoint_file(tmp_path / "a.ckpt")
    assert {"functools.partial", "datetime.datetime"} < set(file.placeholders)
    assert file.hyper_parameters["cfg"] == {"lr": 1e-3, "layers": [1, 2]}
    assert file.hyper_parameters["settings"] == {"depth": 3}
    assert file.hyper_parameters["counts"] == {"a": [1]}


def test_a_whole_pickled_network_gives_its_weights(tmp_path: Path) -> None:
    model = vit()
    torch.save({"model": model, "epoch": 3}, tmp_path / "model.pth")
    torch.save(model, tmp_path / "bare.pth")
    for name in ("model.pth", "bare.pth"):
        notes = assert_same(tmp_path / name, model)
        assert any("timm.models.vision_transformer.VisionTransformer" in note for note in notes)


class _Tensor:
    def __reduce__(self) -> Any:
        return Unsafe, ()


def test_an_object_in_the_place_of_a_weight_is_refused(tmp_path: Path) -> None:
    state: dict[str, Any] = dict(vit().state_dict())
    state["cls_token"] = Unsafe()
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"cls_token is a .*Unsafe, which is not read"):
        load_encoder(tmp_path / "a.pth")


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"])
def test_names_of_wrappers_are_taken_out(tmp_path: Path, wrapper: str) -> None:
    model = vit()
    state = {f"{wrapper}.{key}": value for key, value in model.state_dict().items()}
    state = {key.replace("blocks.1.", f"blocks.1.{wrapper}."): value for key, value in state.items()}
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    assert_same(tmp_path / "a.pth", model)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_distributed_checkpoint_is_assembled(tmp_path: Path) -> None:
    model = vit()
    content = {"model": under("teacher.backbone.", model) | under("student.backbone.", vit(1)), "iteration": 7}
    content["optimizer"] = {"state": torch.zeros(3)}
    folder = tmp_path / "runs" / "7"
    dcp.save(content, checkpoint_id=folder, no_dist=True)
    assert_same(folder, model)
    file = read_checkpoint_file(folder)
    assert (file.name, file.step) == ("7", 7)
    assert len(file.digests) >= 2
    assert not any("optim" in key for key in file.tensors)
    assert find_checkpoints([tmp_path / "runs"]) == [folder]
    (part,) = folder.glob("*.distcp")
    part.unlink()
    with pytest.raises(ValueError, match=f"lacks {part.name}"):
        load_encoder(folder)


def test_metadata_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Tensor()))
    Unsafe.ran = False
    with pytest.raises(ValueError, match="is not metadata"):
        load_encoder(tmp_path)
    assert not Unsafe.ran


def sharded(folder: Path, model: nn.Module, *, index: bool) -> list[Path]:
    items = list(model.state_dict().items())
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"model-{i + 1:05d}-of-00002.safetensors" for i in range(2)]
    for i, name in enumerate(names):
        save_file(dict(items[i::2]), folder / name)
    if index:
        places = {key: names[i % 2] for i, (key, _) in enumerate(items)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return [folder / name for name in names]


def test_shards_are_assembled_from_any_of_their_names(tmp_path: Path) -> None:
    model = vit()
    folder = tmp_path / "sharded"
    first, second = sharded(folder, model, index=True)
    for path in (first, second, folder, folder / "model.safetensors.index.json"):
        assert_same(path, model)
    assert find_checkpoints([tmp_path]) == [folder / "model.safetensors.index.json"]
    second.unlink()
    with pytest.raises(ValueError, match=r"one part of a checkpoint in 2 files, of which model-00002.* are not in"):
        load_encoder(first)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}}))
    with pytest.raises(ValueError, match="names a file outside of its folder"):
        load_encoder(folder)


def test_a_trainers_folder_is_one_checkpoint(tmp_path: Path) -> None:
    """transformers' Trainer leaves an optimizer and generators next to the weights, and the step in JSON."""
    for step in (500, 1000):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file(vit().state_dict(), folder / "model.safetensors")
        torch.save({"state": {}}, folder / "optimizer.pt")
        torch.save({"cpu": torch.zeros(3)}, folder / "rng_state.pth")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    folders = find_checkpoints([tmp_path])
    assert [path.parent.name for path in folders] == ["checkpoint-500", "checkpoint-1000"]
    assert load_encoder(folders[1]).step == 1000


def test_parts_of_ranks_are_refused_with_the_reason(tmp_path: Path) -> None:
    shells = {"module": {key: torch.empty(0) for key in vit().state_dict()}}
    torch.save(shells, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match=r"zero_to_fp32\.py"):
        load_encoder(tmp_path)
    torch.save({"model": {"_fsdp_wrapped_module._flat_param": torch.zeros(9)}}, tmp_path / "rank0.pth")
    with pytest.raises(ValueError, match="FSDP's flat piece of one rank"):
        load_encoder(tmp_path / "rank0.pth")


def test_a_deepspeed_folder_with_whole_weights_is_read(tmp_path: Path) -> None:
    model = vit()
    (tmp_path / "global_step9").mkdir()
    (tmp_path / "latest").write_text("global_step9")
    torch.save({"module": model.state_dict(), "global_steps": 9}, tmp_path / "global_step9/mp_rank_00_model_states.pt")
    assert_same(tmp_path, model)
    assert find_checkpoints([tmp_path]) == [tmp_path / "global_step9" / "mp_rank_00_model_states.pt"]


def lora(model: nn.Module, rank: int = 2) -> dict[str, Tensor]:
    state = {}
    for key, value in model.state_dict().items():
        stem = f"base_model.model.{key.removesuffix('.weight')}"
        if key.endswith("attn.qkv.weight"):
            state[f"{stem}.base_layer.weight"] = value
            state[f"{stem}.lora_A.default.weight"] = torch.randn(rank, value.shape[1])
            state[f"{stem}.lora_B.default.weight"] = torch.randn(value.shape[0], rank)
        else:
            state[f"base_model.model.{key}".replace("qkv.bias", "qkv.base_layer.bias")] = value
    return state


def test_lora_is_merged_with_its_base_or_refused(tmp_path: Path) -> None:
    model = vit()
    state = lora(model)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"whose scale is not in the file: put peft's adapter_config\.json"):
        load_encoder(tmp_path / "a.pth")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8}))
    for i, block in enumerate(model.blocks):  # type: ignore[arg-type]
        stem = f"base_model.model.blocks.{i}.attn.qkv.lora"
        block.attn.qkv.weight.data += 4 * state[f"{stem}_B.default.weight"] @ state[f"{stem}_A.default.weight"]
    assert_same(tmp_path / "a.pth", model)
    alone = {key: value for key, value in state.items() if "lora" in key}
    save_file(alone, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="without the weights that they change"):
        load_encoder(tmp_path / "adapter_model.safetensors")


def test_a_hub_that_is_out_of_reach_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("hf-hub:owner/name", "timm/vit_small_patch16_224.dino"):
        with pytest.raises(ValueError, match=r"has no model\.safetensors.*hf download"):
            load_encoder(Path(name))
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0"
    (tmp_path / "models--owner--name" / "refs").mkdir(parents=True)
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("0")
    sharded(snapshot, vit(), index=True)[1].unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of 2 shards .* such as model-00002-of-00002\.safetensors"):
        load_encoder(Path("hf-hub:owner/name"))


def test_video_and_beit_are_refused_in_words(tmp_path: Path) -> None:
    state = vit().state_dict()
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][:, :, None].repeat(1, 1, 2, 1, 1)
    torch.save({"target_encoder": state}, tmp_path / "vjepa.pt")
    with pytest.raises(ValueError, match="an encoder of videos other than V-JEPA 2"):
        load_encoder(tmp_path / "vjepa.pt")
    with pytest.raises(ValueError, match=r"an encoder of video: patch_embed\.proj\.weight covers 2 frames"):
        load_encoder(tmp_path / "vjepa.pt", arch="vit_tiny_patch16_224")


def test_arrays_in_old_and_new_files_are_read(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "when": datetime.date(2026, 1, 1)}, tmp_path / "a.pt")
    assert read_checkpoint(tmp_path / "a.pt")["a"].tolist() == [1, 1]

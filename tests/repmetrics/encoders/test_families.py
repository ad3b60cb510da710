"""The features of each published layout are those of its source model, in each way of reading it, at tiny sizes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from repmetrics.encoders.checkpoint import load_encoder

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "families.py"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("families", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["families"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


families = load_script()


@pytest.mark.filterwarnings("ignore")  # transformers warns about its own defaults
@pytest.mark.parametrize("name", families.FAMILIES)
def test_features_are_those_of_the_source(tmp_path: Path, name: str) -> None:
    if name.startswith("transformers") or "V-JEPA" in name:
        pytest.importorskip("transformers", reason="the source model")
    found = families.differences(families.FAMILIES[name](), tmp_path)
    measured = {way: value for way, value in found.items() if value is not None}
    assert {"weights alone", "folder", "hub id"} <= measured.keys()
    # attention is computed by other kernels, and a registers' class token is a sum: equal to rounding
    assert max(measured.values()) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_what_is_loaded_under_other_names_is_not_listed_as_left_aside(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the source model")
    source = families.FAMILIES["transformers ViT"]()
    extra = {"vit.pooler.dense.weight": torch.zeros(2, 2), "decoder.weight": torch.zeros(2, 2)}
    save_file({f"vit.{key}": value for key, value in source.weights.items()} | extra, tmp_path / "a.safetensors")
    notes = load_encoder(tmp_path / "a.safetensors", arch_kwargs={"num_heads": 2}).notes
    assert [note for note in notes if note.startswith("left aside")] == ["left aside: decoder, vit.pooler"]


@pytest.mark.filterwarnings("ignore")
def test_an_encoder_of_videos_with_positions_for_frames_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the source model")
    source = families.FAMILIES["V-JEPA 2"]()
    torch.save({"target_encoder": {**source.weights, "pos_embed": torch.zeros(1, 8 * 16, 80)}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="an encoder of videos other than V-JEPA 2"):
        load_encoder(tmp_path / "a.pt", **source.options)
    torch.save({"target_encoder": dict(source.weights)}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="a ViT of width 80 may have"):
        load_encoder(tmp_path / "b.pt")

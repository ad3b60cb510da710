"""Export of a checkpoint's encoder in a format that timm and others read, with a model card."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from timm.layers.mlp import SwiGLUPacked
from torch import nn

from fmtrain.training.checkpoints import DATA
from fmtrain.version import code_version
from repmetrics.encoders.checkpoint import load_encoder
from repmetrics.encoders.encoder import Encoder
from repmetrics.encoders.files import hyper_parameters
from repmetrics.encoders.safe_load import read_checkpoint
from repmetrics.measurement.result import format_value
from repmetrics.monitoring.record import read_jsonl

Form = Literal["timm", "safetensors"]
# Classes that arguments of timm's ViTs may be, which JSON cannot hold; readers here infer them from the weights.
CLASSES: dict[Any, str] = {SwiGLUPacked: "timm.layers.SwiGLUPacked", nn.SiLU: "torch.nn.SiLU"}


def exportable_encoder(
    checkpoint: Path, *, image_size: int | None = None, classes: bool = True, **options: Any
) -> Encoder:
    """Encoder that timm can build by name.

    Args:
        checkpoint: Any checkpoint that states its architecture, or whose architecture is among the options.
        image_size: Side of the images in pixels, instead of the encoder's.
        classes: Whether arguments may be classes, as for SwiGLU; the model card then gives the call.
        options: Arguments of :func:`load_encoder`.

    Raises:
        ValueError: The architecture has no name in timm, arguments that JSON cannot hold, or a pooling that timm lacks.
    """
    encoder = load_encoder(checkpoint, **options)
    if encoder.arch_kwargs is None:
        raise ValueError(f"{checkpoint.name} does not state its architecture, which timm builds by name: pass --arch")
    known = CLASSES if classes else {}
    if unknown := [key for key, value in encoder.arch_kwargs.items() if callable(value) and value not in known]:
        raise ValueError(
            f"{checkpoint.name}: these weights need classes for {', '.join(unknown)} of {encoder.arch}, which "
            "config.json cannot hold: name a timm architecture that has them with --arch"
        )
    if encoder.pooler is not None:
        raise ValueError(f"{checkpoint.name} has CONCH's pooling, which timm lacks: it cannot be exported")
    encoder.image_size = image_size or encoder.image_size
    return encoder


def export_encoder(encoder: Encoder, checkpoint: Path, out: Path, *, to: Form) -> list[Path]:
    """Write the network's weights, a config.json that timm and :func:`load_encoder` read, and a README.

    Args:
        encoder: From `exportable_encoder`.
        checkpoint: File of the encoder, for the model card.
        out: Folder for the files.
        to: "safetensors", or "timm" for a plain state dict.
    """
    state = {name: value.contiguous() for name, value in encoder.model.state_dict().items()}
    weights = "model.safetensors" if to == "safetensors" else "weights.pth"
    texts = {
        "config.json": json.dumps(config(encoder), indent=2) + "\n",
        "README.md": model_card(checkpoint, encoder, weights=weights),
    }
    draft = out.with_name(f"{out.name}.part")
    shutil.rmtree(draft, ignore_errors=True)  # left by a call that was killed
    draft.mkdir(parents=True)
    try:
        if to == "safetensors":
            safetensors.torch.save_file(state, draft / weights, metadata={"format": "pt"})
        else:
            torch.save(state, draft / weights)
        for name, text in texts.items():
            (draft / name).write_text(text, encoding="utf-8")
        draft.replace(out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return [out / weights, *(out / name for name in texts)]


def config(encoder: Encoder) -> dict[str, Any]:
    """Configuration that a loader needs with the weights, in the format of timm's hub."""
    model: Any = encoder.model
    heads = {"num_attention_heads": int(model.blocks[0].attn.num_heads)} if hasattr(model, "blocks") else {}
    return {
        "architecture": encoder.arch,
        "model_args": {key: value for key, value in (encoder.arch_kwargs or {}).items() if not callable(value)},
        "num_classes": 0,
        "num_features": int(model.num_features),
        **heads,
        "pretrained_cfg": {
            "mean": list(encoder.mean),
            "std": list(encoder.std),
            "input_size": [3, encoder.image_size, encoder.image_size],
        },
    }


def _timm_call(encoder: Encoder) -> list[str]:
    """The call that builds the network, where its arguments are more than config.json can hold."""
    kwargs = dict(encoder.arch_kwargs or {})
    if not any(map(callable, kwargs.values())):
        return []
    arguments = [f"{key}={CLASSES.get(value) if callable(value) else repr(value)}" for key, value in kwargs.items()]
    return [f"Build with: `timm.create_model({encoder.arch!r}, num_classes=0, {', '.join(arguments)})`."]


def model_card(checkpoint: Path, encoder: Encoder, *, weights: str) -> str:
    """Model card: code, last measurements, data and recipe."""
    run = checkpoint.resolve().parent.parent
    recipe, measured = run / "config.yaml", run / "measurements.jsonl"
    content: Any = read_checkpoint(checkpoint) if checkpoint.is_file() else {}
    hparams = hyper_parameters(content)
    trained_with = f"fmtrain {hparams['code']}" if "code" in hparams else "not stated"
    data: Mapping[str, Any] = (content.get(DATA) if isinstance(content, Mapping) else None) or {}
    lines = [
        f"# {encoder.arch}" + ("" if encoder.step is None else f", step {encoder.step}"),
        "",
        f"`{weights}` holds the backbone of `{encoder.source}`, in timm's names.",
        f"Input: RGB in 0…1, mean {list(encoder.mean)}, std {list(encoder.std)}, {encoder.image_size} px.",
        *_timm_call(encoder),
        "Output: the class token after the last norm; without a class token, the architecture's pooled features.",
        "",
        *(f"- {note}" for note in encoder.notes),
        "",
        f"Trained with: {trained_with}. Exported with: fmtrain {code_version()}. Not evaluated for any clinical use.",
        "",
        "## Last measurements",
        "",
    ]
    rows = [row for row in read_jsonl(measured) if row["step"] <= (encoder.step or 0)] if measured.is_file() else []
    if rows:
        lines += [f"At step {rows[-1]['step']}, on the held-out patches:", "", "| | value ± standard error | N |"]
        lines += ["|---|---|---|"]
        for name, m in rows[-1]["measurements"].items():
            value = math.nan if m["value"] is None else m["value"]
            lines.append(f"| {name} | {format_value(value, m['standard_error'])} | {m['n']} |")
    else:
        lines.append("No measurements.jsonl in the folder of the run.")
    lines += ["", "## Data", ""]
    for name, value in data.items():  # a mapping holds the names of the quarantined slides
        lines.append(f"- {name}: {(', '.join(value) or 'none') if isinstance(value, Mapping) else value}")
    if not data:
        lines.append("The checkpoint does not state its data.")
    lines += ["", "## Recipe", ""]
    if recipe.is_file():
        lines += ["```yaml", recipe.read_text(encoding="utf-8").rstrip(), "```"]
    else:
        lines.append("No config.yaml in the folder of the run.")
    return "\n".join(lines) + "\n"

"""A run's checkpoint → the encoder alone, in a form others read, with a card that says where it comes from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch

from fmtrain.training.checkpoints import DATA
from fmtrain.version import code_version
from repmetrics.encoders.checkpoint import Encoder, load_encoder
from repmetrics.encoders.safe_load import read_checkpoint
from repmetrics.monitoring.record import read_jsonl

Form = Literal["timm", "safetensors"]


def export_encoder(checkpoint: Path, out: Path, *, to: Form, arch: str | None = None) -> list[Path]:
    """Write the teacher's backbone, a config.json that timm's and our own loaders read, and a README.

    Args:
        checkpoint: Of a run; the code and the data that it states, and its folder's config.yaml and measurements.jsonl,
            go into the card, where there.
        out: A new or empty folder.
        arch: Of a checkpoint that states none.
        to: "timm": weights.pth, a plain state dict. "safetensors": model.safetensors.

    Returns:
        The files.
    """
    encoder = load_encoder(checkpoint, arch=arch)
    state = {name: value.contiguous() for name, value in encoder.model.state_dict().items()}
    weights = "model.safetensors" if to == "safetensors" else "weights.pth"
    texts = {
        "config.json": json.dumps(config(encoder, checkpoint), indent=2) + "\n",
        "README.md": model_card(checkpoint, encoder, weights=weights),
    }
    draft = out.with_name(f"{out.name}.part")
    shutil.rmtree(draft, ignore_errors=True)  # of an earlier call that was killed
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


def config(encoder: Encoder, checkpoint: Path) -> dict[str, Any]:
    """What a loader must know beside the weights, in the words of timm's hub.

    Raises:
        ValueError: The architecture is known by its shapes only.
    """
    if encoder.arch_kwargs is None:
        raise ValueError(f"{checkpoint.name} does not state its architecture, which timm builds by name: pass --arch")
    model: Any = encoder.model
    heads = {"num_attention_heads": int(model.blocks[0].attn.num_heads)} if hasattr(model, "blocks") else {}
    return {
        "architecture": encoder.arch,
        "model_args": dict(encoder.arch_kwargs),
        "num_classes": 0,
        "num_features": int(model.num_features),
        **heads,
        "pretrained_cfg": {
            "mean": list(encoder.mean),
            "std": list(encoder.std),
            "input_size": [3, encoder.image_size, encoder.image_size],
        },
    }


def model_card(checkpoint: Path, encoder: Encoder, *, weights: str) -> str:
    """The model card: data, recipe, code, last measurements."""
    run = checkpoint.resolve().parent.parent
    recipe, measured = run / "config.yaml", run / "measurements.jsonl"
    content: Any = read_checkpoint(checkpoint)
    stated: Any = content.get("hyper_parameters") if isinstance(content, Mapping) else None
    trained_with = f"fmtrain {stated['code']}" if isinstance(stated, Mapping) and "code" in stated else "not stated"
    data: Mapping[str, Any] = (content.get(DATA) if isinstance(content, Mapping) else None) or {}
    lines = [
        f"# {encoder.arch}" + ("" if encoder.step is None else f", step {encoder.step}"),
        "",
        f"`{weights}` holds the backbone of `{encoder.source}`, in timm's names.",
        f"Input: RGB in 0…1, mean {list(encoder.mean)}, std {list(encoder.std)}, {encoder.image_size} px.",
        "Output: the class token after the last norm, or what the architecture pools to where it has none.",
        "",
        f"Trained with: {trained_with}. Exported with: fmtrain {code_version()}. Not evaluated for any clinical use.",
        "",
        "## Last measurements",
        "",
    ]
    rows = [row for row in read_jsonl(measured) if row["step"] <= (encoder.step or 0)] if measured.is_file() else []
    if rows:
        lines += [f"At step {rows[-1]['step']}, on the held-out patches:", "", "| | value | standard error | N |"]
        lines += ["|---|---|---|---|"]
        for name, m in rows[-1]["measurements"].items():
            error = "–" if m["standard_error"] is None else f"{m['standard_error']:.3g}"
            lines.append(
                f"| {name} | {'–' if m['value'] is None else format(m['value'], '.5g')} | {error} | {m['n']} |"
            )
    else:
        lines.append("None were found beside the checkpoint.")
    lines += ["", "## Data", ""]
    for name, value in data.items():  # a mapping: of names, the quarantined slides'
        lines.append(f"- {name}: {(', '.join(value) or 'none') if isinstance(value, Mapping) else value}")
    if not data:
        lines.append("The checkpoint states none.")
    lines += ["", "## Recipe", ""]
    if recipe.is_file():
        lines += ["```yaml", recipe.read_text(encoding="utf-8").rstrip(), "```"]
    else:
        lines.append("No config.yaml was found beside the checkpoint.")
    return "\n".join(lines) + "\n"

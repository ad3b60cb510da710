"""Any checkpoint file → an encoder, or one sentence about why not."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
from torch import Tensor, nn

from repmetrics.encoders.architecture import (
    HEADS,
    SIGNATURES,
    InferredModel,
    StateDict,
    build,
    infer,
    pos_embed_grid,
    to_timm,
)
from repmetrics.encoders.preprocessing import IMAGENET_MEAN, IMAGENET_STD, normalize
from repmetrics.encoders.safe_load import flatten, join_first, read_checkpoint

BRANCH_WORDS = {
    "teacher": re.compile(r"(^|[._])(teacher|ema|momentum|target)([._]|$)"),
    "student": re.compile(r"(^|[._])(student|online)([._]|$)"),
}
SIDECARS = ("config.json", "preprocessor_config.json")
Branch = Literal["teacher", "student"]


class Encoder(nn.Module):
    """Frozen weights with their preprocessing: images (B, 3, H, W), uint8 or float in 0…1 → features (B, D).

    The features are the class token after the final norm where the model has one, its own pooling otherwise.

    Attributes:
        model: the timm model, in eval mode.
        arch: what it is, as timm says it.
        image_size: the side in pixels that images should have.
        mean, std: per channel, on the scale 0…1.
        source: the file and the prefix of the weights in it.
        notes: what was inferred, assumed or left aside.
        step: the training step the file states, if any.
        arch_kwargs: with `arch`, what ``timm.create_model`` takes; None where the shapes told the architecture.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        arch: str,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        source: str,
        notes: tuple[str, ...] = (),
        step: int | None = None,
        arch_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.arch = arch
        self.image_size = image_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.source = source
        self.notes = notes
        self.step = step
        self.arch_kwargs = arch_kwargs
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) → features (B, D): normalise, then the model."""
        patch_embed: Any = getattr(self.model, "patch_embed", None)
        if getattr(patch_embed, "strict_img_size", False) and images.shape[-2:] != patch_embed.img_size:
            raise ValueError(
                f"{self.arch} takes images of {patch_embed.img_size}, got {tuple(images.shape[-2:])}: pass --image-size"
            )
        features: Tensor = self.model(normalize(images, mean=self.mean, std=self.std))
        return features


def load_encoder(
    path: Path,
    *,
    arch: str | None = None,
    arch_kwargs: Mapping[str, Any] | None = None,
    prefix: str | None = None,
    branch: Branch = "teacher",
) -> Encoder:
    """Load the encoder in a checkpoint, with every weight accounted for.

    The weights are found by what they are called and identified by their shapes: the teacher (or EMA) before
    others, heads left aside, chunked, registered and Hugging Face layouts brought to timm's names. Loading is
    strict: a weight missing or left over is an error that lists it.

    Args:
        path: fmtrain's or any Lightning .ckpt, facebookresearch's DINO and DINOv2, timm's, Hugging Face's ViT
            and Dinov2, torchvision's ResNets; PyTorch files and .safetensors.
        arch: a timm architecture, instead of inferring it.
        arch_kwargs: arguments for that architecture, or corrections to what is inferred ("num_heads").
        prefix: where in the file the encoder's weights stand ("teacher.backbone"), instead of finding it.
        branch: which of two networks.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no checkpoint, is unsafe, does not fit, or is ambiguous; the message says what to do.
    """
    content = read_checkpoint(path)
    tensors = flatten(content)
    if not tensors or not isinstance(content, Mapping):
        raise ValueError(f"{path.name} holds no weights: found {_summary(content)}")
    stated = _hyper_parameters(content)
    side = _sidecars(path)
    notes: list[str] = []
    if arch is None and stated:
        arch, arch_kwargs = stated["arch"], {**stated.get("arch_kwargs", {}), **(arch_kwargs or {})}
    elif arch is None and timm.is_model(str(side.get("architecture"))):
        arch, arch_kwargs = side["architecture"], {**side.get("model_args", {}), **(arch_kwargs or {})}
    if arch is None:
        root = find_prefix(list(tensors), prefix=prefix, branch=branch, notes=notes)
        state = backbone_state(tensors, root=root)
        layout = _layout_overrides(tensors, root)
        network = infer(state, overrides={**layout, **_config_overrides(side), **(arch_kwargs or {})})
        notes.extend((f"architecture inferred from the shapes: {network.name}", *network.notes))
    else:
        network, root, state = _load_named(arch, arch_kwargs or {}, tensors, prefix, branch, notes)
    if narrow := sorted({str(t.dtype) for k, t in tensors.items() if k.startswith(root) and is_half_precision(t)}):
        notes.append(f"weights stored as {', '.join(narrow).replace('torch.', '')}, used as float32")
    _load_strictly(network, state, where=f"{path.name} ({root.rstrip('.') or 'top level'})")
    mean, std = _preprocessing(stated, side, network.model if arch else None, notes)
    return Encoder(
        network.model,
        arch=network.name,
        image_size=int(stated.get("image_size", network.image_size)),
        mean=mean,
        std=std,
        source=f"{path.name}:{shown}" if (shown := root.removeprefix("state_dict.").rstrip(".")) else path.name,
        notes=tuple(notes),
        step=_step(content),
        arch_kwargs=network.kwargs,
    )


def find_prefix(
    keys: Sequence[str],
    *,
    signature: Sequence[str] = tuple(SIGNATURES.values()),
    prefix: str | None = None,
    branch: Branch = "teacher",
    notes: list[str] | None = None,
) -> str:
    """The prefix, with its dot, under which the encoder's weights stand.

    Example:
        >>> find_prefix(["student.backbone.patch_embed.proj.weight", "teacher.backbone.patch_embed.proj.weight"])
        'teacher.backbone.'

    Raises:
        ValueError: none, or several equally good ones, which are listed.
    """
    roots = sorted({key[: -len(s)] for key in keys for s in signature if key == s or key.endswith("." + s)})
    if prefix is not None:
        wanted = prefix.rstrip(".") + "." if prefix.strip(".") else ""
        roots = [root for root in roots if root == wanted or root.endswith("." + wanted)] if wanted else [""]
    if not roots:
        where = f"under the prefix {prefix!r}" if prefix else "in it"
        raise ValueError(
            f"no encoder {where}: none of {', '.join(signature)} among {len(keys)} weights such as "
            f"{', '.join(list(keys)[:3])}; name the architecture with --arch and its place with --prefix"
        )
    other: Branch = "student" if branch == "teacher" else "teacher"
    chosen = [root for root in roots if BRANCH_WORDS[branch].search(root)]
    neutral = [root for root in roots if not any(words.search(root) for words in BRANCH_WORDS.values())]
    best = chosen or neutral or roots
    if len(best) > 1:
        listed = ", ".join(repr(root.rstrip(".")) for root in best)
        raise ValueError(f"several encoders: {listed}; choose one with --prefix")
    if notes is not None and BRANCH_WORDS[other].search(best[0]):
        notes.append(f"no {branch} in the file: this is the {other}")
    return best[0]


def backbone_state(tensors: Mapping[str, Tensor], *, root: str) -> StateDict:
    """The weights under `root`, in timm's names and float32, other encoders nested there left aside."""
    inner = {key[len(root) :]: value for key, value in tensors.items() if key.startswith(root)}
    nested = {
        key[: -len(s)] for key in inner for s in SIGNATURES.values() if key.endswith("." + s)
    }  # e.g. an EMA copy inside the module
    kept = {
        key: value.float() if value.is_floating_point() else value
        for key, value in inner.items()
        if not any(key.startswith(other) for other in nested)
    }
    return to_timm(kept)


def _load_named(
    arch: str,
    kwargs: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    prefix: str | None,
    branch: Branch,
    notes: list[str],
) -> tuple[InferredModel, str, StateDict]:
    """An architecture the user or the file names, and its weights."""
    if not timm.is_model(arch):
        close = get_close_matches(arch, timm.list_models(), n=3)
        raise ValueError(
            f"timm has no architecture {arch!r}" + (f": did you mean {', '.join(close)}?" if close else "")
        )
    network = build(arch, kwargs=kwargs)
    own = list(network.model.state_dict())
    known = [s for s in SIGNATURES.values() if s in own]
    signature = [*known, SIGNATURES["hf"]] if known else [own[0]]
    root = find_prefix(list(tensors), signature=signature, prefix=prefix, branch=branch, notes=notes)
    state = backbone_state(tensors, root=root)
    positions = getattr(network.model, "pos_embed", None)
    if "pos_embed" in state and positions is not None and state["pos_embed"].shape != positions.shape:
        size = pos_embed_grid(state)[0] * state["patch_embed.proj.weight"].shape[-1]
        if "img_size" not in kwargs:
            network = build(arch, kwargs={**kwargs, "img_size": size})
            notes.append(f"positions are for {size} px, not {arch}'s own size")
    return network, root, state


def _load_strictly(network: InferredModel, state: StateDict, *, where: str) -> None:
    """Load every weight or raise; only heads, which this network was built without, may be left over."""
    own = network.model.state_dict()
    state = {key: value for key, value in state.items() if key in own or not HEADS.match(key)}
    faults = {
        "missing": [key for key in own if key not in state],
        "left over": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the model"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ],
    }
    if any(faults.values()):
        told = "; ".join(f"{len(keys)} {what}: {join_first(keys)}" for what, keys in faults.items() if keys)
        raise ValueError(f"{network.name} does not fit {where}: {told}")
    network.model.load_state_dict(state, strict=True)


def is_half_precision(tensor: Tensor) -> bool:
    """A floating type of less than 32 bits."""
    return tensor.is_floating_point() and tensor.element_size() < 4


def _hyper_parameters(content: Any) -> dict[str, Any]:
    """What fmtrain's checkpoints state about their encoder; empty for files of others."""
    stated = content.get("hyper_parameters") if isinstance(content, Mapping) else None
    if not isinstance(stated, Mapping) or not isinstance(stated.get("arch"), str) or not timm.is_model(stated["arch"]):
        return {}
    return dict(stated)


def _step(content: Any) -> int | None:
    for key in ("global_step", "iteration", "step"):
        value = content.get(key) if isinstance(content, Mapping) else None
        if isinstance(value, int):
            return value
    return None


def _sidecars(path: Path) -> dict[str, Any]:
    """The JSON that the hubs of timm and Hugging Face keep beside the weights."""
    side: dict[str, Any] = {}
    for name in SIDECARS:
        file = path.with_name(name)
        if file.is_file():
            try:
                content = json.loads(file.read_text())
            except ValueError as error:
                raise ValueError(f"{file} is not JSON: {error}") from error
            side |= content if isinstance(content, dict) else {}
    return side


def _layout_overrides(tensors: Mapping[str, Tensor], root: str) -> dict[str, Any]:
    """Transformers' ViT, unlike its Dinov2 and everybody else's ViT, norms with an epsilon of 1e-12."""
    is_vit = f"{root}{SIGNATURES['hf']}" in tensors and not any(".layer_scale1." in key for key in tensors)
    return {"norm_layer": partial(nn.LayerNorm, eps=1e-12)} if is_vit else {}


def _config_overrides(side: Mapping[str, Any]) -> dict[str, Any]:
    """What a Hugging Face configuration says that shapes do not."""
    told: dict[str, Any] = {}
    if isinstance(side.get("num_attention_heads"), int):
        told["num_heads"] = side["num_attention_heads"]
    if isinstance(side.get("layer_norm_eps"), float):
        told["norm_layer"] = partial(nn.LayerNorm, eps=side["layer_norm_eps"])
    return told


def _preprocessing(
    stated: Mapping[str, Any], side: Mapping[str, Any], named: nn.Module | None, notes: list[str]
) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation: stated in the file, beside it, by timm for the architecture, or ImageNet's."""
    cfg = side.get("pretrained_cfg", side)
    own = getattr(named, "default_cfg", None) or {}
    for mean, std in (
        (stated.get("mean"), stated.get("std")),
        (cfg.get("mean"), cfg.get("std")),
        (cfg.get("image_mean"), cfg.get("image_std")),
        (own.get("mean"), own.get("std")),
    ):
        if mean is not None and std is not None:
            return mean, std
    notes.append("mean and std are not in the file: ImageNet's assumed; pass --mean and --std if it was others")
    return IMAGENET_MEAN, IMAGENET_STD


def _summary(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"a mapping with {join_first([str(key) for key in content])}" if content else "an empty mapping"
    return f"a {type(content).__name__}"

"""Load the encoder in a checkpoint file: read the file, identify the encoder, build it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
from torch import Tensor, nn

from repmetrics.encoders.architecture import (
    HEADS,
    SIGNATURES,
    Architecture,
    StateDict,
    infer,
    pos_embed_grid,
    timm_architecture,
    to_timm,
)
from repmetrics.encoders.preprocessing import IMAGENET_MEAN, IMAGENET_STD, normalize
from repmetrics.encoders.safe_load import flatten, join_first, read_open_checkpoint

BRANCH_WORDS = {
    "teacher": re.compile(r"(^|[._])(teacher|ema|momentum|target)([._]|$)"),
    "student": re.compile(r"(^|[._])(student|online)([._]|$)"),
}
SIDECARS = ("config.json", "preprocessor_config.json")
Branch = Literal["teacher", "student"]


class CheckpointFile(NamedTuple):
    """Content of a checkpoint file and of the JSON files in the same folder.

    Attributes:
        name: Name of the file.
        tensors: Every tensor in the file by its dotted path.
        hyper_parameters: Hyper-parameters recorded in the file.
        config: Merged content of the JSON files.
        step: Training step recorded in the file, if any.
        digests: SHA-256 of each file; empty if not requested.
    """

    name: str
    tensors: StateDict
    hyper_parameters: Mapping[str, Any]
    config: Mapping[str, Any]
    step: int | None
    digests: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class IdentifiedEncoder:
    """An encoder in a checkpoint file, before its network is built.

    Attributes:
        file: Name of the file.
        prefix: Prefix of the weights in the file, with its dot.
        state: Weights in timm's names and float32.
        architecture: Architecture that the weights belong to.
        image_size: Side of the images in pixels.
        mean, std: Normalization per channel, on the scale 0…1.
        notes: What was inferred, assumed or ignored.
        step: Training step recorded in the file, if any.
        inputs: Digests and arguments that determine all of this; None if the file was read without digests.
    """

    file: str
    prefix: str
    state: StateDict
    architecture: Architecture
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...]
    step: int | None
    inputs: tuple[str, ...] | None

    @property
    def arch(self) -> str:
        """Name of the architecture."""
        return self.architecture.name

    @property
    def source(self) -> str:
        """Name of the file, and prefix of the weights in it."""
        prefix = self.prefix.removeprefix("state_dict.").rstrip(".")
        return f"{self.file}:{prefix}" if prefix else self.file

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder, built at first use."""
        return build(self)


class Encoder(nn.Module):
    """Frozen weights with their preprocessing: images (B, 3, H, W), uint8 or float in 0…1 → features (B, D).

    The features are the class token after the final norm if the model has one, else its own pooling.

    Attributes:
        model: Model of timm, in eval mode.
        arch: Name of the architecture.
        arch_kwargs: Arguments of ``timm.create_model`` beside `arch`; None if inferred from shapes.
        image_size, mean, std, source, notes, step: As in `IdentifiedEncoder`.
    """

    def __init__(self, model: nn.Module, identified: IdentifiedEncoder) -> None:
        super().__init__()
        self.model = model
        self.arch, self.arch_kwargs = identified.arch, identified.architecture.kwargs
        self.image_size, self.mean, self.std = identified.image_size, identified.mean, identified.std
        self.source, self.notes, self.step = identified.source, identified.notes, identified.step
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalize images (B, 3, H, W) and apply the model: features (B, D)."""
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

    The weights are found by their names and identified by their shapes. The teacher (or EMA) is preferred to other
    networks. Heads are ignored. Chunked, registered and Hugging Face layouts are converted to timm's names. Loading is
    strict: a weight missing or left over is an error that lists it.

    Args:
        path: Checkpoint: fmtrain's or any Lightning .ckpt, facebookresearch's DINO and DINOv2, timm's, Hugging Face's
            ViT and Dinov2, torchvision's ResNets; PyTorch files and .safetensors.
        arch: Name of a timm architecture. Default: inferred.
        arch_kwargs: Arguments of that architecture, or corrections to what is inferred ("num_heads").
        prefix: Prefix of the encoder's weights in the file ("teacher.backbone"). Default: found by name.
        branch: Network to load from a file that contains both.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a checkpoint, is unsafe, does not fit, or is ambiguous; the message says what to do.
    """
    file = read_checkpoint_file(path, digests=False)
    return build(identify(file, arch=arch, arch_kwargs=arch_kwargs, prefix=prefix, branch=branch))


def read_checkpoint_file(path: Path, *, digests: bool = True) -> CheckpointFile:
    """Read a checkpoint file, and the JSON that the hubs of timm and Hugging Face put into the same folder.

    Each file is opened once, so that its digest belongs to its weights even if the file is replaced meanwhile.

    Args:
        path: Checkpoint.
        digests: Compute the digests of the files, for cache keys.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a checkpoint, is unsafe, contains no weights, or is written while it is read.
    """
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        hashes = [hashlib.file_digest(file, "sha256").hexdigest()] if digests else []
        content = read_open_checkpoint(file, name=path.name)
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ValueError(f"{path.name} changed while it was read: wait until it is written")
    tensors = flatten(content)
    if not tensors or not isinstance(content, Mapping):
        raise ValueError(f"{path.name} holds no weights: found {_summary(content)}")
    config: dict[str, Any] = {}
    for sidecar in (path.with_name(name) for name in SIDECARS):
        if sidecar.is_file():
            text = sidecar.read_bytes()
            hashes += [hashlib.sha256(text).hexdigest()] if digests else []
            try:
                values = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{sidecar} is not JSON: {error}") from error
            config |= values if isinstance(values, dict) else {}
    steps = (content.get(key) for key in ("global_step", "iteration", "step"))
    step = next((value for value in steps if isinstance(value, int)), None)
    return CheckpointFile(path.name, tensors, hyper_parameters(content), config, step, tuple(hashes))


def hyper_parameters(content: Any) -> dict[str, Any]:
    """Hyper-parameters that Lightning stored in a checkpoint; empty if it has none."""
    values = content.get("hyper_parameters") if isinstance(content, Mapping) else None
    return dict(values) if isinstance(values, Mapping) else {}


def identify(
    file: CheckpointFile,
    *,
    arch: str | None = None,
    arch_kwargs: Mapping[str, Any] | None = None,
    prefix: str | None = None,
    branch: Branch = "teacher",
) -> IdentifiedEncoder:
    """Find the encoder's weights in a file, their architecture and their preprocessing, without building the network.

    The arguments are those of `load_encoder`.

    Raises:
        ValueError: The encoder is ambiguous, unknown, or does not fit its architecture; the message says what to do.
    """
    inputs = (*file.digests, repr((arch, dict(arch_kwargs or {}), prefix, branch))) if file.digests else None
    hparams = file.hyper_parameters if _is_timm_name(file.hyper_parameters.get("arch")) else {}
    if arch is None and hparams:
        arch, arch_kwargs = hparams["arch"], {**hparams.get("arch_kwargs", {}), **(arch_kwargs or {})}
    elif arch is None and _is_timm_name(file.config.get("architecture")):
        arch, arch_kwargs = file.config["architecture"], {**file.config.get("model_args", {}), **(arch_kwargs or {})}
    notes: list[str] = []
    if arch is None:
        root = find_prefix(list(file.tensors), prefix=prefix, branch=branch, notes=notes)
        state = backbone_state(file.tensors, root=root)
        overrides = {**_layout_overrides(file.tensors, root), **_config_overrides(file.config), **(arch_kwargs or {})}
        architecture = infer(state, overrides=overrides)
        notes.append(f"architecture inferred from the shapes: {architecture.name}")
    else:
        architecture = timm_architecture(arch, kwargs=arch_kwargs or {})
        names = list(architecture.skeleton.state_dict())
        known = [key for key in SIGNATURES.values() if key in names]
        signature = [*known, SIGNATURES["hf"]] if known else names[:1]
        root = find_prefix(list(file.tensors), signature=signature, prefix=prefix, branch=branch, notes=notes)
        state = backbone_state(file.tensors, root=root)
        architecture = _with_image_size_of(state, architecture)
    notes.extend(architecture.notes)
    floats = [t for key, t in file.tensors.items() if key.startswith(root) and t.is_floating_point()]
    if narrow := sorted({str(t.dtype).removeprefix("torch.") for t in floats if t.element_size() < 4}):
        notes.append(f"weights stored as {', '.join(narrow)}, used as float32")
    state = _select_weights(architecture, state, place=f"{file.name} ({root.rstrip('.') or 'top level'})")
    mean, std, assumed = _preprocessing(hparams, file.config, getattr(architecture.skeleton, "default_cfg", None) or {})
    return IdentifiedEncoder(
        file=file.name,
        prefix=root,
        state=state,
        architecture=architecture,
        image_size=int(hparams.get("image_size", architecture.image_size)),
        mean=tuple(mean),
        std=tuple(std),
        notes=(*notes, *assumed),
        step=file.step,
        inputs=inputs,
    )


def build(identified: IdentifiedEncoder) -> Encoder:
    """Build the network of an identified encoder and load its weights strictly."""
    model = identified.architecture.construct()
    model.load_state_dict(identified.state, strict=True)
    return Encoder(model, identified)


def find_prefix(
    keys: Sequence[str],
    *,
    signature: Sequence[str] = tuple(SIGNATURES.values()),
    prefix: str | None = None,
    branch: Branch = "teacher",
    notes: list[str] | None = None,
) -> str:
    """Prefix of the encoder's weights, with its dot.

    Example:
        >>> find_prefix(["student.backbone.patch_embed.proj.weight", "teacher.backbone.patch_embed.proj.weight"])
        'teacher.backbone.'

    Raises:
        ValueError: No prefix fits, or several fit equally well; the message lists them.
    """
    roots = sorted({key[: -len(s)] for key in keys for s in signature if key == s or key.endswith("." + s)})
    if prefix is not None:
        wanted = prefix.rstrip(".") + "." if prefix.strip(".") else ""
        roots = [root for root in roots if root == wanted or root.endswith("." + wanted)] if wanted else [""]
    if not roots:
        place = f"under the prefix {prefix!r}" if prefix else "in the file"
        raise ValueError(
            f"no encoder {place}: none of {', '.join(signature)} among {len(keys)} weights such as "
            f"{', '.join(list(keys)[:3])}; name the architecture with --arch and the weights' prefix with --prefix"
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
    """Weights under the prefix `root`, in timm's names and float32, without other encoders nested there."""
    inner = {key[len(root) :]: value for key, value in tensors.items() if key.startswith(root)}
    nested = {
        key[: -len(s)] for key in inner for s in SIGNATURES.values() if key.endswith("." + s)
    }  # for example an EMA copy inside the module
    kept = {
        key: value.float() if value.is_floating_point() else value
        for key, value in inner.items()
        if not any(key.startswith(other) for other in nested)
    }
    return to_timm(kept)


def _is_timm_name(arch: Any) -> bool:
    return isinstance(arch, str) and timm.is_model(arch)


def _with_image_size_of(state: StateDict, named: Architecture) -> Architecture:
    """The named architecture, built for the image size of the positions in `state` if its own differs."""
    positions, kwargs = getattr(named.skeleton, "pos_embed", None), named.kwargs or {}
    if "pos_embed" not in state or positions is None or state["pos_embed"].shape == positions.shape:
        return named
    size = pos_embed_grid(state)[0] * state["patch_embed.proj.weight"].shape[-1]
    if "img_size" in kwargs:
        return named
    note = f"positions are for {size} px, not {named.name}'s own size"
    return timm_architecture(named.name, kwargs={**kwargs, "img_size": size})._replace(notes=(note,))


def _select_weights(architecture: Architecture, state: StateDict, *, place: str) -> StateDict:
    """Weights to load, or an error that lists what does not fit. Only heads, which the network lacks, are dropped."""
    expected = architecture.skeleton.state_dict()
    state = {key: value for key, value in state.items() if key in expected or not HEADS.match(key)}
    faults = {
        "missing": [key for key in expected if key not in state],
        "left over": [key for key in state if key not in expected],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} in the file, {tuple(expected[key].shape)} in the model"
            for key in expected
            if key in state and state[key].shape != expected[key].shape
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(keys)} {fault}: {join_first(keys)}" for fault, keys in faults.items() if keys)
        raise ValueError(f"{architecture.name} does not fit {place}: {listed}")
    return state


def _layout_overrides(tensors: Mapping[str, Tensor], root: str) -> dict[str, Any]:
    """Transformers' ViT has norms with an epsilon of 1e-12, unlike its Dinov2 and other libraries' ViTs."""
    is_vit = f"{root}{SIGNATURES['hf']}" in tensors and not any(".layer_scale1." in key for key in tensors)
    return {"norm_layer": partial(nn.LayerNorm, eps=1e-12)} if is_vit else {}


def _config_overrides(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that a Hugging Face configuration states and shapes do not determine."""
    overrides: dict[str, Any] = {}
    if isinstance(config.get("num_attention_heads"), int):
        overrides["num_heads"] = config["num_attention_heads"]
    if isinstance(config.get("layer_norm_eps"), float):
        overrides["norm_layer"] = partial(nn.LayerNorm, eps=config["layer_norm_eps"])
    return overrides


def _preprocessing(
    hparams: Mapping[str, Any], config: Mapping[str, Any], pretrained_cfg: Mapping[str, Any]
) -> tuple[Sequence[float], Sequence[float], tuple[str, ...]]:
    """Mean, standard deviation and notes: from the file, from JSON next to it, from timm, or ImageNet's."""
    cfg = config.get("pretrained_cfg", config)
    for mean, std in (
        (hparams.get("mean"), hparams.get("std")),
        (cfg.get("mean"), cfg.get("std")),
        (cfg.get("image_mean"), cfg.get("image_std")),
        (pretrained_cfg.get("mean"), pretrained_cfg.get("std")),
    ):
        if mean is not None and std is not None:
            return mean, std, ()
    note = "mean and std are not in the file: ImageNet's are assumed; pass --mean and --std if they differ"
    return IMAGENET_MEAN, IMAGENET_STD, (note,)


def _summary(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"a mapping with {join_first([str(key) for key in content])}" if content else "an empty mapping"
    return f"a {type(content).__name__}"

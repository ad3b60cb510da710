"""Load the encoder in a checkpoint: read the files, identify the encoder, build it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from repmetrics.encoders import convolutional, vit, vjepa
from repmetrics.encoders.architecture import Architecture, Choices, StateDict, filtered, timm_architecture
from repmetrics.encoders.configuration import Detail, FileConfig, read_config, resolve_channels
from repmetrics.encoders.encoder import Encoder, IdentifiedEncoder, TokenPool, build
from repmetrics.encoders.files import CheckpointFile, read_checkpoint_file
from repmetrics.encoders.layouts import SEQUENTIAL, SIGNATURES, Layout, layout_of, library_details, prefixes
from repmetrics.encoders.pooling import conch_pooling, resolve_pooling
from repmetrics.encoders.safe_load import join_first
from repmetrics.encoders.weights import (
    check_images,
    find_merged,
    fit_to_weights,
    left_aside,
    raw_weights,
    select_weights,
)

BRANCH_WORDS = {
    "teacher": re.compile(r"(^|[._])(teacher|ema|momentum|target)([._]|$)"),
    "student": re.compile(r"(^|[._])(student|online)([._]|$)"),
}
Branch = Literal["teacher", "student"]


def load_encoder(
    path: str | Path,
    *,
    arch: str | None = None,
    arch_kwargs: Mapping[str, Any] | None = None,
    prefix: str | None = None,
    branch: Branch = "teacher",
    pool: TokenPool | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Encoder:
    """Load the encoder in a checkpoint, with every weight accounted for.

    The weights are found by their names and identified by their shapes. The teacher (or EMA) is preferred to other
    networks. Heads are left aside. The names of other libraries are converted to timm's. Loading is strict: a weight
    missing or left over is an error that lists it. What the weights do not determine is taken from the file or the JSON
    in its folder, or is assumed and listed in the notes. Where published models differ, it is an error that names the
    option.

    Args:
        path: Checkpoint: a file, a shard, a folder of timm, Hugging Face, torch.distributed.checkpoint or DeepSpeed, or
            the name of a model on the hub (``hf-hub:owner/name``).
        arch: Name of a timm architecture. Default: stated, or inferred.
        arch_kwargs: Arguments of that architecture, or of what is inferred ("num_heads", "act_layer", "norm_eps").
        prefix: Prefix of the encoder's weights in the file ("teacher.backbone"). Default: found by name.
        branch: Network to load from a file that contains both.
        pool: Pooling of a ViT's tokens. Default: the network's own.
        mean: Mean per channel on the scale 0…1. Default: stated, or ImageNet's.
        std: Standard deviation per channel. Default: stated, or ImageNet's.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a checkpoint, is unsafe, does not fit, or is ambiguous; the message says what to do.
    """
    file = read_checkpoint_file(Path(path), digests=False)
    options: dict[str, Any] = {"pool": pool, "mean": mean, "std": std}
    return build(identify(file, arch=arch, arch_kwargs=arch_kwargs, prefix=prefix, branch=branch, **options))


def identify(
    file: CheckpointFile,
    *,
    arch: str | None = None,
    arch_kwargs: Mapping[str, Any] | None = None,
    prefix: str | None = None,
    branch: Branch = "teacher",
    pool: TokenPool | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    fallback: Mapping[str, Any] | None = None,
) -> IdentifiedEncoder:
    """Find the encoder's weights in a file, their architecture and their preprocessing, without building the network.

    The arguments are those of `load_encoder`. With `fallback`, properties of a network that the weights are meant for
    are used instead of assumptions.

    Raises:
        ValueError: The encoder is ambiguous, unknown, or does not fit its architecture; the message says what to do.
    """
    file = file._replace(tensors=find_merged(file))
    config, notes = read_config(file), list[str]()
    finder = _Finder(file, prefix, branch, dict(arch_kwargs or {}), fallback)
    if arch is not None:
        root, architecture, state = finder.named(arch, finder.given, source="--arch", notes=notes)
    elif config.arch is not None:
        root, architecture, state, config = finder.from_config(config, notes=notes)
    else:
        root, architecture, state, config = finder.from_shapes(config, notes=notes)
    notes.extend(architecture.notes)
    choices = Choices(finder.given)
    pooler = conch_pooling(file, root, choices, notes) if pool is None else None
    notes.extend(choices.notes())
    if pooler is None:
        pool = resolve_pooling(architecture, pool, notes)
    floats = [t for key, t in file.tensors.items() if key.startswith(root) and t.is_floating_point()]
    if narrow := sorted({str(t.dtype).removeprefix("torch.") for t in floats if t.element_size() < 4}):
        notes.append(f"weights stored as {', '.join(narrow)}, used as float32")
    state = select_weights(architecture, state, place=f"{file.name} ({root.rstrip('.') or 'top level'})")
    channels = resolve_channels(mean, std, config.channels, arch=arch, notes=notes)
    if aside := [group for group in left_aside(file, root, state) if pooler is None or "_contrast" not in group]:
        notes.append(f"left aside: {join_first(aside, shown=8)}")
    if file.placeholders:
        notes.append(f"not read, and never called: {join_first(file.placeholders, shown=8)}")
    arguments = (arch, dict(arch_kwargs or {}), prefix, branch, pool)
    return IdentifiedEncoder(
        file=file.name,
        prefix=root,
        state=state,
        architecture=architecture,
        image_size=config.image_size or architecture.image_size,
        mean=channels.mean,
        std=channels.std,
        notes=(*notes, *config.notes),
        step=file.step,
        inputs=(*file.digests, repr(arguments), architecture.name, *notes) if file.digests else None,
        pool=pool,
        pooler=pooler,
    )


class _Finder:
    """The encoder in a file, by the caller's arguments: its place, architecture, and weights in timm's names."""

    def __init__(
        self,
        file: CheckpointFile,
        prefix: str | None,
        branch: Branch,
        given: dict[str, Any],
        fallback: Mapping[str, Any] | None,
    ) -> None:
        self.file, self.prefix, self.branch, self.given, self.fallback = file, prefix, branch, given, fallback

    def _root(self, signature: Sequence[str], notes: list[str]) -> str:
        keys = list(self.file.tensors)
        return find_prefix(keys, signature=signature, prefix=self.prefix, branch=self.branch, notes=notes)

    def named(
        self, arch: str, kwargs: Mapping[str, Any], *, source: str, notes: list[str]
    ) -> tuple[str, Architecture, StateDict]:
        """An encoder whose architecture has a name in timm."""
        architecture = timm_architecture(arch, kwargs=kwargs)
        expected = architecture.skeleton.state_dict()
        known = any(signature in expected for signature in SIGNATURES)
        root = self._root([*SIGNATURES, "patch_embed.backbone.conv1.weight"] if known else list(expected)[:1], notes)
        raw = raw_weights(self.file, root, expected=expected)
        check_images(raw)
        layout = layout_of(raw)
        state = raw if layout is None or expected.keys() <= raw.keys() else layout.convert(raw)
        architecture = fit_to_weights(architecture, state, source=source)
        return root, architecture, filtered(architecture, state)

    def from_config(self, config: FileConfig, *, notes: list[str]) -> tuple[str, Architecture, StateDict, FileConfig]:
        """An encoder whose architecture the file, or the JSON in its folder, names."""
        assert config.arch is not None
        extra: list[str] = []
        kwargs = {**config.arch_kwargs, **self.given}
        root, architecture, state = self.named(config.arch, kwargs, source=config.source, notes=extra)
        expected = architecture.skeleton.state_dict()
        fitting = sum(key in state and state[key].shape == value.shape for key, value in expected.items())
        if config.source != "config.json" or 2 * fitting >= len(expected):
            notes.extend([*extra, f"architecture as {config.source} states: {architecture.name}"])
            return root, architecture, state, config
        notes.append(f"config.json describes another network, {config.arch}: not used")
        return self.from_shapes(_without_json(config), notes=notes)

    def from_shapes(self, config: FileConfig, *, notes: list[str]) -> tuple[str, Architecture, StateDict, FileConfig]:
        """An encoder whose architecture is inferred from its weights."""
        root = self._root(SIGNATURES, notes)
        raw = raw_weights(self.file, root)
        check_images(raw, video=True)
        layout = layout_of(raw)
        assert layout is not None  # the prefix was found by a signature
        state = layout.convert(raw)
        config = _of_this_network(config, layout, state, notes)
        details = {**training_details(self.file, root), **config.details}
        library = library_details(layout, state)
        choices = Choices(
            self.given, config=details, library=library, place=f"{layout.name} layout", fallback=self.fallback
        )
        architecture = _infer(state, choices, layout, self.file, root, video=vjepa.is_video(raw))
        notes.append(f"architecture inferred from the shapes: {architecture.name}")
        return root, architecture, filtered(architecture, state), config


def _infer(
    state: StateDict, choices: Choices, layout: Layout, file: CheckpointFile, root: str, *, video: bool
) -> Architecture:
    if video:
        return vjepa.infer_vjepa(state, choices)
    if "layer1.0.conv1.weight" in state:
        siblings = {key: t.ndim for key, t in file.tensors.items() if not key.startswith(root) or not root}
        return convolutional.infer_resnet(state, choices, siblings=siblings)
    if convolutional.is_convnext(state):
        return convolutional.infer_convnext(state, choices)
    if vit.is_swin(state):
        return vit.infer_swin(state, choices)
    if vit.is_dinov3(state):
        vit.check_dinov3_bias(state)
        return vit.infer_dinov3(state, choices)
    pathology = f"{root.removesuffix('trunk.')}attn_pool_contrast.query" in file.tensors
    dinov2 = layout.name in ("DINO's and timm's", "transformers'") and "norm_pre.weight" not in state
    return vit.infer_vit(state, choices, native=pathology or not dinov2)


def _without_json(config: FileConfig) -> FileConfig:
    """Only what the checkpoint itself states."""
    channels = config.channels if config.channels and not config.channels.source.endswith(".json") else None
    return FileConfig(channels=channels, notes=config.notes)


def _of_this_network(config: FileConfig, layout: Layout, state: StateDict, notes: list[str]) -> FileConfig:
    """What files state, without a configuration that describes another network."""
    if not config.source.endswith(".json"):
        return config
    first = state.get("patch_embed.proj.weight")
    blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    actual = {} if first is None else {"width": first.shape[0], "depth": len(blocks), "patch": first.shape[-1]}
    different = [f"{key} {value}" for key, value in config.shapes.items() if actual.get(key, value) != value]
    of_layout = config.model_type in layout.model_types if config.model_type else layout.name == "CLIP's"
    if of_layout and not different:
        return config
    kind = f"a {config.model_type or 'CLIP'}" + (f" of {', '.join(different)}" if different else "")
    notes.append(f"{config.source} describes another network, {kind}: not used")
    return _without_json(config)


def training_details(file: CheckpointFile, root: str) -> dict[str, Detail]:
    """Heads of the ViTs that some trainers define: MoCo v3 and solo-learn's MAE and MoCo v3 have 12 at small widths."""
    arch = str(file.arguments.get("arch") or "")
    if re.search(r"(^|\.)(momentum_encoder|base_encoder)\.$", root) and arch.startswith("vit_"):
        return {"num_heads": Detail(12, "MoCo v3's layout")}
    hparams = file.hyper_parameters.get("cfg", file.hyper_parameters)
    method = str(hparams.get("method") if isinstance(hparams, Mapping) else "")
    backbone = hparams.get("backbone") if isinstance(hparams, Mapping) else None
    name = str(backbone.get("name") if isinstance(backbone, Mapping) else backbone)
    if method in ("mae", "mocov3") and name in ("vit_tiny", "vit_small", "vit_base"):
        return {"num_heads": Detail(12, f"solo-learn's {method}")}
    return {}


def find_prefix(
    keys: Sequence[str],
    *,
    signature: Sequence[str] = SIGNATURES,
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
    short = [layout.signature for layout in SEQUENTIAL] if signature == SIGNATURES else []
    roots = sorted(prefixes(keys, signature) or prefixes(keys, short))
    roots = [root for root in roots if not any(_is_part(root, other) for other in roots)]
    if prefix is not None:
        wanted = prefix.rstrip(".") + "." if prefix.strip(".") else ""
        roots = [root for root in roots if root == wanted or root.endswith("." + wanted)] if wanted else [""]
    if not roots:
        place = f"under the prefix {prefix!r}" if prefix else "in the file"
        raise ValueError(
            f"no encoder {place}: none of {', '.join(signature)} among {len(keys)} weights such as "
            f"{', '.join(list(keys)[:3])}; name a timm architecture with --arch and the weights' prefix with "
            "--prefix; of an encoder of your own, give embeddings in place of checkpoints, as .npy files"
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


def _is_part(root: str, other: str) -> bool:
    """Whether a prefix lies in the patch embedding of another encoder: a hybrid, whose patches come from a ResNet."""
    return root != other and root.startswith(f"{other}patch_embed.")

"""What a checkpoint and the JSON in its folder state about the encoder: architecture, details, preprocessing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from repmetrics.encoders.files import CheckpointFile
from repmetrics.encoders.preprocessing import IMAGENET_MEAN, IMAGENET_STD

# Names of activations in transformers, and in timm.
ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "quick_gelu": "quick_gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu",
}  # fmt: skip
# transformers does not write values of a nested configuration that equal its defaults.
_CLIP = {"hidden_size": 768, "num_hidden_layers": 12, "patch_size": 32, "num_attention_heads": 12,
         "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"}  # fmt: skip
_SIGLIP = {**_CLIP, "patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}
NESTED_DEFAULTS: dict[str, dict[str, Any]] = {"clip": _CLIP, "siglip": _SIGLIP}
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
CHANNELS_BY_NAME = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


class Channels(NamedTuple):
    """Mean and standard deviation per channel on the scale 0…1, and the place that states them."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str


class Detail(NamedTuple):
    """Value of a property that shapes do not determine, and the place that states it."""

    value: Any
    source: str


class FileConfig(NamedTuple):
    """What a checkpoint states about its encoder.

    Attributes:
        arch: Name of a timm architecture.
        arch_kwargs: Arguments of that architecture.
        source: Place that states the architecture.
        details: Properties that shapes do not determine: "num_heads", "norm_eps", "act_layer".
        shapes: Width, depth and patch side that the JSON states, to compare with the weights.
        model_type: Name of the model in transformers.
        channels: Mean and standard deviation.
        image_size: Side of the images in pixels.
        notes: What was converted or not understood.
    """

    arch: str | None = None
    arch_kwargs: Mapping[str, Any] = {}
    source: str = ""
    details: Mapping[str, Detail] = {}
    shapes: Mapping[str, int] = {}
    model_type: str = ""
    channels: Channels | None = None
    image_size: int | None = None
    notes: tuple[str, ...] = ()


def read_config(file: CheckpointFile) -> FileConfig:
    """What the file states, and what the JSON in its folder states where the file is silent.

    Raises:
        ValueError: An image size is not a square.
    """
    notes: list[str] = []
    of_json = _timm_config(file) or _transformers_config(file) or _open_clip_config(file) or FileConfig()
    hparams, place = file.hyper_parameters, "its hyper-parameters"
    config = of_json
    if is_timm_name(hparams.get("arch")):
        kwargs = hparams.get("arch_kwargs")
        config = of_json._replace(
            arch=hparams["arch"], arch_kwargs=kwargs if isinstance(kwargs, Mapping) else {}, source=place, details={}
        )
    heads = {value for mapping in (hparams, file.arguments) for value in _values(mapping, HEADS)}
    if "num_heads" not in config.details and config.arch is None and len(heads) == 1:
        config = config._replace(details={**config.details, "num_heads": Detail(heads.pop(), place)})
    candidates = [(hparams.get("mean"), hparams.get("std"), place), *_channels_in_json(file.config)]
    channels = next((c for mean, std, source in candidates if (c := read_channels(mean, std, source, notes))), None)
    size = hparams.get("image_size") if config.source == place else None
    return config._replace(channels=channels, image_size=square(size or config.image_size), notes=tuple(notes))


def is_timm_name(arch: Any) -> bool:
    """Whether timm has an architecture of that name."""
    import timm

    return isinstance(arch, str) and timm.is_model(arch)


def square(size: Any) -> int | None:
    """Side of a square that is given as a number or as two or three numbers (channels first).

    Example:
        >>> square([224, 224]), square(None)
        (224, None)
    """
    if size is None:
        return None
    sides = list(size)[-2:] if isinstance(size, Sequence) and not isinstance(size, str) else [size]
    if not all(isinstance(side, int) and side > 0 for side in sides) or len(set(sides)) != 1:
        raise ValueError(f"the checkpoint states images of {size}: expected one side in pixels; pass --image-size")
    return int(sides[0])


def read_channels(mean: Any, std: Any, source: str, notes: list[str]) -> Channels | None:
    """Mean and std on the scale 0…1 from values that a file states; None, and a note, if they are not understood.

    Example:
        >>> read_channels(0.5, [0.25], "config.json", [])
        Channels(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), source='config.json')
    """
    if mean is None or std is None:
        return None
    if isinstance(mean, str) and str(std) == mean and mean.lower() in CHANNELS_BY_NAME:
        return Channels(*CHANNELS_BY_NAME[mean.lower()], source)
    values = [_three(value) for value in (mean, std)]
    if values[0] is not None and values[1] is not None:
        if max(*values[0], *values[1]) > 1:
            values = [tuple(v / 255 for v in value) for value in values if value is not None]
            notes.append(f"mean and std of {source} are on the scale 0 to 255: divided by 255")
        if fault(values[0], values[1]) is None:  # type: ignore[arg-type]
            return Channels(values[0], values[1], source)  # type: ignore[arg-type]
    notes.append(f"mean {mean!r} and std {std!r} of {source} are not understood, and not used")
    return None


def fault(mean: Sequence[float], std: Sequence[float]) -> str | None:
    """What is wrong with a mean and a standard deviation on the scale 0…1; None if nothing is.

    Example:
        >>> fault((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
        'they are on the scale 0 to 255: divide them by 255'
    """
    if len(mean) != 3 or len(std) != 3:
        return "three channels need three numbers each"
    if not all(map(math.isfinite, (*mean, *std))) or min(mean) < 0 or min(std) <= 0:
        return "a mean is at least 0, a standard deviation more than 0"
    if max(*mean, *std) > 1:
        return "they are on the scale 0 to 255: divide them by 255" if max(*mean, *std) <= 255 else "they exceed 255"
    return None


def resolve_channels(
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    config: Channels | None,
    *,
    arch: str | None,
    notes: list[str],
) -> Channels:
    """Mean and standard deviation: the caller's, those stated, those of a tag of timm, or ImageNet's, with a note.

    Raises:
        ValueError: The caller's are not on the scale 0…1.
    """
    channels = config
    from timm.models import get_pretrained_cfg, split_model_name_tag

    of_timm = get_pretrained_cfg(arch) if arch is not None else None
    if channels is None and arch is not None and of_timm is not None and split_model_name_tag(arch)[1]:
        channels = Channels(tuple(of_timm.mean), tuple(of_timm.std), f"timm's {arch}")
    if channels is None:
        channels = Channels(IMAGENET_MEAN, IMAGENET_STD, "")
    if mean is not None or std is not None:
        channels = Channels(tuple(mean or channels.mean), tuple(std or channels.std), channels.source)
        if wrong := fault(channels.mean, channels.std):
            values = f"mean {list(channels.mean)} and std {list(channels.std)}"
            raise ValueError(f"{values} do not fit the scale 0 to 1: {wrong}")
    if mean is None or std is None:
        unknown = " and ".join(name for name, value in (("mean", mean), ("std", std)) if value is None)
        if channels.source:
            notes.append(f"{unknown} as {channels.source} states: {list(channels.mean)}, {list(channels.std)}")
        else:
            other = "pass --mean and --std if they differ"
            if of_timm is not None and tuple(of_timm.mean) != IMAGENET_MEAN:
                other = f"timm's own weights of {arch} have {list(of_timm.mean)}, {list(of_timm.std)}: {other}"
            notes.append(f"{unknown} are not in the file: ImageNet's are assumed; {other}")
    return channels


def _three(value: Any) -> tuple[float, ...] | None:
    items = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not items or not all(isinstance(item, int | float) and not isinstance(item, bool) for item in items):
        return None
    return tuple(float(item) for item in (items * 3 if len(items) == 1 else items))


def _channels_in_json(config: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[Any, Any, str]]:
    main = config.get("config.json", {})
    cfg = main.get("pretrained_cfg", main)
    if isinstance(cfg, Mapping):
        yield cfg.get("mean"), cfg.get("std"), "config.json"
        yield cfg.get("image_mean"), cfg.get("image_std"), "config.json"
    of_clip = config.get("open_clip_config.json", {}).get("preprocess_cfg")
    if isinstance(of_clip, Mapping):
        yield of_clip.get("mean"), of_clip.get("std"), "open_clip_config.json"
    processor = config.get("preprocessor_config.json", {})
    if processor.get("do_normalize") is False:
        yield 0.0, 1.0, "preprocessor_config.json"
    yield processor.get("image_mean"), processor.get("image_std"), "preprocessor_config.json"


def _timm_config(file: CheckpointFile) -> FileConfig | None:
    """The configuration that timm's hub writes."""
    config = file.config.get("config.json", {})
    if not is_timm_name(config.get("architecture")):
        return None
    kwargs = config.get("model_args")
    # `num_classes` is the classifier's, which is not loaded
    kwargs = {key: value for key, value in (kwargs or {}).items() if key != "num_classes"}
    return FileConfig(arch=config["architecture"], arch_kwargs=kwargs, source="config.json")


def _transformers_config(file: CheckpointFile) -> FileConfig | None:
    """The configuration that transformers writes, of a vision model or of the vision model of a pair."""
    config = file.config.get("config.json", {})
    if not isinstance(config.get("model_type"), str):
        return None
    defaults = NESTED_DEFAULTS.get(config["model_type"], {})
    nested = config.get("vision_config")
    values = {**defaults, **nested} if isinstance(nested, Mapping) else config
    details: dict[str, Detail] = {}
    if isinstance(values.get("num_attention_heads"), int):
        details["num_heads"] = Detail(values["num_attention_heads"], "config.json")
    if isinstance(values.get("layer_norm_eps"), float):
        details["norm_eps"] = Detail(values["layer_norm_eps"], "config.json")
    if isinstance(values.get("hidden_act"), str):
        details["act_layer"] = Detail(ACTIVATIONS.get(values["hidden_act"], values["hidden_act"]), "config.json")
    if isinstance(values.get("crop_size"), int):  # V-JEPA
        details["img_size"] = Detail(values["crop_size"], "config.json")
    names = {"width": "hidden_size", "depth": "num_hidden_layers", "patch": "patch_size"}
    shapes = {name: values[key] for name, key in names.items() if isinstance(values.get(key), int)}
    return FileConfig(details=details, shapes=shapes, model_type=config["model_type"], source="config.json")


def _open_clip_config(file: CheckpointFile) -> FileConfig | None:
    config = file.config.get("open_clip_config.json", {}).get("model_cfg")
    vision = config.get("vision_cfg") if isinstance(config, Mapping) else None
    if not isinstance(config, Mapping) or not isinstance(vision, Mapping) or "timm_model_name" in vision:
        return None
    place = "open_clip_config.json"
    details = {"act_layer": Detail("quick_gelu" if config.get("quick_gelu") else "gelu", place)}
    width, head = vision.get("width", 768), vision.get("head_width", 64)
    if isinstance(width, int) and isinstance(head, int) and head:
        details["num_heads"] = Detail(width // head, place)
    names = {"width": "width", "depth": "layers", "patch": "patch_size"}
    shapes = {name: vision[key] for name, key in names.items() if isinstance(vision.get(key), int)}
    return FileConfig(details=details, shapes=shapes, source=place)


def _values(mapping: Any, keys: Sequence[str], *, depth: int = 0) -> Iterator[int]:
    """Integers under any of these keys, at any depth, except those of decoders, predictors and text."""
    if not isinstance(mapping, Mapping) or depth > 8:
        return
    for key, value in mapping.items():
        if key in keys and isinstance(value, int):
            yield value
        elif not any(word in str(key) for word in ("decoder", "predictor", "text", "head")):
            yield from _values(value, keys, depth=depth + 1)

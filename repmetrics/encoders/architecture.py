"""A network before it is built: by its name in timm, or by choices that the names and shapes of its weights leave."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from repmetrics.encoders.configuration import Detail

StateDict = dict[str, Tensor]

# Arguments of ``timm.create_model`` that name other weights: a checkpoint may state its arguments.
READS_FILES = {"pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
# Weights that timm's filters would resize to the network without a word.
RESIZED = ("patch_embed.proj.weight", "pos_embed", "relative_position_bias_table")


class Architecture(NamedTuple):
    """A network without classifier, before it is built.

    Attributes:
        name: Name of the architecture.
        construct: Function that builds the network, untrained.
        skeleton: Network on the meta device, which has shapes but no values.
        image_size: Side of the images in pixels.
        notes: What a user should know about the architecture.
        kwargs: Arguments of ``timm.create_model`` beside `name`; None if inferred from shapes.
    """

    name: str
    construct: Callable[[], nn.Module]
    skeleton: Any
    image_size: int
    notes: tuple[str, ...] = ()
    kwargs: Mapping[str, Any] | None = None


class Choices:
    """Properties of a network that its weights do not determine: each with its value and the source of the value.

    Args:
        given: Arguments of the caller. Those that no property takes go to the constructor of the network.
        config: What the file and its configuration state.
        library: What the library fixes whose names the weights have.
        place: The library, for notes.
        fallback: Values of the caller's own network, instead of what would be assumed.
    """

    def __init__(
        self,
        given: Mapping[str, Any],
        *,
        config: Mapping[str, Detail] | None = None,
        library: Mapping[str, Any] | None = None,
        place: str = "",
        fallback: Mapping[str, Any] | None = None,
    ) -> None:
        self.given, self._fallback = dict(given), fallback or {}
        self._values = {key: Detail(value, place) for key, value in (library or {}).items()} | dict(config or {})
        self._known: dict[str, list[str]] = {}
        self._assumed: list[str] = []

    def take(self, key: str, default: Any, text: str, *, undetermined: str = "") -> Any:
        """Value of a property: given, stated, fixed by the library, or assumed.

        Args:
            key: Name of the property.
            default: Value to assume.
            text: Description with ``{}`` for the value, for notes.
            undetermined: Error instead of an assumption, where published models differ.

        Raises:
            ValueError: Published models differ, and nothing says which one this is.
        """
        if key in self.given:
            return self.given.pop(key)
        if key in self._values:
            value, source = self._values[key]
            self._known.setdefault(source, []).append(text.format(value))
            return value
        if key in self._fallback:
            return self._fallback[key]
        if undetermined:
            raise ValueError(undetermined)
        self._assumed.append(text.format(default))
        return default

    def has(self, key: str) -> bool:
        """Whether a property is known without an assumption."""
        return key in self.given or key in self._values or key in self._fallback

    def notes(self) -> tuple[str, ...]:
        """What the file and its library state, and what is assumed."""
        known = [f"as {source} states: {', '.join(texts)}" for source, texts in self._known.items()]
        if self._assumed:
            known.append(f"assumed, as no weight determines it: {', '.join(self._assumed)}; see --arch-kwargs")
        return tuple(known)


def norm(eps: Any) -> Callable[..., nn.Module]:
    """Layer norm with an epsilon."""
    if not isinstance(eps, float | int) or not 0 < eps < 1:
        raise ValueError(f"the epsilon of the norms must be a small positive number, got {eps!r}")
    return partial(nn.LayerNorm, eps=eps)


def activation(name: Any) -> Any:
    """Activation by its name in timm."""
    from timm.layers.create_act import get_act_layer

    try:
        return get_act_layer(name)
    except KeyError:
        raise ValueError(f"unknown activation {name!r}: expected gelu, quick_gelu, gelu_tanh, relu, silu …") from None


def timm_architecture(arch: str, *, kwargs: Mapping[str, Any]) -> Architecture:
    """Architecture by its name in timm."""
    import timm

    if not timm.is_model(arch):
        close = ", ".join(get_close_matches(arch, timm.list_models(), n=3))
        raise ValueError(f"timm has no architecture {arch!r}" + (f": did you mean {close}?" if close else ""))
    check_arch_kwargs(kwargs)
    kwargs = {key: value for key, value in kwargs.items() if key != "num_classes"}  # the classifier is not loaded
    construct = partial(_create, arch, kwargs)
    skeleton = without_values(construct)
    patch_embed = getattr(skeleton, "patch_embed", None)
    size = getattr(patch_embed, "img_size", None) or skeleton.default_cfg["input_size"][1:]
    return Architecture(arch, construct, skeleton, int(size[0]), kwargs=kwargs)


def check_arch_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Check that arguments of ``timm.create_model`` only describe the network.

    Raises:
        ValueError: An argument would make timm read a file or download one.
    """
    if refused := sorted(READS_FILES & kwargs.keys()):
        raise ValueError(
            f"arch_kwargs must describe the network, got {', '.join(refused)}: timm would read other weights"
        )


def _create(arch: str, kwargs: Mapping[str, Any]) -> nn.Module:
    import timm

    try:
        model: nn.Module = timm.create_model(arch, pretrained=False, num_classes=0, **kwargs)
    except (TypeError, AssertionError, RuntimeError, KeyError) as error:
        raise ValueError(f"{arch} cannot be built with {dict(kwargs)}: {error}") from error
    return model


def without_values(construct: Callable[[], nn.Module]) -> Any:
    """The network on the meta device if it can be built there."""
    with suppress(RuntimeError, ValueError), torch.device("meta"):
        return construct()
    return construct()  # reads values of tensors while it builds, or raises the same error


def construct(kind: Callable[..., nn.Module], inferred: Mapping[str, Any], overrides: Mapping[str, Any]) -> nn.Module:
    """The network with inferred arguments, which the caller's replace."""
    try:
        return kind(**{**inferred, **overrides})
    except (TypeError, AssertionError) as error:
        name = getattr(kind, "__name__", "network")
        raise ValueError(f"a {name} cannot be built with {dict(overrides)}: {error}") from error


def filtered(architecture: Architecture, state: StateDict) -> StateDict:
    """Weights in the names of the network, by timm's own checkpoint filter for it, if it has one.

    The filters also resize weights to the network. Weights that would be resized stay as they are.
    """
    expected = architecture.skeleton.state_dict()
    filter_fn = getattr(sys.modules[type(architecture.skeleton).__module__], "checkpoint_filter_fn", None)
    if filter_fn is None or expected.keys() <= state.keys():
        return state
    if any(key.endswith(RESIZED) and key in expected and expected[key].shape != state[key].shape for key in state):
        return state
    try:
        converted: StateDict = filter_fn(dict(state), architecture.skeleton)
    except (KeyError, AttributeError, RuntimeError, ValueError):  # the weights of another network
        return state
    return converted

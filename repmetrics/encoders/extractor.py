"""Find the encoder in a module, run it on images, take one vector an image from it and from named layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import Tensor, nn

Pool = Literal["cls", "mean"]
EncoderSpec = str | nn.Module | Callable[[Any, Tensor], Any] | None


def get_submodule(root: nn.Module, path: str) -> nn.Module:
    """The submodule at a dotted path, without the wrapper of ``torch.compile``.

    Raises:
        ValueError: no such submodule; the message holds the near names.

    Example:
        >>> get_submodule(nn.Sequential(nn.Linear(2, 3)), "0").out_features
        3
    """
    try:
        module = root.get_submodule(path)
    except AttributeError:
        names = [name for name, _ in root.named_modules() if name]
        near = get_close_matches(path, names, n=5, cutoff=0.4) or [name for name, _ in root.named_children()]
        raise ValueError(
            f"{type(root).__name__} has no submodule {path!r}: did you mean {', '.join(near) or 'another module'}?"
        ) from None
    return unwrap_compiled(module)


def unwrap_compiled(module: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``'s wrapper, or the module itself."""
    inner = getattr(module, "_orig_mod", module)
    assert isinstance(inner, nn.Module)
    return inner


def pool_tokens(output: Any, *, pool: Pool | None, name: str) -> Tensor:
    """One vector an image: (B, D) as it is, tokens (B, T, D) and maps (B, C, H, W) by ``pool``.

    Args:
        output: what the encoder or a layer returned.
        pool: "cls" takes token 0; "mean" averages all tokens, or all positions of a map.
        name: who returned it, for the message.

    Raises:
        TypeError: not a tensor; says how to choose one.
        ValueError: tokens or maps without a ``pool`` that fits.

    Example:
        >>> pool_tokens(torch.ones(4, 197, 8), pool="mean", name="the encoder").shape
        torch.Size([4, 8])
    """
    if not isinstance(output, Tensor):
        raise TypeError(f"{name} must return one tensor, got {_contents(output)}")
    if output.ndim == 2:
        return output
    shape = tuple(output.shape)
    if output.ndim == 3 and pool is not None:
        return output[:, 0] if pool == "cls" else output.mean(1)
    if output.ndim == 4 and pool == "mean":
        return output.mean((2, 3))
    if output.ndim == 3:
        raise ValueError(f'{name} returned tokens {shape}: choose pool="cls" or pool="mean"')
    if output.ndim == 4:
        raise ValueError(f'{name} returned feature maps {shape}: choose pool="mean"')
    raise ValueError(f"{name} must return (B, D), got {shape}")


def _contents(output: Any) -> str:
    if isinstance(output, Mapping):
        keys = list(output)
        return (
            f"a {type(output).__name__} with keys {', '.join(map(str, keys))}: choose one with "
            f"encoder=lambda module, images: module(images)[{keys[0]!r}]"
            if keys
            else f"an empty {type(output).__name__}"
        )
    if isinstance(output, (tuple, list)):
        parts = ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in output)
        return (
            f"a {type(output).__name__} of {len(output)} ({parts}): choose one with "
            "encoder=lambda module, images: module(images)[0]"
        )
    return type(output).__name__


class FeatureExtractor:
    """Images → features of the encoder and of the named layers, side by side in one (B, ΣD) tensor.

    One forward pass serves all; :meth:`split` takes the columns apart again.

    Args:
        root: the module that paths start from.
        encoder: what is run. A path: that submodule on the images. A module: itself. A function: called as
            ``encoder(root, images)``. None: ``root(images)``.
        layers: paths whose outputs are caught while the encoder runs.
        pool: see :func:`pool_tokens`.

    Raises:
        ValueError: a path that does not exist, or a root without ``forward`` where it is needed.
    """

    def __init__(
        self, root: nn.Module, encoder: EncoderSpec = None, *, layers: Sequence[str] = (), pool: Pool | None = None
    ) -> None:
        self.layers = tuple(layers)
        self.pool = pool
        self.widths: dict[str, tuple[int, torch.dtype]] = {}
        self.name = "the encoder" if not isinstance(encoder, str) else f"encoder {encoder!r}"
        self._modules = {path: get_submodule(root, path) for path in layers}
        self._run, extra = _resolve_encoder(root, encoder)
        self.roots = (root, *extra)

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, …) → (B, ΣD): the encoder's columns first, then each layer's."""
        caught: dict[str, Any] = {}
        with self._capture(caught):
            output = pool_tokens(self._run(images), pool=self.pool, name=self.name)
        parts = {"": output}
        for path in self.layers:
            if path not in caught:
                raise ValueError(
                    f"layer {path!r} did not run when {self.name} did: give an encoder that passes through it, "
                    "such as encoder=lambda module, images: module.projector(module.backbone(images))"
                )
            parts[path] = pool_tokens(caught[path], pool=self.pool, name=f"layer {path!r}")
        if len(output) != len(images):
            raise ValueError(f"{self.name} must return ({len(images)}, D), got {tuple(output.shape)}")
        for path, part in parts.items():
            self.widths[path] = (part.shape[1], part.dtype)
        return torch.cat(list(parts.values()), dim=1)

    def split(self, values: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Pairs (layer, its features in the dtype they came in); the encoder's own under ""."""
        start = 0
        for path, (width, dtype) in self.widths.items():
            yield path, values[:, start : start + width].to(dtype)
            start += width

    @contextmanager
    def _capture(self, caught: dict[str, Any]) -> Iterator[None]:
        def keep(path: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                caught[path] = output

            return hook

        with ExitStack() as hooks:
            for path, module in self._modules.items():
                hooks.enter_context(module.register_forward_hook(keep(path)))
            yield


def _resolve_encoder(root: nn.Module, encoder: EncoderSpec) -> tuple[Callable[[Tensor], Any], tuple[nn.Module, ...]]:
    if isinstance(encoder, str):
        return get_submodule(root, encoder), ()
    if isinstance(encoder, nn.Module):
        module = unwrap_compiled(encoder)
        return module, (module,)
    if encoder is not None and not callable(encoder):
        raise TypeError(f"encoder must be a path, a module or a function, got {type(encoder).__name__}")
    if encoder is not None:
        function = encoder
        return lambda images: function(root, images), ()
    if not _has_forward(root):
        children = ", ".join(name for name, _ in root.named_children()) or "none"
        raise ValueError(
            f"{type(root).__name__} has no forward(): name the encoder with encoder=, its submodules are: {children}"
        )
    return unwrap_compiled(root), ()


def _has_forward(module: nn.Module) -> bool:
    """False where ``forward`` is nn.Module's or LightningModule's own, which only raise."""
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    return owner is not nn.Module and not owner.__module__.startswith(("lightning.", "pytorch_lightning."))

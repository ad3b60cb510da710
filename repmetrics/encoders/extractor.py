"""Run an encoder within a module, and take one vector per image from it and from named layers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from typing import Any, Literal

from torch import Tensor, nn

Pool = Literal["cls", "mean"]
EncoderSpec = str | nn.Module | Callable[[Any, Tensor], Any] | None


def get_submodule(root: nn.Module, path: str) -> nn.Module:
    """The submodule at a dotted path, without the wrapper of ``torch.compile``.

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
    return unwrap(module)


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside the wrappers of ``torch.compile``, data parallelism and Lightning Fabric, or the module itself.

    A forward pass of a data-parallel wrapper would wait for the other ranks, which may hold fewer batches.

    Example:
        >>> inner = nn.Linear(2, 3)
        >>> unwrap(nn.DataParallel(inner)) is inner
        True
    """
    fabric = type(module).__name__ == "_FabricModule"  # of lightning.fabric or lightning_fabric
    if fabric or isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner = module.module
    else:
        inner = getattr(module, "_orig_mod", module)
    assert isinstance(inner, nn.Module)
    return inner if inner is module else unwrap(inner)


FEATURE_NAMES = (
    *("feats", "features", "feat", "embedding", "embeddings", "representation", "representations"),
    *("x_norm_clstoken", "last_hidden_state", "pooler_output"),
)
"""Keys of outputs that hold features, the likeliest first. A pooler is last: it may have random weights."""


def pool_tokens(output: Any, *, pool: Pool | None, name: str, call: str | None = None) -> Tensor:
    """One vector per image: (B, D) unchanged, (B, C, 1, 1) flattened, tokens and maps (B, C, H, W) pooled.

    A tuple, list or mapping that holds one tensor stands for that tensor.

    Args:
        output: Output of the encoder or of a layer.
        pool: "cls" takes token 0; "mean" averages all tokens, or all positions of a map.
        name: Name of the encoder or layer, for error messages.
        call: Expression that gives this output, from which messages make a function to choose one tensor of several.

    Example:
        >>> import torch
        >>> pool_tokens(torch.ones(4, 197, 8), pool="mean", name="the encoder").shape
        torch.Size([4, 8])
    """
    if not isinstance(output, Tensor):
        parts = _tensors(output)
        if len(parts) != 1:
            raise TypeError(f"{name} must return one tensor, got {_contents(output)}{_remedy(parts, pool, call)}")
        (output,) = parts.values()
    shape = tuple(output.shape)
    if output.ndim == 4 and shape[2:] == (1, 1):
        return output.flatten(1)
    if output.ndim == 2:
        return output
    if output.ndim == 3 and pool is not None:
        return output[:, 0] if pool == "cls" else output.mean(1)
    if output.ndim == 4 and pool == "mean":
        return output.mean((2, 3))
    if output.ndim == 3:
        raise ValueError(f'{name} returned tokens {shape}: choose pool="cls" or pool="mean"')
    if output.ndim == 4:
        raise ValueError(f'{name} returned feature maps {shape}: choose pool="mean"')
    raise ValueError(f"{name} must return (B, D), got {shape}")


def _tensors(output: Any) -> dict[Any, Tensor]:
    """Tensors of a mapping or sequence that may be features, by key or index: floating, and no losses."""
    items: Any = ()
    if isinstance(output, Mapping):
        items = output.items()
    elif isinstance(output, tuple | list):
        items = enumerate(output)
    return {key: value for key, value in items if _may_be_features(value)}


def _may_be_features(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and 2 <= value.ndim <= 4


def _contents(output: Any) -> str:
    if isinstance(output, Mapping):
        keys = ", ".join(map(str, output))
        return f"a {type(output).__name__} with keys {keys}" if keys else f"an empty {type(output).__name__}"
    if isinstance(output, tuple | list):
        parts = ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in output)
        return f"a {type(output).__name__} of {len(output)} ({parts})"
    return type(output).__name__


def _remedy(parts: Mapping[Any, Tensor], pool: Pool | None, call: str | None) -> str:
    """Function that takes the likeliest features of several tensors, as an ``encoder=`` to copy."""
    if not parts or call is None:
        return "" if not parts else ": name a layer that returns one"

    def preference(key: Any) -> tuple[int, bool, bool]:
        known = FEATURE_NAMES.index(key) if key in FEATURE_NAMES else len(FEATURE_NAMES)
        return known, key == "logits", parts[key].ndim > 2

    key = min(parts, key=preference)
    mean = {3: ".mean(1)", 4: ".mean((2, 3))"}.get(parts[key].ndim, "") if pool is None else ""
    return f": choose one with encoder=lambda module, images: {call}[{key!r}]{mean}"


class FeatureExtractor:
    """Images → features of the encoder and of named layers, from one forward pass.

    Args:
        root: Module that paths start from.
        encoder: Encoder to run. A path: that submodule, called with the images. A module: itself. A function: called
            as ``encoder(root, images)``. None: ``root(images)``.
        layers: Paths of submodules whose outputs are captured while the encoder runs.
        pool: Pooling of tokens, see :func:`pool_tokens`.
        transform: Function of a batch of images, which runs before the encoder.

    Attributes:
        module: Module that the encoder is; None for a function.
        first_input: Images of the first call, as the encoder gets them.
        sharded: Whether parameters are sharded over ranks, as by FSDP2: all ranks must run the encoder together.

    Raises:
        ValueError: The encoder is a part of a sharded module.
    """

    def __init__(
        self,
        root: nn.Module,
        encoder: EncoderSpec = None,
        *,
        layers: Sequence[str] = (),
        pool: Pool | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        root = unwrap(root)
        self.layers = tuple(layers)
        self.pool = pool
        self.transform = transform
        self.first_input: Tensor | None = None
        self.name = "the encoder" if not isinstance(encoder, str) else f"encoder {encoder!r}"
        self._call = _call_expression(root, encoder)
        self._modules = {path: get_submodule(root, path) for path in layers}
        self._run, extra = _resolve_encoder(root, encoder)
        self.module = self._run if isinstance(self._run, nn.Module) else None
        self.roots = (root, *extra)
        self.sharded = any(_is_sharded(parameter) for module in self.roots for parameter in module.parameters())
        if self.sharded and self.module is not None and self.module is not root:
            raise ValueError(
                f"{self.name} is a part of a module with sharded parameters, which only the forward pass of the whole "
                "module gathers: name the part in layers=, or give encoder= a function that calls the module"
            )

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, …) → features (B, D) by layer; those of the encoder's output are under ""."""
        images = self._transformed(images)
        if self.first_input is None:
            self.first_input = images
        captured: dict[str, Any] = {}
        with self._capture(captured):
            output = self._run(images)
        features = {"": pool_tokens(output, pool=self.pool, name=self.name, call=self._call)}
        for path in self.layers:
            if path not in captured:
                raise ValueError(
                    f"layer {path!r} did not run when {self.name} did: give an encoder that passes through it, "
                    "such as encoder=lambda module, images: module.projector(module.backbone(images))"
                )
            features[path] = pool_tokens(captured[path], pool=self.pool, name=f"layer {path!r}")
        for path, values in features.items():
            if len(values) != len(images):
                name = f"layer {path!r}" if path else self.name
                raise ValueError(f"{name} must return ({len(images)}, D), got {tuple(values.shape)}")
        return features

    def _transformed(self, images: Tensor) -> Tensor:
        if self.transform is None:
            return images
        transformed = self.transform(images)
        if not isinstance(transformed, Tensor) or len(transformed) != len(images):
            got = tuple(transformed.shape) if isinstance(transformed, Tensor) else type(transformed).__name__
            raise ValueError(f"transform must return a batch of {len(images)} images, got {got}")
        return transformed

    @contextmanager
    def _capture(self, captured: dict[str, Any]) -> Iterator[None]:
        def make_hook(path: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                captured[path] = output

            return hook

        with ExitStack() as hooks:
            for path, module in self._modules.items():
                hooks.enter_context(module.register_forward_hook(make_hook(path)))
            yield


def _is_sharded(parameter: Tensor) -> bool:
    tensor = sys.modules.get("torch.distributed.tensor")  # takes a second to import
    return tensor is not None and isinstance(parameter, tensor.DTensor)


def _resolve_encoder(root: nn.Module, encoder: EncoderSpec) -> tuple[Callable[[Tensor], Any], tuple[nn.Module, ...]]:
    if isinstance(encoder, str):
        return get_submodule(root, encoder), ()
    if isinstance(encoder, nn.Module):
        module = unwrap(encoder)
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
    return root, ()


def _call_expression(root: nn.Module, encoder: EncoderSpec) -> str:
    """Python expression that runs the encoder, in terms of ``module``, the root, and ``images``."""
    path = encoder if isinstance(encoder, str) else None
    if isinstance(encoder, nn.Module):
        path = next((name for name, module in root.named_modules() if module is encoder), None)
        if path is None:
            return "your_encoder(images)"
    elif encoder is not None and path is None:
        return "your_function(module, images)"
    if not path:
        return "module(images)"
    if all(part.isidentifier() for part in path.split(".")):
        return f"module.{path}(images)"
    return f"module.get_submodule({path!r})(images)"


def _has_forward(module: nn.Module) -> bool:
    """Whether a class overrides ``forward`` of nn.Module and LightningModule, which only raise."""
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    return owner is not nn.Module and not owner.__module__.startswith(("lightning.", "pytorch_lightning."))

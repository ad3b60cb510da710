"""Patch tokens of an encoder as grids, read while it runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

MOST_PREFIX_TOKENS = 17
"""Class tokens and registers before the patch tokens, where the module does not count them."""


class TokenReader:
    """Reads the last tokens or feature map that a module computes, from a forward pass that runs anyway.

    The first pass finds the submodule whose output is the last with positions; later passes read that submodule.

    Args:
        root: Module that runs. Nothing of a compiled one is read: a hook may make it compile again.
        path: Submodule that an earlier reader found.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 5, 2, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> reader, images = TokenReader(net), torch.zeros(2, 3, 8, 8)
        >>> with reader:
        ...     _ = net(images)
        >>> reader.path, reader.grid(images).shape
        ('0', torch.Size([2, 4, 4, 5]))
    """

    def __init__(self, root: nn.Module, path: str | None = None) -> None:
        self.path = path
        self._modules = dict(root.named_modules()) if _can_be_read(root) else {}
        self._output: Tensor | None = None
        self._hooks = ExitStack()

    def __enter__(self) -> TokenReader:
        for path, module in self._modules.items():
            if self.path in (None, path):
                hook = partial(_pass_output, partial(self._keep, path))
                self._hooks.enter_context(module.register_forward_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _keep(self, path: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and output.ndim in (3, 4):
            tokens = output.shape[1:3].numel() if output.ndim == 3 else output.shape[2:].numel()
            if tokens > 1 and min(output.shape[1:]) > 1:
                self.path, self._output = path, output.detach()

    def grid(self, images: Tensor) -> Tensor | None:
        """Tokens (B, h, w, D) of the images (B, C, H, W) of the last pass; None where nothing has their form."""
        if self._output is None or self.path is None or len(self._output) != len(images):
            return None
        return as_grid(self._output, height=images.shape[-2], width=images.shape[-1], prefix=self._prefix_tokens())

    def _prefix_tokens(self) -> int | None:
        """Tokens before the patch tokens, as timm's models count them."""
        path = str(self.path)
        while True:
            count = getattr(self._modules.get(path), "num_prefix_tokens", None)
            if isinstance(count, int) or not path:
                return count if isinstance(count, int) else None
            path = path.rpartition(".")[0]


def as_grid(tokens: Tensor, *, height: int, width: int, prefix: int | None = None) -> Tensor | None:
    """Tokens (B, T, D), or a map (B, D, h, w) or (B, h, w, D), as (B, h, w, D); None where they fit no grid.

    The grid has the proportions of the image. Tokens in front of it are the class token and registers.

    Example:
        >>> as_grid(torch.zeros(2, 17, 8), height=64, width=64).shape  # a class token, 4 × 4 patches
        torch.Size([2, 4, 4, 8])
        >>> as_grid(torch.zeros(2, 8, 2, 4), height=32, width=64).shape
        torch.Size([2, 2, 4, 8])
    """
    if tokens.ndim == 4:
        if _proportional(tokens.shape[2], tokens.shape[3], height, width):
            return tokens.permute(0, 2, 3, 1)
        return tokens if _proportional(tokens.shape[1], tokens.shape[2], height, width) else None
    total = tokens.shape[1]
    for skipped in range(MOST_PREFIX_TOKENS + 1) if prefix is None else [prefix]:
        rows = round(((total - skipped) * height / width) ** 0.5) if total > skipped else 0
        columns = (total - skipped) // rows if rows else 0
        if rows * columns == total - skipped > 1 and _proportional(rows, columns, height, width):
            return tokens[:, skipped:].unflatten(1, (rows, columns))
    return None


def _proportional(rows: int, columns: int, height: int, width: int) -> bool:
    """Whether a grid may cover an image: both sides rounded to whole patches."""
    return abs(rows * width - columns * height) < max(height, width)


def _can_be_read(root: nn.Module) -> bool:
    return not any(
        hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) or isinstance(m, torch.jit.ScriptModule)
        for m in root.modules()
    )


def _pass_output(read: Callable[[Any], None], _module: nn.Module, _inputs: Any, output: Any) -> None:
    read(output)

"""Evaluate a model during training without changing its state or the random generators."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


@contextmanager
def isolated(
    modules: Iterable[nn.Module], *, seed: int = 0, generators: Iterable[torch.Generator] = ()
) -> Iterator[None]:
    """Context with modules in evaluation mode and random generators set to ``seed``, all restored on exit.

    The generators of torch (CPU, every CUDA device), NumPy and Python are restored. Each module's ``training`` flag is
    restored separately, so that a teacher in evaluation mode remains in it. Buffers are restored too, and attributes
    that are tensors or numbers: memory banks, counters and observers of quantization change in evaluation mode. The
    seed is the same at every call, so that a random crop of the held-out set is the same crop each time.

    Compiled modules run eagerly inside. Recompiling for evaluation mode would count against the limit of
    recompilations in training.

    Args:
        modules: Modules; their submodules are included.
        seed: Seed of all generators inside.
        generators: Further generators to set and restore, such as a loader's, which training may use too.

    Example:
        >>> layer = nn.Dropout()
        >>> before = torch.get_rng_state()
        >>> with isolated([layer]):
        ...     layer.training, torch.rand(2).shape
        (False, torch.Size([2]))
        >>> layer.training, torch.equal(before, torch.get_rng_state())
        (True, True)
    """
    flags = {module: module.training for root in modules for module in root.modules()}
    with _generators(seed, generators), _state(flags), torch.compiler.set_stance("force_eager"):
        try:
            for module in flags:
                module.training = False
            yield
        finally:
            for module, training in flags.items():
                module.training = training


def user_hooks(roots: Iterable[nn.Module]) -> list[str]:
    """Forward hooks of modules by name, without those of torch and Lightning."""
    names = []
    for root in roots:
        for path, module in root.named_modules():
            for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
                owner = getattr(hook, "__module__", None) or type(hook).__module__
                if owner.partition(".")[0] not in ("torch", "lightning", "pytorch_lightning"):
                    names.append(f"{getattr(hook, '__qualname__', type(hook).__name__)} of {path or 'the module'}")
    return names


class _Saved(NamedTuple):
    """A tensor of a module, and a copy of its content."""

    tensor: Tensor
    content: Tensor


@contextmanager
def _state(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore buffers, and attributes that are tensors or numbers. A tensor that did not change is not written to."""
    saved = [(module, _save(module._buffers), _save(vars(module))) for module in modules]
    try:
        yield
    finally:
        for module, buffers, attributes in saved:
            _restore(module._buffers, buffers)
            _restore(vars(module), attributes)


def _save(values: Mapping[str, object]) -> dict[str, object]:
    """What is to be restored; parameters are not, as no evaluation changes them."""
    saved: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and not is_lazy(value):
            saved[name] = _Saved(value, value.detach().clone())
        elif value is None or isinstance(value, (bool, int, float)):
            saved[name] = value
    return saved


def _restore(values: MutableMapping[str, Any], saved: Mapping[str, object]) -> None:
    for name, before in saved.items():
        if not isinstance(before, _Saved):
            if values.get(name) is not before and name != "training":
                values[name] = before
            continue
        tensor, content = before
        with torch.no_grad():
            if tensor.shape != content.shape:
                tensor.resize_(content.shape)
            if not torch.equal(tensor, content):
                tensor.copy_(content)
        if values.get(name) is not tensor:
            values[name] = tensor


@contextmanager
def _generators(seed: int, others: Iterable[torch.Generator]) -> Iterator[None]:
    # default_generator: torch.manual_seed would queue a seed for CUDA that is not initialized yet.
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002  the global generator
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    other_states = [(generator, generator.get_state()) for generator in others]
    try:
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        if cuda is not None:
            torch.cuda.manual_seed_all(seed)
        for generator, _ in other_states:
            generator.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        for generator, state in other_states:
            generator.set_state(state)

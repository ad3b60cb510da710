"""Evaluate a model during training without changing its state or the random generators."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def isolated(
    modules: Iterable[nn.Module], *, seed: int = 0, generators: Iterable[torch.Generator] = ()
) -> Iterator[None]:
    """Context with modules in evaluation mode and random generators set to ``seed``, all restored on exit.

    The generators of torch (CPU, every CUDA device), NumPy and Python are restored. Each module's ``training`` flag is
    restored separately, so that a teacher in evaluation mode remains in it. The seed is the same at every call, so
    that a random crop of the held-out set is the same crop each time.

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
    with _generators(seed, generators), torch.compiler.set_stance("force_eager"):
        try:
            for module in flags:
                module.training = False
            yield
        finally:
            for module, training in flags.items():
                module.training = training


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

"""Look at a model in the middle of training and leave no trace."""

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
    """Modules in evaluation mode, random generators set to ``seed``; on leaving, everything as it was.

    What is put back: the state of the generators of torch (CPU, every CUDA device), NumPy and Python, and each
    module's own ``training`` flag, so that a teacher in evaluation mode stays there. With the seed the same at
    every call, a random crop of the held-out set is the same crop each time.

    Compiled modules run eagerly inside: a recompilation for evaluation mode would count against the limit of
    those that training is allowed.

    Args:
        modules: their submodules are included.
        seed: of all generators inside.
        generators: further ones to set and to put back, such as a loader's own, which training may draw from too.

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
    # default_generator, not torch.manual_seed: that one would queue a seed for a CUDA not yet initialised.
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002  the global one
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    kept = [(generator, generator.get_state()) for generator in others]
    try:
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        if cuda is not None:
            torch.cuda.manual_seed_all(seed)
        for generator, _ in kept:
            generator.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        for generator, state in kept:
            generator.set_state(state)

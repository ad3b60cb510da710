"""Models larger than a GPU: the strategy that shards them, and its checkpoints, folders with a part per rank."""

from __future__ import annotations

import os
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry

from fmtrain.training.checkpoints import (
    NonFiniteWeightsError,
    comparable_state,
    find_nonfinite,
    from_lightning,
    is_same_state,
    to_lightning,
)

FSDP2 = "fsdp2"
"""Name of the strategy in ``trainer.strategy``."""


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all ranks: weights, gradients and the optimizer are sharded, each step gathers a block at a time.

    A checkpoint is a folder of ``torch.distributed.checkpoint``. It is complete or absent: it is written beside its
    place and renamed. It can be continued on another number of ranks.

    Args:
        process_group_backend: Backend of torch.distributed; None: NCCL on GPUs, gloo on CPUs.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(tensor_parallel_size=1, process_group_backend=process_group_backend)
        self._written: Path | None = None
        self._state: dict[str, Any] = {}

    def setup_environment(self) -> None:
        """Form one group of all ranks."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write one checkpoint: every rank its part.

        Raises:
            NonFiniteWeightsError: A weight or a value of the optimizer is NaN or infinite; nothing is written.
        """
        path = Path(self.broadcast(str(filepath)))
        temporary, state = path.with_name(f"{path.name}.part"), comparable_state(checkpoint)
        same = self._written is not None and self._written.is_dir() and is_same_state(state, self._state)
        if self.broadcast(same):
            self._place(path, temporary, copied=self._written)
            return
        name = find_nonfinite(checkpoint)
        if self.reduce_boolean_decision(name is not None, all=False):
            where = name or "on another rank"
            raise NonFiniteWeightsError(
                f"the weights are not finite at step {checkpoint['global_step']} ({where}); nothing was written"
            )
        if self.is_global_zero:
            shutil.rmtree(temporary, ignore_errors=True)
        self.barrier()
        super().save_checkpoint(from_lightning(checkpoint), temporary)
        self.barrier()
        self._place(path, temporary)
        self._written, self._state = path, deepcopy(state)

    def _place(self, path: Path, temporary: Path, *, copied: Path | None = None) -> None:
        """Rename a finished folder, or links to the files of another one, to its place."""
        if self.is_global_zero and copied != path:
            if copied is not None:
                shutil.rmtree(temporary, ignore_errors=True)
                shutil.copytree(copied, temporary, copy_function=_link)
            earlier = path.with_name(f"{path.name}.earlier")
            shutil.rmtree(earlier, ignore_errors=True)
            if path.exists():
                path.rename(earlier)
            temporary.rename(path)
            shutil.rmtree(earlier, ignore_errors=True)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read one checkpoint of any number of ranks, without the time that earlier jobs used."""
        return to_lightning(super().load_checkpoint(checkpoint_path, weights_only=weights_only))


StrategyRegistry.register(FSDP2, ShardedStrategy, description="FSDP2 over all ranks, with sharded checkpoints")


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # the file system has no hard links
        shutil.copy2(source, target)


def check_strategy(path: Path, strategy: object) -> None:
    """Refuse to continue a sharded run without sharding, or another one with it.

    Raises:
        ValueError: One of checkpoint and strategy is sharded.
    """
    sharded = isinstance(strategy, ModelParallelStrategy)
    if path.is_dir() and not sharded:
        raise ValueError(f"{path} is sharded: continue with trainer.strategy {FSDP2}, or begin a run with model.init")
    if sharded and not path.is_dir():
        raise ValueError(f"{path} is not sharded: continue with trainer.strategy ddp, or begin a run with model.init")

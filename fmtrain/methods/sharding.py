"""Student and teacher sharded over ranks by FSDP2, for models that are larger than a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fmtrain.methods.backbone import Branch


def shard_(branch: Branch, mesh: DeviceMesh) -> None:
    """Shard each block, each head, and the rest of a branch. A part is whole only while it runs.

    Calls of ``forward``, ``features`` and ``tokens`` gather the parameters. They must run before those of a head.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    backbone: Any = branch.backbone
    heads = [module for name, module in branch.named_children() if name != "backbone"]
    for module in (*backbone.blocks, *heads):
        if any(True for _ in module.parameters()):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    # Otherwise the rest of the teacher, which has no backward pass, would stay whole.
    fully_shard(branch, mesh=mesh, reshard_after_forward=True)
    for method in ("features", "tokens"):
        register_fsdp_forward_method(branch, method)


def local(parameters: Iterable[Tensor]) -> list[Tensor]:
    """This rank's parts of sharded parameters, and others as they are."""
    return [p.to_local() if hasattr(p, "to_local") else p for p in parameters]


def whole(value: Tensor) -> Tensor:
    """A value that was computed from sharded tensors, on every rank; others as they are."""
    full: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full

"""DINO and DINOv2, imported on first use, and their components."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fmtrain.methods.dino import DINO as DINO
    from fmtrain.methods.dinov2 import DINOv2 as DINOv2

__all__ = ["DINO", "DINOv2"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"fmtrain.methods.{name.lower()}"), name)
    raise AttributeError(f"module 'fmtrain.methods' has no attribute {name!r}")

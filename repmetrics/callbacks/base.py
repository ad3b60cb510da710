"""Base class of callbacks for both namespaces of Lightning."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:

    def _namespaces() -> list[ModuleType]:
        """The namespaces of Lightning that are installed."""
        namespaces = []
        for package in ("lightning.pytorch", "pytorch_lightning"):
            try:
                namespaces.append(import_module(package))
            except ModuleNotFoundError as error:
                if error.name != package.split(".")[0]:
                    raise
        return namespaces

    class Callback(*(namespace.Callback for namespace in _namespaces())):
        """Subclass of ``lightning.pytorch.Callback`` and of ``pytorch_lightning.Callback``, if installed.

        A Trainer of one namespace rejects callbacks of the other; both accept this class.
        """

        def __new__(cls, *_args: Any, **_kwargs: Any) -> Any:  # noqa: D102  a constructor
            if not _namespaces():
                raise ImportError(f"{cls.__name__} needs Lightning: pip install 'repmetrics[lightning]'")
            return super().__new__(cls)

    # Annotations are read at run time: by jsonargparse, by Sphinx, by typing.get_type_hints.
    LightningModule, Trainer = next(((n.LightningModule, n.Trainer) for n in _namespaces()), (Any, Any))


__all__ = ["Callback", "LightningModule", "Trainer"]

"""Base class of callbacks for both namespaces of Lightning."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:

    def _bases() -> tuple[type, ...]:
        bases = []
        for package in ("lightning.pytorch", "pytorch_lightning"):
            try:
                bases.append(import_module(package).Callback)
            except ModuleNotFoundError as error:
                if error.name != package.split(".")[0]:
                    raise
        return tuple(bases)

    class Callback(*_bases()):
        """Subclass of ``lightning.pytorch.Callback`` and of ``pytorch_lightning.Callback``, if installed.

        A Trainer of one namespace rejects callbacks of the other; both accept this class.
        """

        def __new__(cls, *_args: Any, **_kwargs: Any) -> Any:  # noqa: D102  a constructor
            if not _bases():
                raise ImportError(f"{cls.__name__} needs Lightning: pip install 'repmetrics[lightning]'")
            return super().__new__(cls)


__all__ = ["Callback"]

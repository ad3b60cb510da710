"""Inert objects in the place of pickled types that are not loaded, and plain values of what they hold."""

from __future__ import annotations

import argparse
import types
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Modules whose names a pickle holds only to run code.
CODE_MODULES = {
    "os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "runpy", "importlib", "ctypes", "pty", "code",
    "commands", "multiprocessing", "webbrowser", "builtins.eval", "builtins.exec", "builtins.compile", "builtins.open",
    "builtins.__import__",
}  # fmt: skip
# Modules of torch that rebuild tensors: an unknown name there is a tensor that would be lost.
TENSOR_MODULES = ("torch._utils", "torch._tensor", "torch.storage", "torch.serialization")
MAX_DEPTH = 16


class Placeholder:
    """Inert object in the place of a pickled one whose type is not on the list of harmless types.

    It accepts any arguments and any state, keeps them, and runs nothing.

    Attributes:
        type_name: Name of the type in the pickle.
        args: Arguments of its constructor.
    """

    type_name = ""

    def __new__(cls, *args: Any, **_: Any) -> Placeholder:
        """Keep the arguments."""
        self = super().__new__(cls)
        self.args, self._state = args, None
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self._state = state

    args: tuple[Any, ...]
    _state: Any

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the pickled object, if its state is a mapping, or a pair of mappings as for ``__slots__``."""
        parts = self._state if isinstance(self._state, tuple) and len(self._state) == 2 else (self._state,)
        return {str(key): value for part in parts if isinstance(part, Mapping) for key, value in part.items()}

    def weights(self) -> dict[str, Any]:
        """Parameters, persistent buffers and submodules, if the pickled object is an ``nn.Module``."""
        attributes = self.attributes
        if not isinstance(attributes.get("_modules"), Mapping):
            return {}
        transient = attributes.get("_non_persistent_buffers_set") or ()
        groups = (attributes.get(name) for name in ("_parameters", "_buffers", "_modules"))
        content = {key: value for group in groups if isinstance(group, Mapping) for key, value in group.items()}
        return {str(key): value for key, value in content.items() if value is not None and key not in transient}


class _NewMapping:
    """Constructor of an empty mapping, for unknown types that a pickle fills with keys."""

    def __new__(cls, *_: Any, **__: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


class _NewList:
    """Constructor of an empty list, for unknown types that a pickle fills with items."""

    def __new__(cls, *_: Any, **__: Any) -> list[Any]:  # type: ignore[misc]
        return []


def runs_code(name: str) -> bool:
    """Whether a name in a pickle is one that only an attack, or a damaged file, calls."""
    return name in CODE_MODULES or name.split(".")[0] in CODE_MODULES or name.startswith(TENSOR_MODULES)


def replacement(name: str, *, filled: str) -> type:
    """Inert type for the name of an unknown one.

    Args:
        name: Dotted name in the pickle.
        filled: "keys" or "items" if the pickle fills its objects with them, else "".
    """
    kind = {"keys": _NewMapping, "items": _NewList}.get(filled, Placeholder)
    return type(name.rpartition(".")[2], (kind,), {"type_name": name})


def plain(value: Any, *, depth: int = 0) -> Any:
    """Mappings, lists and numbers in the place of namespaces, OmegaConf's nodes and other placeholders.

    Example:
        >>> plain({"args": argparse.Namespace(lr=0.1)})
        {'args': {'lr': 0.1}}
    """
    if depth > MAX_DEPTH:
        return None
    if isinstance(value, Placeholder):
        attributes = value.attributes
        inner = next((attributes[key] for key in ("_val", "_content") if key in attributes), None)
        public = {key: node for key, node in attributes.items() if not key.startswith("_")}
        return plain(public if inner is None else inner, depth=depth + 1)
    if isinstance(value, argparse.Namespace | types.SimpleNamespace):
        return plain(vars(value), depth=depth + 1)
    if isinstance(value, Mapping):
        return {str(key): plain(node, depth=depth + 1) for key, node in value.items()}
    if isinstance(value, list | tuple):
        return [plain(node, depth=depth + 1) for node in value]
    return None if isinstance(value, Tensor) else value

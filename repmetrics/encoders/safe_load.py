"""Read a checkpoint file without running the code in it.

A pickle is a program. PyTorch's ``weights_only`` unpickler calls only a list of harmless constructors. This module adds
the few that common checkpoints need, by name. Other types become inert placeholders, and names that only run code are
refused. The sizes that a file claims are compared with the size of the file before memory is allocated.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import struct
import types
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._weights_only_unpickler import _get_allowed_globals

from repmetrics.encoders.placeholders import Placeholder, replacement, runs_code

FORMATS = "a PyTorch file (.pt .pth .ckpt .bin) or .safetensors"
# Errors of unpicklers on bytes that are not a pickle.
CORRUPTION_ERRORS = (
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    RecursionError,
    UnicodeError,
    ImportError,
    pickle.UnpicklingError,
)
ITEM_BYTES = {"ComplexDouble": 16, "ComplexFloat": 8, "Double": 8, "Long": 8, "Float": 4, "Int": 4, "Half": 2}
ITEM_BYTES |= {"BFloat16": 2, "Short": 2}
MAX_HEADER = 100_000_000  # bytes; safetensors' own limit


def _allowed_globals() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Types, by name, that well-known trainers store in checkpoints and that have no effect when constructed.

    Lightning's AttributeDict becomes an OrderedDict: the unpickler fills no other mapping, and Lightning need not be
    installed. Paths become pure paths, which never access the disk.
    """
    scalar: Any = np.float64(0).__reduce__()[0]
    reconstruct: Any = np.zeros(0).__reduce__()[0]
    numpy: list[tuple[Callable[..., Any], str]] = [
        (function, f"numpy.{package}.multiarray.{name}")
        for package in ("core", "_core")  # before and after NumPy 2
        for function, name in ((scalar, "scalar"), (reconstruct, "_reconstruct"))
    ]
    return [
        argparse.Namespace,  # facebookresearch/dino
        (OrderedDict, "pytorch_lightning.utilities.parsing.AttributeDict"),
        (OrderedDict, "lightning_fabric.utilities.data.AttributeDict"),
        (OrderedDict, "lightning.fabric.utilities.data.AttributeDict"),
        (OrderedDict, "lightning.pytorch.utilities.parsing.AttributeDict"),
        (types.SimpleNamespace, "types.SimpleNamespace"),
        (PurePosixPath, "pathlib.PosixPath"),
        (PurePosixPath, "pathlib._local.PosixPath"),
        np.dtype,
        np.ndarray,
        *numpy,
        *(getattr(np.dtypes, name) for name in np.dtypes.__all__),
    ]


class Content(NamedTuple):
    """Content of a checkpoint file.

    Attributes:
        value: Nested mappings, lists, numbers, CPU tensors and placeholders.
        placeholders: Names of the types that became placeholders.
    """

    value: Any
    placeholders: tuple[str, ...] = ()


def read_checkpoint(path: Path) -> Any:
    """Content of a checkpoint file: nested mappings, lists, numbers, CPU tensors and placeholders.

    The first bytes determine the format, not the name.
    """
    with path.open("rb") as file:
        return read_open_checkpoint(file, name=path.name).value


def read_open_checkpoint(file: IO[bytes], *, name: str) -> Content:
    """Content of a checkpoint file that is open for reading, from its beginning; see `read_checkpoint`."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(16)
    file.seek(0)
    if head.startswith(b"PK\x03\x04"):
        content = _unpickle(file, name, _check_zip(file, name, size))
    elif head[8:9] == b"{":  # before pickle's mark, which may also be the first byte of a header's length
        content = Content(_read_safetensors(file, name, head, size))
    elif head[:1] == b"\x80":
        content = _unpickle(file, name, _check_legacy(file, name, size))
    else:
        raise ValueError(f"{name} is not a checkpoint: expected {FORMATS}, found {_describe(head)}")
    for key, tensor in flatten(content.value).items():
        if tensor.numel() * tensor.element_size() > size:  # strides of 0: a view of almost nothing
            raise ValueError(f"{name} refused: {key} is {tuple(tensor.shape)}, more than the file holds")
    return content


def _describe(head: bytes) -> str:
    known = {
        b"\x89HDF": "an HDF5 file (Keras?)",
        b"\x93NUMPY": "a NumPy array",
        b"\x1f\x8b": "a gzip archive: unpack it first",
        b"version https://": "a Git LFS pointer: run 'git lfs pull'",
        b"<": "a web page or XML: the download failed?",
        b"{": "JSON",
        b"GGUF": "a GGUF file",
    }
    if not head:
        return "an empty file"
    return next((text for start, text in known.items() if head.startswith(start)), f"bytes {head[:8]!r}")


def _check_zip(file: IO[bytes], name: str, size: int) -> dict[str, str]:
    """Names in the pickle. A torch file is a zip of *stored* records; others may claim more than the file holds."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            if any(entry.endswith("constants.pkl") for entry in entries):
                raise ValueError("it is a TorchScript archive, which holds code: save its state_dict() instead")
            if compressed := [key for key, entry in entries.items() if entry.compress_type != zipfile.ZIP_STORED]:
                raise ValueError(f"{compressed[0]!r} is compressed, where PyTorch stores records plain")
            if sum(entry.file_size for entry in entries.values()) > size:
                raise ValueError("it claims more bytes than it has")
            pickled = next((key for key in entries if key.endswith("/data.pkl") or key == "data.pkl"), None)
            if pickled is None:
                raise ValueError(f"a zip but no checkpoint: expected {FORMATS}, found {list(entries)[:3]}")
            with archive.open(pickled) as record:
                return _scan(record, pickles=1, size=size)
    except (zipfile.BadZipFile, NotImplementedError, struct.error, *CORRUPTION_ERRORS) as error:
        raise ValueError(f"{name} is truncated or damaged: {_first_line(error)}") from error
    except ValueError as error:
        raise ValueError(f"{name} refused: {error}") from error


def _check_legacy(file: IO[bytes], name: str, size: int) -> dict[str, str]:
    """Names in the pickle. The old format is five pickles, then the storages, which the fourth pickle declares."""
    try:
        first = _Scanner(file)
        if first.load() != torch.serialization.MAGIC_NUMBER:
            calls = f" that would call {next(iter(first.names))}" if first.names else ""
            raise ValueError(f"it is a plain pickle{calls}, not a file of torch.save")
        return _scan(file, pickles=3, size=size)
    except CORRUPTION_ERRORS as error:
        raise ValueError(f"{name} is truncated or damaged: {_first_line(error)}") from error
    except ValueError as error:
        raise ValueError(f"{name} refused: {error}") from error


class _Scanned:
    """Object in the place of every pickled one while a file is scanned: accepts anything, does nothing."""

    filled = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        type(self).filled = "keys"

    def append(self, item: Any) -> None:
        type(self).filled = "items"

    def extend(self, items: Any) -> None:
        type(self).filled = "items"


class _Scanner(pickle._Unpickler):
    """Reads the storages and names in a pickle without constructing any object except plain containers.

    This uses the private Python unpickler: the C one allocates memory for the largest memo index that a file names.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="latin-1")
        self.claims: dict[str, int] = {}
        self.names: dict[str, type[_Scanned]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """An inert type instead of the object of that name."""
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # of Python 2
        return self.names.setdefault(f"{module}.{name}", type(name, (_Scanned,), {}))

    def persistent_load(self, pid: Any) -> Any:
        """("storage", type, key, location, number of elements, …), as torch.save writes it."""
        if isinstance(pid, tuple) and pid[:1] == ("module",):  # the old format stores classes of networks so
            raise ValueError("it holds the source code of a class: save its state_dict() alone")
        if not isinstance(pid, tuple) or len(pid) < 5 or not isinstance(pid[4], int) or pid[4] < 0:
            raise pickle.UnpicklingError("the description of a storage is not PyTorch's")
        kind = getattr(pid[1], "__name__", "").removesuffix("Storage")
        self.claims[str(pid[2])] = pid[4] * ITEM_BYTES.get(kind, 1)
        return _Scanned()


def _scan(file: IO[bytes], *, pickles: int, size: int) -> dict[str, str]:
    """Names in the last of this number of pickles, with what its objects are filled with; sizes are checked."""
    for _ in range(pickles):
        scanner = _Scanner(file)
        scanner.load()
    if (claimed := sum(scanner.claims.values())) > size:
        raise ValueError(f"its tensors claim {claimed:,} bytes in a file of {size:,}")
    return {name: scanned.filled for name, scanned in scanner.names.items()}


def _unpickle(file: IO[bytes], name: str, names: Mapping[str, str]) -> Content:
    file.seek(0)
    allowed = _allowed_globals()
    harmless = {e[1] if isinstance(e, tuple) else f"{e.__module__}.{e.__qualname__}" for e in allowed}
    harmless |= _get_allowed_globals().keys()
    unknown = {key: filled for key, filled in names.items() if key not in harmless}
    if refused := next(filter(runs_code, unknown), None):
        raise ValueError(
            f"{name} refused: loading it would call {refused}, which is not on the list of harmless types; "
            "save its state_dict() alone"
        )
    placeholders = [(replacement(key, filled=filled), key) for key, filled in unknown.items()]
    try:
        with torch.serialization.safe_globals([*allowed, *placeholders]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol: if it cannot be read, that is an error
            return Content(torch.load(file, map_location="cpu", weights_only=True), tuple(unknown))
    except pickle.UnpicklingError as error:
        reason = str(error).partition("WeightsUnpickler error: ")[2].strip() or str(error).strip()
        raise ValueError(f"{name} refused: {reason.splitlines()[0]}; save its state_dict() alone") from error
    except (RuntimeError, ValueError, *CORRUPTION_ERRORS) as error:
        if sharded := next((key for key in unknown if key.startswith("torch.distributed.")), None):
            raise ValueError(
                f"{name} holds one rank's part of a sharded network ({sharded}): save the full state_dict"
            ) from error
        raise ValueError(f"{name} is truncated or damaged: {_first_line(error)}") from error


def _read_safetensors(file: IO[bytes], name: str, head: bytes, size: int) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    (length,) = struct.unpack("<Q", head[:8])
    if length > min(MAX_HEADER, size - 8):
        raise ValueError(f"{name} claims a header of {length:,} bytes in a file of {size:,}: truncated or hostile")
    content = file.read()
    try:
        tensors = load(content)
        header = json.loads(content[8 : 8 + length])  # `load` returns the tensors in random order
        return {key: tensors[key] for key in sorted(tensors, key=lambda key: (header[key]["data_offsets"], key))}
    except (SafetensorError, ValueError, RuntimeError, *CORRUPTION_ERRORS) as error:
        raise ValueError(f"{name} is truncated or damaged: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def flatten(content: Any) -> dict[str, Tensor]:
    """Every tensor in nested mappings, and in the modules of a pickled network, by its dotted path.

    Example:
        >>> list(flatten({"teacher": {"norm.weight": torch.ones(2)}, "epoch": 3}))
        ['teacher.norm.weight']
    """
    tensors: dict[str, Tensor] = {}
    waiting: list[tuple[str, Any]] = [("", content)]
    seen: set[int] = set()  # a pickle may hold a mapping that holds itself
    while waiting:
        path, node = waiting.pop()
        if isinstance(node, Tensor):
            tensors[path] = node
            continue
        children = node.weights() if isinstance(node, Placeholder) else node
        if isinstance(children, Mapping) and id(node) not in seen:
            seen.add(id(node))
            inner = [(f"{path}.{key}" if path else str(key), value) for key, value in children.items()]
            waiting.extend(reversed(inner))
    return tensors


def join_first(names: Sequence[str], *, shown: int = 4) -> str:
    """The first names of a list, and the number of the rest.

    Example:
        >>> join_first(["a", "b", "c"], shown=2)
        'a, b and 1 more'
    """
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more

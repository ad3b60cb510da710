"""Reading a checkpoint file without running what is in it.

Pickle is a program. PyTorch's ``weights_only`` unpickler runs only a list of harmless constructors; this module
adds the few that common checkpoints need, by name, refuses everything else with the name of what was refused,
and compares the sizes a file claims with the size it has before memory is taken.
"""

from __future__ import annotations

import argparse
import pickle
import re
import struct
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

FORMATS = "a PyTorch file (.pt .pth .ckpt .bin) or .safetensors"
# What unpicklers raise over bytes that are no pickle.
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
    """The types, by name, that well-known trainers put into checkpoints and that do nothing when made.

    Lightning's AttributeDict becomes an OrderedDict: the unpickler fills no other mapping, and so Lightning need
    not be installed. Paths become pure ones, which never touch the disk.
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


def read_checkpoint(path: Path) -> Any:
    """The content of a checkpoint file: nested mappings, lists, numbers and CPU tensors.

    The format is told from the first bytes, not from the name.

    Raises:
        OSError: the file is not there or cannot be read.
        ValueError: the file is truncated, hostile, or in no format known here; the message says which.
    """
    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith(b"PK\x03\x04"):
        _check_zip(path)
        content = _unpickle(path)
    elif head[8:9] == b"{":  # before pickle's own sign, which may as well be the first byte of a header's length
        content = _read_safetensors(path, head)
    elif head[:1] == b"\x80":
        _check_legacy(path)
        content = _unpickle(path)
    else:
        raise ValueError(f"{path.name} is not a checkpoint: expected {FORMATS}, found {_describe(head)}")
    for name, tensor in flatten(content).items():
        if tensor.numel() * tensor.element_size() > path.stat().st_size:  # strides of 0: a view of nearly nothing
            raise ValueError(f"{path.name} refused: {name} is {tuple(tensor.shape)}, more than the file holds")
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


def _check_zip(path: Path) -> None:
    """A torch file is a zip of *stored* records. Anything else may claim more than the file holds."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            if any(name.endswith("constants.pkl") for name in entries):
                raise ValueError("it is a TorchScript archive, which holds code: save its state_dict() instead")
            if squeezed := [name for name, entry in entries.items() if entry.compress_type != zipfile.ZIP_STORED]:
                raise ValueError(f"{squeezed[0]!r} is compressed, where PyTorch stores records plain")
            if sum(entry.file_size for entry in entries.values()) > size:
                raise ValueError("it claims more bytes than it has")
            pickled = next((name for name in entries if name.endswith("/data.pkl") or name == "data.pkl"), None)
            if pickled is None:
                raise ValueError(f"a zip but no checkpoint: expected {FORMATS}, found {list(entries)[:3]}")
            with archive.open(pickled) as file:
                _check_claims(_declared_sizes(file, pickles=1), size)
    except (zipfile.BadZipFile, NotImplementedError, struct.error, *CORRUPTION_ERRORS) as error:
        raise ValueError(f"{path.name} is truncated or damaged: {_first_line(error)}") from error
    except ValueError as error:
        raise ValueError(f"{path.name} refused: {error}") from error


def _check_legacy(path: Path) -> None:
    """The old format is five pickles and then the storages; loading would allocate what the fourth claims, unseen."""
    try:
        with path.open("rb") as file:
            first = _SizeReader(file)
            if first.load() != torch.serialization.MAGIC_NUMBER:
                calls = f" that would call {first.names[0]}" if first.names else ""
                raise ValueError(f"it is a plain pickle{calls}, and no file of torch.save")
            _check_claims(_declared_sizes(file, pickles=3), path.stat().st_size)
    except CORRUPTION_ERRORS as error:
        raise ValueError(f"{path.name} is truncated or damaged: {_first_line(error)}") from error
    except ValueError as error:
        raise ValueError(f"{path.name} refused: {error}") from error


def _check_claims(claims: Mapping[str, int], size: int) -> None:
    if sum(claims.values()) > size:
        raise ValueError(f"its tensors claim {sum(claims.values()):,} bytes in a file of {size:,}")


class _Placeholder:
    """What every name in a pickle stands for while sizes are read: takes anything, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass


class _SizeReader(pickle._Unpickler):
    """Reads a pickle's storages without making any object of it but plain containers.

    In Python, because the one in C takes memory for the largest memo index that a file cares to name.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="latin-1")
        self.claims: dict[str, int] = {}
        self.names: list[str] = []

    def find_class(self, module: str, name: str) -> Any:
        """Never the real thing."""
        self.names.append(f"{module}.{name}")
        return type(name, (_Placeholder,), {})

    def persistent_load(self, pid: Any) -> Any:
        """("storage", type, key, location, number of elements, …), as torch.save writes it."""
        if not isinstance(pid, tuple) or len(pid) < 5 or not isinstance(pid[4], int) or pid[4] < 0:
            raise pickle.UnpicklingError("a storage is described in no way that PyTorch does")
        kind = getattr(pid[1], "__name__", "").removesuffix("Storage")
        self.claims[str(pid[2])] = pid[4] * ITEM_BYTES.get(kind, 1)
        return _Placeholder()


def _declared_sizes(file: IO[bytes], *, pickles: int) -> dict[str, int]:
    """Bytes each storage claims, by its key, in the last of so many pickles."""
    for _ in range(pickles):
        reader = _SizeReader(file)
        reader.load()
    return reader.claims


def _unpickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_allowed_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol: if it cannot be read, that is an error
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:GLOBAL|Unsupported class|global) ([\w.]+)", str(error))
        if refused:
            raise ValueError(
                f"{path.name} refused: loading it would call {refused.group(1)}, which is not on the list of "
                "harmless types; save its state_dict() alone"
            ) from error
        raise ValueError(f"{path.name} refused: {_first_line(error)}") from error
    except (RuntimeError, ValueError, *CORRUPTION_ERRORS) as error:
        raise ValueError(f"{path.name} is truncated or damaged: {_first_line(error)}") from error


def _read_safetensors(path: Path, head: bytes) -> dict[str, Tensor]:
    (length,) = struct.unpack("<Q", head[:8])
    size = path.stat().st_size
    if length > min(MAX_HEADER, size - 8):
        raise ValueError(f"{path.name} claims a header of {length:,} bytes in a file of {size:,}: truncated or hostile")
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path.name} is truncated or damaged: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def flatten(content: Any) -> dict[str, Tensor]:
    """Every tensor in nested mappings, by its dotted path.

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
        elif isinstance(node, Mapping) and id(node) not in seen:
            seen.add(id(node))
            inner = [(f"{path}.{key}" if path else str(key), value) for key, value in node.items()]
            waiting.extend(reversed(inner))
    return tensors


def join_first(names: Sequence[str], *, shown: int = 4) -> str:
    """The first few of many names, and how many more there are.

    Example:
        >>> join_first(["a", "b", "c"], shown=2)
        'a, b and 1 more'
    """
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more

"""Read a folder of torch.distributed.checkpoint (FSDP, DINOv2, DINOv3) without running the code in its metadata."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repmetrics.encoders.placeholders import Placeholder, replacement
from repmetrics.encoders.safe_load import CORRUPTION_ERRORS, read_open_checkpoint

METADATA = ".metadata"
MAX_METADATA = 1 << 28  # bytes; the metadata of a network of 7 billion weights has less than one million
VALUES = ("iteration", "global_step", "step", "hyper_parameters")


class DistributedContent(NamedTuple):
    """Tensors by name, other values by name, and the digests of the files."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]
    digests: tuple[str, ...]


class _MetadataReader(pickle._Unpickler):
    """Reads the metadata with an inert object in the place of every object."""

    def find_class(self, module: str, name: str) -> Any:
        """A tuple for torch.Size, else a placeholder."""
        return tuple if (module, name) == ("torch", "Size") else replacement(f"{module}.{name}", filled="")


def read_distributed(folder: Path, *, digests: bool) -> DistributedContent:
    """Assemble the tensors of a folder, except those of the optimizer.

    Raises:
        ValueError: The metadata or a part is damaged, absent, or in an encoding that is not known.
    """
    metadata = _read_metadata(folder / METADATA)
    entries, storage = metadata.get("state_dict_metadata"), metadata.get("storage_data")
    if not isinstance(entries, Mapping) or not isinstance(storage, Mapping):
        raise ValueError(f"{folder.name}/{METADATA} is not metadata of torch.distributed.checkpoint")
    places = {_index(key): value.attributes for key, value in storage.items() if isinstance(value, Placeholder)}
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for key, entry in entries.items():
        described = entry.attributes if isinstance(entry, Placeholder) else {}
        if key.split(".")[0].startswith("optim"):
            continue
        if "chunks" in described:
            tensors[key] = _assemble(folder, key, described["size"], described["chunks"], places)
        elif key in VALUES and (key, None) in places:
            values[key] = _read_part(folder, key, places[key, None])
    files = sorted({str(place.get("relative_path")) for place in places.values()})
    hashed = [folder / METADATA, *(folder / name for name in files)] if digests else []
    return DistributedContent(tensors, values, tuple(_sha256(file) for file in hashed))


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a folder whose files are complete.

    Raises:
        OSError: A file is absent.
        ValueError: The metadata is damaged, or a file is shorter than it states.
    """
    metadata = _read_metadata(folder / METADATA)
    entries, storage = metadata.get("state_dict_metadata") or {}, metadata.get("storage_data") or {}
    for place in (value.attributes for value in storage.values() if isinstance(value, Placeholder)):
        size, end = (folder / str(place["relative_path"])).stat().st_size, int(place["offset"]) + int(place["length"])
        if size < end:
            raise ValueError(f"{place['relative_path']} is incomplete: it has {size} bytes, the metadata states {end}")
    described = {key: entry.attributes for key, entry in entries.items() if isinstance(entry, Placeholder)}
    return {key: tuple(entry["size"]) for key, entry in described.items() if "chunks" in entry}


def _read_metadata(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        content = file.read(MAX_METADATA + 1)
    if len(content) > MAX_METADATA:
        raise ValueError(f"{path} refused: metadata of more than {MAX_METADATA:,} bytes")
    try:
        metadata = _MetadataReader(io.BytesIO(content)).load()
    except (ValueError, *CORRUPTION_ERRORS) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from error
    return metadata.attributes if isinstance(metadata, Placeholder) else {}


def _index(key: Any) -> tuple[str, tuple[int, ...] | None]:
    """Name of a tensor, and the offset of the part."""
    described = key.attributes if isinstance(key, Placeholder) else {}
    offset = described.get("offset")
    return str(described.get("fqn")), tuple(offset) if offset is not None else None


def _assemble(
    folder: Path, name: str, size: Sequence[int], chunks: Sequence[Any], places: Mapping[Any, Mapping[str, Any]]
) -> Tensor:
    parts: list[tuple[tuple[int, ...], Tensor]] = []
    for chunk in chunks:
        offset = tuple(chunk.attributes["offsets"])
        place = places.get((name, offset))
        if place is None:
            raise ValueError(f"{folder.name}: the part of {name} at {offset} is not in the metadata: copy all files")
        part = _read_part(folder, name, place)
        if not isinstance(part, Tensor) or part.shape != torch.Size(chunk.attributes["sizes"]):
            raise ValueError(f"{folder.name}: the part of {name} at {offset} is not what the metadata states")
        parts.append((offset, part))
    if sum(part.numel() for _, part in parts) != torch.Size(size).numel():
        raise ValueError(f"{folder.name}: the parts of {name} do not cover its shape {tuple(size)}")
    whole = torch.empty(tuple(size), dtype=parts[0][1].dtype)
    for offset, part in parts:
        whole[tuple(slice(start, start + length) for start, length in zip(offset, part.shape, strict=True))] = part
    return whole


def _read_part(folder: Path, name: str, place: Mapping[str, Any]) -> Any:
    if place.get("transform_descriptors"):
        raise ValueError(f"{folder.name}: {name} is stored as {place['transform_descriptors']}: save it uncompressed")
    path = folder / str(place["relative_path"])
    if path.resolve().parent != folder.resolve():
        raise ValueError(f"{folder.name} refused: its metadata names a file outside of the folder, {path}")
    if not path.is_file():
        raise ValueError(f"{folder.name} lacks {path.name}, which its metadata names: copy all files of the folder")
    with path.open("rb") as file:
        file.seek(int(place["offset"]))
        content = file.read(int(place["length"]))
    return read_open_checkpoint(io.BytesIO(content), name=f"{folder.name}/{path.name}").value


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Hostile and damaged files: refused in one sentence, nothing run, no memory taken, no crash."""

from __future__ import annotations

import io
import json
import pickle
import resource
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from repmetrics.data.open import open_data
from repmetrics.encoders.checkpoint import load_encoder
from repmetrics.encoders.safe_load import flatten, read_checkpoint

HEADROOM = 2 << 30  # bytes of address space that a refusal may use in addition


@pytest.fixture
def little_memory() -> Iterator[None]:
    """On Linux, allocating what a hostile file claims fails."""
    if not sys.platform.startswith("linux"):
        yield
        return
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=64, depth=1, num_heads=1, num_classes=0).state_dict()


def torch_file(content: Any, *, new: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def rezip(whole: bytes, change: Callable[[str, bytes], bytes], *, compression: int = zipfile.ZIP_STORED) -> bytes:
    """The same archive with its records changed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return out.getvalue()


def claim(content: bytes, *, numel: int) -> bytes:
    """A pickled storage of 1000 elements (opcode M, e8 03) claims `numel` instead."""
    assert content.count(b"M\xe8\x03") >= 1
    return content.replace(b"M\xe8\x03", b"J" + struct.pack("<i", numel))


def safetensors_file(header: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


FLAT = {"w": torch.zeros(1000)}
TEN_GIB = 10 << 30
HOSTILE: dict[str, tuple[bytes, str]] = {
    "zip_claim.pt": (
        rezip(torch_file(FLAT), lambda n, b: claim(b, numel=2_000_000_000) if n.endswith("data.pkl") else b),
        "tensors claim 8,000,000,000 bytes in a file of",
    ),
    "legacy_claim.pt": (
        claim(torch_file(FLAT, new=False), numel=2_000_000_000),
        "tensors claim 8,000,000,000 bytes in a file of",
    ),
    "deflated.pt": (
        rezip(torch_file(FLAT), lambda n, b: b, compression=zipfile.ZIP_DEFLATED),
        "is compressed, where PyTorch stores records plain",
    ),
    "stride0.pt": (torch_file({"w": torch.zeros(1).expand(1 << 40)}), "more than the file holds"),
    "header.safetensors": (struct.pack("<Q", TEN_GIB) + b'{"w":', "claims a header of 10,737,418,240 bytes"),
    "big_endian.safetensors": (
        struct.pack(">Q", 60) + safetensors_file({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})[8:],
        "claims a header of",
    ),
    "offsets.safetensors": (
        safetensors_file({"w": {"dtype": "F32", "shape": [TEN_GIB // 4], "data_offsets": [0, TEN_GIB]}}, b"1234"),
        "truncated or damaged",
    ),
    "byteorder.pt": (
        rezip(torch_file(FLAT), lambda n, b: b"middle" if n.endswith("byteorder") else b),
        "truncated or damaged",
    ),
    "photos.pt": (b"", ""),  # written below: a zip of something else
    "half.pt": (torch_file(FLAT)[:2000], "truncated or damaged"),
    "half_legacy.pt": (torch_file(FLAT, new=False)[:300], "truncated or damaged"),
}
_zip = io.BytesIO()
with zipfile.ZipFile(_zip, "w") as _archive:
    _archive.writestr("a.txt", "hello")
HOSTILE["photos.pt"] = (_zip.getvalue(), "a zip but no checkpoint")


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path: Path, name: str) -> None:
    content, message = HOSTILE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*({message})") as caught:
        read_checkpoint(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_script_archive_holds_code(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "s.pt"))
    with pytest.raises(ValueError, match="TorchScript archive, which holds code"):
        read_checkpoint(tmp_path / "s.pt")


def test_names_are_keys_and_never_paths(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save_file({**weights(), "../../escaped": torch.zeros(2)}, tmp_path / "in" / "a.safetensors")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"1 left over: \.\./\.\./escaped"):
        load_encoder(tmp_path / "in" / "a.safetensors")
    assert sorted(tmp_path.rglob("*")) == before


def test_big_endian_files_of_torch_are_read(tmp_path: Path) -> None:
    swapped = rezip(
        torch_file({"w": torch.arange(4.0)}),
        lambda name, record: (
            b"big"
            if name.endswith("byteorder")
            else np.frombuffer(record, "<f4").astype(">f4").tobytes()
            if "/data/" in name
            else record
        ),
    )
    (tmp_path / "a.pt").write_bytes(swapped)
    assert read_checkpoint(tmp_path / "a.pt")["w"].tolist() == [0, 1, 2, 3]


def test_tensors_keep_their_order(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "a.safetensors")
    assert list(read_checkpoint(tmp_path / "a.safetensors")) == list(load_file(tmp_path / "a.safetensors"))


def test_a_mapping_that_holds_itself_ends() -> None:
    loop: dict[str, Any] = {"w": torch.zeros(1)}
    loop["again"] = loop
    assert list(flatten(loop)) == ["w"]


@pytest.mark.usefixtures("little_memory")
def test_embeddings_that_claim_much(tmp_path: Path) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": (1 << 24, 1 << 10)}
    with (tmp_path / "e.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
    np.savez_compressed(tmp_path / "e.npz", features=np.zeros((1 << 18, 64), np.float32))
    for name in ("e.npy", "e.npz"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as NumPy"):
            open_data(tmp_path / name)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.filterwarnings("ignore")  # torch warns about what it finds in broken files
def test_300_damaged_files_without_a_crash(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    save_file(weights(), tmp_path / "w.safetensors")
    originals = {
        "a.pt": torch_file({"model": weights()}),
        "b.pt": torch_file({"model": weights()}, new=False),
        "c.safetensors": (tmp_path / "w.safetensors").read_bytes(),
        "d.pt": pickle.dumps({"a": [1, 2, 3]}),
    }
    outcomes = {"loaded": 0, "refused": 0}
    for i in range(300):
        name, whole = list(originals.items())[i % 4]
        damaged = bytearray(whole)
        end = len(damaged) if i % 3 else min(len(damaged), 4096)  # the headers are at the start
        for position in generator.integers(0, end, size=int(generator.integers(1, 30))):
            damaged[position] = generator.integers(0, 256)
        if i % 5 == 0:
            del damaged[int(generator.integers(0, len(damaged))) :]
        path = tmp_path / name
        path.write_bytes(damaged)
        try:
            load_encoder(path)
            outcomes["loaded"] += 1
        except ValueError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 100  # changed numbers among the weights cannot be noticed; the rest must be

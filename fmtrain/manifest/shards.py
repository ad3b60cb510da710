"""Scan of a folder in shares, by the jobs of an array: their records, and the merge of all. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from fmtrain.manifest.manifest import assets_dir, info_from_json
from fmtrain.manifest.scan import Job, ScanResult
from fmtrain.rng import stable_hash
from fmtrain.slides.info import fingerprint
from fmtrain.slides.remote import StorageError, version
from repmetrics.atomic_write import write_text

FORMAT, VERSION = "fmtrain manifest shard", 1


class Shard(NamedTuple):
    """One share of the slides of a folder: `number` from 1 to `total`."""

    number: int
    total: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard of a text like "3/16".

        Example:
            >>> Shard.parse("3/16")
            Shard(number=3, total=16)
        """
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise ValueError(f"--shard must be like 3/16, from 1/16 to 16/16, got {text!r}")
        return cls(int(number), int(count))

    def of(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs of this shard. A hash of the name decides: a slide that joins the folder moves no other."""
        return [job for job in jobs if stable_hash(job.name) % self.total == self.number - 1]

    def record(self, manifest: Path) -> Path:
        """File of the results of this shard."""
        return folder(manifest) / f"{self.number}-of-{self.total}.json"


def folder(manifest: Path) -> Path:
    """Folder of the records of a manifest's shards."""
    return assets_dir(manifest) / "shards"


def write_record(path: Path, jobs: Sequence[Job], results: Sequence[ScanResult]) -> None:
    """Write the results of a shard. The file is there when the shard is complete."""
    slides = {job.name: {"state": state(job), **_to_json(result)} for job, result in zip(jobs, results, strict=True)}
    write_text(path, json.dumps({"format": FORMAT, "version": VERSION, "slides": slides}, ensure_ascii=False))


def read_records(manifest: Path) -> dict[str, dict[str, Any]]:
    """Records of the slides of all shards, by name.

    Raises:
        ValueError: There are no records, those of a shard are missing, or they are of several divisions.
    """
    paths = sorted(folder(manifest).glob("*-of-*.json"))
    counts = {int(path.stem.partition("-of-")[2]) for path in paths}
    if not paths:
        raise ValueError(f"{folder(manifest)} has no records to merge: run each --shard first")
    if len(counts) > 1:
        raise ValueError(
            f"{folder(manifest)} has records of divisions into {sorted(counts)} shards: delete those of one"
        )
    count = counts.pop()
    missing = [k for k in range(1, count + 1) if not Shard(k, count).record(manifest).exists()]
    if missing:
        names = ", ".join(f"{k}/{count}" for k in missing[:8]) + (", …" if len(missing) > 8 else "")
        raise ValueError(f"{len(missing)} of {count} shards are missing: run --shard {names} before --merge")
    records: dict[str, dict[str, Any]] = {}
    for path in paths:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.get("version") != VERSION:
            raise ValueError(f"{path} was written by another version: run its shard again")
        records |= document["slides"]
    return records


def merged(records: Mapping[str, dict[str, Any]], jobs: Sequence[Job]) -> dict[str, ScanResult]:
    """Results of the jobs that a shard scanned as they are now, by name; storage that failed may work again."""
    results = {}
    for job in jobs:
        record = records.get(job.name)
        if record is not None and not record["may_pass"] and record["state"] == state(job):
            results[job.name] = _from_json(job, record)
    return results


def state(job: Job) -> list[Any]:
    """What the result of a job depends on, as JSON; sizes and times stand for the content of files."""
    try:
        files = [version(job.path.parent / name) for name in job.files or (job.path.name,)]
        mask = None if job.given_mask is None else fingerprint(job.given_mask)
    except StorageError:
        raise
    except OSError as error:
        return [str(error.strerror)]
    return [str(job.path), list(job.given or ()), list(job.files), job.problem, mask, files]


def _to_json(result: ScanResult) -> dict[str, Any]:
    return {
        "info": None if result.info is None else asdict(result.info),
        "tissue_mm2": result.tissue_mm2,
        "problem": result.problem,
        "mask_quality": result.mask_quality,
        "may_pass": result.may_pass,
    }


def _from_json(job: Job, record: Mapping[str, Any]) -> ScanResult:
    info = None if record["info"] is None else info_from_json(record["info"])
    return ScanResult(job.path, info, record["tissue_mm2"], record["problem"], job.name, record["mask_quality"])

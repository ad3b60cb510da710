"""Warnings on a collection: what of the user's input was not used, and values that contradict each other. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from fmtrain.manifest.file_kinds import SUFFIXES
from fmtrain.manifest.scan import ScanResult
from fmtrain.manifest.search import OtherFile
from fmtrain.manifest.shown_names import examples
from fmtrain.slides.resolution import INCH_PER_CM, SAME_OBJECTIVE

_DOUBTFUL = (
    "the folder cannot be read", "a format that OpenSlide", "an incomplete file", "a broken link", "no permission",
    "cannot be read",
)  # fmt: skip
FEW, MANY = 0.1, 5  # an outlier is in a group of at most a tenth of the slides, beside a group of at least five


def passed_over(others: Sequence[OtherFile]) -> list[str]:
    """Warnings on folders that could not be searched, and on files that may be slides."""
    by_reason: dict[str, list[str]] = {}
    for other in others:
        picture, hidden = "a picture" in other.reason, other.reason.startswith("hidden")
        if hidden and PurePosixPath(other.relative).suffix.lower() not in SUFFIXES:
            continue
        if picture or hidden or other.reason.startswith(_DOUBTFUL):
            by_reason.setdefault(other.reason, []).append(other.relative)
    return [
        f"not {'searched' if 'folder' in reason else 'used'} ({len(names)}): {examples(names, 'file')}; {reason}"
        for reason, names in by_reason.items()
    ]


def mpp_doubts(results: Sequence[ScanResult], *, filler: float | None, overrides: Mapping[str, int]) -> list[str]:
    """Warnings on resolutions: user's values that were not used, contradictions within files and among them.

    Args:
        results: All slides.
        filler: The value of --mpp.
        overrides: Number of slides that each --mpp-override fits.
    """
    used = [result.info for result in results if result.info is not None]
    lines = [f"--mpp-override {pattern} fits no slide" for pattern, count in overrides.items() if not count]
    if filler is not None and not any(info.mpp_source == "given" for info in used):
        lines.append(f"--mpp {filler:g} was not used: every slide has an mpp; --mpp-override replaces it")
    contradictions = [f"{info.name}: {text}" for info in used for text in info.warnings]
    if contradictions:
        lines.append(f"doubtful: {examples(contradictions)}; the table or --mpp-override corrects an mpp")
    outliers = mpp_outliers({info.name: info.mpp for info in used})
    if outliers:
        texts = [f"{name}: {text}" for name, text in outliers.items()]
        lines.append(f"unusual mpp: {examples(texts)}; the table or --mpp-override corrects it")
    return lines


def mpp_outliers(mpps: Mapping[str, float]) -> dict[str, str]:
    """Slides whose mpp differs from that of nearly all others, with the reason.

    Example:
        >>> mpp_outliers({**{f"{k}.svs": 0.5 for k in range(20)}, "odd.svs": 1.27})
        {'odd.svs': 'mpp 1.27, where most have 0.5 (factor 2.54: inch and centimeter confused)'}
    """
    groups: list[list[str]] = []
    for name in sorted(mpps, key=lambda key: mpps[key]):
        if groups and mpps[name] <= mpps[groups[-1][-1]] * SAME_OBJECTIVE**0.5:
            groups[-1].append(name)
        else:
            groups.append([name])
    largest = max(groups, key=len, default=[])
    if len(largest) < MANY:
        return {}
    usual = mpps[largest[len(largest) // 2]]
    outliers = {}
    for group in groups:
        for name in group if group is not largest and len(group) <= max(1, FEW * len(mpps)) else ():
            ratio = max(mpps[name] / usual, usual / mpps[name])
            inch = " (factor 2.54: inch and centimeter confused)" if abs(ratio / INCH_PER_CM - 1) < 0.02 else ""
            outliers[name] = f"mpp {mpps[name]:.4g}, where most have {usual:.4g}{inch}"
    return outliers

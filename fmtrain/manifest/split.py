"""Choice of the held-out patients, and the check of a split. Pure functions, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fmtrain.manifest.shown_names import shown
from fmtrain.rng import hash_order

JACKKNIFE_GROUPS = 32  # maximum number of groups in the standard errors of repmetrics


def select_held_out(units: Sequence[str], *, fraction: float, seed: int) -> set[str]:
    """Patients (or sites) that are held out: a fraction, and at least a quarter as long as that is up to 32.

    A hash of each name decides. New slides therefore move only the few patients that keep the fraction constant.

    Example:
        >>> len(select_held_out([f"patient {k}" for k in range(100)], fraction=0.1, seed=0))
        25
    """
    names = sorted(set(units))
    if len(names) < 2:
        raise ValueError(f"{len(names) or 'no'} patient or site has usable slides: a split needs at least two")
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction must lie between 0 and 1, got {fraction}")
    count = max(round(fraction * len(names)), min(JACKKNIFE_GROUPS, len(names) // 4), 1)
    return {names[k] for k in hash_order(names, seed=seed)[: min(count, len(names) - 1)]}


def copies(keys: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Groups of slides that share a key, such as the hash of their content; sorted.

    Example:
        >>> copies({"a": ["1"], "b": ["2"], "c": ["1", "3"], "d": ["3"]})
        [['a', 'c', 'd']]
    """
    parent = {name: name for name in keys}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    first: dict[str, str] = {}
    for name, of_slide in keys.items():
        for key in of_slide:
            parent[root(name)] = root(first.setdefault(key, name))
    groups: dict[str, list[str]] = {}
    for name in keys:
        groups.setdefault(root(name), []).append(name)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def unite(units: Mapping[str, str], groups: Sequence[Sequence[str]]) -> dict[str, str]:
    """Unit of each slide, after uniting the units (patients or sites) of slides that are copies of each other.

    Example:
        >>> unite({"a": "p", "b": "q", "c": "q", "d": "r"}, [["a", "b"]])
        {'a': 'p', 'b': 'p', 'c': 'p', 'd': 'r'}
    """
    keys: dict[str, list[str]] = {name: [f"unit {unit}"] for name, unit in units.items()}
    for number, group in enumerate(groups):
        for name in group:
            keys[name].append(f"copy {number}")
    united = dict(units)
    for names in copies(keys):
        unit = min(units[name] for name in names)
        united.update(dict.fromkeys(names, unit))
    return united


def check_split(patients: Mapping[str, str], splits: Mapping[str, str]) -> None:
    """Raise if a patient is on both sides of a split, or if one side is empty."""
    sides: dict[str, dict[str, str]] = {}
    for slide, patient in patients.items():
        sides.setdefault(patient, {}).setdefault(splits[slide], slide)
    for patient, by_split in sides.items():
        if len(by_split) > 1:
            names = [f"{shown(by_split[side])} in {side}" for side in ("train", "held_out")]
            raise ValueError(
                f"patient {shown(patient, 'patient')} is on both sides of the split: {', '.join(names)}; "
                "patients seen in training must not be held out"
            )
    for side in ("train", "held_out"):
        if side not in splits.values():
            raise ValueError(f"the split leaves no slide in {side}")

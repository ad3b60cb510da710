"""Choice of the held-out patients, and the check of a split. Pure functions, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
        raise ValueError(f"only one patient or site ({names[0] if names else 'none'}): a split needs at least two")
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction must lie between 0 and 1, got {fraction}")
    count = max(round(fraction * len(names)), min(JACKKNIFE_GROUPS, len(names) // 4), 1)
    return {names[k] for k in hash_order(names, seed=seed)[: min(count, len(names) - 1)]}


def check_split(patients: Mapping[str, str], splits: Mapping[str, str]) -> None:
    """Raise if a patient is on both sides of a split, or if one side is empty."""
    sides: dict[str, dict[str, str]] = {}
    for slide, patient in patients.items():
        sides.setdefault(patient, {}).setdefault(splits[slide], slide)
    for patient, by_split in sides.items():
        if len(by_split) > 1:
            raise ValueError(
                f"patient {patient} is on both sides of the split: {by_split['train']} in train, "
                f"{by_split['held_out']} in held_out; patients seen in training must not be held out"
            )
    for side in ("train", "held_out"):
        if side not in splits.values():
            raise ValueError(f"the split leaves no slide in {side}")

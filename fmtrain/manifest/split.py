"""Who is held out, and which of their patches: pure functions from tables to tables. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fmtrain.rng import stable_hash

JACKKNIFE_GROUPS = 32  # what the standard errors of repmetrics take, where there are so many


def select_held_out(units: Sequence[str], *, fraction: float, seed: int) -> set[str]:
    """Which patients (or sites) are held out: a fraction, yet a quarter where that makes up to 32 of them.

    Decided by a hash of each name, so new slides move nobody who was there from one side to the other, but for
    the few that keep the fraction.

    Args:
        units: the names; repeats do not count.
        fraction: of them.
        seed: another choice.

    Raises:
        ValueError: fewer than two: nobody would be left on one of the sides.

    Example:
        >>> len(select_held_out([f"patient {k}" for k in range(100)], fraction=0.1, seed=0))
        25
    """
    order = sorted(set(units), key=lambda name: stable_hash(f"{seed}/{name}"))
    if len(order) < 2:
        raise ValueError(f"only one patient or site ({order[0] if order else 'none'}): a split needs at least two")
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction must lie between 0 and 1, got {fraction}")
    count = max(round(fraction * len(order)), min(JACKKNIFE_GROUPS, len(order) // 4), 1)
    return set(order[: min(count, len(order) - 1)])


def check_split(patients: Mapping[str, str], splits: Mapping[str, str]) -> None:
    """Refuse a split with a patient on both sides, or with nobody on one of them.

    Args:
        patients: slide → patient.
        splits: slide → "train" or "held_out".
    """
    sides: dict[str, dict[str, str]] = {}
    for slide, patient in patients.items():
        sides.setdefault(patient, {}).setdefault(splits[slide], slide)
    for patient, by_split in sides.items():
        if len(by_split) > 1:
            raise ValueError(
                f"patient {patient} is on both sides of the split: {by_split['train']} in train, "
                f"{by_split['held_out']} in held_out; what the encoder has seen must not be measured on"
            )
    for side in ("train", "held_out"):
        if side not in splits.values():
            raise ValueError(f"the split leaves no slide in {side}")

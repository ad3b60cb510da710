"""Callbacks and learning-rate schedulers of a trainer that decide by the keys of a monitor."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from repmetrics.measurement.registry import Direction


@dataclass(frozen=True)
class KeyReader:
    """A callback or a scheduler that reads a key from ``trainer.callback_metrics``.

    Attributes:
        name: Name of its class.
        key: Key that it reads.
        epochs: It reads at the end of every this many training epochs; 0 if it does not.
        steps: It reads after every this many optimizer steps, or batches for a scheduler; 0 if it does not.
        scheduler: Whether it is a scheduler.
        mode: "min" or "max" if it has such an option.
    """

    name: str
    key: str
    epochs: int = 0
    steps: int = 0
    scheduler: bool = False
    mode: str | None = None

    def at_validation(self) -> bool:
        """Whether it reads at validations, or at the epoch's end that follows."""
        return self.steps == 0

    def at_epoch_end(self, epoch: int) -> bool:
        """Whether it reads at the end of a training epoch, the first of which is 0."""
        return self.epochs > 0 and (epoch + 1) % self.epochs == 0

    def after_batch(self, batch_idx: int, *, step: int) -> bool:
        """Whether it reads after a batch of the epoch, when ``step`` optimizer steps are taken."""
        return self.steps > 0 and (batch_idx + 1 if self.scheduler else step) % self.steps == 0


def find_readers(callbacks: Iterable[Any], schedulers: Iterable[Any], keys: Set[str]) -> list[KeyReader]:
    """Readers of any of the keys. A callback is one if an attribute, or an item of one, is a key.

    Callbacks of Lightning, Optuna's and Ray Tune's name their keys in attributes. Code that reads
    ``trainer.callback_metrics`` without that cannot be recognized.

    Args:
        callbacks: Callbacks other than monitors.
        schedulers: Configurations of schedulers, as in ``trainer.lr_scheduler_configs``.
        keys: Keys of a monitor.
    """
    readers = [_callback_reader(c, key) for c in callbacks for key in sorted(keys & set(_texts(vars(c))))]
    for config in schedulers:
        if config.monitor in keys:
            every = {"epochs" if config.interval == "epoch" else "steps": config.frequency}
            mode = getattr(config.scheduler, "mode", None)
            readers.append(
                KeyReader(type(config.scheduler).__name__, config.monitor, scheduler=True, mode=mode, **every)
            )
    return readers


def _callback_reader(callback: Any, key: str) -> KeyReader:
    name, mode = type(callback).__name__, getattr(callback, "mode", None)
    if (steps := getattr(callback, "_every_n_train_steps", 0)) > 0:  # ModelCheckpoint
        return KeyReader(name, key, steps=steps, mode=mode)
    for option in ("_check_on_train_epoch_end", "_save_on_train_epoch_end"):  # EarlyStopping, ModelCheckpoint
        if hasattr(callback, option):
            return KeyReader(name, key, epochs=int(bool(getattr(callback, option))), mode=mode)
    return KeyReader(name, key, epochs=1, mode=mode)


def describe_wrong_modes(readers: Iterable[KeyReader], directions: Mapping[str, Direction]) -> list[str]:
    """One sentence for each reader whose mode contradicts the direction of its key: EarlyStopping minimizes by default.

    Args:
        readers: Readers of keys.
        directions: Direction of an improvement by key; keys without one are not checked.
    """
    modes = {"higher": "max", "lower": "min"}
    sentences = []
    for reader in readers:
        direction = directions.get(reader.key)
        if direction is None or reader.mode not in ("min", "max"):
            continue
        if direction == "neither":
            sentences.append(f"{reader.name} reads {reader.key!r}, which is neither better higher nor lower")
        elif reader.mode != modes[direction]:
            sentences.append(
                f"{reader.name} reads {reader.key!r} with mode={reader.mode!r}, but {direction} is better: "
                f"give mode={modes[direction]!r}"
            )
    return sentences


def _texts(value: Any, *, depth: int = 3) -> Iterator[str]:
    """Texts in a value or in its containers."""
    if isinstance(value, str):
        yield value
    elif depth and isinstance(value, Mapping):
        for item in (*value.keys(), *value.values()):
            yield from _texts(item, depth=depth - 1)
    elif depth and isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _texts(item, depth=depth - 1)


def refuse_unknown_keys(trainer: Any, *, prefix: str, others: Sequence[str], keys: Sequence[str]) -> None:
    """Raise now for an unknown key, which EarlyStopping would miss only at its first check, hours later.

    Args:
        trainer: Trainer with the callbacks and schedulers.
        prefix: Prefix of the monitor's keys.
        others: Prefixes of the trainer's other monitors.
        keys: Keys that the monitor logs now or later.
    """
    readers = [(type(c).__name__, getattr(c, "monitor", None)) for c in trainer.callbacks]
    readers += [(type(c.scheduler).__name__, c.monitor) for c in trainer.lr_scheduler_configs]
    for name, key in readers:
        if key is None or any(str(key).startswith(f"{other}/") for other in others) or key in keys:
            continue
        if str(key).startswith(f"{prefix}/"):
            raise ValueError(
                f"{name} monitors {key!r}, which will never be logged: choose among {', '.join(sorted(keys))}"
            )
        close = [f"{prefix}/{key}"] if f"{prefix}/{key}" in keys else get_close_matches(str(key), keys, n=1, cutoff=0.9)
        if close and trainer.is_global_zero:
            warnings.warn(f"{name} monitors {key!r}, which is not logged: did you mean {close[0]!r}?", stacklevel=2)

"""The linear probe that kaiko's eva trains, at the time of its paper (2024-04) and in version 0.4.

Its numbers are comparable with published ones. During training, :func:`repmetrics.probes.linear.linear_probe` is the
better choice: it is fitted in closed form, without tuning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from repmetrics.data.features import Features
from repmetrics.probes import common

MAX_STEPS = 12_500
RUNS = 5


class Protocol(NamedTuple):
    """Training settings of a head.

    Attributes:
        name: "paper" or "v0.4".
        batch_size: Batch size of training.
        lr: Initial learning rate.
        patience: Epochs without a better balanced accuracy on the validation split before training stops. None: 5 %
            ("paper") or 20 % ("v0.4") of the epochs in `max_steps`.
        max_steps: Most training steps.
    """

    name: Literal["paper", "v0.4"]
    batch_size: int
    lr: float
    patience: int | None = None
    max_steps: int = MAX_STEPS

    def patience_for(self, rows: int) -> int:
        """`patience`, or its default for a training split of `rows`."""
        share = 0.05 if self.name == "paper" else 0.2
        return self.patience or math.ceil(share * self.max_steps / math.ceil(rows / self.batch_size))

    def optimizer(self, head: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """SGD with momentum and a cosine ("paper") or AdamW ("v0.4"), each with eva's schedule, stepped per *epoch*.

        The cosine's period is `max_steps`, but eva lets Lightning step it per epoch: the rate hardly falls. For "v0.4",
        eva's configurations name no schedule. Its head then uses the default, torch's ``ConstantLR``: a third of the
        rate for the first five epochs.
        """
        if self.name == "v0.4":
            adamw = torch.optim.AdamW(head.parameters(), lr=self.lr)
            return adamw, torch.optim.lr_scheduler.ConstantLR(adamw)
        sgd = torch.optim.SGD(head.parameters(), lr=self.lr, momentum=0.9)
        return sgd, torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=self.max_steps)


def paper(batch_size: int = 256, *, patience: int | None = None) -> Protocol:
    """Protocol of eva at the time of arXiv 2404.15217: lr 0.01 for a batch of 4096, proportional for other sizes.

    Example:
        >>> paper().lr
        0.000625
    """
    return Protocol("paper", batch_size, 0.01 * batch_size / 4096, patience)


def eva_v0_4(batch_size: int = 256, *, patience: int | None = None) -> Protocol:
    """Protocol of eva 0.4.

    Example:
        >>> eva_v0_4().patience_for(100_000)  # CRC
        7
    """
    return Protocol("v0.4", batch_size, 3e-4, patience)


class SeedAccuracies(NamedTuple):
    """Balanced accuracies of runs that differ in their seeds.

    Attributes:
        split: Name of the split they are computed on.
        values: One balanced accuracy per run.
        used_for_selection: Whether the epoch was selected on this split, which makes the accuracy optimistic.
    """

    split: str
    values: tuple[float, ...]
    used_for_selection: bool

    @property
    def mean(self) -> float:
        """Mean over runs."""
        return sum(self.values) / len(self.values)

    @property
    def sd(self) -> float:
        """Standard deviation over runs: the seeds' part of the uncertainty, not the data's."""
        return float(torch.tensor(self.values, dtype=torch.float64).std()) if len(self.values) > 1 else math.nan


def eva_probe(
    train: Features,
    val: Features,
    *,
    test: Features | None = None,
    protocol: Protocol,
    runs: int = RUNS,
    device: torch.device | str = "cpu",
) -> list[SeedAccuracies]:
    """Train a linear head several times; keep each run's best epoch on `val`; report it on `val` and `test`.

    As in eva, two classes have one logit and binary cross entropy. More classes have one logit each and cross entropy.

    Args:
        train: Features with labels 0 … K − 1.
        val: Features that the epoch is selected on.
        test: Features that nothing is selected on.
        protocol: Training settings.
        runs: Number of runs, with the seeds 0, 1, …
        device: Device of the training.

    Returns:
        Balanced accuracies on `val`, and on `test` if given.
    """
    splits = {"train": train, "val": val} | ({"test": test} if test is not None else {})
    classes = _check(splits)
    data = {name: _to_tensors(split, device) for name, split in splits.items()}
    accuracies: dict[str, list[float]] = {name: [] for name in data if name != "train"}
    for seed in range(runs):
        head = _train(data["train"], data["val"], classes=classes, protocol=protocol, seed=seed)
        for name, values in accuracies.items():
            values.append(_balanced_accuracy(head, *data[name], classes=classes))
    return [SeedAccuracies(name, tuple(v), used_for_selection=name == "val") for name, v in accuracies.items()]


def _check(splits: dict[str, Features]) -> int:
    train = splits["train"]
    for name, split in splits.items():
        if split.labels is None:
            raise ValueError(f"the {name} split has no labels")
        if len(split.values) == 0 or split.values.shape[1] != train.values.shape[1]:
            raise ValueError(f"{name} features must be (N, {train.values.shape[1]}), got {tuple(split.values.shape)}")
    present = {name: set(split.labels.tolist()) for name, split in splits.items() if split.labels is not None}
    expected = set(range(max(present["train"]) + 1))
    for name, labels in present.items():
        if labels != expected or len(expected) < 2:
            raise ValueError(f"every split needs the classes {sorted(expected)}, {name} has {sorted(labels)}")
    return len(expected)


def _to_tensors(split: Features, device: torch.device | str) -> tuple[Tensor, Tensor]:
    assert split.labels is not None
    return split.values.float().to(device), split.labels.to(device)


def _train(
    train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], *, classes: int, protocol: Protocol, seed: int
) -> nn.Linear:
    """Head of the first epoch with the best balanced accuracy on `val`."""
    features, labels = train
    generator = torch.Generator().manual_seed(seed)
    head = _head(features.shape[1], classes, generator).to(features.device)
    optimizer, schedule = protocol.optimizer(head)
    loss_of = _loss(classes)
    best, best_state, waited = -1.0, head.state_dict(), 0
    step, patience = 0, protocol.patience_for(len(features))
    while step < protocol.max_steps and waited < patience:
        for rows in torch.randperm(len(features), generator=generator).to(features.device).split(protocol.batch_size):
            optimizer.zero_grad(set_to_none=True)
            loss_of(head(features[rows]), labels[rows]).backward()
            optimizer.step()
            step += 1
            if step == protocol.max_steps:
                break
        schedule.step()
        accuracy = _balanced_accuracy(head, *val, classes=classes)
        waited += 1
        if accuracy > best:
            best, waited = accuracy, 0
            best_state = {key: value.clone() for key, value in head.state_dict().items()}
    head.load_state_dict(best_state)
    return head


def _head(width: int, classes: int, generator: torch.Generator) -> nn.Linear:
    """Linear layer with torch's default initialization, drawn from this generator."""
    head = nn.Linear(width, 1 if classes == 2 else classes)
    bound = 1 / math.sqrt(width)
    with torch.no_grad():
        head.weight.uniform_(-bound, bound, generator=generator)
        head.bias.uniform_(-bound, bound, generator=generator)
    return head


def _loss(classes: int) -> Callable[[Tensor, Tensor], Tensor]:
    if classes > 2:
        return nn.functional.cross_entropy
    return lambda logits, labels: nn.functional.binary_cross_entropy_with_logits(logits.squeeze(-1), labels.float())


@torch.no_grad()
def _balanced_accuracy(head: nn.Linear, features: Tensor, labels: Tensor, *, classes: int) -> float:
    logits = head(features)
    predicted = (logits.squeeze(-1) > 0).long() if classes == 2 else logits.argmax(1)
    return common._balanced_accuracy((predicted == labels).cpu().numpy(), labels.cpu().numpy(), classes)

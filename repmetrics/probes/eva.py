"""The linear probe as kaiko's eva trains it: at the time of the paper (2024-04) and now.

The online probe of `repmetrics.probes.linear` is fitted in closed form, without tuning, and is the better choice during
training. This one exists to be comparable with published numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from repmetrics.data.features import Features

MAX_STEPS = 12_500
RUNS = 5


class Protocol(NamedTuple):
    """How a head is trained.

    Attributes:
        name: "paper" or "now".
        batch_size: of training.
        lr: at the start.
        patience: epochs without a better balanced accuracy on the validation split before training stops; None: 5 %
            ("paper") or 20 % ("now") of the epochs that `max_steps` make.
        max_steps: at most.
    """

    name: Literal["paper", "now"]
    batch_size: int
    lr: float
    patience: int | None = None
    max_steps: int = MAX_STEPS

    def patience_for(self, rows: int) -> int:
        """`patience`, or its rule."""
        share = 0.05 if self.name == "paper" else 0.2
        return self.patience or math.ceil(share * self.max_steps / math.ceil(rows / self.batch_size))

    def optimizer(self, head: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """SGD with momentum and a cosine ("paper"), AdamW ("now"), each with eva's schedule, stepped once an *epoch*.

        The cosine's period is `max_steps`, but eva leaves Lightning to step it by epochs: the rate hardly falls. For
        "now" eva's configurations name no schedule, which leaves its head the default, torch's ``ConstantLR``: a third
        of the rate for the first five epochs.
        """
        if self.name == "now":
            adamw = torch.optim.AdamW(head.parameters(), lr=self.lr)
            return adamw, torch.optim.lr_scheduler.ConstantLR(adamw)
        sgd = torch.optim.SGD(head.parameters(), lr=self.lr, momentum=0.9)
        return sgd, torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=self.max_steps)


def paper(batch_size: int = 256, *, patience: int | None = None) -> Protocol:
    """Eva at the time of arXiv 2404.15217: lr 0.01 for a batch of 4096, in proportion for others.

    Example:
        >>> paper().lr
        0.000625
    """
    return Protocol("paper", batch_size, 0.01 * batch_size / 4096, patience)


def eva_v0_4(batch_size: int = 256, *, patience: int | None = None) -> Protocol:
    """Eva 0.4.

    Example:
        >>> eva_v0_4().patience_for(100_000)  # CRC
        7
    """
    return Protocol("now", batch_size, 3e-4, patience)


class SeedAccuracies(NamedTuple):
    """Balanced accuracies of several runs that differ in their seeds.

    Attributes:
        split: the rows they were computed on.
        values: one a run.
        used_for_selection: the epoch was chosen on these very rows, so the accuracy is optimistic.
    """

    split: str
    values: tuple[float, ...]
    used_for_selection: bool

    @property
    def mean(self) -> float:
        """Over runs."""
        return sum(self.values) / len(self.values)

    @property
    def sd(self) -> float:
        """Over runs; it holds the seeds' part of the uncertainty, not the data's."""
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

    Two classes have one logit and binary cross entropy, more have a logit each and cross entropy, as in eva.

    Args:
        train: features with labels 0 … K − 1.
        val: chooses the epoch.
        test: rows that choose nothing.
        protocol: how to train.
        runs: with the seeds 0, 1, …
        device: where to train.

    Returns:
        The balanced accuracies on `val`, and on `test` where it is given.

    Raises:
        ValueError: no labels, other classes in one split than in another, D that differ, or a split of no rows.
    """
    splits = {"train": train, "val": val} | ({"test": test} if test is not None else {})
    classes = _check(splits)
    data = {name: _on(split, device) for name, split in splits.items()}
    found: dict[str, list[float]] = {name: [] for name in data if name != "train"}
    for seed in range(runs):
        head = _train(data["train"], data["val"], classes=classes, protocol=protocol, seed=seed)
        for name, values in found.items():
            values.append(_balanced_accuracy(head, *data[name], classes=classes))
    return [SeedAccuracies(name, tuple(values), used_for_selection=name == "val") for name, values in found.items()]


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


def _on(split: Features, device: torch.device | str) -> tuple[Tensor, Tensor]:
    assert split.labels is not None
    return split.values.float().to(device), split.labels.to(device)


def _train(
    train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], *, classes: int, protocol: Protocol, seed: int
) -> nn.Linear:
    """One run: the head of the first epoch with the best balanced accuracy on `val`."""
    features, labels = train
    generator = torch.Generator().manual_seed(seed)
    head = _head(features.shape[1], classes, generator).to(features.device)
    optimizer, schedule = protocol.optimizer(head)
    loss_of = _loss(classes)
    best, best_state, waited = -1.0, head.state_dict(), 0
    step, patience = 0, protocol.patience_for(len(features))
    while step < protocol.max_steps and waited < patience:
        for rows in _batches(len(features), protocol.batch_size, generator):
            rows = rows.to(features.device)
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
    """Torch's own initialisation of a linear layer, from this generator."""
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


def _batches(rows: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    yield from torch.randperm(rows, generator=generator).split(size)


@torch.no_grad()
def _balanced_accuracy(head: nn.Linear, features: Tensor, labels: Tensor, *, classes: int) -> float:
    logits = head(features)
    predicted = (logits.squeeze(-1) > 0).long() if classes == 2 else logits.argmax(1)
    return balanced_accuracy(predicted, labels, classes=classes)


def balanced_accuracy(predicted: Tensor, labels: Tensor, *, classes: int) -> float:
    """Mean over the classes of the share of their rows that is predicted right.

    Example:
        >>> balanced_accuracy(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), classes=2)
        0.75
    """
    right = torch.bincount(labels[predicted == labels], minlength=classes).double()
    return float((right / torch.bincount(labels, minlength=classes)).mean())


def describe(found: Sequence[SeedAccuracies]) -> list[str]:
    """The runs in words, with a warning where the epoch was chosen on the rows reported.

    Example:
        >>> describe([SeedAccuracies("val", (0.8, 0.9), True)])
        ['val: 0.850 ± 0.071 (2 runs); optimistic: the epoch was chosen on this split']
    """
    return [
        f"{runs.split}: {runs.mean:.3f} ± {runs.sd:.3f} ({len(runs.values)} runs)"
        + ("; optimistic: the epoch was chosen on this split" if runs.used_for_selection else "")
        for runs in found
    ]

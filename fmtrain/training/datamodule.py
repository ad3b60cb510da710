"""What a run reads: patches that are a function of the step, the frozen held-out set, labelled images for the probe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset

from fmtrain.patches.dataset import HeldOutPatches, TrainingPatches
from fmtrain.patches.loader import training_batches
from repmetrics.data.batches import ResizeCrop
from repmetrics.data.open import open_data


class SlideDataModule(LightningDataModule):
    """Online patching: every batch is new random patches of random slides, decided by (seed, step) alone.

    Resuming therefore needs the step and nothing else, and any number of workers or ranks reads the same patches.
    Batches are uint8 tensors (batch_size, 3, size_px, size_px) on each rank; an epoch has no end of its own.

    Args:
        manifest: What ``fmtrain manifest`` wrote.
        size_px: Side of the patches.
        batch_size: On each rank.
        num_workers: Processes that read; 0 reads in the training process.
        seed: Of the patches.
        probe: A labelled image folder or CSV for the linear probe, if not the held-out patches themselves.
        probe_size_px: Its images are brought to this side; None: as they are.
        options: Of :class:`~fmtrain.patches.dataset.TrainingPatches`: ``mpp``, ``fraction``, ``patches_per_slide``, …
    """

    def __init__(
        self,
        manifest: Path,
        *,
        size_px: int = 256,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        probe: Path | None = None,
        probe_size_px: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.patches = TrainingPatches(manifest, size_px=size_px, seed=seed, **options)
        self.held_out = HeldOutPatches(manifest)
        self.probe_data = None if probe is None else labeled_images(probe, size_px=probe_size_px)
        self.waiting = TimedBatches(self._batches)

    def setup(self, stage: str) -> None:
        """Refuse a batch that the training set cannot fill, before anything is read."""
        self.check(world_size=1 if self.trainer is None else self.trainer.world_size)

    def check(self, *, world_size: int) -> None:
        """Refuse a batch that the training set cannot fill with distinct patches, or one of no patches.

        Raises:
            ValueError: If it cannot.
        """
        batch, distinct = self.batch_size * world_size, self.patches.distinct
        if self.batch_size < 1:
            raise ValueError(f"data.batch_size must be 1 or more, got {self.batch_size}")
        if distinct is not None and batch > distinct:
            ranks = f" on each of {world_size} ranks" if world_size > 1 else ""
            raise ValueError(
                f"a batch of {self.batch_size} patches{ranks} is more than the {distinct} distinct patches of "
                f"{len(self.patches.slides)} training slides: lower data.batch_size, or raise patches_per_slide or "
                "patches_in_total"
            )

    def state_dict(self) -> dict[str, Any]:
        """What the run reads, for its checkpoints: to be stated with the weights, and not to change on the way."""
        slides, mpps = self.patches.slides, ", ".join(f"{mpp:g}" for mpp in self.patches.planner.mpps)
        return {
            "manifest": self.patches.manifest.content_hash(),
            "training slides": len(slides),
            "training patients": len({slide.patient for slide in slides}),
            "patches": f"{self.patches.size_px} px at {mpps} µm per pixel",
            "held-out patches": len(self.held_out),
            "quarantined": self.patches.quarantined,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on with other slides; read no more what the interrupted run no longer did.

        Raises:
            ValueError: The manifest is not the one that the run began with.
        """
        then, now = state_dict["manifest"], self.patches.manifest.content_hash()
        if then != now:
            raise ValueError(
                f"the run began with the manifest of hash {then[:12]}, and data.manifest is of {now[:12]}: "
                "resume with the one it had, or begin anew with model.init"
            )
        self.patches.quarantine(state_dict["quarantined"])

    def train_dataloader(self) -> TimedBatches:
        """Batches from the trainer's step on."""
        return self.waiting

    def _batches(self) -> Iterator[Tensor]:
        trainer = self.trainer
        if trainer is None:
            raise RuntimeError("SlideDataModule has no trainer: its batches begin at the trainer's step")
        return training_batches(
            self.patches,
            batch_size=self.batch_size,
            rank=trainer.global_rank,
            world=trainer.world_size,
            start_step=trainer.global_step * trainer.accumulate_grad_batches,
            num_workers=self.num_workers,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )


class TimedBatches:
    """Batches made anew at every epoch, and the seconds that their reader has waited for them."""

    def __init__(self, make: Callable[[], Iterator[Tensor]]) -> None:
        self.make = make
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Tensor]:
        start = time.perf_counter()
        for batch in self.make():
            self.seconds += time.perf_counter() - start
            yield batch
            start = time.perf_counter()


def labeled_images(path: Path, *, size_px: int | None = None) -> Dataset[Any]:
    """The images of anything `repmetrics score` reads, with their labels.

    Raises:
        ValueError: If there are no images or no labels for them.
    """
    source = open_data(path)
    if source.images is None or not source.classes:
        raise ValueError(f"{path} cannot be probed: a probe needs images with labels")
    return source.images if size_px is None else ResizeCrop(source.images, size_px)

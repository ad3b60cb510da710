"""Data module of a run: training patches, the frozen held-out patches, labeled images for the probe."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import Dataset

from fmtrain.domains import check_domain
from fmtrain.patches.dataset import HeldOutPatches, TrainingPatches
from fmtrain.patches.loader import training_batches
from fmtrain.patches.sources import PatchMixture, SourceOptions
from fmtrain.slides.remote import is_remote
from fmtrain.slides.staging import describe
from repmetrics.data.batches import ResizeCrop
from repmetrics.data.open import open_data
from repmetrics.progress import print_line

log = logging.getLogger(__name__)
PER_STEP = "patches per step"  # key in the state of the data module


class SlideDataModule(LightningDataModule):
    """Online patching: every batch holds new random patches of random slides, a function of (seed, step).

    Resuming needs only the step. Any number of workers or ranks reads the same patches. Batches are uint8 tensors
    (batch_size, 3, size_px, size_px) on each rank; an epoch has no end.

    Args:
        manifest: Manifest that ``fmtrain manifest`` wrote.
        size_px: Side of the patches in pixels.
        batch_size: Number of patches per batch on each rank.
        num_workers: Number of reading processes; 0 reads in the training process.
        seed: Seed of the patches.
        probe: Labeled image folder or CSV for the linear probe, instead of the held-out patches.
        probe_size_px: Side to which the probe's images are resized; None keeps their size.
        cache: Whether to decode the held-out patches once, into a file beside the manifest that all runs share.
        sources: Further sources of training patches: manifests, folders of tiles, coordinates of TRIDENT or CLAM.
        manifest_weight: Weight of the manifest's training slides among the sources; 0 leaves them out.
        options: Options of :class:`~fmtrain.patches.options.PatchOptions`: ``mpp``, ``slide_fraction``, …
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
        cache: bool = True,
        sources: list[SourceOptions] | None = None,
        manifest_weight: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__()
        check_domain("batch_size", batch_size, minimum=1)
        check_domain("num_workers", num_workers, minimum=0)
        check_domain("probe_size_px", probe_size_px, minimum=1)
        self.batch_size = batch_size
        self.num_workers = num_workers
        check_domain("manifest_weight", manifest_weight, minimum=0)
        self.patches: Any = TrainingPatches(manifest, size_px=size_px, seed=seed, **options)
        if sources:
            self.patches = PatchMixture(self.patches, sources, weight=manifest_weight, options=options)
        self.held_out = HeldOutPatches(manifest, cache=cache)
        self.probe_data = None if probe is None else labeled_images(probe, size_px=probe_size_px)
        self.timed_batches = TimedBatches(self._make_batches)

    def prepare_data(self) -> None:
        """Decode the held-out patches, on one rank of each machine."""
        self.held_out.build_cache(num_workers=self.num_workers, write=print_line)

    def setup(self, stage: str) -> None:
        """Check the batch size before anything is read."""
        self.check(world_size=1 if self.trainer is None else self.trainer.world_size)

    def check(self, *, world_size: int) -> None:
        """Check that the training set has enough distinct patches for a batch; state what is assumed of the sources."""
        far = next((slide.path.parent for slide in self.patches.slides if is_remote(slide.path)), None)
        for note in [*getattr(self.patches, "notes", ()), *([] if far is None else [describe(far)])]:
            warnings.warn(note, stacklevel=2)
        batch, distinct = self.batch_size * world_size, self.patches.distinct
        if distinct is not None and batch > distinct:
            ranks = f" on each of {world_size} ranks" if world_size > 1 else ""
            raise ValueError(
                f"a batch of {self.batch_size} patches{ranks} is more than the {distinct} distinct patches of "
                f"{len(self.patches.slides)} training slides: lower data.batch_size, or raise patches_per_slide or "
                "patches_in_total"
            )

    def patches_per_step(self, trainer: Trainer) -> int:
        """Patches of an optimizer step, over all ranks and accumulated batches."""
        return self.batch_size * trainer.world_size * trainer.accumulate_grad_batches

    def state_dict(self) -> dict[str, Any]:
        """Description of the data for checkpoints and model cards; the manifest may not change during a run."""
        slides, mpps = self.patches.slides, ", ".join(f"{mpp:g}" for mpp in self.patches.planner.mpps)
        return {
            "manifest": self.patches.manifest.content_hash(),
            "training slides": len(slides),
            "training patients": len({slide.patient for slide in slides}),
            "patches": f"{self.patches.size_px} px at {mpps} µm per pixel",
            PER_STEP: None if self.trainer is None else self.patches_per_step(self.trainer),
            "held-out patches": len(self.held_out),
            "quarantined": self.patches.quarantined,
            **({"sources": self.patches.state()} if isinstance(self.patches, PatchMixture) else {}),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the quarantine of failed slides, and the slides that the manifest had; raise if it is another one."""
        expected, actual = state_dict["manifest"], self.patches.manifest.content_hash()
        patches = self.patches if actual == expected else self.patches.before_extension(expected)
        if patches is None:
            raise ValueError(
                f"the run started with the manifest of hash {expected[:12]}, but data.manifest has {actual[:12]}: "
                "resume with the first, or start a new run with model.init"
            )
        if patches is not self.patches:
            new = len(self.patches.manifest.slides) - len(patches.manifest.slides)
            log.warning("the manifest was extended since the run started: its %d new slides are not used", new)
            if isinstance(self.patches, PatchMixture):
                self.patches.replace_main(patches)
            else:
                self.patches = patches
        if isinstance(self.patches, PatchMixture):
            self.patches.restore(state_dict.get("sources", {}))
        self.patches.quarantine(state_dict["quarantined"])

    def train_dataloader(self) -> TimedBatches:
        """Batches, starting at the trainer's step."""
        return self.timed_batches

    def _make_batches(self) -> Iterator[Tensor]:
        trainer = self.trainer
        if trainer is None:
            raise RuntimeError("batches start at the trainer's step, and there is no trainer: use Trainer.fit")
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
    """Iterable over batches, with a new iterator per epoch, that records the seconds spent waiting for data."""

    def __init__(self, factory: Callable[[], Iterator[Tensor]]) -> None:
        self.factory = factory
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[Tensor]:
        start = time.perf_counter()
        for batch in self.factory():
            self.wait_seconds += time.perf_counter() - start
            yield batch
            start = time.perf_counter()


def labeled_images(path: Path, *, size_px: int | None = None) -> Dataset[Any]:
    """Images and labels from any data that `repmetrics score` reads.

    Args:
        path: Image folder or CSV.
        size_px: Side to which the images are resized; None keeps their size.
    """
    source = open_data(path)
    if source.images is None or not source.classes:
        raise ValueError(f"{path} cannot be probed: a probe needs images with labels")
    return source.images if size_px is None else ResizeCrop(source.images, size_px)

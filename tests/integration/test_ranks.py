"""Two processes train the same weights, and log the same values, as one with twice the batch."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fit_runs import SMALL, call
from processes import run_fmtrain, run_ranks
from small_runs import LIGHTNING_NOISE

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE),
    pytest.mark.filterwarnings("ignore:.*args parameter is intended to run.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
]

# Published masks are drawn per rank.
V2 = ["--model", "fmtrain.methods.DINOv2", "--model.masks_per_rank", "false"]
V2 += ["--model.regularizer_weight", "0"]  # KoLeo compares the patches of one rank


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    [[], [*V2, "--model.centering", "sinkhorn_knopp"], V2],
    ids=["DINO, centered", "DINOv2, Sinkhorn", "DINOv2, centered"],
)
def test_two_ranks_are_one_with_twice_the_batch(manifest: Path, tmp_path: Path, extra: list[str]) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(SMALL.replace("patch_size: 8", "patch_size: 4"))
    # float64: the gradient of a key's bias is 0 up to rounding, and Adam takes full steps from it in float32
    common = ["--config", str(config), "--data.manifest", str(manifest), "--trainer.precision", "64-true"]
    common += ["--trainer.max_steps", "4", "--model.drop_path_rate", "0", "--trainer.log_every_n_steps", "1", *extra]
    common += ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger"]
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "4", "--out", tmp_path / "two"]
    two += ["--trainer.logger.save_dir", tmp_path / "two"]
    run_ranks(run_fmtrain, "fit", *common, *two, folder=tmp_path)
    assert call("fit", *common, "--out", tmp_path / "one", "--trainer.logger.save_dir", tmp_path / "one") == 0
    single, ranks = (
        torch.load(tmp_path / out / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for out in ("one", "two")
    )
    for name, value in single.items():
        torch.testing.assert_close(ranks[name], value, atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    one, two_ranks = (signals(tmp_path / out) for out in ("one", "two"))
    assert {"train/target_entropy", "train/teacher_student_cosine", "train/prototypes_used"} < one[0].keys()
    assert two_ranks == [pytest.approx(row, rel=1e-5) for row in one]


def signals(out: Path) -> list[dict[str, float]]:
    """Logged values of each step, without those of speed."""
    (file,) = out.rglob("metrics.csv")
    with file.open(newline="") as text:
        rows = [row for row in csv.DictReader(text) if row["train/loss"]]
    return [
        {name: float(value) for name, value in row.items() if name.startswith(("train/", "schedule/")) and value}
        for row in rows
    ]

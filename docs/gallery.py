"""Charts of docs/gallery.md: tiny networks that fail in known ways, next to healthy ones, under the monitor.

    python docs/gallery.py docs/images/gallery

Images are drawn: stripes in four directions, in the colors of their slide. Some four minutes on a core.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repmetrics import Monitor
from repmetrics.atomic_write import write_text
from repmetrics.report.charts import metric_chart
from repmetrics.report.runs import Run
from repmetrics.report.verdict import Verdict

STEPS, EVERY, BATCH, WIDTH = 240, 20, 128, 64
METRICS = ("rankme_centered", "odcorr", "mean_direction", "dead_features", "view_retrieval", "view_retrieval_whitened",
           "slide_leakage")  # fmt: skip
Loss = Callable[[Tensor, Tensor], Tensor]


def draw(slides: int, per_slide: int, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, 3, 16, 16) in 0 … 1, the direction of their stripes, and their slide."""
    g = torch.Generator().manual_seed(seed)
    slide = torch.arange(slides).repeat_interleave(per_slide)
    label = torch.randint(0, 4, (len(slide),), generator=g)
    angle, phase = label * torch.pi / 4, 2 * torch.pi * torch.rand(len(slide), generator=g)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    along = x * angle.cos()[:, None, None] + y * angle.sin()[:, None, None]
    width = 4 + 4 * torch.rand(len(slide), 1, 1, generator=g)
    stripes = 0.5 + 0.4 * torch.sin(2 * torch.pi * along / width + phase[:, None, None])
    tint = 0.4 + 0.6 * torch.rand(slides, 3, 1, 1, generator=g)
    images = stripes[:, None] * tint[slide] + 0.05 * torch.randn(len(slide), 3, 16, 16, generator=g)
    return images.clamp(0, 1), label, slide


def view(images: Tensor, *, jitter: float) -> Tensor:
    """Shift, mirror and noise, and colors changed by a factor within 1 ± jitter."""
    shift = torch.randint(-3, 4, (2,)).tolist()
    mirrored = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
    colors = 1 + jitter * (2 * torch.rand(len(images), 3, 1, 1) - 1)
    return mirrored.roll(shift, (2, 3)) * colors + 0.05 * torch.randn_like(images)


def normalize(images: Tensor) -> Tensor:
    return 2 * images - 1


def convolutional(*, relu: bool = False) -> nn.Module:
    layers: list[nn.Module] = []
    for channels in ((3, 32), (32, 64)):
        layers += [nn.Conv2d(*channels, 3, stride=2, padding=1), nn.BatchNorm2d(channels[1]), nn.ReLU()]
    head = nn.Linear(64, WIDTH)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head, *([nn.ReLU()] if relu else []))


class Transformer(nn.Module):
    """Patches of 4 pixels, normalized after each block, as in the first transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.position = nn.Parameter(0.02 * torch.randn(16, WIDTH))
        block = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, 6)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.blocks(self.patches(images).flatten(2).mT + self.position).mean(1)
        return features


def contrastive(a: Tensor, b: Tensor) -> Tensor:
    """SimCLR's loss at temperature 0.2."""
    z = F.normalize(torch.cat([a, b]), dim=1)
    logits = (z @ z.T / 0.2).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(a)))


def attraction(a: Tensor, b: Tensor) -> Tensor:
    """Views attract each other, and nothing keeps images apart."""
    return -F.cosine_similarity(a, b).mean()


def without_covariance(a: Tensor, b: Tensor) -> Tensor:
    """VICReg's loss without its covariance term: each feature must vary, but all may be alike."""
    spread = sum(F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() for z in (a, b))
    return F.mse_loss(a, b) + spread


def train(
    name: str,
    *,
    loss: Loss = contrastive,
    encoder: Callable[[], nn.Module] = convolutional,
    projector: bool = True,
    rate: float = 2e-3,
    warmup: int = 0,
    jitter: float = 0.6,
    scaled: Callable[[Tensor], Tensor] = normalize,
    steps: int = STEPS,
) -> Run:
    """Train on 2,048 images, and measure 512 of other slides every 20 steps; ``scaled`` normalizes the latter."""
    torch.manual_seed(0)
    network = encoder()
    head = nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, 32)) if projector else nn.Identity()
    optimizer = torch.optim.AdamW([*network.parameters(), *head.parameters()], lr=rate)
    images = draw(64, 32, seed=1)[0]
    held_out = [draw(16, 32, seed=2)]
    monitor = Monitor(metrics=METRICS, transform=scaled, progress=None)
    for step in range(steps + 1):
        if step % EVERY == 0:
            monitor.measure(network, held_out, step=step)
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / max(warmup, 1))
        batch = images[torch.randint(0, len(images), (BATCH,))]
        value = loss(*(head(network(normalize(view(batch, jitter=jitter)))) for _ in range(2)))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return Run(name, list(monitor.history))


healthy = cache(partial(train, "healthy"))
SIGNATURES: dict[str, tuple[str, list[Callable[..., Run]]]] = {
    "complete-collapse": ("mean_direction", [healthy, partial(train, "collapsed", loss=attraction, projector=False)]),
    "dimensional-collapse": (
        "rankme_centered",
        [healthy, partial(train, "without covariance term", loss=without_covariance, projector=False)],
    ),
    "dead-features": (
        "dead_features",
        [
            partial(train, "learning rate 0.002", encoder=partial(convolutional, relu=True)),
            partial(train, "learning rate 0.2", encoder=partial(convolutional, relu=True), rate=0.2),
        ],
    ),
    "wrong-normalization": (
        "mean_direction",
        [healthy, partial(train, "held-out images not normalized", scaled=lambda images: images)],
    ),
    "leakage": ("slide_leakage", [healthy, partial(train, "without color jitter", jitter=0.0)]),
    "short-warm-up": (
        "rankme_centered",
        [
            partial(train, f"warm-up of {warmup} steps", encoder=Transformer, rate=3e-3, warmup=warmup)
            for warmup in (120, 0)
        ],
    ),
}


def chart(name: str, *, steps: int = STEPS) -> tuple[str, list[Run]]:
    """The chart of a signature as SVG, and its two runs."""
    metric, trainings = SIGNATURES[name]
    runs = [training(steps=steps) for training in trainings]
    return metric_chart(runs, metric, [Verdict("", "", None, ())] * len(runs)).svg, runs


def main(folder: Path) -> None:
    for name in SIGNATURES:
        svg, runs = chart(name)
        write_text(folder / f"{name}.svg", svg)
        for run in runs:
            last = run.records[-1]
            kinds = dict.fromkeys(alarm.kind for record in run.records for alarm in record.alarms)
            values = ", ".join(f"{key} {m.value:.3g}" for key, m in last.measurements.items())
            print(f"{name}, {run.name}: {values}; alarms: {', '.join(kinds) or 'none'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

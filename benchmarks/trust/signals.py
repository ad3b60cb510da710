"""Label-free signals of a domain's held-out images beyond those that the monitor measures: all views, tokens, turns."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from domains import Domain
from torch import Tensor, nn

from fmtrain.patches.stains import STAIN
from repmetrics.data.views import VIEW_SETS, ViewSet, quarter_turns
from repmetrics.functional import dse, high_norm_share, rotation_probe
from repmetrics.functional.retrieval import match_views

Views = Mapping[str, Tensor]
"""Two fixed views of each held-out image by view set, (2, N, 3, 32, 32) uint8."""

DENSE_IMAGES = 32


def view_sets(domain: Domain) -> dict[str, ViewSet]:
    """View sets to measure on a domain; those of stained tissue only where images have no orientation."""
    sets = {name: VIEW_SETS[name] for name in ("weak", "natural", "geometry")}
    if domain.orientation_free:
        sets |= {"stain": STAIN, "turned": VIEW_SETS["turned"]}
    return sets


def fixed_views(domain: Domain) -> Views:
    """Views of the held-out images, the same for all runs."""
    images = domain.images[domain.held_out]
    return {name: torch.stack([s.draw(images, view=view) for view in (0, 1)]) for name, s in view_sets(domain).items()}


def to_unit(images: Tensor) -> Tensor:
    """Pixels of uint8 images in 0 … 1."""
    return images.to(torch.float32) / 255


def embed(encoder: nn.Module, images: Tensor, *, batch_size: int = 250) -> Tensor:
    """Features (N, D) of uint8 images."""
    size = 10 * batch_size if images.is_cuda else batch_size  # a small batch stays in a core's cache
    return torch.cat([encoder(to_unit(part)) for part in images.split(size)])


def signals_of_images(encoder: nn.Module, domain: Domain, views: Views) -> dict[str, float]:
    """Retrieval by view set, rotation probe, and metrics of tokens, of an encoder in evaluation mode."""
    values: dict[str, float] = {}
    for name, (first, second) in views.items():
        pair = embed(encoder, first), embed(encoder, second)
        plain, whitened = match_views(*pair), match_views(*pair, whiten=True)
        values[f"view_retrieval_{name}"] = float(plain.hits.mean())
        values[f"view_retrieval_whitened_{name}"] = float(whitened.hits.mean())
        values[f"view_infonce_{name}"] = float(plain.losses.mean())
    images = domain.images[domain.held_out]
    turned = torch.stack([embed(encoder, turn) for turn in quarter_turns(images)], dim=1)
    values["rotation_probe"] = float(rotation_probe(turned.cpu()))
    tokens = encoder.tokens(to_unit(images[:DENSE_IMAGES])).cpu()  # type: ignore[operator]  # both networks have it
    return values | {"dse": float(dse(tokens)), "high_norm_share": float(high_norm_share(tokens))}

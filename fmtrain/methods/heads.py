"""Projection head of DINO, iBOT and DINOv2."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


class ProjectionHead(nn.Module):
    """MLP → bottleneck → unit length → weight-normalized prototypes (arXiv 2104.14294, section 3.1).

    The prototypes start at unit length. With `norm_last_layer`, the default of DINO, the magnitude of the weight
    normalization stays at 1; without, as in DINOv2, it learns.
    There is no batch normalization, hence nothing to synchronize between ranks. lightly's head uses the deprecated
    ``torch.nn.utils.weight_norm``, which torch 2.15 cannot deepcopy.

    Args:
        in_dim: Width of the representation.
        n_prototypes: Number of outputs.
        hidden_dim: Width of the MLP.
        bottleneck_dim: Width of the normalized layer before the prototypes.
        layers: Number of linear layers of the MLP, including the bottleneck.
        norm_last_layer: Whether the prototypes keep unit length.

    Shapes: (N, in_dim) → (N, n_prototypes) logits, not divided by a temperature.
    """

    def __init__(
        self,
        in_dim: int,
        *,
        n_prototypes: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        layers: int = 3,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        self.spec: dict[str, Any] = {
            "n_prototypes": n_prototypes,
            "hidden_dim": hidden_dim,
            "bottleneck_dim": bottleneck_dim,
            "layers": layers,
            "norm_last_layer": norm_last_layer,
        }
        widths = [in_dim, *[hidden_dim] * (layers - 1), bottleneck_dim]
        modules: list[nn.Module] = []
        for before, after in pairwise(widths):
            modules += [nn.Linear(before, after), nn.GELU()]
        self.mlp = nn.Sequential(*modules[:-1])
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = weight_norm(nn.Linear(bottleneck_dim, n_prototypes, bias=False))
        magnitude: Tensor = self.last_layer.parametrizations.weight.original0
        nn.init.ones_(magnitude)
        magnitude.requires_grad_(not norm_last_layer)

    def forward(self, representations: Tensor) -> Tensor:
        """Logits of the prototypes."""
        # 1e-6 as in DINOv2: the default 1e-12 underflows in bfloat16 and float16.
        logits: Tensor = self.last_layer(F.normalize(self.mlp(representations), dim=-1, eps=1e-6))
        return logits

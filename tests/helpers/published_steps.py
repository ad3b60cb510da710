"""DINO and DINOv2 restated from their papers and published code as plain functions of named tensors, in float64.

Nothing of fmtrain, timm or lightly is used. Crops, masks and schedules are inputs. Random subsets are drawn from the
generator of torch in the order of the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def cubic_matrix(new: int, old: int, scale: float) -> Tensor:
    """Bicubic interpolation (Keys, a = −0.75) of `old` points at `new` places whose spacing is 1 / scale."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        x = (i + 0.5) / scale - 0.5
        for tap in range(math.floor(x) - 1, math.floor(x) + 3):
            d = abs(x - tap)
            near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(tap, 0), old - 1)] += near if d <= 1 else far if d < 2 else 0.0
    return matrix


def layer_norm(x: Tensor, w: Weights, name: str) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attention(x: Tensor, w: Weights, name: str, heads: int) -> Tensor:
    n, t, d = x.shape
    q, k, v = linear(x, w, f"{name}.qkv").reshape(n, t, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
    mixed = (q @ k.transpose(-1, -2) / math.sqrt(d // heads)).softmax(-1) @ v
    return linear(mixed.transpose(1, 2).reshape(n, t, d), w, f"{name}.proj")


def mlp(x: Tensor, w: Weights, name: str, *, swiglu: bool) -> Tensor:
    hidden = linear(x, w, f"{name}.fc1")
    if swiglu:
        gate, value = hidden.chunk(2, -1)
        hidden = gate * torch.sigmoid(gate) * value
    else:
        hidden = gelu(hidden)
    return linear(hidden, w, f"{name}.fc2")


@dataclass
class Method:
    """Settings of one method, and its state over the steps."""

    v2: bool
    depth: int
    heads: int
    patch: int
    native: int  # tokens of a side for which there are positions
    drop_path: float
    swiglu: bool
    registers: bool
    layer_decay: float
    clip: float
    batch: int
    local_crops: int
    centers: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def encode(self, images: Tensor, w: Weights, *, train: bool, mask: Tensor | None = None) -> Tensor:
        """All tokens after the last norm."""
        n, _, height, _ = images.shape
        side = height // self.patch
        cut = images.reshape(n, 3, side, self.patch, side, self.patch).permute(0, 2, 4, 1, 3, 5)
        kernel = w["backbone.patch_embed.proj.weight"].flatten(1)
        x = cut.reshape(n, side * side, -1) @ kernel.T + w["backbone.patch_embed.proj.bias"]
        if mask is not None:
            x = torch.where(mask.reshape(n, side * side, 1), w["mask_token"], x)
        class_position, positions = w["class position"], w["positions"]
        if side != self.native:
            m = cubic_matrix(side, self.native, (side + 0.1) / self.native)
            grid = positions.reshape(self.native, self.native, -1)
            positions = torch.einsum("ai,bj,ijd->abd", m, m, grid).reshape(side * side, -1)
        tokens = [(w["backbone.cls_token"] + class_position).expand(n, 1, -1)]
        if self.registers:
            tokens.append(w["backbone.reg_token"].expand(n, -1, -1))
        x = torch.cat([*tokens, x + positions], 1)
        for i in range(self.depth):
            name = f"backbone.blocks.{i}"
            rate = self.drop_path if self.v2 else self.drop_path * i / (self.depth - 1)
            for norm, part, scale in (("norm1", "attn", "ls1"), ("norm2", "mlp", "ls2")):
                gamma = w.get(f"{name}.{scale}.gamma", torch.tensor(1.0, dtype=torch.float64))

                def branch(
                    y: Tensor, norm: str = norm, part: str = part, gamma: Tensor = gamma, name: str = name
                ) -> Tensor:
                    y = layer_norm(y, w, f"{name}.{norm}")
                    if part == "attn":
                        return gamma * attention(y, w, f"{name}.attn", self.heads)
                    return gamma * mlp(y, w, f"{name}.mlp", swiglu=self.swiglu)

                if not train or rate == 0:
                    x = x + branch(x)
                elif self.v2:  # an exact share of the batch
                    kept = torch.randperm(n)[: int(n * (1 - rate))]
                    added = torch.zeros_like(x)
                    added[kept] = branch(x[kept]) * n / len(kept)
                    x = x + added
                else:
                    keep = torch.empty(n, 1, 1, dtype=torch.float64).bernoulli_(1 - rate)
                    x = x + branch(x) * keep / (1 - rate)
        return layer_norm(x, w, "backbone.norm")

    def logits(self, x: Tensor, w: Weights, head: str = "head") -> Tensor:
        for i in (0, 2):
            x = gelu(linear(x, w, f"{head}.mlp.{i}"))
        x = linear(x, w, f"{head}.mlp.4")
        x = x / x.norm(dim=-1, keepdim=True)
        last = f"{head}.last_layer.parametrizations.weight"
        direction = w[f"{last}.original1"]
        return x @ (w[f"{last}.original0"] * direction / direction.norm(dim=1, keepdim=True)).T

    def targets(self, logits: Tensor, temperature: float, kind: str) -> Tensor:
        """Softmax of centered logits, with the center of the steps before."""
        center = self.centers.setdefault(kind, torch.zeros(logits.shape[-1], dtype=torch.float64))
        result = ((logits - center) / temperature).softmax(-1)
        if len(logits):
            self.centers[kind] = 0.9 * center + 0.1 * logits.mean(0)
        return result

    def loss(self, crops: Sequence[Tensor], mask: Tensor, w: Weights, teacher: Weights, temperature: float) -> Tensor:
        """Loss of one batch: global crops (2·B, …) and local crops (L·B, …)."""
        b = self.batch
        with torch.no_grad():
            seen = self.encode(crops[0], teacher, train=False)
            q = self.targets(self.logits(seen[:, 0], teacher), temperature, "class").reshape(2, b, -1)
        tokens = self.encode(crops[0], w, train=True, mask=mask if self.v2 else None)
        local = self.encode(crops[1], w, train=True)
        log_p = (self.logits(torch.cat([tokens[:, 0], local[:, 0]]), w) / 0.1).log_softmax(-1)
        views = log_p.reshape(2 + self.local_crops, b, -1)
        pairs = [(t, s) for t in range(2) for s in range(len(views)) if s != t]
        total = sum((-(q[t] * views[s]).sum(-1).mean() for t, s in pairs), torch.tensor(0.0)) / len(pairs)
        if not self.v2:
            return total
        prefix = tokens.shape[1] - self.native**2
        flat = mask.reshape(2 * b, -1)
        with torch.no_grad():
            patch_q = self.targets(self.logits(seen[:, prefix:][flat], teacher, "ibot_head"), temperature, "patch")
        patch_p = (self.logits(tokens[:, prefix:][flat], w, "ibot_head") / 0.1).log_softmax(-1)
        weight = (1 / flat.sum(1).clamp(min=1))[:, None].expand_as(flat)[flat]
        ibot = (-(patch_q * patch_p).sum(-1) * weight).sum() / (2 * b)
        spread = torch.tensor(0.0, dtype=torch.float64)
        for view in tokens[:, 0].reshape(2, b, -1):
            unit = view / view.norm(dim=-1, keepdim=True)
            nearest = (unit @ unit.T).detach().fill_diagonal_(-2).argmax(1)
            spread = spread - ((unit - unit[nearest] + 1e-8).norm(dim=1) + 1e-8).log().mean()
        return total + ibot + 0.1 * spread

    def lr_factor(self, name: str) -> float:
        layer = self.depth + 1
        if name in ("class position", "positions", "mask_token") or name.startswith(
            ("backbone.patch_embed", "backbone.cls_token", "backbone.reg_token")
        ):
            layer = 0
        elif name.startswith("backbone.blocks."):
            layer = int(name.split(".")[2]) + 1
        factor = self.layer_decay ** (self.depth + 1 - layer) if self.v2 else 1.0
        return factor * (0.2 if self.v2 and name.startswith("backbone.patch_embed") else 1.0)

    def clip_factors(self, gradients: Mapping[str, Tensor]) -> dict[str, float]:
        """Factor of each gradient: by its own norm in DINO, by that of backbone or head in DINOv2."""

        def group(name: str) -> str:
            if self.v2:
                return name.split(".")[0] if "head" in name else "backbone"
            return "positions" if name == "class position" else name

        squares: dict[str, float] = {}
        for name, gradient in gradients.items():
            squares[group(name)] = squares.get(group(name), 0.0) + float(gradient.square().sum())
        return {name: min(1.0, self.clip / (math.sqrt(squares[group(name)]) + 1e-6)) for name in gradients}

    def adamw(self, name: str, value: Tensor, gradient: Tensor, *, lr: float, decay: float) -> Tensor:
        first, second = self.moments.get(name, (torch.zeros_like(value), torch.zeros_like(value)))
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient.square()
        self.moments[name] = first, second
        t = self.counts[name] = self.counts.get(name, 0) + 1
        step = (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        return value * (1 - lr * decay) - lr * step

    def update(self, w: Weights, loss: Tensor, *, lr: float, decay: float, frozen: bool) -> Weights:
        """Weights of the student after one step."""
        names = [name for name, value in w.items() if value.requires_grad]
        gradients = dict(zip(names, torch.autograd.grad(loss, [w[name] for name in names]), strict=True))
        factors = self.clip_factors(gradients)
        result = {name: value.detach() for name, value in w.items()}
        for name, gradient in gradients.items():
            last = "last_layer" in name
            if frozen and last and not self.v2:
                continue
            decays = not (name.endswith(".bias") or "norm" in name or "gamma" in name)
            rate = 0.0 if frozen and last else lr * self.lr_factor(name)
            result[name] = self.adamw(
                name, result[name], gradient * factors[name], lr=rate, decay=decay if decays else 0.0
            )
        return {name: value.requires_grad_(name in gradients) for name, value in result.items()}

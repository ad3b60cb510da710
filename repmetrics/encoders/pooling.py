"""The pooling of an encoder's tokens: the network's own, a requested one, or CONCH's."""

from __future__ import annotations

from typing import Any

from repmetrics.encoders.architecture import Architecture, Choices, StateDict
from repmetrics.encoders.encoder import Pooler, TokenPool
from repmetrics.encoders.files import CheckpointFile

# Names of CONCH's pooling beside its trunk, and of the parts of an `AttentionPooler`.
_CONCH = {"attn_pool_contrast.": "", "ln_contrast.": "norm."}
_CONCH_PARTS = 13


def resolve_pooling(architecture: Architecture, pool: TokenPool | None, notes: list[str]) -> TokenPool | None:
    """The requested pooling, or one for a network that pools nothing.

    Raises:
        ValueError: The network has no class token, or no tokens.
    """
    skeleton: Any = architecture.skeleton
    has_class = getattr(skeleton, "cls_token", None) is not None
    tokens = hasattr(skeleton, "num_prefix_tokens") and hasattr(skeleton, "fc_norm")
    if pool is None:
        if getattr(skeleton, "global_pool", None) or not tokens:
            return None
        pool = "cls" if has_class else "mean"
        kind = "class token; --pool cls+mean appends the mean of the patch tokens, as Virchow does"
        notes.append(f"the configuration pools nothing: features are the {kind if has_class else 'mean of the tokens'}")
        return pool
    if not tokens:
        raise ValueError(f"{architecture.name} has no tokens to pool: leave out --pool")
    if pool != "mean" and not has_class:
        raise ValueError(f"{architecture.name} has no class token: choose --pool mean")
    return pool


def conch_pooling(file: CheckpointFile, root: str, choices: Choices, notes: list[str]) -> Pooler | None:
    """CONCH's attention pooling beside its trunk; None if there is none, or if it is not complete."""
    parent = root.removesuffix("trunk.")
    state: StateDict = {
        new + key.removeprefix(parent + old): value.float()
        for old, new in _CONCH.items()
        for key, value in file.tensors.items()
        if key.startswith(parent + old)
    }
    if parent == root or "query" not in state:
        return None
    if len(state) < _CONCH_PARTS:
        notes.append(
            f"left aside: {parent}attn_pool_contrast, which lacks weights: the features are the trunk's, not CONCH's"
        )
        return None
    heads = int(choices.take("attn_pooler_heads", 8, "{} heads of the pooling"))
    notes.append("features from CONCH's attention pooling and norm, before its projection; --pool cls: the class token")
    return Pooler(state, heads)

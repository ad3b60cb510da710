"""Which settings make a comparison of runs unfair: they change what a metric measures, or raise it by themselves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple


class Axis(NamedTuple):
    """Settings with one effect on label-free metrics.

    Attributes:
        settings: Regular expression of the last part of their names.
        effect: What they do, after the name.
    """

    settings: str
    effect: str


AXES: tuple[Axis, ...] = (
    Axis(
        r"regularizer|koleo|kde|vicreg|barlow|spread|(variance|covariance|uniformity)_(weight|coeff?)",
        "raises the rank directly: a higher rank is not evidence of better features",
    ),
    Axis(r"^(class_path|_target_|method|algorithm|objective)$", "mixes methods: ranks compare only within one method"),
    Axis(
        r"^(arch|arch_kwargs|architecture|model|model_name|backbone|embed_dim|depth|num_heads|patch_size|width|reg_tokens|"
        r"ffn_layer|layer_scale)$",
        "changes the architecture and with it the feature space: values compare only within one",
    ),
    Axis(
        r"^(encoder|encoder_path|layers?|pool|pooling|branch|transform)$",
        "changes which features are measured: values are not comparable",
    ),
    Axis(
        r"manifest|held_out|val_data|view_set|^(views|data|keys)$",
        "changes the measured samples: values are not comparable",
    ),
    Axis(
        r"(img|image|input|crops?)_?size|^(size_px|mpps?|resolution|global_size|local_size)$",
        "changes the resolution or the size of the crops: objects appear at another scale than in the held-out images",
    ),
    Axis(
        r"prototypes|bottleneck|hidden_dim|(proj|projector|projection|head|out|mlp)_?(dim|width|layers|hidden)|^mlp_ratio$",
        "changes the width of the head: it limits how far features spread, and losses of other heads do not compare",
    ),
    Axis(
        r"(?<!lr_)batch_?size|accumulate_grad|^(devices|num_nodes)$|per_device",
        "changes the images seen in each step: compare runs of equal numbers of images",
    ),
    Axis(r"weight_decay|^(wd|l2)$", "shrinks weights, which changes the spectrum of the features directly"),
    Axis(
        r"jitter|brightness|contrast|saturation|hue|gr[ae]yscale|blur|solari[sz]|stain|crops?_scale|_scale$|min_area|"
        r"crops?_number|^(n|num)_(views|crops)$|flip|augment|rotat|color|colour|mask_|mixup|cutmix|^ratio$",
        "changes the strength of the augmentation, and so by itself what features ignore and how far they spread",
    ),
    Axis(
        r"^((max|num|total|n)_)?(train_)?(steps|epochs|iters?|iterations|time)$|^limit_train_batches$",
        "changes the length of training, with which metrics change by themselves",
    ),
    Axis(
        r"^(init|init_heads|pretrained|ckpt_path)$",
        "changes the weights from which training starts, and with them what metrics begin from",
    ),
    Axis(r"seed", "is no setting but noise: repeat settings with seeds instead"),
)
"""Settings that make a comparison unfair, with the reason. The first row that matches counts."""


def axis_warning(name: str) -> str | None:
    """Reason why runs that differ in this setting do not compare, or None.

    Example:
        >>> axis_warning("model.init_args.weight_decay")
        'weight_decay shrinks weights, which changes the spectrum of the features directly'
        >>> axis_warning("model.init_args.schedules.lr")
    """
    parts = [part for part in name.split(".") if part not in ("name", "type")] or [name]
    last = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", parts[-1]).lower()  # batchSize as batch_size
    effect = next((axis.effect for axis in AXES if re.search(axis.settings, last)), None)
    return None if effect is None else f"{parts[-1]} {effect}"


def comparison_warnings(
    axes: Sequence[str], *, methods: Sequence[str] = (), widths: Sequence[int | None] = (), metrics: Sequence[str] = ()
) -> list[str]:
    """Return the reasons why label-free metrics do not compare between runs.

    Args:
        axes: Settings that differ between the runs.
        methods: Method of each run.
        widths: Width of each run's features.
        metrics: Metrics of the selection.

    Example:
        >>> comparison_warnings(["model.init_args.regularizer_weight"], methods=["DINOv2", "DINOv2"])
        ['regularizer_weight raises the rank directly: a higher rank is not evidence of better features']
    """
    reasons = [axis_warning(name) for name in axes]
    warnings = [warning for warning in dict.fromkeys(reasons) if warning is not None]
    if len(kinds := sorted({method for method in methods if method})) > 1:
        warnings.append(f"methods differ ({', '.join(kinds)}): ranks and correlations compare only within one method")
    if len(sizes := sorted({width for width in widths if width is not None})) > 1:
        warnings.append(f"features are {', '.join(map(str, sizes))} wide: ranks compare only at one width")
    if "loss" in metrics:
        warnings.append("losses compare only if their definition is the same")
    return warnings

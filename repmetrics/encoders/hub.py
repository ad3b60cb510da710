"""Names of models on the Hugging Face hub, resolved to files in the cache of its library."""

from __future__ import annotations

import json
import re
from pathlib import Path

# In order of preference.
WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "open_clip_model.safetensors", "pytorch_model.bin",
    "pytorch_model.bin.index.json", "open_clip_pytorch_model.bin",
)  # fmt: skip
SIDECARS = ("config.json", "preprocessor_config.json", "open_clip_config.json")
_ID = re.compile(r"(?:hf-hub:|hf_hub:|hf://)([\w.-]+/[\w.-]+)(?:@([\w./-]+))?$")
_TIMM = re.compile(r"(timm/[\w.-]+)(?:@([\w./-]+))?$")


def is_hub_id(name: str) -> bool:
    """Whether a name is that of a model on the hub: ``hf-hub:owner/name`` or ``timm/name``, with ``@revision``.

    Example:
        >>> is_hub_id("hf-hub:owner/name@main"), is_hub_id("timm/vit_small_patch16_224.dino"), is_hub_id("runs/a.ckpt")
        (True, True, False)
    """
    return bool(_ID.match(name) or (_TIMM.match(name) and not Path(name).exists()))


def download(name: str) -> Path:
    """File of the weights of a model on the hub, with its JSON and its shards in the same folder.

    The library of the hub keeps files in its cache. Files that are there are not downloaded again.

    Raises:
        ValueError: The hub does not have the model, or is out of reach and the cache has no copy.
    """
    from huggingface_hub import constants

    match = _ID.match(name) or _TIMM.match(name)
    assert match is not None
    repo, revision = match.group(1), match.group(2)
    for sidecar in SIDECARS:
        _file(repo, sidecar, revision)
    weights = next((path for file in WEIGHTS if (path := _file(repo, file, revision)) is not None), None)
    if weights is None:
        raise ValueError(
            f"{repo} has no {', '.join(WEIGHTS)} in the cache {constants.HF_HUB_CACHE}, and none could be downloaded: "
            f"check the name, or run 'hf download {repo}' where the hub can be reached"
        )
    if weights.suffix == ".json":
        shards = sorted(set(json.loads(weights.read_text(encoding="utf-8"))["weight_map"].values()))
        if missing := [shard for shard in shards if _file(repo, shard, revision) is None]:
            raise ValueError(
                f"{repo} lacks {len(missing)} of {len(shards)} shards in the cache {constants.HF_HUB_CACHE}, such as "
                f"{missing[0]}: run 'hf download {repo}' where the hub can be reached"
            )
    return weights


def _file(repo: str, name: str, revision: str | None) -> Path | None:
    """Path of a file in the cache, downloaded if necessary; None if it is not on the hub, or out of reach."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, name, revision=revision))
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"hf-hub:{repo}: {str(error).strip().splitlines()[0]}") from error

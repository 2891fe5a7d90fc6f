"""Published weight files that lie behind a plain address instead of on the Hub: found, or fetched once and checked."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_OFFLINE

from diffalign.reward_models.base import RewardInfo, WeightsError, WeightSpec
from diffalign.reward_models.checkpoints import find_file
from diffalign.reward_models.weights import expected, one_line

__all__ = ["find_or_fetch"]

_CHECKSUM = re.compile(r"-([0-9a-f]{8,})\.")


def find_or_fetch(
    info: RewardInfo, path: str | Path | None, spec: WeightSpec, local_files_only: bool | None = None
) -> Path:
    """The local path of a published file: the one given, else the one in torch's cache, else fetched from `spec.url`.

    torch keeps such files in `torch.hub.get_dir()/checkpoints`, where torchvision looks for them as well. Names mostly
    carry the first digits of the file's SHA-256, which are then checked when it is fetched.

    Args:
        info: For the messages.
        path: The file, a folder with it, or a Hub id; None for torch's cache.
        spec: Which file.
        local_files_only: Never ask the network; None follows HF_HUB_OFFLINE.

    Raises:
        WeightsError: If it is not there and cannot be fetched.
    """
    if path is not None:
        return find_file(info, path, spec, local_files_only)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / spec.filename
    if cached.is_file():
        return cached
    if HF_HUB_OFFLINE if local_files_only is None else local_files_only:
        raise WeightsError(
            f"cannot load {info.name}: {spec.filename!r} is not in {str(cached.parent)!r}; {expected(info, spec)}"
        )
    cached.parent.mkdir(parents=True, exist_ok=True)
    checksum = _CHECKSUM.search(spec.filename)
    try:
        # It writes beside the target and renames when the checksum fits, so that a kill leaves no half file.
        torch.hub.download_url_to_file(spec.url, str(cached), checksum[1] if checksum else None, progress=False)
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"cannot fetch {info.name} from {spec.url}: {one_line(error)}; {expected(info, spec)}"
        ) from error
    return cached

"""Which cache belongs to which data, model and preprocessing, and how it is found again without looking at the data.

A cache is named by a hash that the content of the data is part of, so that finding it means reading the data. Beside it
lies a note, named by a hash of the settings that led to it. Whoever vouches for the data not having changed
(`data.check_source: false`) finds the cache by the note alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from diffalign.data.config import DataConfig
from diffalign.data.disk import write_whole
from diffalign.data.encoded import EncodedPairs
from diffalign.data.index import MANIFEST
from diffalign.data.media import MediaSize, Preparation

_log = logging.getLogger("diffalign")

CACHE_VERSION = 2
SHARD_SIZE = 256
CLIP_SHARD_SIZE = 16
"""For clips, whose latents are megabytes each and minutes of work."""
_HOW = {
    "resolution",
    "aspect_ratio_buckets",
    "bucket_step",
    "fps",
    "center_crop",
    "random_flip",
    "cache",
    "cache_dtype",
}
"""Settings that `cache_key` has in its own words."""
_WHATEVER = {"encoded_dir", "cache_dir", "streaming", "encode_batch_size", "max_corrupt_fraction", "check_source"}
"""Settings that lead to the same cache whatever they are."""


class Encodes(MediaSize, Protocol):
    """The part of a policy that a cache is named after."""

    def encoder_fingerprint(self) -> str:
        """See `Policy.encoder_fingerprint`."""
        ...


def cache_key(
    policy: Encodes, config: DataConfig, preparation: Preparation, shard_size: int | None = None
) -> dict[str, Any]:
    """Everything but the data that decides the bytes of a cache, as JSON values.

    Args:
        policy: Whose encoders are used.
        config: What is kept.
        preparation: What is done to the pictures.
        shard_size: Pairs per file; None takes 256 pairs of images or 16 of clips.
    """
    return {
        "version": CACHE_VERSION,
        "encoder": policy.encoder_fingerprint(),
        **preparation.key(),
        "cache": config.cache,
        "cache_dtype": config.cache_dtype,
        "shard_size": shard_size or (CLIP_SHARD_SIZE if policy.is_video else SHARD_SIZE),
    }


def fingerprint(key: Mapping[str, Any]) -> str:
    """The hash of a key."""
    return hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()


def note_cache(folder: Path, key: Mapping[str, Any], config: DataConfig) -> None:
    """Leaves the note in a finished cache, and takes it away from the cache of what the data were before.

    Args:
        folder: The cache.
        key: Of `cache_key`.
        config: What its data were read with.
    """
    name, content = _note(key, config)
    if not (folder / name).is_file():
        try:
            write_whole(folder / name, content)
        except OSError as error:
            _log.warning("%s; data.check_source: false will not find the cache", error)
    for other in folder.parent.glob(f"*/{name}"):
        if other.parent != folder:
            other.unlink(missing_ok=True)


def check_finished(root: Path) -> None:
    """Raises ValueError if no cache below `root` is finished; needs no model."""
    if not any(root.glob(f"*/{MANIFEST}")):
        raise ValueError(
            f"data.check_source is false, and {root} holds no finished cache; train once with check_source: true, or "
            "name the caches' folder in data.encoded_dir"
        )


def find_encoded(
    policy: Encodes, config: DataConfig, root: Path, *, winners_only: bool = False, shard_size: int | None = None
) -> EncodedPairs:
    """The cache that `encode_pairs` has finished with the same settings, found and opened without looking at the data.

    Takes the same time for any number of pairs. Nothing is known of the data as they are now: that they are those that
    were encoded is the caller's word. No file of the cache is checked before it is read.

    Args:
        policy: The model.
        config: The settings.
        root: Folder of all caches.
        winners_only: See `load_pairs`.
        shard_size: See `encode_pairs`.

    Raises:
        ValueError: If there is none.
    """
    preparation = Preparation(config, policy, winners_only=winners_only or config.format == "scored")
    name, _ = _note(cache_key(policy, config, preparation, shard_size), config)
    found = [path for path in root.glob(f"*/{name}") if (path.parent / MANIFEST).is_file()]
    if not found:
        raise ValueError(
            f"data.check_source is false, and no finished cache in {root} was made from these data with this model, "
            "size and preprocessing; train once with check_source: true"
        )
    newest = max(found, key=lambda path: path.stat().st_mtime)  # one, unless two runs noted theirs at one moment
    return EncodedPairs.open(newest.parent, check_files=False)


def _note(key: Mapping[str, Any], config: DataConfig) -> tuple[str, bytes]:
    """Name and content of the note."""
    settings = {**key, "data": config.model_dump(mode="json", exclude=_HOW | _WHATEVER)}
    return f"made-from-{fingerprint(settings)}.json", json.dumps(settings, indent=1).encode()

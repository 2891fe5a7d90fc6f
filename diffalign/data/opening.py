"""The pairs of a run, opened in the order in which a mistake costs least: settings, raw data, the model's encoders."""

from __future__ import annotations

from pathlib import Path

from diffalign.data.caches import check_finished, find_encoded
from diffalign.data.config import DataConfig
from diffalign.data.encoded import EncodedPairs
from diffalign.data.encoding import Encoder, encode_pairs
from diffalign.data.loading import check_source, load_pairs
from diffalign.data.media import Media, check_media
from diffalign.data.pairs import PairSet
from diffalign.processes import ALONE, Processes

__all__ = ["RunPairs"]


class RunPairs:
    """Pairs on their way from a configuration to a cache: made first, then `read`, then `encoded`.

    With `check_source: false` raw data are never looked at: the cache must be finished.

    Args:
        config: Where they are.
        output_dir: Of the run, which has the cache unless `config` names a folder for it.
        winners_only: See `load_pairs`.

    Raises:
        ValueError: As `check_source` or `check_finished`; no data set is downloaded, no model loaded.
    """

    def __init__(self, config: DataConfig, output_dir: str | Path, *, winners_only: bool = False) -> None:
        self.config, self._winners_only = config, winners_only
        self.cache = Path(config.encoded_dir or Path(output_dir) / "cache")
        self._pairs: PairSet | None = None
        if config.check_source:
            check_source(config, winners_only=winners_only)
        else:
            check_finished(self.cache)

    def read(self, model: Media) -> None:
        """Reads the raw pairs, if they are to be looked at.

        Args:
            model: Class of the policy, which says whether it draws videos.

        Raises:
            ValueError: As `load_pairs`; or if pairs are of images where the model draws videos, or the other way round.
        """
        if self.config.check_source:
            self._pairs = load_pairs(self.config, winners_only=self._winners_only)
            check_media(self._pairs, model)

    def encoded(self, policy: Encoder, processes: Processes = ALONE) -> EncodedPairs:
        """The cache, made by the policy's encoders if it is not there.

        Raises:
            ValueError: As `encode_pairs`, or as `find_encoded` with `check_source: false`.
        """
        if not self.config.check_source:
            return find_encoded(policy, self.config, self.cache, winners_only=self._winners_only)
        assert self._pairs is not None, "read comes first"
        return encode_pairs(self._pairs, policy, self.config, self.cache, processes=processes)

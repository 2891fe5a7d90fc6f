"""Settings that only video models have, and scorers that only images have: refused before any weights load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from diffalign.backbones.loading import ModelSource, policy_class
from diffalign.config import ConfigError
from diffalign.data import DataConfig
from diffalign.data.media import check_crop
from diffalign.generation import SamplingConfig
from diffalign.videos import require_av


def check_media_settings(
    source: ModelSource,
    *,
    num_frames: int | None = None,
    options: Mapping[str, Any] | None = None,
    data: DataConfig | None = None,
    sampling: SamplingConfig | None = None,
) -> None:
    """Whether frames and rates fit the model.

    Args:
        source: The model.
        num_frames: What `model.num_frames` says.
        options: What `model.options` says.
        data: The section `data`.
        sampling: The section `sampling`.

    Raises:
        ValueError: If frames or rates are set for an image model, if random crops are, if PyAV is missing for a video
            model, or if clips would be read at another rate than the network is told.
    """
    model = policy_class(source)
    fps = data.fps if data is not None else None
    if not model.is_video:
        written = sampling.fps if sampling is not None else None
        for name, value in (("model.num_frames", num_frames), ("data.fps", fps), ("sampling.fps", written)):
            if value is not None:
                raise ConfigError(f"{name} is {value:g}, and {source.family} draws images; leave it out")
        if data is not None:
            check_crop(data, model)
        return
    require_av()
    told = (options or {}).get("frame_rate") or model.frame_rate
    if model.reads_frame_rate and fps is not None and fps != told:
        raise ConfigError(
            f"data.fps is {fps:g}, and the network is told {told:g} frames per second; set model.options.frame_rate: "
            f"{fps:g} and leave out data.fps"
        )


def check_scorers(source: ModelSource, infos: Iterable[Any], *, in_groups: bool = False) -> None:
    """Raises ValueError for a reward model that does not score what the model draws.

    Args:
        source: The model.
        infos: What is known about the reward models, as `diffalign.reward_models.RewardInfo`.
        in_groups: Whether all media of a prompt are scored in one call, as a rank among them needs.
    """
    kind = "video" if policy_class(source).is_video else "image"
    for info in infos:
        if kind not in info.kind:
            raise ConfigError(
                f"reward model {info.name!r} scores {' and '.join(sorted(info.kind))}s, and {source.family} draws "
                f"{kind}s; take a reward model of {kind}s"
            )
        if info.pairwise_native:
            raise ConfigError(
                f"reward model {info.name!r} judges pairs and gives no scores; take win_rate({info.name})"
            )
        if info.groupwise and not in_groups:
            raise ConfigError(
                f"reward model {info.name!r} compares the {kind}s of one prompt with each other, and here each is "
                "scored alone; take one that scores single media"
            )


def check_judges(source: ModelSource, infos: Iterable[Any], benchmark: Any | None) -> None:
    """Raises ValueError unless what a video or image model draws is looked at by something that reads it.

    Args:
        source: The model.
        infos: Of the reward models, see `check_scorers`.
        benchmark: Class of the benchmark, or None.
    """
    infos, kind = list(infos), "videos" if policy_class(source).is_video else "images"
    check_scorers(source, infos)
    if benchmark is not None and benchmark.is_video != (kind == "videos"):
        other = "videos" if benchmark.is_video else "images"
        raise ConfigError(
            f"evaluation.benchmark {benchmark.name!r} judges {other}, and {source.family} draws {kind}; name another"
        )
    if benchmark is None and not infos:
        raise ConfigError("evaluation has neither reward_models nor a benchmark; nothing would be compared")

"""The models whose pictures benchmarks judge: drawn into the cache, or found again without loading them."""

from __future__ import annotations

import gc
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffalign.backbones import ModelSource, inspect_model
from diffalign.backbones.loading import policy_class
from diffalign.config import ConfigError, ModelConfig
from diffalign.configured import load_model
from diffalign.generation import SamplingConfig
from diffalign.media_checks import check_media_settings
from diffalign.picture_cache import PictureCache, open_cache
from diffalign.processes import Processes
from diffalign.resumable import write_atomically

if TYPE_CHECKING:
    from diffalign.eval.base import Benchmark

logger = logging.getLogger("diffalign")

PICTURES, MODELS = "pictures", "models.json"


@dataclass(frozen=True)
class Asked:
    """What a user says about the model whose pictures are judged.

    Attributes:
        model: Folder, Hub id or embedded model; with imported pictures just its name.
        adapter: Trained weights to put on top.
        sampling: Guidance and steps; a batch size is not remembered.
        size: Height and width in pixels.
        num_frames: Of a video.
    """

    model: str
    adapter: str | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    size: tuple[int, int] | None = None
    num_frames: int | None = None

    @property
    def name(self) -> str:
        """A name for people, of the adapter if there is one, else of the model."""
        text = re.sub(r"[^A-Za-z0-9.]+", "-", (self.adapter or self.model).rstrip("/").rpartition("/")[2])
        return text.strip("-.") or "model"

    def with_model(self, model: str) -> Asked:
        """Another model without an adapter, drawn in the same way."""
        return replace(self, model=model, adapter=None)

    def settings(self) -> dict[str, Any]:
        """What `models.json` finds it by."""
        said = asdict(self) | {"sampling": self.sampling.model_dump(exclude={"batch_size"}, exclude_defaults=True)}
        settings: dict[str, Any] = json.loads(json.dumps(said))
        return settings


@dataclass(frozen=True)
class Side:
    """A model whose pictures are, or will be, in a cache.

    Attributes:
        name: Of its folders.
        cache: Its pictures.
        model: What reports say about it.
        sampling: What reports say about the sampler.
    """

    name: str
    cache: PictureCache
    model: Mapping[str, Any]
    sampling: Mapping[str, Any]


def check_model(asked: Asked, benchmarks: Sequence[Benchmark]) -> ModelSource:
    """The model, looked at; refused if it does not draw what the benchmarks judge."""
    source = inspect_model(asked.model)
    kind = policy_class(source)
    kind.check_sampling(source)
    check_media_settings(source, num_frames=asked.num_frames, sampling=asked.sampling)
    for benchmark in benchmarks:
        check_medium(benchmark, kind.is_video, source.name)
    return source


def check_medium(benchmark: Benchmark, is_video: bool, name: str) -> None:
    """Raises ConfigError if a model draws videos for a benchmark of images, or the other way round."""
    if benchmark.is_video != is_video:
        kinds = ("videos", "images") if benchmark.is_video else ("images", "videos")
        raise ConfigError(f"benchmark {benchmark.name!r} judges {kinds[0]}, and {name} draws {kinds[1]}; name another")


def draw_side(
    output: Path,
    asked: Asked,
    source: ModelSource,
    benchmarks: Sequence[Benchmark],
    before: Sequence[Side],
    processes: Processes,
) -> Side:
    """Draws what the benchmarks lack of one model's pictures."""
    section = ModelConfig(pretrained_model_name_or_path=asked.model, num_frames=asked.num_frames)
    policy: Any = load_model(section, source, adapter=asked.adapter, size=asked.size, sampling=asked.sampling)
    sampling = asked.sampling.resolved(policy)
    dtype = str(next(policy.denoiser.parameters()).dtype).removeprefix("torch.")
    made_with = {"dtype": dtype, "size": list(policy.size)}
    cache = open_cache(output / PICTURES, policy, sampling, made_with, processes)
    model = {"path": asked.model, "adapter": asked.adapter, "pictures": cache.key}
    model |= {"scheduler": type(policy.pipeline.scheduler).__name__, "dtype": dtype}
    said: dict[str, Any] = {
        "guidance_scale": sampling.guidance_scale,
        "num_inference_steps": sampling.num_inference_steps,
        "size": list(policy.size),
        **sampling.caches(),
    }
    if policy.is_video:
        said |= {"num_frames": policy.num_frames, "fps": sampling.fps}
    side = Side(f"{asked.name}-{cache.key[:10]}", cache, model, said)
    for other in before:
        _check_comparable(other, side)
    processes.on_first(lambda: _remember(output, asked, side))
    lists = [[(case.prompt, case.seed) for case in benchmark.cases()] for benchmark in benchmarks]
    for benchmark, wanted in zip(benchmarks, lists, strict=True):
        _announce(f"{benchmark.name}, {side.name}", cache, wanted, processes)
    for wanted in lists:
        cache.fill(policy, wanted, sampling, processes)
    del policy
    free_memory()
    return side


def _announce(name: str, cache: PictureCache, wanted: Sequence[tuple[str, int]], processes: Processes) -> None:
    if processes.is_first:
        count, missing = len(set(wanted)), cache.missing(wanted)
        kind = "videos" if cache.is_video else "pictures"
        logger.info("%s: %d %s, %d are there, %d to draw", name, count, kind, count - missing, missing)


def _check_comparable(base: Side, aligned: Side) -> None:
    """Refuses a comparison before its second half is drawn."""
    if base.cache.key == aligned.cache.key:
        raise ConfigError(
            f"{aligned.model['path']} and {base.model['path']} have the same weights, so there is nothing to compare; "
            "give the trained weights with --adapter"
        )
    different = [key for key in aligned.sampling if aligned.sampling[key] != base.sampling.get(key)]
    if different:
        what = "; ".join(f"{key}: {base.sampling.get(key)!r}, {aligned.sampling[key]!r}" for key in different)
        raise ConfigError(
            f"{base.model['path']} and {aligned.model['path']} would be sampled with different settings ({what}); give "
            "--guidance-scale, --num-inference-steps, --height and --width, or evaluate each without --against"
        )


def _remember(output: Path, asked: Asked, side: Side) -> None:
    """Notes which pictures a model has, so that they can be scored without loading it."""
    known = _known(output)
    entry = {
        "asked": asked.settings(),
        "name": side.name,
        "pictures": side.cache.key,
        "is_video": side.cache.is_video,
        "model": dict(side.model),
        "sampling": dict(side.sampling),
    }
    kept = [other for other in known if other["asked"] != entry["asked"]]
    text = json.dumps([*kept, entry], indent=1, ensure_ascii=False) + "\n"
    write_atomically(output / MODELS, text.encode())


def _known(output: Path) -> list[dict[str, Any]]:
    path = output / MODELS
    if not path.is_file():
        return []
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); delete it, and evaluate again without --stage") from error
    return found


def recall_side(output: Path, asked: Asked, benchmarks: Sequence[Benchmark]) -> Side:
    """The side that an earlier call drew for the same model and settings."""
    entry = next((entry for entry in _known(output) if entry["asked"] == asked.settings()), None)
    if entry is None:
        raise ConfigError(
            f"{output} holds no pictures of {asked.model} with these settings; draw them first, with --stage generate "
            "and the same model, adapter, guidance, steps and size"
        )
    for benchmark in benchmarks:
        check_medium(benchmark, entry["is_video"], asked.model)
    cache = PictureCache(output / PICTURES, entry["pictures"], entry["is_video"])
    return Side(entry["name"], cache, entry["model"], entry["sampling"])


def free_memory() -> None:
    """Gives memory of models that nobody holds any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

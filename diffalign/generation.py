"""Images or videos from prompts, into a folder, in a way that survives being killed: the body of `diffalign sample`.

Nothing here imports torch: the configuration is read, and a wrong one refused, before anything heavy loads.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from diffalign.processes import ALONE, Processes
from diffalign.prompts import OWN_FIELDS, PromptRow, image_seed
from diffalign.resumable import Row, RowLog, claim_folder, to_line, write_atomically
from diffalign.videos import require_av, to_mp4

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.policy import Policy

_log = logging.getLogger("diffalign")
T = TypeVar("T")

INDEX_FILE = "index.jsonl"
IMAGE_FOLDER = "images"
VIDEO_FOLDER = "videos"
NAMES = ("model", "adapter")
"""Settings that only name weights, whose hash is a setting of its own."""


class NonFiniteImageError(ValueError):
    """The model drew NaN or infinity instead of a picture."""


class SamplingConfig(BaseModel):
    """How images or videos are drawn.

    Attributes:
        guidance_scale: Weight of classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) in the convention of
            diffusers: 1 switches it off. None is what the model's family is usually sampled with.
        num_inference_steps: Steps of the pipeline's sampler; None likewise.
        num_images_per_prompt: Images or videos for each prompt, each with its own seed.
        batch_size: Images or videos per forward pass; None takes 8 images or 1 video. It changes the last digits of
            float32 sums, so it belongs to the settings that a folder is tied to.
        fps: Frames per second of the video files; None takes the family's own.
        torch_compile: Compile the denoiser before drawing, as `model.torch_compile_backend` and `_mode` say, or with
            "blocks" only the blocks that it repeats; worth its minutes for many pictures on a GPU. The last batch is
            filled up to `batch_size`, as another size would be compiled anew.
        deep_cache: Of UNets: compute the whole network every so manyth step and its shallowest branch alone in between,
            DeepCache (arXiv:2312.00858). Other pictures than without; 1 draws the same. None switches it off.
        first_block_cache: Of transformers that diffusers has it for: relative change of the first block's residual up
            to which the other blocks are taken from the step before. Other pictures than without, which then depend on
            the pictures of their batch; 0 draws the same. None switches it off.
        negative_model: Weights for the unconditional branch of guidance, a run's output folder or a file, for `sample`,
            `pairs` and `evaluate`; see docs/negative_models.md.
        negative_alpha: Share of what the sampled model has learnt that they get, in 0..1.
        negative_scale: Share of what the negative model has learnt that they get, in 0..1.
        reward_guidance: Folder of a reward model on noisy latents, whose gradient moves the samples of a flow model
            (Flow-NRG). Used by `sample`, and by `evaluate` for the aligned side; pairs and the pictures that validate a
            run are drawn without. See docs/flow_rewards.md.
        reward_weights: Weight of each of its dimensions; dimensions that are left out get 0, and all get 1 if none is
            named.
        reward_scale: w, how far the law of the samples is tilted: by exp(w * reward).
        reward_max_factor: Bound of t / (1 - t), which grows without end towards pure noise; None leaves it alone.
        reward_max_share: Bound of the correction's norm, as a share of the velocity's; None likewise.
        seed: Of the run; each image's seed is derived from it, see `image_seed`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    guidance_scale: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    num_inference_steps: int | None = Field(default=None, ge=1)
    num_images_per_prompt: int = Field(default=1, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    fps: float | None = Field(default=None, gt=0, le=1000, allow_inf_nan=False)
    torch_compile: bool | Literal["blocks"] = False
    deep_cache: int | None = Field(default=None, ge=1)
    first_block_cache: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    negative_model: str | None = None
    negative_alpha: float = Field(default=1.0, ge=0, le=1)
    negative_scale: float = Field(default=1.0, ge=0, le=1)
    reward_guidance: str | None = None
    reward_weights: dict[str, float] = Field(default_factory=dict)
    reward_scale: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    reward_max_factor: float | None = Field(default=5.0, gt=0, allow_inf_nan=False)
    reward_max_share: float | None = Field(default=0.2, gt=0, allow_inf_nan=False)
    seed: int = 0

    def resolved(self, policy: Policy) -> SamplingConfig:
        """The same settings with the family's own numbers where none were given."""
        own: dict[str, Any] = {
            "guidance_scale": policy.guidance_scale,
            "num_inference_steps": policy.num_inference_steps,
            "batch_size": 1 if policy.is_video else 8,
            "fps": policy.frame_rate if policy.is_video else None,
        }
        return self.model_copy(update={k: v for k, v in own.items() if getattr(self, k) is None})

    def caches(self) -> dict[str, Any]:
        """The deep caches that are on: what readers of scores should know of the pictures."""
        found = {"deep_cache": self.deep_cache, "first_block_cache": self.first_block_cache}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Request:
    """One image or video to draw.

    Attributes:
        id: Unique in its list; letters, digits, `.`, `_` and `-`, since it names the file.
        prompt: What to draw.
        seed: Seed of its own generator, 0 <= seed < 2**31.
        extras: Further fields of its index row, as JSON values.
        is_video: Whether it is a video.
    """

    id: str
    prompt: str
    seed: int
    extras: Mapping[str, Any] = field(default_factory=dict)
    is_video: bool = False

    @property
    def file(self) -> str:
        """Where it will lie, relative to the output folder."""
        return f"{VIDEO_FOLDER}/{self.id}.mp4" if self.is_video else f"{IMAGE_FOLDER}/{self.id}.png"

    def row(self) -> dict[str, Any]:
        """Its row in the index, which names the file as `image` or `video`."""
        kind = "video" if self.is_video else "image"
        return {"id": self.id, "prompt": self.prompt, "seed": self.seed, kind: self.file, **self.extras}


def generate(
    policy: Policy,
    requests: Sequence[Request],
    out_dir: str | Path,
    sampling: SamplingConfig,
    *,
    reference: bool = False,
    settings: Mapping[str, Any],
    processes: Processes = ALONE,
) -> Path:
    """Draws all requested images or videos into a folder; a rerun goes on where a killed run was.

    Writes `images/<id>.png` or `videos/<id>.mp4`, `index.jsonl` with one row for each in the order of the requests, and
    `settings.json` with everything they depend on. Batches are cut from the list of requests alone and a batch that was
    not finished is drawn again as a whole, so that the folder of an interrupted run is equal, byte for byte, to that of
    an uninterrupted one. In the middle of a run every row of the index has its file.

    Args:
        policy: Draws.
        requests: What to draw; all of the kind that the policy draws.
        out_dir: Output folder; new, or of an earlier run with the same requests and settings. The same weights under
            another path go on there.
        sampling: Guidance, steps, batch size and frame rate; seed and number of images are for `make_requests` only.
            With a `negative_model`, the policy must have it already, see `Policy.put_negative`.
        reference: Draw with the frozen reference's weights instead of the policy's.
        settings: What else the images depend on and a reader should find in `settings.json`: path of the model, of
            the adapter. The hash of the weights is added, unless given as `weights`.
        processes: Who shares the work, each calling this with the same arguments; the folder is the same for any
            number of them, and a rerun may have another number.

    Returns:
        Path of the index.

    Raises:
        ValueError: If requests are empty, share or misspell an id, or are of the other kind; if the folder holds images
            of other settings; if videos are drawn and PyAV is not installed.
        NonFiniteImageError: If the model draws NaN; no file is written for that image.
    """
    _check(requests, policy)
    sampling = sampling.resolved(policy)
    out_dir = Path(out_dir)

    def claim() -> None:
        digest = hashlib.blake2b("".join(to_line(request.row()) for request in requests).encode(), digest_size=8)
        first = requests[0]
        listed = f"{len(requests)} from {first.prompt!r} with seed {first.seed}, digest {digest.hexdigest()}"
        own = {"batch_size": sampling.batch_size, "requests": listed}
        everything = own | drawing_settings(policy, sampling, reference=reference, settings=settings)
        claim_folder(out_dir, everything, (INDEX_FILE, VIDEO_FOLDER if policy.is_video else IMAGE_FOLDER), NAMES)

    processes.on_first(claim)
    return draw(policy, requests, out_dir / INDEX_FILE, sampling, reference=reference, processes=processes)


def draw(
    policy: Policy,
    requests: Sequence[Request],
    index: Path,
    sampling: SamplingConfig,
    *,
    reference: bool = False,
    kept: Collection[str] = (),
    processes: Processes = ALONE,
) -> Path:
    """The drawing of `generate`, into a folder that the caller has made sure of: what `index` does not list yet.

    Args:
        policy: Draws.
        requests: As in `generate`.
        index: Where the index goes, in the folder of the pictures.
        sampling: As in `generate`.
        reference: As in `generate`.
        kept: Ids of requests whose files are left as they are when their batch is drawn.
        processes: As in `generate`.

    Returns:
        `index`.

    Raises:
        ValueError: As in `generate`.
        NonFiniteImageError: As in `generate`.
    """
    _check(requests, policy)
    sampling = sampling.resolved(policy)
    assert sampling.batch_size is not None
    out_dir = index.parent
    kind, folder = ("video", VIDEO_FOLDER) if policy.is_video else ("image", IMAGE_FOLDER)

    def prepare() -> None:
        _warn_of_long_prompts(policy, requests)
        (out_dir / folder).mkdir(exist_ok=True)

    processes.on_first(prepare)
    lines = {request.id: to_line(request.row()) for request in requests}

    def is_current(row: Row) -> bool:
        return to_line(row) == lines[row["id"]] and (out_dir / row[kind]).is_file()

    log = RowLog(index, list(lines), sampling.batch_size, is_current, processes)
    with log.progress("sampling", kind) as progress:
        for chunk in log.todo:
            batch = requests[chunk.start : chunk.stop]
            filled = batch
            if policy.compiled and chunk.start:  # as long as those before
                filled = fill_up(batch, sampling.batch_size)
            images = policy.sample(
                [request.prompt for request in filled],
                [request.seed for request in filled],
                guidance_scale=sampling.guidance_scale,
                num_inference_steps=sampling.num_inference_steps,
                reference=reference,
                **({"negative": True} if sampling.negative_model is not None else {}),
            )
            for request, image in zip(batch, images[: len(batch)], strict=True):
                drawn = _finite(image, request)
                if request.id not in kept:
                    content = to_mp4(drawn, cast(float, sampling.fps)) if request.is_video else to_png(drawn)
                    write_atomically(out_dir / request.file, content)
            log.append([request.row() for request in batch])
            progress.update(len(batch))
    log.finish()
    return log.path


def fill_up(batch: Sequence[T], size: int) -> list[T]:
    """The batch and copies of its last item: compiled networks have one batch size, any other is compiled anew."""
    return [*batch, *[batch[-1]] * (size - len(batch))]


def make_requests(prompts: Sequence[PromptRow], sampling: SamplingConfig, *, is_video: bool = False) -> list[Request]:
    """`num_images_per_prompt` requests for each prompt, prompt by prompt.

    Ids are `<number of the prompt>-<number of the sample>`. A prompt that stands twice in the list goes on counting
    its samples, so that its images differ.
    """
    seen: dict[str, int] = {}
    requests = []
    for number, row in enumerate(prompts):
        for sample in range(sampling.num_images_per_prompt):
            drawn = seen.get(row.prompt, 0)
            seen[row.prompt] = drawn + 1
            seed = image_seed(sampling.seed, row.prompt, drawn)
            requests.append(Request(f"{number:05d}-{sample:02d}", row.prompt, seed, row.extras, is_video))
    return requests


def to_png(image: Tensor) -> bytes:
    """An image [3, H, W] in [0, 1] as the bytes of an 8-bit RGB PNG file."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def weights_fingerprint(policy: Policy, *, reference: bool = False, negative: bool = False) -> str:
    """A hash of the weights that draw an image: denoiser, autoencoder and text encoder, with `negative` that model too.

    With `reference`, adapters are left out, so that the reference has one fingerprint whatever adapter lies on it. A
    reference that is a frozen copy is named by the live weights beside it: too strict, never too lax.
    """
    from diffalign.weight_hashes import hash_weights

    digest = hashlib.blake2b(policy.encoder_fingerprint().encode(), digest_size=16)
    named = []
    for name, tensor in sorted(policy.denoiser.state_dict().items()):
        if reference and "lora_" in name and not name.endswith(".reference.weight"):
            continue  # the second adapter of a run that went on from one is the reference's own
        plain = name.replace(".base_layer.", ".")  # peft's name for a layer under an adapter
        named.append((f"{plain if reference else name} {tensor.dtype} {tuple(tensor.shape)}", tensor))
    hash_weights(digest, named)
    if negative:
        digest.update(policy.negative_fingerprint().encode())
    return digest.hexdigest()


def drawing_settings(
    policy: Policy,
    sampling: SamplingConfig,
    *,
    reference: bool = False,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """What pictures depend on beside prompts, seeds and the batches they are drawn in, as JSON values.

    Args:
        policy: Draws.
        sampling: Resolved for the policy.
        reference: Whether the frozen reference's weights draw.
        settings: Further entries; the hash of the weights is added, unless given as `weights`.
    """
    everything = {
        "guidance_scale": sampling.guidance_scale,
        "num_inference_steps": sampling.num_inference_steps,
        "device": next(policy.denoiser.parameters()).device.type,
        "pipeline": policy.sampling_settings(float(sampling.guidance_scale or 0)),
        **settings,
    }
    if policy.is_video:
        everything["fps"] = sampling.fps
    negative = sampling.negative_model is not None
    if negative:
        said = {"model": sampling.negative_model, "alpha": sampling.negative_alpha, "scale": sampling.negative_scale}
        everything["negative"] = {**said, "weights": policy.negative_fingerprint()}
    if "weights" not in everything:
        everything["weights"] = weights_fingerprint(policy, reference=reference, negative=negative)
    return everything


def _check(requests: Sequence[Request], policy: Policy) -> None:
    if not requests:
        raise ValueError("there is nothing to draw: the list of requests is empty; expected at least one prompt")
    if policy.is_video:
        require_av()
    seen: set[str] = set()
    for request in requests:
        if re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", request.id) is None:
            raise ValueError(f"request id {request.id!r} cannot name a file; use letters, digits, '.', '_' and '-'")
        if request.is_video != policy.is_video:
            kinds = ("a video", "images") if request.is_video else ("an image", "videos")
            raise ValueError(f"request {request.id} asks for {kinds[0]}, and the model draws {kinds[1]}")
        if request.id in seen:
            raise ValueError(f"request id {request.id!r} occurs twice; each needs an id of its own")
        if not 0 <= request.seed < 2**31:
            raise ValueError(f"request {request.id}: seed must be in 0..2**31-1, got {request.seed}")
        clash = [name for name in OWN_FIELDS if name in request.extras]
        if clash:
            raise ValueError(f"request {request.id}: extra field {clash[0]!r} would hide its own; rename it")
        seen.add(request.id)


def _warn_of_long_prompts(policy: Policy, requests: Sequence[Request]) -> None:
    prompts = list(dict.fromkeys(request.prompt for request in requests))
    long = sum(count > policy.max_tokens for count in policy.token_counts(prompts))
    if long:
        _log.warning(
            "%d of %d prompts are longer than the %d tokens that the text encoder reads; their ends are cut off",
            long,
            len(prompts),
            policy.max_tokens,
        )


def _finite(image: Tensor, request: Request) -> Tensor:
    if not bool(image.isfinite().all()):
        raise NonFiniteImageError(
            f"{'video' if request.is_video else 'image'} {request.id} is not finite (prompt {request.prompt!r}, seed "
            f"{request.seed}); the weights may have diverged, or the dtype may be too narrow: check the adapter, or "
            "sample in float32"
        )
    return image

"""VideoScore: five aspects of a generated clip, each about 1 to 4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Idefics2Config, Idefics2Model
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

from diffalign.devices import resolve_device
from diffalign.reward_models.base import RewardInfo, RewardModel, WeightsError, WeightSpec
from diffalign.reward_models.checkpoints import find_file, load_complete, read_shards
from diffalign.reward_models.media import Media, read_clip
from diffalign.reward_models.published_texts import PublishedText
from diffalign.reward_models.qwen_heads import empty, load_template, pad_rows, splice
from diffalign.reward_models.weights import expected, locate, one_line

__all__ = ["VideoScore"]

Version = Literal["1.1", "1.0"]

INSTRUCTION = PublishedText(
    "videoscore_user_text.txt",
    "https://raw.githubusercontent.com/TIGER-AI-Lab/VideoScore/194736f913018188105a6e0c2b0667eff5bd3be5/examples/run_videoscore.py",
    "49b386d9ea3003760c983cc258cf4211faf858d58191f95fcfacdf68a8fed2c0",
    literal=True,
)
ASPECTS = (
    "visual quality", "temporal consistency", "dynamic degree", "text-to-video alignment", "factual consistency",
)  # fmt: skip
_HOMES = {"1.1": "TIGER-Lab/VideoScore-v1.1", "1.0": "TIGER-Lab/VideoScore"}
_MOST_FRAMES = {"1.1": 48, "1.0": 16}
_AROUND, _IMAGE = "<fake_token_around_image>", "<image>"


def _weights(version: str) -> tuple[WeightSpec, ...]:
    # Shards with an index, or one file: which it is, is not confirmed here, and both are read.
    names = ("model.safetensors.index.json", "model.safetensors")
    return tuple(WeightSpec(_HOMES[version], name) for name in names)


class VideoScorer(nn.Module):
    """Idefics2 and a linear map with bias; names as in the published files."""

    def __init__(self, config: Idefics2Config):
        super().__init__()
        self.model = Idefics2Model(config)
        self.score = nn.Linear(config.text_config.hidden_size, len(ASPECTS))


class VideoScore(RewardModel):
    """Five aspects of a clip as people rated them from 1 to 4, not clipped, and their mean, "overall".

    Source: He et al. 2024, "VideoScore: Building Automatic Metrics to Simulate Fine-grained Human Feedback for Video
    Generation" (arXiv:2406.15252). An Idefics2 of 8 billion parameters is read at the last token of an instruction with
    the prompt, behind which the frames stand as separate images. The mean as one number for a clip is what the authors
    take for pairs in a later version.

    Frames: all of them, but at most 48 (version 1.1) or 16 (1.0), then evenly spaced without the last. Control tokens
    in prompts are defused with a space.
    """

    info = RewardInfo(
        name="video_score-1.1",
        license="MIT",
        weights=_weights("1.1"),
        kind=frozenset({"video"}),
        dims=(*ASPECTS, "overall"),
        differentiable=False,
        nominal_range=(1.0, 4.0),
        tau=1.0,  # of nothing that was trained: the model regresses ratings
        min_vram_gb=36.0,
    )
    item_ndim = 4

    def __init__(
        self,
        path_or_id: str | Path | None = None,
        *,
        version: Version = "1.1",
        max_frames: int | None = None,
        template: str | Path | None = None,
        device: str | torch.device = "auto",
        dtype: torch.dtype | Literal["auto"] = "auto",
        local_files_only: bool | None = None,
    ):
        """Loads the weights; see `RewardModel.from_pretrained`.

        Args:
            path_or_id: Folder in the layout of transformers, with tokenizer and preprocessor_config.json, or a Hub id.
            version: "1.1" or "1.0": the published weights, and how many frames are looked at.
            max_frames: How many frames at most, >= 1; None is the version's number.
            template: Folder with videoscore_user_text.txt; None looks beside local weights, then as `read_text` does.
            device: As in `from_pretrained`.
            dtype: Type of the body; the original runs in bfloat16. The head is float32.
            local_files_only: As in `from_pretrained`.

        Raises:
            ValueError: If the version is unknown or `max_frames` is less than 1.
            WeightsError: If a file is missing, damaged or of another model.
        """
        super().__init__()
        self.info = self.describe(version)
        if max_frames is not None and max_frames < 1:
            raise ValueError(f"max_frames must be at least 1, got {max_frames}")
        self.max_frames = max_frames or _MOST_FRAMES[version]
        self.template = load_template(INSTRUCTION, template, path_or_id, local_files_only)
        config, self.tokenizer, self.processor = _load_parts(self.info, path_or_id, local_files_only)
        body = torch.float32 if dtype == "auto" else dtype
        self.scorer = empty(lambda: VideoScorer(config), body)
        self.scorer.score.to(torch.promote_types(body, torch.float32))
        state = read_shards(self.info, path_or_id, _HOMES[version], local_files_only)
        load_complete(self.info, self.scorer, state, path_or_id or _HOMES[version])
        device = resolve_device(device)
        self.to(device).requires_grad_(False).train(False)

    @classmethod
    def describe(cls, version: Version = "1.1") -> RewardInfo:
        """See `RewardModel`."""
        if version not in _HOMES:
            raise ValueError(f"unknown VideoScore version {version!r} (available: {', '.join(map(repr, _HOMES))})")
        return replace(VideoScore.info, name=f"video_score-{version}", weights=_weights(version))

    def preprocess(self, item: Media) -> dict[str, Tensor]:
        """See `RewardModel`: pixel_values [1, T, 3, H, W] and pixel_attention_mask [1, T, H, W]."""
        images = read_clip(item, lambda total, _: frame_numbers(total, self.max_frames))
        return dict(self.processor([images], return_tensors="pt"))

    def encode_text(self, prompts: Sequence[str], batch_size: int) -> list[str]:
        """The instruction with each prompt in its place; its tokens follow when the number of frames is known."""
        return [self.template.replace("{text_prompt}", self._harmless(prompt)) for prompt in prompts]

    def _harmless(self, prompt: str) -> str:
        for token in self.tokenizer.get_added_vocab():
            prompt = prompt.replace(token, f"{token[0]} {token[1:]}")
        return prompt

    def score_prepared(self, prepared: Sequence[Mapping[str, Tensor]], texts: Sequence[str]) -> dict[str, Tensor]:
        """See `RewardModel`."""
        model = self.scorer.model
        rows, states = [], []
        for clip, text in zip(prepared, texts, strict=True):
            pixels, mask = clip["pixel_values"].to(self.device), clip["pixel_attention_mask"].to(self.device)
            # Clip by clip: padded to the size of others, frames would not give the same numbers.
            states.append(torch.cat(tuple(model.get_image_features(pixels, mask.bool()).pooler_output)))
            crops = 5 if self.processor.do_image_splitting else 1
            frame = (_AROUND + _IMAGE * model.image_seq_len) * crops + _AROUND + " "
            rows.append(self.tokenizer(text + frame * (pixels.shape[1] // crops))["input_ids"])
        tokens, kept = pad_rows(rows, self.device, left=self.tokenizer.padding_side == "left")
        places = (tokens == model.image_token_id) & kept.bool()
        embeddings = splice(model.get_input_embeddings()(tokens), places, torch.cat(states))
        hidden = model.text_model(inputs_embeds=embeddings, attention_mask=kept, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(rows), device=self.device), last_kept(kept)]
        scores = self.scorer.score(last.to(self.scorer.score.weight.dtype))
        return {**dict(zip(ASPECTS, scores.unbind(-1), strict=True)), "overall": scores.mean(-1)}

    def settings(self) -> dict[str, str]:
        """See `RewardModel`."""
        return {"dtype": str(self.scorer.model.dtype), "max_frames": str(self.max_frames)}


def last_kept(mask: Tensor) -> Tensor:
    """Where the last one of each row of a mask [B, L] is, on whichever side it is padded."""
    return (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(-1)


def frame_numbers(total: int, most: int) -> list[int]:
    """Which of `total` frames are looked at: all, or `most` at equal distances from the first on, rounded down."""
    if total <= most:
        return list(range(total))
    numbers = np.arange(0, total, total / most).astype(int)
    # Rounding may add one number too many, behind the end; the original never finds such a frame.
    return [int(number) for number in numbers if number < total]


def _load_parts(
    info: RewardInfo, path_or_id: str | Path | None, local_files_only: bool | None
) -> tuple[Idefics2Config, Any, Idefics2ImageProcessorPil]:
    """Configuration, tokenizer and preparation of images."""
    repo = info.weights[0].repo
    source, local = locate(info, path_or_id if path_or_id is not None else repo, local_files_only)
    for name in ("config.json", "preprocessor_config.json"):  # without them, transformers falls back to defaults
        find_file(info, path_or_id, WeightSpec(repo, name), local_files_only)
    try:
        config = Idefics2Config.from_pretrained(source, local_files_only=local)
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
        processor = Idefics2ImageProcessorPil.from_pretrained(source, local_files_only=local)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise WeightsError(f"cannot load {info.name} from {source!r}: {one_line(error)}; {expected(info)}") from error
    ids = tokenizer.convert_tokens_to_ids([_IMAGE, _AROUND])
    rows = config.text_config.vocab_size
    if ids[0] != config.image_token_id or ids[1] in (None, tokenizer.unk_token_id) or len(tokenizer) > rows:
        raise WeightsError(
            f"the tokenizer in {source!r} does not belong to {info.name}: {_IMAGE} has id {ids[0]}, the model expects "
            f"{config.image_token_id}; {_AROUND} has id {ids[1]}; {len(tokenizer)} tokens for {rows} embeddings"
        )
    return config, tokenizer, processor

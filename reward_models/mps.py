"""MPS: which picture of a prompt people prefer, overall or under one condition."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from diffalign.reward_models.base import RewardInfo, WeightsError, WeightSpec
from diffalign.reward_models.checkpoints import find_file, load_complete, read_tensors
from diffalign.reward_models.clip_towers import CropPreprocessing, HFTowers, ImageScorer, unit
from diffalign.reward_models.mps_network import CrossConfig, CrossModel
from diffalign.reward_models.pickled_modules import read_pickled_module
from diffalign.reward_models.text_cache import TextCache
from diffalign.reward_models.weights import (
    CLIP_H,
    TOKENIZER_FILES,
    clip_h_config,
    empty_clip,
    folder_with,
    load_tokenizer,
)

__all__ = ["MPS", "CONDITIONS"]

MaskMaximum = Literal["sample", "batch"]

CONDITIONS: dict[str, str] = {
    "aesthetics": "light, color, clarity, tone, style, ambiance, artistry",
    "detail_quality": "shape, face, hair, hands, limbs, structure, instance, texture",
    "semantic_alignment": "quantity, attributes, position, number, location",
    # Official, with the period at its end; the other three are its groups of words, as a later port has them.
    "overall": (
        "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
        "texture, quantity, attributes, position, number, location, word, things."
    ),
}
"""The words that say which quality is meant, by the name of the score."""

_HUB = WeightSpec("RE-N-Y/mpsv1", "model.safetensors")  # the file's name was not confirmed here
_PLAIN = WeightSpec("", "MPS_overall.pth", "torch", md5="1491cbbbd20565747fe07e7572e2ac56")
_OFFICIAL = WeightSpec("", "MPS_overall_checkpoint.pth", "torch", url="https://github.com/Kwai-Kolors/MPS")


class MPS(ImageScorer):
    """exp(logit_scale) times the cosine of a prompt and of a picture that has looked at some of the prompt's words.

    Source: Zhang et al. 2024, "Learning Multi-dimensional Human Preference for Text-to-Image Generation"
    (arXiv:2405.14705), and the released inference code. CLIP ViT-H/14 gives all image tokens and all word tokens; the
    image tokens attend to those words of the prompt that match one of the condition's words; the first of them is
    compared with the prompt. About 5 to 15; `compare` is the softmax of the two scores.

    Only weights trained on overall preference were released: the other three conditions are the paper's, but with
    these weights they are an extrapolation. Each further condition costs one more pass of the cross-attention.

    A word is visible if its best match with a word of the condition, divided by the best match of any word of the
    prompt, exceeds `mask_threshold`. The threshold 0.3 is that of the evaluation behind the published accuracies; the
    released model's own forward has 0.01. It divides by the best match in the whole batch, so that scores depend on
    what else is scored; here the maximum is the prompt's own, which is the same for a single picture.
    """

    info = RewardInfo(
        name="mps",
        license="MIT",
        weights=(_HUB, _PLAIN, _OFFICIAL),
        dims=tuple(CONDITIONS),
        nominal_range=(5.0, 15.0),
        tau=1.0,
        min_vram_gb=5.0,
    )
    towers: HFTowers
    cross_model: CrossModel

    def __init__(
        self,
        path_or_id: str | Path | None = None,
        *,
        conditions: Sequence[str] | Mapping[str, str] = tuple(CONDITIONS),
        mask_threshold: float = 0.3,
        mask_maximum: MaskMaximum = "sample",
        processor: str | Path | None = None,
        clip_config: Mapping[str, Any] | None = None,
        cross_config: CrossConfig | None = None,
        allow_pickle: bool = False,
        device: str | torch.device = "auto",
        dtype: torch.dtype | Literal["auto"] = "auto",
        local_files_only: bool | None = None,
    ):
        """Loads the weights; see `RewardModel.from_pretrained`.

        Args:
            path_or_id: A file with the weights, a folder with one, or a Hub id.
            conditions: Which scores to give, the primary one last: names of `CONDITIONS`, or own words by name.
            mask_threshold: How well a word must match the condition, relative to the best.
            mask_maximum: "sample" divides by the prompt's best match; "batch" by that of everything scored together,
                as the released code does.
            processor: Folder or Hub id of the tokenizer; None takes the one beside local weights if there is one,
                else that of CLIP-H.
            clip_config: Arguments of the checkpoint's CLIPConfig; None is ViT-H/14.
            cross_config: Sizes of the cross model; None is the published ones.
            allow_pickle: Whether to read a checkpoint that is a whole pickled module, as the official one is; its
                tensors are taken out without running its code. Save them with `save_weights`.
            device: As in `from_pretrained`.
            dtype: As in `from_pretrained`.
            local_files_only: As in `from_pretrained`.

        Raises:
            ValueError: If a condition or `mask_maximum` is unknown.
            WeightsError: If the checkpoint is missing, damaged, holds more than tensors, or is of another model.
        """
        self.conditions = _words(conditions)
        if mask_maximum not in ("sample", "batch"):
            raise ValueError(f"mask_maximum must be 'sample' or 'batch', got {mask_maximum!r}")
        self.info = self.describe(self.conditions)
        path = _find(self.info, path_or_id, local_files_only)
        if path.name == _OFFICIAL.filename and not allow_pickle:
            raise WeightsError(
                f"{str(path)!r} is a whole pickled module; pass allow_pickle=True to take its tensors out"
            )
        clip, cross_model = _empty(clip_config or clip_h_config(), cross_config or CrossConfig())
        network = nn.ModuleDict({"model": clip, "cross_model": cross_model})
        state = read_pickled_module(self.info, path) if allow_pickle else read_tensors(self.info, path)
        constants = [name for name, _ in network.named_buffers()]
        load_complete(self.info, network, state, path, rename=_rename, may_lack=constants)
        words = processor or folder_with(path_or_id, TOKENIZER_FILES) or CLIP_H
        towers = HFTowers(clip, load_tokenizer(self.info, words, clip.config.text_config, local_files_only))
        super().__init__(device, dtype, towers=towers, cross_model=cross_model)
        self.mask_threshold, self.mask_maximum = mask_threshold, mask_maximum
        self.crop = CropPreprocessing(towers.image_size)
        self.text_cache: TextCache[list[_Text]] = TextCache(128)

    @classmethod
    def describe(cls, conditions: Sequence[str] | Mapping[str, str] = tuple(CONDITIONS)) -> RewardInfo:
        """See `RewardModel`."""
        names = tuple(_words(conditions))
        return MPS.info if names == MPS.info.dims else replace(MPS.info, name=f"mps-{names[-1]}", dims=names)

    def preprocess_image(self, image: Image.Image) -> Tensor:
        """See `ImageScorer`."""
        return self.crop.image(image)

    def preprocess_tensor(self, pixels: Tensor) -> Tensor:
        """See `ImageScorer`."""
        return self.crop.tensor(pixels)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], batch_size: int) -> list[_Text]:
        """See `RewardModel`: token states, matches with the conditions and the pooled state of each prompt."""
        weights = list(self.towers.text_weights())
        chunks = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
        return [text for chunk in chunks for text in self.text_cache.get(chunk, weights, self._encode)]

    def _encode(self, prompts: Sequence[str]) -> list[_Text]:
        # The padding takes part: its tokens are compared with the condition, and looked at, like any other.
        words, pooled = self._text_tokens(prompts)
        conditions, _ = self._text_tokens(list(self.conditions.values()))
        wide = torch.promote_types(words.dtype, torch.float32)
        matches = torch.einsum("bld,ckd->bclk", words.to(wide), conditions.to(wide)).amax(-1)
        return [_Text(*parts) for parts in zip(words, matches, unit(pooled), strict=True)]

    def _text_tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Projected states [B, L, D] of all tokens and [B, D] of the end-of-text token."""
        clip = self.towers.model
        hidden = clip.text_model(input_ids=self.towers.token_ids(texts))
        return clip.text_projection(hidden.last_hidden_state), clip.text_projection(hidden.pooler_output)

    def score_pixels(self, pixels: Tensor, texts: Sequence[_Text], dims: Collection[str]) -> dict[str, Tensor]:
        """See `ImageScorer`."""
        clip = self.towers.model
        # The last layer norm of the vision tower is for the pooled token only; the released code skips it as well.
        hidden = clip.vision_model(pixel_values=pixels.to(self.device, self.dtype)).last_hidden_state
        tokens = clip.visual_projection(hidden)
        words = torch.stack([text.words for text in texts])
        pooled = torch.stack([text.pooled for text in texts])
        visible = self.visible(torch.stack([text.matches for text in texts]))
        scores = {}
        for i, name in enumerate(self.conditions):
            if name in dims:
                looked = self.cross_model(tokens, words, visible[:, i])[:, 0]
                score = self.towers.scale * (unit(looked) * pooled).sum(-1)
                # Attention to nothing is undefined, and torch would quietly give zeros.
                scores[name] = score.masked_fill(~visible[:, i].any(-1), float("nan"))
        return scores

    def visible(self, matches: Tensor) -> Tensor:
        """Which words [B, C, L] of each prompt count under each of C conditions, from their matches [B, C, L]."""
        over = (0, 2) if self.mask_maximum == "batch" else (2,)
        return matches / matches.amax(over, keepdim=True) > self.mask_threshold

    def save_weights(self, path: str | Path) -> None:
        """Writes a safetensors file that `path_or_id` may name, such as one converted from a pickled module."""
        from safetensors.torch import save_file

        network = nn.ModuleDict({"model": self.towers.model, "cross_model": self.cross_model})
        save_file({name: value.contiguous() for name, value in network.state_dict().items()}, path)

    def settings(self) -> dict[str, str]:
        """See `RewardModel`."""
        own = {"conditions": repr(self.conditions), "mask": f"{self.mask_threshold} of {self.mask_maximum}"}
        return {**super().settings(), "scale": f"{self.towers.scale:.9e}", **own}


class _Text(NamedTuple):
    """An encoded prompt: word tokens [L, D], their matches with C conditions [C, L], unit pooled vector [D]."""

    words: Tensor
    matches: Tensor
    pooled: Tensor


def _words(conditions: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    if isinstance(conditions, Mapping):
        chosen = dict(conditions)
    else:
        names = [conditions] if isinstance(conditions, str) else list(conditions)
        for name in names:
            if name not in CONDITIONS:
                raise ValueError(f"unknown MPS condition {name!r} (available: {', '.join(CONDITIONS)})")
        chosen = {name: CONDITIONS[name] for name in names}
    if not chosen:
        raise ValueError("MPS needs at least one condition")
    return chosen


def _find(info: RewardInfo, path_or_id: str | Path | None, local_files_only: bool | None) -> Path:
    """The file with the weights; of a local folder, the first of the published names that is there."""
    names = {spec.filename: spec for spec in info.weights}
    folder = folder_with(path_or_id, names)
    if folder is not None and Path(str(path_or_id)).expanduser().is_dir():
        return next(folder / name for name in names if (folder / name).is_file())
    return find_file(info, path_or_id, local_files_only=local_files_only)


def _empty(clip_config: Mapping[str, Any], cross_config: CrossConfig) -> tuple[Any, CrossModel]:
    """A CLIPModel and the cross model, both without values."""
    clip = empty_clip(clip_config)
    if clip.config.projection_dim != cross_config.dim:
        raise WeightsError(
            f"the cross model is {cross_config.dim} wide and CLIP's space {clip.config.projection_dim}; make them equal"
        )
    with torch.device("meta"):
        cross = CrossModel(cross_config)
    cross.fill_constants()
    return clip, cross


def _rename(name: str) -> str | None:
    """A port puts "mps." before every name; old files hold position ids, which are no weights."""
    return None if name.endswith("embeddings.position_ids") else name.removeprefix("mps.")

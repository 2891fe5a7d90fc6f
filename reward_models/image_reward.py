"""ImageReward: how much people like a picture for its prompt, by a BLIP that reads both together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from diffalign.reward_models.base import RewardInfo, WeightsError, WeightSpec
from diffalign.reward_models.blip import (
    VIT_LARGE,
    BlipTowers,
    BlipWithHead,
    load_tokenizer,
    published_to_own,
    read_text_config,
)
from diffalign.reward_models.checkpoints import LoadReport, find_file, load_complete, read_tensors
from diffalign.reward_models.clip_towers import CropPreprocessing, ImageScorer
from diffalign.reward_models.weights import folder_with, one_line

__all__ = ["ImageReward"]

TOKENIZER = "google-bert/bert-base-uncased"
"""Where the tokenizer is published; it is not in the repository of the weights."""

MAX_TOKENS = 35
"""Texts are padded and cut to this many tokens, [CLS] and [SEP] included."""

_CONFIG = "med_config.json"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")


class ImageReward(ImageScorer):
    """(r - mean) / std of the reward r of a BLIP-large, about -2.3 to 2.1.

    Source: Xu et al. 2023, "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation"
    (arXiv:2304.05977). The loss of its training is -log sigmoid(r_better - r_worse); `compare` uses temperature 1 on
    the normalised scores.

    Pictures: RGB, short side to 224 (PIL bicubic), centre crop, CLIP's statistics. The released code converts to RGB
    after the crop, which differs for palettes and grey only in rounding. Texts: uncased BERT tokens, cut at 35.
    Picture and text attend to each other, so only the token ids of a prompt are shared between pictures.

    Attributes:
        report: What became of the tensors of the weight file.
    """

    info = RewardInfo(
        name="image_reward",
        license="Apache-2.0",
        weights=(WeightSpec("THUDM/ImageReward", "ImageReward.pt", "torch"),),
        nominal_range=(-2.3, 2.1),
        tau=1.0,
        min_vram_gb=2.5,
    )
    default_mean: float = 0.16717362830052426
    default_std: float = 1.0333394966054072
    towers: BlipTowers
    report: LoadReport

    def __init__(
        self,
        path_or_id: str | Path | None = None,
        *,
        tokenizer: str | Path | None = None,
        mean: float | None = None,
        std: float | None = None,
        vision_config: Mapping[str, Any] | None = None,
        device: str | torch.device = "auto",
        dtype: torch.dtype | Literal["auto"] = "auto",
        local_files_only: bool | None = None,
    ):
        """Loads the weights; see `RewardModel.from_pretrained`.

        Args:
            path_or_id: Folder with ImageReward.pt and med_config.json, the .pt file beside the other, or a Hub id.
            tokenizer: Folder or Hub id of the tokenizer; None takes the one in a local `path_or_id` if there is one,
                else the published one.
            mean: Subtracted from the raw reward; None is the published constant.
            std: Divided by then, > 0; None is the published constant.
            vision_config: Values of a BlipVisionConfig that differ from ViT-L/16 at 224 pixels.
            device: As in `from_pretrained`.
            dtype: As in `from_pretrained`; the head and the score stay in float32.
            local_files_only: As in `from_pretrained`.

        Raises:
            ValueError: If `std` is not positive.
            WeightsError: If a file is missing, damaged, or of another model.
        """
        shift = self.default_mean if mean is None else float(mean)
        scale = self.default_std if std is None else float(std)
        if not scale > 0:
            raise ValueError(f"std must be positive, got {std}")
        path = find_file(self.info, path_or_id, None, local_files_only)
        spec = WeightSpec(self.info.weights[0].repo, _CONFIG)
        beside = path.parent if path_or_id is not None and path == Path(path_or_id).expanduser() else path_or_id
        config_path = find_file(self.info, beside, spec, local_files_only)
        text_config = read_text_config(self.info, config_path)
        words = tokenizer if tokenizer is not None else folder_with(path_or_id, _TOKENIZER_FILES) or TOKENIZER
        tokens = load_tokenizer(self.info, words, text_config["vocab_size"], local_files_only)
        try:
            network = BlipWithHead(text_config, {**VIT_LARGE, **(vision_config or {})})
        except (ValueError, TypeError) as error:
            raise WeightsError(
                f"{str(config_path)!r} describes no text encoder of {self.info.name}: {one_line(error)}"
            ) from error
        report = load_complete(self.info, network, read_tensors(self.info, path), path, rename=published_to_own)
        super().__init__(device, dtype, towers=network.towers)
        # Added by itself, so that its weights are never rounded to the towers' type.
        head_type = torch.promote_types(self.dtype, torch.float32)
        self.mlp = network.mlp.to(self.device, head_type).requires_grad_(False).train(False)
        self.tokenizer, self.report = tokens, report
        self.mean, self.std = shift, scale
        self.crop = CropPreprocessing(self.towers.image_size, origin="round")

    def preprocess_image(self, image: Image.Image) -> Tensor:
        """See `ImageScorer`."""
        return self.crop.image(image)

    def preprocess_tensor(self, pixels: Tensor) -> Tensor:
        """See `ImageScorer`."""
        return self.crop.tensor(pixels)

    def encode_text(self, prompts: Sequence[str], batch_size: int) -> Tensor:
        """Token ids and their mask, int64 [N, 2, 35]."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        return torch.stack([tokens["input_ids"], tokens["attention_mask"]], dim=1)

    def score_pixels(self, pixels: Tensor, texts: Sequence[Tensor], dims: Collection[str]) -> dict[str, Tensor]:
        """See `ImageScorer`."""
        ids, mask = torch.stack(list(texts)).to(self.device).unbind(1)
        states = self.towers(pixels.to(self.device, self.dtype), ids, mask)
        rewards = self.mlp(states.to(torch.promote_types(states.dtype, torch.float32))).squeeze(-1)
        return {"overall": (rewards - self.mean) / self.std}

    def settings(self) -> dict[str, str]:
        """The towers' type and the constants of the score; the rest is in the weights."""
        return {**super().settings(), "mean": repr(self.mean), "std": repr(self.std)}

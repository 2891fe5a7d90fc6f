"""HPSv3: how much people like a picture of a prompt, with the uncertainty of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffalign.reward_models.base import RewardInfo, Scores, WeightsError, WeightSpec
from diffalign.reward_models.checkpoints import find_file, read_tensors
from diffalign.reward_models.clip_towers import resize, to_float
from diffalign.reward_models.media import InvalidMediaError, Media, to_rgb
from diffalign.reward_models.published_texts import PublishedText
from diffalign.reward_models.qwen_heads import (
    QWEN2_VL_7B,
    MarkedText,
    QwenReward,
    VisionTokens,
    load_scorer,
    load_template,
    load_tokenizer,
    patchify,
    smart_resize,
)
from diffalign.reward_models.weights import TOKENIZER_FILES, folder_with

__all__ = ["HPSv3"]

BASE = "Qwen/Qwen2-VL-7B-Instruct"
"""Where the tokenizer is published."""

AREA = 256 * 28 * 28
"""Pixels to which every picture is resized, about: 256 tokens."""

INSTRUCTION = PublishedText(
    "hpsv3_user_text.txt",
    "https://raw.githubusercontent.com/RE-N-Y/imscore/a2bc6595f9a0a9dd39ce6292a3ee8470d7874ee2/src/imscore/hpsv3/utils.py",
    "e61d58f3c7d3be656ccd024f5c0cd8c001cf9a2122305d52b59e60d94147e0f2",
    literal=True,
)

_NODES, _WEIGHTS = np.polynomial.hermite.hermgauss(32)


class HPSv3(QwenReward):
    """The mean of a Gaussian over a picture's worth, about -8 to 15, and its standard deviation as uncertainty.

    Source: Ma et al. 2025, "HPSv3: Towards Wide-Spectrum Human Preference Score" (arXiv:2508.03789). A Qwen2-VL-7B is
    read at one added token; two linear maps with ReLU and a last one give (mu, a), and sigma = exp(a). The score is mu.
    `compare` averages sigmoid(mu_a - mu_b + sqrt(sigma_a^2 + sigma_b^2) e) over a standard normal e, the probability
    of which the training's loss is a bound.

    Pictures are resized (PIL bicubic) to about 448x448 pixels of area, their ratio kept: detail of larger pictures is
    not seen. Prompts are not cut; control tokens in them are defused with a space.
    """

    info = RewardInfo(
        name="hpsv3",
        license="MIT",  # as the package's metadata says
        weights=(WeightSpec("MizzenAI/HPSv3", "HPSv3.safetensors"),),
        nominal_range=(-8.0, 15.0),
        tau=1.0,
        min_vram_gb=36.0,
    )
    reward_tokens = ("<|Reward|>",)
    vision_token = "<|image_pad|>"
    placeholder = "{prompt}"

    def __init__(
        self,
        path_or_id: str | Path | None = None,
        *,
        tokenizer: str | Path | None = None,
        template: str | Path | None = None,
        model_config: Mapping[str, Any] | None = None,
        device: str | torch.device = "auto",
        dtype: torch.dtype | Literal["auto"] = "auto",
        local_files_only: bool | None = None,
    ):
        """Loads the weights; see `RewardModel.from_pretrained`.

        Args:
            path_or_id: The published file, a folder with it, or a Hub id.
            tokenizer: Folder or Hub id of Qwen2-VL's tokenizer; None looks beside local weights, else Qwen2-VL's.
            template: Folder with hpsv3_user_text.txt; None looks beside local weights, then as `read_text` does.
            model_config: `text_config` and `vision_config` of the checkpoint; None is Qwen2-VL-7B.
            device: As in `from_pretrained`.
            dtype: Type of the body; the original runs in bfloat16, which halves the memory. The head is float32.
            local_files_only: As in `from_pretrained`.

        Raises:
            WeightsError: If the checkpoint is missing, damaged or of another model, or tokenizer or instruction are.
        """
        instruction = load_template(INSTRUCTION, template, path_or_id, local_files_only)
        path = find_file(self.info, path_or_id, local_files_only=local_files_only)
        state = _read(self.info, path)
        scorer = load_scorer(
            self.info,
            state,
            path,
            model_config if model_config is not None else QWEN2_VL_7B,
            head,
            torch.float32 if dtype == "auto" else dtype,
        )
        rows = scorer.model.get_input_embeddings().num_embeddings
        words = tokenizer if tokenizer is not None else folder_with(path_or_id, TOKENIZER_FILES)
        tokens = load_tokenizer(self.info, words, BASE, self.reward_tokens, rows, local_files_only)
        super().__init__(scorer, tokens, instruction, device)

    def preprocess(self, item: Media) -> VisionTokens:
        """See `RewardModel`."""
        image = to_rgb(item)
        height, width = smart_resize(image.height, image.width, AREA, AREA)
        pixels = to_float(image.resize((width, height), Image.Resampling.BICUBIC))
        return patchify(pixels.expand(2, -1, -1, -1))  # a picture is a clip of twice the same frame

    def score_prepared(self, prepared: Sequence[VisionTokens], texts: Sequence[MarkedText]) -> Scores:
        """See `RewardModel`."""
        mean, log_deviation = self.outputs(prepared, texts)[:, 0].unbind(-1)
        return Scores({"overall": mean}, uncertainty=log_deviation.exp())

    def score_tensor(self, pixels: Tensor, prompts: str | Sequence[str]) -> Tensor:
        """Scores [B] on the model's device, with a graph to `pixels`; the model's own weights get no gradient.

        Equal to `score` for 8-bit pictures whose size `smart_resize` keeps, such as 448x448; others are resized as
        tensors, which skips the 8-bit rounding of `score`. Values are used as they are: clamp pixels that leave [0, 1]
        yourself.

        Args:
            pixels: RGB [B, 3, H, W] in [0, 1], any floating type; half precision is widened before resizing.
            prompts: One prompt, or B.

        Raises:
            InvalidMediaError: If `pixels` has another shape or is not floating.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            raise InvalidMediaError(f"expected floats [B, 3, H, W], got {pixels.dtype} {tuple(pixels.shape)}")
        unique, rows = self._texts(prompts, len(pixels))
        texts = self.encode_text(unique, len(unique))
        wide = pixels.to(self.device, torch.promote_types(pixels.dtype, torch.float32))
        resized = resize(wide, *smart_resize(pixels.shape[-2], pixels.shape[-1], AREA, AREA))
        media = [patchify(image.expand(2, -1, -1, -1)) for image in resized]
        return self.outputs(media, [texts[row] for row in rows])[:, 0, 0]

    def _preference(self, difference: Tensor, deviation: Tensor | None) -> Tensor:
        """E sigmoid(difference + deviation * e) for a standard normal e, by Gauss-Hermite quadrature of 32 nodes."""
        if deviation is None:
            return super()._preference(difference, deviation)
        nodes = torch.from_numpy(_NODES * 2**0.5)
        weights = torch.from_numpy(_WEIGHTS / np.pi**0.5)
        points = difference.double()[:, None] + deviation.double()[:, None] * nodes
        return (torch.sigmoid(points) * weights).sum(-1).float()


def head(size: int) -> nn.Sequential:
    """The published head, (mu, a) of a state of `size` numbers; its dropout was for training."""
    return nn.Sequential(
        nn.Linear(size, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )


def _read(info: RewardInfo, path: Path) -> dict[str, Tensor]:
    """The tensors of the published file, or of a .pth of the training code, which has them under "model"."""
    try:
        return read_tensors(info, path)
    except WeightsError:
        if path.suffix == ".safetensors":
            raise
        return read_tensors(info, path, inside="model")

"""PAL: what one person prefers, known from many people and a few of their own choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from diffalign.reward_models.base import RewardInfo, WeightsError, WeightSpec
from diffalign.reward_models.checkpoints import find_file
from diffalign.reward_models.clip_towers import CropPreprocessing, DualEncoder
from diffalign.reward_models.media import MediaBatch, as_list
from diffalign.reward_models.pal_heads import PALHead, fit_user
from diffalign.reward_models.weights import CLIP_H, TOKENIZER_FILES, folder_with, load_hf_towers

__all__ = ["PAL"]

_HEAD = WeightSpec("", "pal.safetensors")


class PAL(DualEncoder):
    """An ideal-point model (`pal_heads.PALHead`) on the frozen embeddings of a CLIP.

    Source: Chen et al. 2024, "PAL: Pluralistic Alignment Framework for Learning from Heterogeneous Preferences"
    (arXiv:2406.08469). The authors publish embeddings of pictures, but no model of them: the file read here,
    `pal.safetensors`, is what `PALHead.save` writes. Embeddings are of unit length; whether the published ones are was
    not confirmed here.

    Scores are for one person at a time: `PAL(..., user="ann")`, `for_user`, or `adapt` for somebody new. Without a
    person, prototypes weigh what they weigh for the known people on average. Scores of different people cannot be
    compared. Their range depends on the file: exp(s) times a cosine, or minus a distance.
    """

    info = RewardInfo(
        name="pal",
        license="MIT (CLIP); of the head, its own",
        weights=(WeightSpec(CLIP_H, "model.safetensors"), _HEAD),
        tau=1.0,
        min_vram_gb=4.5,
    )
    user_weights: Tensor

    def __init__(
        self,
        path_or_id: str | Path | None = None,
        *,
        user: str | int | None = None,
        clip: str | Path | None = None,
        processor: str | Path | None = None,
        device: str | torch.device = "auto",
        dtype: torch.dtype | Literal["auto"] = "auto",
        local_files_only: bool | None = None,
    ):
        """Loads the weights; see `RewardModel.from_pretrained`.

        Args:
            path_or_id: The head's file, a folder with it as pal.safetensors, or a Hub id with it.
            user: Name or number of a known person; None is the average one.
            clip: Folder or Hub id of the CLIP whose embeddings the head was trained on; None takes the one in the
                head's folder if one is there, else CLIP-H.
            processor: Folder or Hub id of the tokenizer; None looks beside CLIP, then takes that of CLIP-H.
            device: As in `from_pretrained`.
            dtype: As in `from_pretrained`; the head is computed in float32.
            local_files_only: As in `from_pretrained`.

        Raises:
            ValueError: If there is no such user.
            WeightsError: If head or CLIP are missing, damaged, or do not belong together.
        """
        path = find_file(self.info, path_or_id, _HEAD, local_files_only)
        head = PALHead.load(self.info, path)
        clip = clip or folder_with(path, ("config.json",)) or CLIP_H
        towers = load_hf_towers(
            self.info, clip, processor or folder_with(clip, TOKENIZER_FILES) or CLIP_H, local_files_only
        )
        width = int(towers.model.config.projection_dim)
        if width != head.config.in_dim:
            raise WeightsError(
                f"{str(path)!r} reads embeddings of width {head.config.in_dim}, {str(clip)!r} gives {width}"
            )
        super().__init__(towers, device, dtype)
        wide = torch.promote_types(self.dtype, torch.float32)
        self.head = head.to(self.device, wide).requires_grad_(False).eval()
        self.crop = CropPreprocessing(towers.image_size)
        self.register_buffer("user_weights", torch.zeros(head.config.prototypes, device=self.device, dtype=wide))
        self.for_user(user)

    @torch.no_grad()
    def for_user(self, user: str | int | None) -> None:
        """Scores are of this known person from now on; None is the average one.

        Raises:
            ValueError: If there is no such person.
        """
        if user is not None:
            weights = self.head.weights(user)
        elif self.head.config.users:
            weights = self.head.user_logits.softmax(-1).mean(0)
        else:
            weights = torch.full_like(self.user_weights, 1 / len(self.user_weights))
        self.user_weights.copy_(weights)
        self.info = PAL.info if user is None else replace(PAL.info, name=f"pal-{user}")

    @torch.no_grad()
    def adapt(
        self,
        name: str,
        chosen: MediaBatch,
        rejected: MediaBatch,
        prompts: str | Sequence[str],
        *,
        ridge: float = 0.01,
        batch_size: int = 32,
    ) -> Tensor:
        """Learns to know somebody new from k pairs, and scores for them from now on; always with the same result.

        Only the person's weights are fitted. `head.save` keeps them, under the name.

        Args:
            name: What to call the person.
            chosen: k media that they preferred.
            rejected: The other halves.
            prompts: One prompt, or k.
            ridge: See `fit_user`.
            batch_size: How many media pass the network at once.

        Returns:
            Weights of the prototypes [K].

        Raises:
            InvalidMediaError: If a medium cannot be read.
            ValueError: If there are no pairs, not as many of each, or the name is taken.
        """
        first, second = as_list(chosen), as_list(rejected)
        if len(first) != len(second) or not first:
            raise ValueError(f"adapt needs k >= 1 pairs, got {len(first)} chosen and {len(second)} rejected")
        unique, rows = self._texts(prompts, len(first))
        texts = self.encode_text(unique, batch_size)[rows]
        pixels = [self.preprocess(item) for item in (*first, *second)]
        chunks = [torch.stack(pixels[i : i + batch_size]) for i in range(0, len(pixels), batch_size)]
        images = torch.cat([self.encode_pixels(chunk) for chunk in chunks])
        logits = fit_user(self.head, images[: len(first)], images[len(first) :], texts, ridge)
        self.head.add_user(name, logits)
        self.for_user(name)
        return self.user_weights.clone()

    def preprocess_image(self, image: Image.Image) -> Tensor:
        """See `ImageScorer`."""
        return self.crop.image(image)

    def preprocess_tensor(self, pixels: Tensor) -> Tensor:
        """See `ImageScorer`."""
        return self.crop.tensor(pixels)

    def score_embeddings(self, images: Tensor, texts: Tensor) -> Tensor:
        """See `DualEncoder`."""
        scores: Tensor = self.head(images, texts, self.user_weights)
        return scores

    def score_grid(self, images: Tensor, texts: Tensor) -> Tensor:
        """See `DualEncoder`."""
        return torch.stack([self.score_embeddings(images, text.expand_as(images)) for text in texts], dim=1)

    def settings(self) -> dict[str, str]:
        """See `RewardModel`."""
        return {**super().settings(), "head": repr(replace(self.head.config, users=()))}

"""The two models of T2I-CompBench that need no detector: BLIP-VQA, asked for a "yes", and CLIP's plain cosine."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from diffalign.devices import resolve_device
from diffalign.reward_models.base import RewardInfo, WeightsError, WeightSpec
from diffalign.reward_models.blip import load_tokenizer
from diffalign.reward_models.clip_towers import CropPreprocessing, DualEncoder
from diffalign.reward_models.weights import load_hf_towers, load_network

__all__ = ["BLIP_VQA", "CLIP_B32", "BlipVQA", "ClipCosine"]

BLIP_VQA = WeightSpec("Salesforce/blip-vqa-capfilt-large", "model.safetensors")
CLIP_B32 = WeightSpec("openai/clip-vit-base-patch32", "model.safetensors")
IMAGE_SIZE = 480
"""Side of the square pictures, in pixels."""
MOST_TOKENS = 35
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of RGB in 0..1, CLIP's."""


class BlipVQA(nn.Module):
    """P(yes) / (P(yes) + P(no)) for questions about a picture, from the first token of the answer.

    Source: Li et al. 2022, "BLIP: Bootstrapping Language-Image Pre-training for Unified Vision-Language Understanding
    and Generation" (arXiv:2201.12086), asked as in T2I-CompBench's released evaluation: pictures of 480 pixels, the
    question begins with BLIP's [ENC] token, the answer with its [DEC] token. Where the model's own `generate` in
    transformers is used, the processor begins the question with [CLS] instead, which gives other values.

    The weights that transformers reads may have positions for another size than 480 (their configuration says so);
    positions are then interpolated, and values differ somewhat from those of the authors' file.

    Args:
        path_or_id: Folder in the layout of transformers with config.json, weights and tokenizer, or a Hub id; None is
            the published one.
        image_size: Side of the pictures.
        device: Where it runs; "auto" is the first accelerator, else the CPU.
        local_files_only: Never ask the Hub; None follows HF_HUB_OFFLINE.

    Raises:
        WeightsError: If the weights are missing, damaged or of another model.
    """

    def __init__(
        self,
        path_or_id: str | Path | None = None,
        *,
        image_size: int = IMAGE_SIZE,
        device: str | torch.device = "auto",
        local_files_only: bool | None = None,
    ):
        super().__init__()
        self.network = load_network(
            _INFO,
            transformers.BlipForQuestionAnswering,
            path_or_id,
            local_files_only,
            model_type="blip",
            ignored="position_ids$",
        )
        own = self.network.config.vision_config
        if image_size < 1 or image_size % own.patch_size:
            raise ValueError(f"image_size must be a multiple of the patches' {own.patch_size} pixels, got {image_size}")
        self.image_size, self.interpolate = image_size, image_size != own.image_size
        vocabulary = self.network.config.text_config.vocab_size
        source = path_or_id if path_or_id is not None else BLIP_VQA.repo
        self.tokenizer = load_tokenizer(_INFO, source, vocabulary, local_files_only)
        # BLIP put its two tokens behind BERT's 30522; published tokenizers may lack them.
        self.start_answer, self.start_question = vocabulary - 2, vocabulary - 1
        self.yes, self.no = self.tokenizer.convert_tokens_to_ids(["yes", "no"])
        if self.tokenizer.unk_token_id in (self.yes, self.no):
            raise WeightsError(f"the tokenizer in {str(source)!r} has no single tokens 'yes' and 'no'")
        digest = sha256(self.network.text_decoder.cls.predictions.bias.detach().numpy().tobytes()).hexdigest()[:8]
        name = str(source) if not Path(source).exists() else Path(source).name
        self.identity = f"{name}:{digest}@{image_size}"
        device = resolve_device(device)
        self.to(device).requires_grad_(False).eval()

    @torch.no_grad()
    def ask(self, image: Image.Image, questions: Sequence[str]) -> list[float]:
        """P(yes) / (P(yes) + P(no)) of each question about one RGB picture; NaN where the network gives none."""
        if not questions:
            return []
        device = next(self.network.parameters()).device
        pixels = self.prepare(image)[None].to(device)
        seen = self.network.vision_model(pixel_values=pixels, interpolate_pos_encoding=self.interpolate)[0]
        return [self._ask(seen, question) for question in questions]

    def _ask(self, seen: Tensor, question: str) -> float:
        """The answer to one question, alone: transformers' decoder attends to padding whatever mask it is given.

        Args:
            seen: States of the picture's patches [1, N, D].
            question: The text.
        """
        tokens = self.tokenizer(question, truncation=True, max_length=MOST_TOKENS, return_tensors="pt")
        ids = tokens["input_ids"].to(seen.device)
        ids[:, 0] = self.start_question  # in the place of the tokenizer's own [CLS]
        states = self.network.text_encoder(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long, device=seen.device),
            return_dict=False,
        )[0]
        output = self.network.text_decoder(
            input_ids=torch.full((1, 1), self.start_answer, device=seen.device),
            encoder_hidden_states=states,
            encoder_attention_mask=torch.ones_like(ids),
            return_dict=True,
        )
        logits: Tensor = output.logits[0, 0].float()
        return float(torch.sigmoid(logits[self.yes] - logits[self.no]))

    def prepare(self, image: Image.Image) -> Tensor:
        """A picture resized to a square with PIL's bicubic filter and normalised, float32 [3, S, S]."""
        small = image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255
        return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


class ClipCosine(DualEncoder):
    """The cosine of picture and text under OpenAI's CLIP ViT-B/32, as it is: no prefix, no factor, no maximum with 0.

    Args:
        path_or_id: Folder with model and tokenizer in the layout of transformers, or a Hub id.
        device: As in `RewardModel.from_pretrained`.
        local_files_only: As in `RewardModel.from_pretrained`.

    Raises:
        WeightsError: If the weights are missing, damaged or of another model.
    """

    info = RewardInfo(name="clip-cosine", license="MIT", weights=(CLIP_B32,), nominal_range=(0.2, 0.4), tau=0.01)

    def __init__(
        self,
        path_or_id: str | Path | None = None,
        *,
        device: str | torch.device = "auto",
        local_files_only: bool | None = None,
    ):
        towers = load_hf_towers(self.info, path_or_id, None, local_files_only)
        super().__init__(towers, device, "auto")
        source = path_or_id if path_or_id is not None else CLIP_B32.repo
        self.identity = str(source) if not Path(source).exists() else Path(source).name
        self.crop = CropPreprocessing(towers.image_size, origin="round")

    def preprocess_image(self, image: Image.Image) -> Tensor:
        """See `DualEncoder`."""
        return self.crop.image(image)

    def preprocess_tensor(self, pixels: Tensor) -> Tensor:
        """See `DualEncoder`."""
        return self.crop.tensor(pixels)

    def score_cosine(self, cosine: Tensor) -> Tensor:
        """The cosine itself."""
        return cosine


_INFO = RewardInfo(name="BLIP-VQA", license="BSD-3-Clause", weights=(BLIP_VQA,), differentiable=False)

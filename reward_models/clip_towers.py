"""What scorers with two CLIP towers share: the towers themselves, the pictures' way into them, and the score.

`HFTowers` wraps a CLIPModel of transformers, `OpenCLIPTowers` one of open_clip (Radford et al. 2021, "Learning
Transferable Visual Models From Natural Language Supervision", arXiv:2103.00020). `DualEncoder` is the reward model on
top of either, a function of the cosine between an image and a text embedding; `ImageScorer` is what it shares with
scorers that have other networks behind the same pictures.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Literal

import numpy as np
import open_clip
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from diffalign.devices import resolve_device
from diffalign.reward_models.base import OnInvalid, RewardModel
from diffalign.reward_models.media import InvalidMediaError, Media, MediaBatch, as_list, to_rgb
from diffalign.reward_models.text_cache import TextCache

__all__ = ["CropPreprocessing", "DualEncoder", "HFTowers", "ImageScorer", "OpenCLIPTowers", "Towers", "unit"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Statistics of RGB in [0, 1] that all CLIP models but our embedded one were trained with."""

_MAX_ASPECT = 1000
"""Pictures more elongated than this are refused: resizing their short side would need gigabytes."""


class Towers(nn.Module):
    """Two encoders into one space.

    Attributes:
        scale: exp(logit_scale), kept as a Python float: in half precision it would be off by up to 0.2 percent.
        image_size: Side of the square pictures that the image encoder reads, in pixels.
    """

    scale: float
    image_size: int

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Embeddings [B, D], not normalised, of preprocessed pixels [B, 3, S, S]."""

    @abstractmethod
    def token_ids(self, texts: Sequence[str]) -> Tensor:
        """Token ids [B, L] on the model's device; texts that are too long are cut, keeping the end-of-text token."""

    @abstractmethod
    def encode_ids(self, ids: Tensor) -> Tensor:
        """Embeddings [B, D], not normalised, of token ids [B, L]."""

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [B, D], not normalised, of texts."""
        return self.encode_ids(self.token_ids(texts))

    @abstractmethod
    def text_weights(self) -> Iterator[nn.Parameter]:
        """The parameters that `encode_texts` reads."""


class HFTowers(Towers):
    """A CLIPModel of transformers and its tokenizer."""

    def __init__(self, model: transformers.CLIPModel, tokenizer: transformers.CLIPTokenizer):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.scale = model.logit_scale.detach().double().exp().item()
        self.image_size = int(model.config.vision_config.image_size)
        self.max_tokens = int(model.config.text_config.max_position_embeddings)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """See `Towers`."""
        return _projected(self.model.get_image_features(pixel_values=pixels))

    def encode_ids(self, ids: Tensor) -> Tensor:
        """See `Towers`. No mask is needed: the encoder is causal and read at the end-of-text token."""
        return _projected(self.model.get_text_features(input_ids=ids))

    def token_ids(self, texts: Sequence[str]) -> Tensor:
        """Token ids [B, L] on the model's device: cut to, or filled with the tokenizer's own padding up to, its L."""
        tokens = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        ids: Tensor = tokens["input_ids"]
        return ids.to(self.model.logit_scale.device)

    def text_weights(self) -> Iterator[nn.Parameter]:
        """See `Towers`."""
        return chain(self.model.text_model.parameters(), self.model.text_projection.parameters())


class OpenCLIPTowers(Towers):
    """A CLIP of open_clip, with open_clip's own byte-pair tokenizer."""

    def __init__(self, model: open_clip.CLIP):
        super().__init__()
        self.model = model
        self.scale = model.logit_scale.detach().double().exp().item()
        size = model.visual.image_size
        self.image_size = int(size[0] if isinstance(size, tuple) else size)
        self.tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """See `Towers`."""
        embeddings: Tensor = self.model.encode_image(pixels)
        return embeddings

    def token_ids(self, texts: Sequence[str]) -> Tensor:
        """See `Towers`. The tokenizer pads with 0 and forces the last token to end-of-text on overflow."""
        ids: Tensor = self.tokenizer(list(texts))
        return ids.to(self.model.logit_scale.device)

    def encode_ids(self, ids: Tensor) -> Tensor:
        """See `Towers`."""
        embeddings: Tensor = self.model.encode_text(ids)
        return embeddings

    def text_weights(self) -> Iterator[nn.Parameter]:
        """See `Towers`."""
        return (weight for name, weight in self.model.named_parameters() if not name.startswith("visual."))


def _projected(output: Any) -> Tensor:
    """The projected embedding: transformers 5 wraps it in an output object, earlier versions return it bare."""
    embeddings: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return embeddings


class CropPreprocessing:
    """CLIP's own way in: short side to `size` (bicubic, antialiased), centre crop, normalise.

    The other side becomes int(size * long / short). `origin` says where an odd margin is cut: "floor" as the
    processors of transformers do, "round" (half to even) as torchvision's CenterCrop does, which the original CLIP
    code uses; the two are one pixel apart.
    """

    def __init__(
        self,
        size: int,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        origin: Literal["floor", "round"] = "floor",
    ):
        self.size, self.mean, self.std, self.origin = size, tuple(mean), tuple(std), origin

    def image(self, image: Image.Image) -> Tensor:
        """Float32 [3, size, size] of an RGB picture; resized by PIL on its 8 bits, as the originals do."""
        height, width, top, left = self.geometry(image.height, image.width)
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        cropped = resized.crop((left, top, left + self.size, top + self.size))
        return normalise(to_float(cropped), self.mean, self.std)

    def tensor(self, pixels: Tensor) -> Tensor:
        """The same for pixels [B, 3, H, W] in [0, 1], differentiable; values are not rounded to 8 bits on the way."""
        height, width, top, left = self.geometry(pixels.shape[-2], pixels.shape[-1])
        resized = resize(pixels, height, width)
        return normalise(resized[..., top : top + self.size, left : left + self.size], self.mean, self.std)

    def geometry(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Height and width after resizing, and the crop's top and left, in pixels.

        Raises:
            InvalidMediaError: If one side is more than 1000 times the other.
        """
        short, long = min(height, width), max(height, width)
        if long > _MAX_ASPECT * short:
            raise InvalidMediaError(f"expected sides of a ratio up to {_MAX_ASPECT}:1, got {width}x{height}")
        other = int(self.size * long / short)
        new_height, new_width = (self.size, other) if height <= width else (other, self.size)
        return new_height, new_width, self._margin(new_height), self._margin(new_width)

    def _margin(self, side: int) -> int:
        return (side - self.size) // 2 if self.origin == "floor" else round((side - self.size) / 2)


def to_float(image: Image.Image) -> Tensor:
    """An RGB picture as float32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bicubic resize of [B, 3, H, W]; PIL's filter, without its rounding and clipping to 8 bits."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    return F.interpolate(pixels, (height, width), mode="bicubic", align_corners=False, antialias=True)


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(pixels - mean) / std per channel, for pixels [..., 3, H, W]."""
    return (pixels - pixels.new_tensor(mean)[:, None, None]) / pixels.new_tensor(std)[:, None, None]


class ImageScorer(RewardModel):
    """A reward model that reads single pictures as squares of normalised pixels.

    Subclasses say how pictures get in and what becomes of the pixels; scoring and the gradient path are shared.

    Args:
        device: Where it runs; "auto" is the first accelerator, else the CPU.
        dtype: Type of the towers; "auto" is float32.
        parts: Modules of that type, by attribute.
    """

    def __init__(self, device: str | torch.device, dtype: torch.dtype | Literal["auto"], **parts: nn.Module):
        super().__init__()
        device = resolve_device(device)
        self.dtype = torch.float32 if dtype == "auto" else dtype
        for name, part in parts.items():
            self.add_module(name, part)
        self.to(device, self.dtype).requires_grad_(False).train(False)

    @abstractmethod
    def preprocess_image(self, image: Image.Image) -> Tensor:
        """Normalised float32 pixels [3, S, S] of an RGB picture."""

    @abstractmethod
    def preprocess_tensor(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, S, S] of pixels [B, 3, H, W] in [0, 1], differentiable."""

    @abstractmethod
    def score_pixels(self, pixels: Tensor, texts: Sequence[Any], dims: Collection[str]) -> dict[str, Tensor]:
        """Scores [B], float32 at least, of preprocessed pixels [B, 3, S, S] with B encoded prompts, differentiable.

        Args:
            pixels: On any device, in any floating type.
            texts: What `encode_text` gave.
            dims: Which of `info.dims` are wanted; others may be left out.
        """

    def preprocess(self, item: Media) -> Tensor:
        """See `RewardModel`: float32 [3, S, S]."""
        return self.preprocess_image(to_rgb(item))

    def score_prepared(self, prepared: Sequence[Tensor], texts: Sequence[Any]) -> Mapping[str, Tensor]:
        """See `RewardModel`."""
        return self.score_pixels(torch.stack(list(prepared)), texts, self.info.dims)

    def score_tensor(self, pixels: Tensor, prompts: str | Sequence[str] | None = None) -> Tensor:
        """Primary scores [B] on the model's device, with a graph to `pixels`; the model's weights get no gradient.

        Equal to `score` for 8-bit pictures that already have the model's size; others are resized as tensors, which
        skips the 8-bit rounding of `score`. Values are used as they are: clamp pixels that leave [0, 1] yourself.

        Args:
            pixels: RGB [B, 3, H, W] in [0, 1], any floating type; half precision is widened before resizing.
            prompts: One prompt, or B; None for models that need none.

        Raises:
            InvalidMediaError: If `pixels` has another shape or is not floating.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            raise InvalidMediaError(f"expected floats [B, 3, H, W], got {pixels.dtype} {tuple(pixels.shape)}")
        unique, rows = self._texts(prompts, len(pixels))
        encoded = self.encode_text(unique, len(unique))
        wide = pixels.to(self.device, torch.promote_types(pixels.dtype, torch.float32))
        primary = self.info.dims[-1]
        return self.score_pixels(self.preprocess_tensor(wide), [encoded[row] for row in rows], [primary])[primary]

    def settings(self) -> dict[str, str]:
        """The towers' type; the rest is in the weights."""
        return {"dtype": str(self.dtype)}


class DualEncoder(ImageScorer):
    """A reward model that is a function of an image and a text embedding, of their cosine unless overridden.

    Subclasses load their towers, say how pictures get in, and turn the cosine into a score. Texts encoded in earlier
    calls are remembered, up to 1024 of them.
    """

    towers: Towers

    def __init__(self, towers: Towers, device: str | torch.device, dtype: torch.dtype | Literal["auto"]):
        super().__init__(device, dtype, towers=towers)
        self.text_cache: TextCache[Tensor] = TextCache(1024)

    def score_cosine(self, cosine: Tensor) -> Tensor:
        """The score of a cosine, element by element: CLIP's logit unless overridden."""
        return self.towers.scale * cosine

    def score_embeddings(self, images: Tensor, texts: Tensor) -> Tensor:
        """Scores [B] of unit image and text embeddings [B, D]."""
        return self.score_cosine((images * texts).sum(-1))

    def wrap_prompt(self, prompt: str) -> str:
        """The text that the text encoder reads for a prompt."""
        return prompt

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], batch_size: int) -> Tensor:
        """Unit text embeddings [N, D], float32 at least."""
        texts = [self.wrap_prompt(p) for p in prompts]
        weights = list(self.towers.text_weights())

        def encode(chunk: Sequence[str]) -> Tensor:
            return unit(self.towers.encode_texts(chunk))

        chunks = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
        return torch.cat([self.text_cache.get(chunk, weights, encode) for chunk in chunks])

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Unit image embeddings [B, D], float32 at least, of preprocessed pixels [B, 3, S, S]."""
        return unit(self.towers.encode_images(pixels.to(self.device, self.dtype)))

    def score_pixels(self, pixels: Tensor, texts: Sequence[Tensor], dims: Collection[str]) -> dict[str, Tensor]:
        """See `ImageScorer`."""
        return {self.info.dims[-1]: self.score_embeddings(self.encode_pixels(pixels), torch.stack(list(texts)))}

    @torch.no_grad()
    def score_matrix(
        self, media: MediaBatch, prompts: Sequence[str], *, batch_size: int = 32, on_invalid: OnInvalid = "raise"
    ) -> Tensor:
        """Scores [M, N] of every medium with every prompt, float32 on the CPU; each side is encoded once.

        Rows of media that cannot be read are NaN with `on_invalid="nan"`. Other arguments and errors as in `score`.
        """
        items = as_list(media)
        names = [prompts] if isinstance(prompts, str) else list(prompts)
        matrix = torch.full((len(items), len(names)), float("nan"))
        if not items or not names:
            return matrix
        unique, rows = self._texts(names, len(names))
        texts = self.encode_text(unique, batch_size)[rows]
        errors: list[str | None] = [None] * len(items)
        for start in range(0, len(items), batch_size):
            good, prepared = self._prepare(items, range(start, min(start + batch_size, len(items))), errors, on_invalid)
            if good:
                images = self.encode_pixels(torch.stack(prepared))
                matrix[good] = self.score_grid(images, texts).float().cpu()
        return matrix

    def score_grid(self, images: Tensor, texts: Tensor) -> Tensor:
        """Scores [M, N] of unit image embeddings [M, D] with unit text embeddings [N, D]."""
        return self.score_cosine(images @ texts.T)

    def settings(self) -> dict[str, str]:
        """The towers' type and scale; the rest is in the weights."""
        return {**super().settings(), "scale": f"{self.towers.scale:.9e}"}


def unit(embeddings: Tensor) -> Tensor:
    """Embeddings [..., D] divided by their length, in float32 at least; zeros stay zeros."""
    wide = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    return F.normalize(wide, dim=-1)

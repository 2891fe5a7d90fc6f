"""GenEval's detector without mmdet: Mask2Former from transformers, fed and read as the released evaluation does it.

Source: Cheng et al. 2022, "Masked-attention Mask Transformer for Universal Image Segmentation" (arXiv:2112.01527); the
steps before and after the network are those of mmdetection 2.x for the instance model that GenEval uses. The processor
that belongs to the published weights is not used: it squashes every picture to 384x384 and reads masks on a grid of
that size, where small objects vanish.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers.models.mask2former.modeling_mask2former import Mask2FormerPreTrainedModel

from diffalign.devices import resolve_device
from diffalign.reward_models.base import RewardInfo, WeightSpec
from diffalign.reward_models.geneval_rules import Box, Detection
from diffalign.reward_models.weights import load_network as load_published

__all__ = ["DETECTOR", "Detector", "Mask2FormerDetector", "Prepared", "prepare", "read_queries"]

DETECTOR = WeightSpec("facebook/mask2former-swin-small-coco-instance", "model.safetensors")
CLASSES = 80
SHORT_SIDE, LONG_SIDE = 800, 1333
"""A picture is resized until its short side is 800 pixels, or its long side 1333 if that comes first."""
DIVISOR = 32
"""Both sides are then padded to multiples of this."""
PAD = 128.0
"""Grey of the padding, put in before normalising; black of the panoptic models comes after it."""
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
"""Of RGB in 0..255."""
TOP = 100
"""Pairs of query and class that are read, the surest ones; one mask can be among them under several classes."""
_CHUNK = 10  # masks at full size at a time: 100 of 1024x1024 would be 400 MB


class Detector(Protocol):
    """Anything that finds objects. An `nn.Module` is moved and fingerprinted with the reward model that holds it."""

    @property
    def identity(self) -> str:
        """Name of the detector and its weights, for results."""
        ...

    def detect(self, images: Sequence[Image.Image], thresholds: Sequence[float]) -> list[list[Detection]]:
        """The objects in each RGB picture whose score may exceed its threshold, in any order."""
        ...


class Mask2FormerDetector(nn.Module):
    """Mask2Former with Swin-S on COCO's 80 classes.

    The published weights that transformers can load are Meta's own; those of the original GenEval come from another
    training run of the same architecture, so scores differ somewhat and the detector's name belongs to every result.
    Everything is computed in float32: thresholds were set on such scores.
    """

    def __init__(
        self,
        path_or_id: str | Path | None = None,
        *,
        short_side: int = SHORT_SIDE,
        long_side: int = LONG_SIDE,
        batch_size: int = 8,
        device: str | torch.device = "auto",
        local_files_only: bool | None = None,
    ):
        """Loads the weights, completely or not at all.

        Args:
            path_or_id: Folder with config.json and model.safetensors in the layout of transformers, or a Hub id; None
                is `DETECTOR`.
            short_side: Size of the short side that the network sees, in pixels.
            long_side: Largest size of the long side.
            batch_size: Most pictures that pass the network at once.
            device: Where it runs; "auto" is the first accelerator, else the CPU.
            local_files_only: Never ask the Hub; None follows HF_HUB_OFFLINE.

        Raises:
            ValueError: If a size is not positive.
            WeightsError: If the weights are missing, damaged or of another model.
        """
        super().__init__()
        if min(short_side, batch_size) < 1 or long_side < short_side:
            raise ValueError(
                f"expected 1 <= short_side <= long_side and batch_size >= 1, got {short_side}, {long_side} and "
                f"{batch_size}"
            )
        self.short_side, self.long_side, self.batch_size = short_side, long_side, batch_size
        self.source = str(path_or_id) if path_or_id is not None else DETECTOR.repo
        self.network = load_network(path_or_id, local_files_only)
        self._digest = sha256(self.network.class_predictor.weight.detach().numpy().tobytes()).hexdigest()[:8]
        device = resolve_device(device)
        self.to(device).requires_grad_(False).eval()

    @property
    def identity(self) -> str:
        """The weights' Hub id or folder, a digest of the class layer (trainings differ in it), and the input's size."""
        name = self.source if self.source.count("/") == 1 and not Path(self.source).exists() else Path(self.source).name
        return f"{name}:{self._digest}@{self.short_side}x{self.long_side}"

    @torch.no_grad()
    def detect(self, images: Sequence[Image.Image], thresholds: Sequence[float]) -> list[list[Detection]]:
        """See `Detector`: detections with masks, the surest first.

        Pictures of one padded size share a forward; a result does not depend on the others (beyond rounding).

        Args:
            images: RGB pictures of any sizes.
            thresholds: One for each; detections whose score cannot exceed it are left out.
        """
        device = next(self.network.parameters()).device
        found: list[list[Detection]] = [[] for _ in images]
        prepared = [prepare(image, self.short_side, self.long_side) for image in images]
        order = sorted(range(len(images)), key=lambda i: tuple(prepared[i].pixels.shape))
        for _, same in groupby(order, key=lambda i: tuple(prepared[i].pixels.shape)):
            rows = list(same)
            for start in range(0, len(rows), self.batch_size):
                batch = rows[start : start + self.batch_size]
                classes, masks = self.network(torch.stack([prepared[i].pixels for i in batch]).to(device))
                for i, class_logits, mask_logits in zip(batch, classes, masks, strict=True):
                    found[i] = read_queries(class_logits, mask_logits, prepared[i], thresholds[i])
        return found


@dataclass(frozen=True, eq=False)
class Prepared:
    """A picture as the network sees it.

    Attributes:
        pixels: Normalised, float32 [3, H, W], padded at the right and below.
        size: Height and width without the padding.
        original: Height and width of the picture.
    """

    pixels: Tensor
    size: tuple[int, int]
    original: tuple[int, int]


def prepare(image: Image.Image, short_side: int = SHORT_SIDE, long_side: int = LONG_SIDE) -> Prepared:
    """A picture resized (bilinear, without antialiasing), padded with grey, then normalised.

    Args:
        image: 8-bit RGB, the right way up.
        short_side: Wanted size of the short side.
        long_side: Largest size of the long side.
    """
    height, width = image.height, image.width
    factor = min(long_side / max(height, width), short_side / min(height, width))
    size = max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    # The original resizes 8-bit pixels with OpenCV; rounding comes within one grey level of it.
    pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=False).round().clamp(0, 255)
    below, right = -size[0] % DIVISOR, -size[1] % DIVISOR
    pixels = F.pad(pixels, (0, right, 0, below), value=PAD)[0]
    pixels = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    return Prepared(pixels, size, (height, width))


def read_queries(class_logits: Tensor, mask_logits: Tensor, prepared: Prepared, threshold: float) -> list[Detection]:
    """The objects that the network's queries stand for, the surest first.

    The score is the class's probability times the mean probability of the mask's pixels. Mask logits are brought to
    the picture's size as logits and cut at zero there. A query whose mask is empty is no object.

    Args:
        class_logits: [Q, C + 1], the last column for "no object".
        mask_logits: [Q, h, w], for the padded picture.
        prepared: What the network saw.
        threshold: Pairs of query and class whose probability, and so score, does not exceed it are left out unread.
    """
    probabilities = class_logits.float().softmax(-1)[:, :-1]
    classes = probabilities.shape[1]
    top, places = probabilities.flatten().topk(min(TOP, probabilities.numel()))
    pairs = [
        (p, i // classes, i % classes) for p, i in zip(top.tolist(), places.tolist(), strict=True) if p > threshold
    ]
    queries = sorted({query for _, query, _ in pairs})
    seen: dict[int, tuple[float, Box, Any]] = {}
    for start in range(0, len(queries), _CHUNK):
        chunk = queries[start : start + _CHUNK]
        logits = _full_size(mask_logits[chunk].float(), prepared)
        for query, mask in zip(chunk, logits, strict=True):
            inside = mask > 0
            box = _tight_box(inside)
            if box is not None:
                quality = (mask.sigmoid() * inside).sum() / (inside.sum() + 1e-6)
                seen[query] = quality.item(), box, inside.cpu().numpy()
    found = [
        # Multiplied in single precision, as the original's scores are; thresholds are sharp.
        Detection(label, float(np.float32(p) * np.float32(seen[query][0])), seen[query][1], seen[query][2])
        for p, query, label in pairs
        if query in seen
    ]
    return sorted(found, key=lambda detection: -detection.score)


def _full_size(logits: Tensor, prepared: Prepared) -> Tensor:
    """Mask logits [N, h, w] of the padded picture at the original's size [N, H, W]."""
    padded = prepared.pixels.shape[-2:]
    height, width = prepared.size
    at_input = F.interpolate(logits[None], tuple(padded), mode="bilinear", align_corners=False)
    cropped = at_input[..., :height, :width]
    return F.interpolate(cropped, prepared.original, mode="bilinear", align_corners=False)[0]


def _tight_box(mask: Tensor) -> Box | None:
    """The box around a mask [H, W], or None around nothing."""
    rows, columns = (mask.any(dim).nonzero().flatten().tolist() for dim in (1, 0))
    if not rows:
        return None
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


class InstanceNetwork(Mask2FormerPreTrainedModel):  # type: ignore[misc]  # transformers is not typed
    """Mask2Former with its class layer and nothing of the training loss.

    Parameters have the names of `Mask2FormerForUniversalSegmentation`, whose constructor asks for the loss's packages.
    Load it with `from_pretrained` only: live names of the Swin backbone differ from those in the files.
    """

    def __init__(self, config: transformers.Mask2FormerConfig):
        super().__init__(config)
        self.model = transformers.Mask2FormerModel(config)
        self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
        self.post_init()

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits [B, Q, C + 1] and mask logits [B, Q, H / 4, W / 4] of pixels [B, 3, H, W].

        No mask for the padding is passed: it would change nothing, and the original ignores padding as well.
        """
        # Without output_hidden_states the decoder's states are None.
        output = self.model(pixel_values=pixels, output_hidden_states=True, return_dict=True)
        states = output.transformer_decoder_intermediate_states[-1].transpose(0, 1)
        return self.class_predictor(states), output.masks_queries_logits[-1]


def load_network(path_or_id: str | Path | None = None, local_files_only: bool | None = None) -> InstanceNetwork:
    """The network with published weights, float32 on the CPU; see `Mask2FormerDetector`.

    Raises:
        WeightsError: If the weights are missing, damaged or of another model.
    """
    network: InstanceNetwork = load_published(
        _INFO,
        InstanceNetwork,
        path_or_id,
        local_files_only,
        model_type="mask2former",
        optional=_UNUSED,
        ignored=r"^criterion\.",  # the loss, which is not built here
        check=_check_classes,
    )
    return network


def _check_classes(config: transformers.Mask2FormerConfig) -> None:
    if config.num_labels != CLASSES:
        raise ValueError(f"it has {config.num_labels} classes; expected COCO's {CLASSES} of the instance variant")


_UNUSED = r"encoder\.swin\.layernorm\.(weight|bias)$"
"""The backbone's last norm, which its outputs do not use and published files lack."""
_KIND: Literal["image"] = "image"
_INFO = RewardInfo(name="geneval's detector", license="other", weights=(DETECTOR,), kind=frozenset({_KIND}))

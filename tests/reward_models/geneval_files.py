"""What tests of GenEval share: a tiny random detector in the published layout, pictures whose objects are painted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from transformers import Mask2FormerConfig, SwinConfig

from diffalign.reward_models.geneval_detector import InstanceNetwork
from diffalign.reward_models.geneval_rules import Box, Detection

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "geneval"
"""Where the published prompts are in a development checkout; they are no part of the project."""


def geneval_data() -> Path:
    """The folder with GenEval's prompts and class names, or a skipped test."""
    if not (DATA / "evaluation_metadata.jsonl").is_file() or not (DATA / "object_names.txt").is_file():
        pytest.skip("evaluation_metadata.jsonl and object_names.txt are not in ../shared/data/geneval")
    return DATA


def save_detector(folder: Path, *, classes: int = 80, seed: int = 0) -> Path:
    """A random Mask2Former with the smallest Swin, as its authors publish it: without the unused norm, with the loss's
    weight."""
    swin = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=12,
        num_labels=classes, architectures=["Mask2FormerForUniversalSegmentation"],
    )  # fmt: skip
    network = InstanceNetwork(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in network.named_parameters():
            width = p.shape[-1] if p.ndim > 1 else 4
            p.copy_(torch.randn(p.shape, generator=generator) * width**-0.5 + ("norm" in name and p.ndim == 1))
        network.class_predictor.weight.mul_(8)  # some classes are sure
    network.save_pretrained(folder)
    file = folder / "model.safetensors"
    state = {name: value for name, value in load_file(file).items() if "encoder.swin.layernorm" not in name}
    save_file(state | {"criterion.empty_weight": torch.ones(classes + 1)}, file, metadata={"format": "pt"})
    return folder


def box(label: int, score: float, corners: Box = (0, 0, 10, 10)) -> Detection:
    """A detection without a mask."""
    return Detection(label, score, corners)


class PaintedDetector:
    """Finds painted objects: every colour (7, class, copy) of a picture is one, and as sure as it is told to be."""

    identity = "painted"

    def __init__(self, score: float = 0.95):
        self.score = score

    def detect(self, images: Sequence[Image.Image], thresholds: Sequence[float]) -> list[list[Detection]]:
        return [self._detect(np.asarray(image)) for image in images]

    def _detect(self, pixels: np.ndarray) -> list[Detection]:
        colors = np.unique(pixels[pixels[..., 0] == 7].reshape(-1, 3), axis=0)
        found = []
        for color in colors:
            mask = (pixels == color).all(-1)
            rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
            corners = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            found.append(Detection(int(color[1]), self.score, tuple(map(float, corners)), mask))
        return found


def paint(objects: Sequence[tuple[int, Box]], size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A picture in which `PaintedDetector` finds objects of the given classes and places."""
    image = Image.new("RGB", size, (200, 200, 200))
    for copy, (label, (x1, y1, x2, y2)) in enumerate(objects):
        ImageDraw.Draw(image).rectangle((x1, y1, x2 - 1, y2 - 1), fill=(7, label, copy))
    return image

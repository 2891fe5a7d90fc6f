"""Tiny random CLIP models in the published layouts, pictures, and an independent CLIP in NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])

OPEN_CLIP_CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 32, "head_width": 16, "patch_size": 56},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def save_hf_clip(folder: Path, *, image_size: int = 224, patch: int = 56, act: str = "gelu", seed: int = 0) -> Path:
    """A random two-layer CLIPModel with its tokenizer, saved as transformers publishes it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(c + "</w>" for c in alphabet), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, projection_dim=12, num_hidden_layers=2,
        num_attention_heads=2, hidden_act=act, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, projection_dim=12, num_hidden_layers=2, num_attention_heads=2,
        image_size=image_size, patch_size=patch, hidden_act=act,
    )  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12))
    randomise(model, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights that make every part matter; the default ones leave the towers nearly linear."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (1.0 if p.ndim < 2 else p.shape[-1] ** -0.5))
            if "norm" in name or "ln_" in name:
                p.add_(1.0 if name.endswith("weight") else 0.0)
        dict(model.named_parameters())["logit_scale"].fill_(math.log(37.5))


def save_hps(folder: Path, name: str = "HPS_v2.1_compressed.pt", seed: int = 0) -> Path:
    """A random tiny open_clip CLIP in the checkpoint format of HPSv2."""
    import open_clip

    model = open_clip.CLIP(**OPEN_CLIP_CONFIG)
    randomise(model, seed)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": model.state_dict()}, folder / name)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A seed at which all cosines of the tests are positive: 2.5 * max(cos, 0) is flat where they are not.
    return save_hf_clip(tmp_path_factory.mktemp("clip"), seed=20)


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf_clip(tmp_path_factory.mktemp("shapes"), image_size=64, patch=16, act="quick_gelu")


@pytest.fixture(scope="session")
def hps_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hps(tmp_path_factory.mktemp("hps"))


@pytest.fixture(scope="session")
def blip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.reward_models.test_image_reward import save_published

    return save_published(tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="session")
def section(clip_folder: Path, hps_folder: Path, blip_folder: Path, shapes_folder: Path) -> Callable[..., Any]:
    """Sections `reward` of configurations by the scorers' names; see tests/reward_models/scorer_training.py."""
    from tests.reward_models.scorer_training import sections

    return sections(clip_folder, hps_folder, OPEN_CLIP_CONFIG, blip_folder, shapes_folder)


def photo(height: int, width: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    """A picture with gradients and noise, uint8 [height, width, channels]."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / (7 + c) + seed) + np.cos(y / (11 + c)) for c in range(channels)], axis=-1)
    return np.clip(127 + 50 * waves + generator.normal(0, 15, waves.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def photos() -> list[Image.Image]:
    return [Image.fromarray(photo(h, w, seed=i)) for i, (h, w) in enumerate([(224, 224), (64, 90), (300, 200)])]


class NumpyCLIP:
    """CLIP's forward pass from its definition, head by head, in float64; for either family's state dict."""

    def __init__(self, state: dict[str, torch.Tensor], heads: tuple[int, int], act: str):
        self.w = {k: v.double().numpy() for k, v in state.items()}
        self.hf = "visual_projection.weight" in self.w
        self.image_heads, self.text_heads = heads
        self.act = act

    def image(self, pixels: np.ndarray) -> np.ndarray:
        """Unit embedding of normalised pixels [3, S, S]."""
        pre = "vision_model." if self.hf else "visual."
        kernel = self.w[pre + ("embeddings.patch_embedding.weight" if self.hf else "conv1.weight")]
        p, side = kernel.shape[-1], pixels.shape[-1] // kernel.shape[-1]
        patches = [
            (kernel * pixels[:, i * p : (i + 1) * p, j * p : (j + 1) * p]).sum((1, 2, 3))
            for i in range(side)
            for j in range(side)
        ]
        first = self.w[pre + ("embeddings.class_embedding" if self.hf else "class_embedding")]
        places = self.w[pre + ("embeddings.position_embedding.weight" if self.hf else "positional_embedding")]
        x = self._norm(np.stack([first, *patches]) + places, pre + ("pre_layrnorm" if self.hf else "ln_pre"))
        for layer in range(2):
            x = self._block(x, pre, layer, self.image_heads, causal=False)
        x = self._norm(x[0], pre + ("post_layernorm" if self.hf else "ln_post"))
        return _unit(self.w["visual_projection.weight"] @ x if self.hf else x @ self.w["visual.proj"])

    def text(self, ids: list[int]) -> np.ndarray:
        """Unit embedding of token ids that end with end-of-text, without padding."""
        pre = "text_model." if self.hf else ""
        table = self.w[pre + ("embeddings.token_embedding.weight" if self.hf else "token_embedding.weight")]
        places = self.w[pre + ("embeddings.position_embedding.weight" if self.hf else "positional_embedding")]
        x = table[ids] + places[: len(ids)]
        for layer in range(2):
            x = self._block(x, pre, layer, self.text_heads, causal=True)
        x = self._norm(x[-1], pre + ("final_layer_norm" if self.hf else "ln_final"))
        return _unit(self.w["text_projection.weight"] @ x if self.hf else x @ self.w["text_projection"])

    def _block(self, x: np.ndarray, pre: str, layer: int, heads: int, causal: bool) -> np.ndarray:
        if self.hf:
            at = f"{pre}encoder.layers.{layer}."
            names = ["layer_norm1", "layer_norm2", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]
            qkv = [(self.w[f"{at}self_attn.{n}_proj.weight"], self.w[f"{at}self_attn.{n}_proj.bias"]) for n in "qkv"]
        else:
            at = f"{pre}transformer.resblocks.{layer}."
            names = ["ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"]
            weights, biases = self.w[at + "attn.in_proj_weight"], self.w[at + "attn.in_proj_bias"]
            qkv = list(zip(np.split(weights, 3), np.split(biases, 3), strict=True))
        y = self._norm(x, at + names[0])
        q, k, v = (y @ weight.T + bias for weight, bias in qkv)
        d = x.shape[-1] // heads
        outputs = []
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            logits = q[:, part] @ k[:, part].T / math.sqrt(d)
            if causal:
                logits = np.where(np.tri(len(x), dtype=bool), logits, -np.inf)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            outputs.append(weights / weights.sum(-1, keepdims=True) @ v[:, part])
        x = x + self._linear(np.concatenate(outputs, axis=-1), at + names[2])
        hidden = self._linear(self._norm(x, at + names[1]), at + names[3])
        return x + self._linear(self._gelu(hidden), at + names[4])

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return unit * self.w[name + ".weight"] + self.w[name + ".bias"]

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.w[name + ".weight"].T + self.w[name + ".bias"]

    def _gelu(self, x: np.ndarray) -> np.ndarray:
        if self.act == "quick_gelu":
            return x / (1 + np.exp(-1.702 * x))
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


def crop_224(image: Image.Image) -> np.ndarray:
    """CLIP's preprocessing, written from its description: [3, 224, 224] float64."""
    w, h = image.size
    size = (224, int(224 * h / w)) if w <= h else (int(224 * w / h), 224)
    array = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))
    top, left = (array.shape[0] - 224) // 2, (array.shape[1] - 224) // 2
    array = array[top : top + 224, left : left + 224] / 255.0
    return ((array - MEAN) / STD).transpose(2, 0, 1)


@pytest.fixture(scope="session")
def numpy_clip() -> type[NumpyCLIP]:
    return NumpyCLIP


@pytest.fixture(scope="session")
def numpy_crop() -> Callable[[Image.Image], np.ndarray]:
    return crop_224


@pytest.fixture(scope="session")
def make_photo() -> Callable[..., np.ndarray]:
    return photo


@pytest.fixture(scope="session")
def make_hps() -> Callable[..., Path]:
    return save_hps


@pytest.fixture(scope="session")
def make_clip() -> Callable[..., Path]:
    return save_hf_clip


@pytest.fixture(scope="session")
def hps_config() -> dict[str, object]:
    return OPEN_CLIP_CONFIG


def differences(score: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor) -> None:
    """The gradient of `score` at float64 `pixels` equals central differences along three random directions."""
    pixels = pixels.detach().double().requires_grad_(True)
    value = score(pixels)
    assert value.dtype == torch.float64
    (gradient,) = torch.autograd.grad(value.sum(), pixels)
    assert gradient.isfinite().all()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = torch.randn(pixels.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            up, down = (score(pixels + step * direction).sum() for step in (1e-5, -1e-5))
        expected = float((up - down) / 2e-5)
        assert abs(expected) > 1e-6
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.fixture(scope="session")
def check_gradient() -> Callable[[Callable[[torch.Tensor], torch.Tensor], torch.Tensor], None]:
    return differences

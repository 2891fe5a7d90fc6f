"""Tiny random Qwen2-VL reward models in the published formats, and their tokenizer."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

PROMPTS = Path(__file__).resolve().parents[3] / "shared" / "data" / "reward_prompts"
"""Where the published texts are in a development checkout; they are no part of the project."""

CONFIG: dict[str, Any] = {
    "text_config": {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "rms_norm_eps": 1e-6,
        "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 2, 2]},
    },
    "vision_config": {"hidden_size": 24, "depth": 2, "embed_dim": 16, "mlp_ratio": 2, "num_heads": 2},
}  # fmt: skip
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]  # fmt: skip


def template_folder(filename: str) -> Path:
    """The folder with a published text, or a skipped test."""
    if not (PROMPTS / filename).is_file():
        pytest.skip(f"{filename} is not in ../shared/data/reward_prompts")
    return PROMPTS


def save_tokenizer(folder: Path) -> Path:
    """A tokenizer of Qwen2's kind, with merges for the words of the published texts, and the control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = Qwen2Tokenizer(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])._tokenizer.pre_tokenizer
    texts = [path.read_text(encoding="utf-8") for path in sorted(PROMPTS.glob("*_user_text.txt"))]
    own.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False))
    learned = json.loads(own.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=learned["vocab"], merges=[tuple(pair) for pair in learned["merges"]])
    tokenizer.add_tokens(CONTROL, special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


def rows_of(folder: Path, added: int) -> int:
    """How many embeddings a model with so many added tokens has."""
    return len(Qwen2Tokenizer.from_pretrained(folder)) + added


def random_model(rows: int, added: int, head: nn.Module, seed: int = 0) -> nn.Module:
    """Qwen2-VL of transformers, with its language-model head, and a reward head; every part matters."""
    parts = copy.deepcopy(CONFIG)
    parts["text_config"]["vocab_size"] = rows
    first = rows - added - len(CONTROL)
    names = {"vision_start": 3, "vision_end": 4, "image": 6, "video": 7}
    ids = {f"{name}_token_id": first + place for name, place in names.items()}
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**parts, **ids))
    model.rm_head = head
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            fan = p[0].numel() if p.ndim > 1 else 1
            p.copy_(torch.randn(p.shape, generator=generator) * (fan**-0.5 if p.ndim > 1 else 0.2))
            if "embed_tokens" in name:
                p.mul_(fan**0.5)
            if name.endswith("weight") and p.ndim == 1:
                p.add_(1.0)
    return model.eval().requires_grad_(False)


def published(model: nn.Module, old: bool = True) -> dict[str, Tensor]:
    """Its tensors by the names of transformers before 4.52, as the files have them, or of 4.52."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if not old:
        return state
    renamed = {}
    for name, value in state.items():
        name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        renamed[name] = value
    return renamed


def save_published(model: nn.Module, path: Path, old: bool = True) -> Path:
    """The tensors as one safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(published(model, old), path)
    return path

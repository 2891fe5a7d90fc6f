"""BLIP with a scalar head: what ImageReward and its relatives compute, on the BLIP modules of transformers.

A picture goes through a ViT; a text goes through a BERT whose layers also attend to the picture's patches; the state
of the text's first token goes through a chain of linear layers without activations (Li et al. 2022, "BLIP:
Bootstrapping Language-Image Pre-training for Unified Vision-Language Understanding and Generation", arXiv:2201.12086,
with the head of Xu et al. 2023, "ImageReward", arXiv:2304.05977).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from diffalign.reward_models.base import RewardInfo, WeightsError
from diffalign.reward_models.weights import number_positions, one_line, read_tokenizer

__all__ = [
    "TEXT_KEYS",
    "BlipTowers",
    "BlipWithHead",
    "load_tokenizer",
    "own_to_published",
    "published_to_own",
    "read_text_config",
]

VIT_LARGE: Mapping[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}
"""ViT-L/16 at 224 pixels, 197 positions; the class of transformers has another epsilon by default."""

TEXT_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "vocab_size",
    "layer_norm_eps",
    "hidden_act",
    "pad_token_id",
)

_VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "norm.": "post_layernorm.",
}
_BLOCK_NAMES = {
    "attn.qkv.": "self_attn.qkv.",
    "attn.proj.": "self_attn.projection.",
    "norm1.": "layer_norm1.",
    "norm2.": "layer_norm2.",
}


class BlipTowers(nn.Module):
    """A vision tower, and a text tower that looks at it.

    Attributes:
        image_size: Side of the square pictures that it reads, in pixels.
    """

    def __init__(self, text_config: Mapping[str, Any], vision_config: Mapping[str, Any]):
        super().__init__()
        vision = transformers.BlipVisionConfig(**vision_config)
        # The flag in the configuration creates the cross-attention; the causal mask, which a BERT must not have, comes
        # with an argument of the call that is off by default.
        text = transformers.BlipTextConfig(**text_config, encoder_hidden_size=vision.hidden_size, is_decoder=True)
        self.image_size = int(vision.image_size)
        self.vision = transformers.BlipVisionModel(vision)
        self.text = transformers.BlipTextModel(text, add_pooling_layer=False)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Last states [B, D] of the first tokens.

        Args:
            pixels: Normalised pixels [B, 3, S, S], in the type of the weights.
            ids: Token ids [B, L].
            mask: 1 for tokens, 0 for padding, [B, L].
        """
        patches = self.vision(pixel_values=pixels).last_hidden_state  # the pooled output is normalised twice
        states = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=patches).last_hidden_state
        first: Tensor = states[:, 0]
        return first


class BlipWithHead(nn.Module):
    """All that a weight file holds: `towers`, and `mlp`, which makes one number of a state.

    Built without values, on the meta device: `checkpoints.load_complete` gives it some.
    """

    def __init__(self, text_config: Mapping[str, Any], vision_config: Mapping[str, Any]):
        super().__init__()
        with torch.device("meta"):
            self.towers = BlipTowers(text_config, vision_config)
            self.mlp = _linear_chain(int(text_config["hidden_size"]))
        number_positions(self)


def _linear_chain(width: int) -> nn.Sequential:
    """Linear layers to 1024, 128, 64, 16 and 1 numbers; the gaps are the dropout layers that published names count."""
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.Identity(),
        nn.Linear(1024, 128),
        nn.Identity(),
        nn.Linear(128, 64),
        nn.Identity(),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )


def published_to_own(name: str) -> str | None:
    """The name in `BlipWithHead` of a tensor as ImageReward publishes it; None for those that no score needs.

    Not needed are the two projections of BLIP's contrastive loss, and position ids, which are no weights.
    """
    if name.endswith("position_ids") or name.startswith(("blip.vision_proj.", "blip.text_proj.")):
        return None
    if name.startswith("mlp.layers."):
        return "mlp." + name.removeprefix("mlp.layers.")
    if name.startswith("blip.text_encoder."):
        return "towers.text." + name.removeprefix("blip.text_encoder.")
    if not name.startswith("blip.visual_encoder."):
        return name
    rest = name.removeprefix("blip.visual_encoder.")
    if rest.startswith("blocks."):
        _, number, part = rest.split(".", 2)
        return f"towers.vision.encoder.layers.{number}.{_replace_start(part, _BLOCK_NAMES)}"
    return "towers.vision." + _replace_start(rest, _VISION_NAMES)


def own_to_published(name: str) -> str:
    """The name that ImageReward publishes for a tensor of `BlipWithHead`; `published_to_own` leads back."""
    if name.startswith("mlp."):
        return "mlp.layers." + name.removeprefix("mlp.")
    if name.startswith("towers.text."):
        return "blip.text_encoder." + name.removeprefix("towers.text.")
    rest = name.removeprefix("towers.vision.")
    if rest.startswith("encoder.layers."):
        _, _, number, part = rest.split(".", 3)
        return f"blip.visual_encoder.blocks.{number}.{_replace_start(part, _turned(_BLOCK_NAMES))}"
    return "blip.visual_encoder." + _replace_start(rest, _turned(_VISION_NAMES))


def _turned(table: Mapping[str, str]) -> dict[str, str]:
    return {own: published for published, own in table.items()}


def _replace_start(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def read_text_config(info: RewardInfo, path: Path) -> dict[str, Any]:
    """Arguments of a BlipTextConfig from a `med_config.json`.

    Its `encoder_width` is not read: the published file says 768, but the weights attend to the vision tower's 1024.

    Raises:
        WeightsError: If the file cannot be read or lacks a value.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {key: content[key] for key in TEXT_KEYS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"cannot read {str(path)!r} as the text configuration of {info.name}: {one_line(error)}; expected a JSON "
            f"object with {', '.join(TEXT_KEYS)}"
        ) from error


def load_tokenizer(
    info: RewardInfo, path_or_id: str | Path, vocab_size: int, local_files_only: bool | None
) -> transformers.BertTokenizer:
    """The uncased BERT tokenizer that a text tower with `vocab_size` embeddings was trained with.

    BLIP adds two tokens to BERT's, [DEC] and [ENC], which this scoring never uses: the tokenizer may lack them.

    Raises:
        WeightsError: If it is not there, or has another number of tokens.
    """
    files = "vocab.txt or tokenizer.json of 'google-bert/bert-base-uncased',"
    source, tokenizer = read_tokenizer(info, transformers.BertTokenizer, path_or_id, files, local_files_only)
    if len(tokenizer) not in (vocab_size - 2, vocab_size):
        raise WeightsError(
            f"the tokenizer in {source!r} does not belong to {info.name}: it has {len(tokenizer)} tokens, expected "
            f"{vocab_size - 2}, or {vocab_size} with [DEC] and [ENC]"
        )
    return tokenizer

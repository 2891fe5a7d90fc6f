"""Original names of the layers of UNets: diffusers' converter is the judge."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffalign.lora_names import diffusers_unet, dotted, original_unet, underscored

UNETS: dict[str, tuple[tuple[str, ...], tuple[str, ...], dict[str, Any]]] = {
    "sd": (
        ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        {"transformer_layers_per_block": 1},
    ),
    "sdxl": (
        ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        {"transformer_layers_per_block": (1, 2, 3), "addition_embed_type": "text_time"},
    ),
    "sdxl-refiner": (
        ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        {"transformer_layers_per_block": 4, "addition_embed_type": "text_time"},
    ),
}


@pytest.mark.parametrize("family", UNETS)
def test_original_names_of_every_layer_of_a_unet(family: str) -> None:
    """diffusers' converter of original checkpoints maps our original names onto its own layers, all of them."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    down, up, options = UNETS[family]
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            down_block_types=down,
            up_block_types=up,
            block_out_channels=(8,) * (len(down) - 1) + (16,),  # a change of width has a shortcut
            layers_per_block=2,
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=2,
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=16,
            **options,
        )
    layers = [n.removesuffix(".weight") for n, p in unet.named_parameters() if n.endswith("weight") and p.ndim > 1]
    assert len(layers) > 100
    originals = {path: original_unet(path, family) for path in layers}
    assert len(set(originals.values())) == len(layers)
    for path, original in originals.items():
        assert diffusers_unet(original) == diffusers_unet(path) == path
        assert dotted(underscored(original)) == original
        assert dotted(underscored(path)) == path
    checkpoint = {
        f"model.diffusion_model.{original}.{kind}": torch.tensor(i)
        for i, original in enumerate(originals.values())
        for kind in ("weight", "bias")  # the converter asks some layers for both
    }
    converted = convert_ldm_unet_checkpoint(checkpoint, dict(unet.config))
    found = {key: int(value) for key, value in converted.items() if key.endswith(".weight") and value is not None}
    assert found == {f"{path}.weight": i for i, path in enumerate(layers)}

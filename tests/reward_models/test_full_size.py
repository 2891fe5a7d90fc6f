"""Names, shapes and counts of the published checkpoints at full size; nothing is allocated.

The tables are written from the models' descriptions: ViT-H/14 has 32 vision layers of width 1280 and 24 text layers of
width 1024, both with feed-forward parts four times as wide, on 257 and 77 places, and a joint space of 1024.
"""

from __future__ import annotations

import math

import open_clip
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from diffalign.reward_models import HPSv2, PickScore, ThreeDGenScore, WeightsError
from diffalign.reward_models.checkpoints import load_complete
from diffalign.reward_models.mps import MPS, _empty, _rename
from diffalign.reward_models.mps_network import CrossConfig
from diffalign.reward_models.threedgen import _Network
from diffalign.reward_models.weights import clip_h_config, empty_clip, empty_open_clip

Shapes = dict[str, tuple[int, ...]]

CLIP_H = 986_109_441
"""Parameters of ViT-H/14 with its text encoder, as published for laion2B-s32B-b79K."""
CROSS = 118_497_280
"""Parameters of MPS's cross model: 8 blocks of 14 812 160, see `mps_shapes`."""


def open_clip_shapes() -> Shapes:
    shapes: Shapes = {
        "logit_scale": (), "positional_embedding": (77, 1024), "text_projection": (1024, 1024),
        "token_embedding.weight": (49408, 1024), "ln_final.weight": (1024,), "ln_final.bias": (1024,),
        "visual.class_embedding": (1280,), "visual.positional_embedding": (257, 1280), "visual.proj": (1280, 1024),
        "visual.conv1.weight": (1280, 3, 14, 14),
        **{f"visual.{n}.{w}": (1280,) for n in ("ln_pre", "ln_post") for w in ("weight", "bias")},
    }  # fmt: skip
    for pre, d, layers in (("", 1024, 24), ("visual.", 1280, 32)):
        for i in range(layers):
            at = f"{pre}transformer.resblocks.{i}."
            linears = {"attn.in_proj_": (3 * d, d), "attn.out_proj.": (d, d)}
            linears |= {"mlp.c_fc.": (4 * d, d), "mlp.c_proj.": (d, 4 * d)}
            for name, shape in linears.items():
                shapes |= {f"{at}{name}weight": shape, f"{at}{name}bias": shape[:1]}
            shapes |= {f"{at}{n}.{w}": (d,) for n in ("ln_1", "ln_2") for w in ("weight", "bias")}
    return shapes


def vision_shapes() -> Shapes:
    shapes = {
        "embeddings.class_embedding": (1280,),
        "embeddings.patch_embedding.weight": (1280, 3, 14, 14),
        "embeddings.position_embedding.weight": (257, 1280),
        **{f"{n}.{w}": (1280,) for n in ("pre_layrnorm", "post_layernorm") for w in ("weight", "bias")},
    }
    return shapes | layer_shapes(1280, 32)


def layer_shapes(d: int, layers: int) -> Shapes:
    shapes: Shapes = {}
    for i in range(layers):
        at = f"encoder.layers.{i}."
        linears = {f"self_attn.{n}_proj": (d, d) for n in ("q", "k", "v", "out")}
        linears |= {"mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
        for name, shape in linears.items():
            shapes |= {f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[:1]}
        shapes |= {f"{at}layer_norm{n}.{w}": (d,) for n in (1, 2) for w in ("weight", "bias")}
    return shapes


def hf_shapes(pre: str = "") -> Shapes:
    text: Shapes = {
        "embeddings.token_embedding.weight": (49408, 1024),
        "embeddings.position_embedding.weight": (77, 1024),
        **{f"final_layer_norm.{w}": (1024,) for w in ("weight", "bias")},
        **layer_shapes(1024, 24),
    }
    return {
        f"{pre}logit_scale": (),
        f"{pre}text_projection.weight": (1024, 1024),
        f"{pre}visual_projection.weight": (1024, 1280),
        **{f"{pre}text_model.{name}": shape for name, shape in text.items()},
        **{f"{pre}vision_model.{name}": shape for name, shape in vision_shapes().items()},
    }


def mps_shapes() -> tuple[Shapes, Shapes]:
    """Parameters and stored constants."""
    weights, constants = hf_shapes("model."), {}
    for layer in range(4):
        cross, own = (f"cross_model.layers.{layer}.{i}.fn." for i in (0, 1))
        weights |= {
            f"{cross}norm.weight": (1024,), f"{cross}to_q.weight": (1024, 1024), f"{cross}to_kv.weight": (128, 1024),
            f"{cross}to_out.weight": (1024, 1024), f"{cross}ff.0.weight": (8192, 1024),
            f"{cross}ff.2.weight": (1024, 4096),
            f"{own}norm.weight": (1024,), f"{own}fused_attn_ff_proj.weight": (1024 + 64 + 64 + 8192, 1024),
            f"{own}attn_out.weight": (1024, 1024), f"{own}ff_out.1.weight": (1024, 4096),
        }  # fmt: skip
        constants |= {f"{cross}norm.bias": (1024,), f"{own}norm.bias": (1024,), f"{own}rotary_emb.inv_freq": (32,)}
    return weights, constants


def threedgen_shapes() -> Shapes:
    shapes = hf_shapes("clip.")
    for kind in ("normal", "rgb"):
        shapes |= {f"{kind}_vision_model.{name}": shape for name, shape in vision_shapes().items()}
        shapes[f"{kind}_visual_projection.weight"] = (1024, 1280)
    for name in ("geo_detail", "texture"):
        shapes |= {f"{name}_logit_proj.weight": (1, 1024), f"{name}_logit_proj.bias": (1,)}
    return shapes | dict.fromkeys(("geo_logit_scale", "geo_texture_logit_scale", "align_logit_scale"), ())


def count(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes.values()))


def shapes_of(module: torch.nn.Module) -> Shapes:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def meta(shapes: Shapes) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def test_tables_have_the_published_counts():
    assert count(open_clip_shapes()) == count(hf_shapes()) == CLIP_H
    assert len(open_clip_shapes()) == 686
    weights, constants = mps_shapes()
    assert count(weights) == CLIP_H + CROSS
    assert (len(weights) - len(hf_shapes()), len(constants)) == (40, 12)


def test_hpsv2_at_full_size():
    model = empty_open_clip(open_clip.get_model_config("ViT-H-14"))
    assert shapes_of(model) == open_clip_shapes()
    assert load_complete(HPSv2.info, model, meta(open_clip_shapes()), "file").complete
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert (model.visual.image_size, model.visual.transformer.resblocks[0].attn.num_heads) == ((224, 224), 16)
    assert model.attn_mask.device.type == "cpu"


def test_pickscore_at_full_size():
    """Its config.json is that of CLIP-H: widths that differ from the defaults of transformers."""
    config = CLIPConfig(
        projection_dim=1024,
        text_config={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "projection_dim": 1024},
        vision_config={"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "patch_size": 14,
                       "projection_dim": 1024, "num_attention_heads": 16},
    )  # fmt: skip
    with torch.device("meta"):
        assert shapes_of(CLIPModel(config)) == hf_shapes()
    assert load_complete(PickScore.info, empty_clip(clip_h_config()), meta(hf_shapes()), "file").complete


def test_clip_h_is_built_as_published():
    config = empty_clip(clip_h_config()).config
    assert (config.text_config.num_attention_heads, config.vision_config.num_attention_heads) == (16, 16)
    assert (config.text_config.hidden_act, config.vision_config.hidden_act) == ("gelu", "gelu")
    assert (config.text_config.eos_token_id, config.vision_config.image_size) == (49407, 224)


@pytest.mark.parametrize("prefix", ["", "mps."])
def test_mps_at_full_size(prefix):
    clip, cross = _empty(clip_h_config(), CrossConfig())
    network = torch.nn.ModuleDict({"model": clip, "cross_model": cross})
    weights, constants = mps_shapes()
    assert shapes_of(network) == {**weights, **constants}
    assert {name for name, _ in network.named_parameters()} == set(weights)
    file = meta({f"{prefix}{name}": shape for name, shape in {**weights, **constants}.items()})
    file[f"{prefix}model.text_model.embeddings.position_ids"] = torch.empty(1, 77, device="meta")
    assert load_complete(MPS.info, network, file, "file", rename=_rename).complete
    file.popitem()
    file.pop(f"{prefix}cross_model.layers.3.1.fn.attn_out.weight")
    with pytest.raises(
        WeightsError, match=r"1 tensors are missing, such as 'cross_model.layers.3.1.fn.attn_out.weight'"
    ):
        load_complete(MPS.info, network, file, "file", rename=_rename)


@pytest.mark.slow
def test_3dgen_at_full_size():
    network = _Network(clip_h_config())
    assert shapes_of(network) == threedgen_shapes()
    assert load_complete(ThreeDGenScore.info, network, meta(threedgen_shapes()), "file").complete

"""Names of a denoiser's layers in diffusers and in the models' own code bases; strings only.

Three spellings of one layer of SDXL:

    diffusers    down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q
    original     input_blocks.4.1.transformer_blocks.0.attn1.to_q       the publisher's code, and ComfyUI's modules
    kohya        the original or the diffusers name with every dot written as an underscore

For FLUX.1 the original code has one layer where diffusers has three or four: queries, keys and values of a block are
the rows of one matrix, in a single block followed by those of the MLP.
"""

from __future__ import annotations

import re
from functools import cache

LAYERS_PER_BLOCK = 2
"""ResNets per level of the published Stable Diffusion UNets, on which the original block numbers depend."""
LEVELS = 4

FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}
"""FLUX.1: original layer -> the diffusers layers whose rows it holds, in their order."""
MLP_RATIO = 4
"""Rows of `proj_mlp` for one of the others' in every published FLUX.1."""

_DOUBLE_BLOCK = {
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    **{layer: FUSED[layer] for layer in ("img_attn.qkv", "txt_attn.qkv")},
}
_SINGLE_BLOCK = {"linear1": FUSED["linear1"], "linear2": ("proj_out",), "modulation.lin": ("norm.linear",)}
_FLUX = {
    "double_blocks": ("transformer_blocks", _DOUBLE_BLOCK),
    "single_blocks": ("single_transformer_blocks", _SINGLE_BLOCK),
}

_UNET_LAYERS = {
    "resnets": {
        "conv1": "in_layers.2",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    },
    "downsamplers": {"conv": "op"},
    "upsamplers": {"conv": "conv"},
}
"""Layers of a UNet's parts, diffusers -> original; those of attentions have the same names."""
_ORIGINAL_LAYERS = {
    original: (kind, layer) for kind, layers in _UNET_LAYERS.items() for layer, original in layers.items()
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_ORIGINAL_ENDS = {original: path for path, original in _UNET_ENDS.items()}
_UNET_PATH = re.compile(
    r"((?:down_blocks\.\d+|up_blocks\.\d+|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.\d+)\.(.+)"
)
_ORIGINAL_PATH = re.compile(r"((?:input|output)_blocks\.\d+\.\d+|middle_block\.\d+)\.(.+)")

_WORD = re.compile(
    r"""(?:(?:down|up|input|output|transformer|double|single)_blocks | mid_block | middle_block
        | to_(?:q|k|v|out) | (?:proj|conv)_(?:in|out) | conv_shortcut | skip_connection | linear_[12]
        | time_emb_proj | time_embedding | add_embedding | time_embed | label_emb | (?:in|out|emb)_layers
        | (?:img|txt)_(?:attn|mlp|mod)
        | [^_]+)(?=_|$)""",
    re.VERBOSE,
)
"""A part of a dotted name. Those with an underscore of their own are listed: it must not become a dot."""


def underscored(name: str) -> str:
    """The kohya spelling.

    Raises:
        ValueError: If the dots could not be told from the underscores again.
    """
    short = name.replace(".", "_")
    if dotted(short) != name:
        raise ValueError(f"no kohya name is known for the layer {name!r}")
    return short


def dotted(name: str) -> str:
    """A kohya name with its dots back: "mid_block_attentions_0_proj_in" -> "mid_block.attentions.0.proj_in"."""
    return ".".join(_WORD.findall(name))


# --- Stable Diffusion ------------------------------------------------------------------------------------------------


@cache
def _unet_blocks(family: str) -> dict[str, str]:
    """Prefixes of the blocks' parts, diffusers -> original.

    The original numbers run through all layers; a downsampler has one of its own, an upsampler is the last part of one.
    The first up block of SD and of the SDXL refiner has no attention, so that its upsampler comes second, not third.
    """
    names = {f"mid_block.resnets.{i}": f"middle_block.{2 * i}" for i in range(2)}
    names["mid_block.attentions.0"] = "middle_block.1"
    for level in range(LEVELS):
        first = level * (LAYERS_PER_BLOCK + 1)
        plain = level == 0 and family != "sdxl"
        for layer in range(LAYERS_PER_BLOCK):
            names[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{first + 1 + layer}.0"
            names[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{first + 1 + layer}.1"
        names[f"down_blocks.{level}.downsamplers.0"] = f"input_blocks.{first + 1 + LAYERS_PER_BLOCK}.0"
        for layer in range(LAYERS_PER_BLOCK + 1):
            names[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{first + layer}.0"
            if not plain:
                names[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{first + layer}.1"
        names[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{first + LAYERS_PER_BLOCK}.{1 if plain else 2}"
    return names


@cache
def _diffusers_blocks() -> dict[tuple[str, str], str]:
    """(Kind of part, original prefix) -> diffusers prefix, for all UNets."""
    everything = [pair for family in ("sd", "sdxl") for pair in _unet_blocks(family).items()]
    return {(path.split(".")[-2], original): path for path, original in everything}


def original_unet(path: str, family: str) -> str:
    """The original name of a UNet's layer.

    Args:
        path: Its name in diffusers.
        family: "sd", "sdxl" or "sdxl-refiner".

    Raises:
        ValueError: If it has none.
    """
    if path in _UNET_ENDS:
        return _UNET_ENDS[path]
    if match := _UNET_PATH.fullmatch(path):
        prefix, kind, layer = match.groups()
        block = _unet_blocks(family).get(prefix)
        inner = _UNET_LAYERS[kind].get(layer) if kind in _UNET_LAYERS else layer
        if block and inner:
            return f"{block}.{inner}"
    raise ValueError(f"no original name is known for the layer {path!r} of a UNet ({family})")


def diffusers_unet(name: str) -> str:
    """The diffusers name of a UNet's layer from its original name; diffusers' own names come back unchanged.

    Raises:
        ValueError: If it is neither.
    """
    if name in _UNET_ENDS or _UNET_PATH.fullmatch(name):
        return name
    if name in _ORIGINAL_ENDS:
        return _ORIGINAL_ENDS[name]
    if match := _ORIGINAL_PATH.fullmatch(name):
        prefix, layer = match.groups()
        kind, inner = _ORIGINAL_LAYERS.get(layer, ("attentions", layer))
        block = _diffusers_blocks().get((kind, prefix))
        if block:
            return f"{block}.{inner}"
    raise ValueError(f"unknown layer {name!r}; expected one of a Stable Diffusion UNet")


# --- FLUX.1 ----------------------------------------------------------------------------------------------------------


@cache
def _original_flux_layers() -> dict[tuple[str, str], tuple[str, str, int]]:
    """(Kind of block, layer) in diffusers -> (kind of block, layer, place among the layer's parts)."""
    return {
        (kind, part): (original, layer, place)
        for original, (kind, layers) in _FLUX.items()
        for layer, parts in layers.items()
        for place, part in enumerate(parts)
    }


def original_flux(path: str) -> tuple[str, int]:
    """The original layer that holds a layer of `FluxTransformer2DModel`, and its place among that layer's parts.

    "transformer_blocks.3.attn.to_v" -> ("double_blocks.3.img_attn.qkv", 2).

    Raises:
        ValueError: If it has no original name here: layers outside the blocks have none.
    """
    kind, _, rest = path.partition(".")
    number, _, layer = rest.partition(".")
    found = _original_flux_layers().get((kind, layer))
    if found is None:
        raise ValueError(
            f"no original name is known for the layer {path!r} of FLUX.1; only those in its blocks have one"
        )
    original, fused, place = found
    return f"{original}.{number}.{fused}", place


def diffusers_flux(name: str) -> tuple[str, ...]:
    """The diffusers layers whose rows an original layer of FLUX.1 holds; one, three or four.

    Raises:
        ValueError: If it is unknown.
    """
    kind, _, rest = name.partition(".")
    number, _, layer = rest.partition(".")
    block, layers = _FLUX.get(kind, ("", {}))
    if layer not in layers:
        raise ValueError(f"unknown layer {name!r}; expected one of FLUX.1's double_blocks or single_blocks")
    return tuple(f"{block}.{number}.{part}" for part in layers[layer])

"""What the tensors of a LoRA file mean in each key layout: reading them as adapters of layers, and writing them.

The layouts are described in `diffalign.lora_formats`. The original FLUX.1 has one layer for queries, keys and values,
so adapters are fused and split here; names of layers are in `diffalign.lora_names`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.backbones.starting import METADATA
from diffalign.lora_names import (
    MLP_RATIO,
    diffusers_flux,
    diffusers_unet,
    dotted,
    original_flux,
    original_unet,
    underscored,
)

Layout = Literal["diffusers", "kohya", "comfyui"]
Family = Literal["sd", "sdxl", "sdxl-refiner", "flux"]

_SUFFIXES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}
_DORA = ("lora_magnitude_vector", "dora_scale")
_TEXT = ("text_encoder", "lora_te", "text_encoders.")
_PREFIXES = ("lora_unet_", "diffusion_model.", "unet.", "transformer.")


@dataclass(frozen=True)
class Adapter:
    """What a LoRA adds to one layer.

    Attributes:
        down: First matrix, [rank, in] or, of a convolution, [rank, in, h, w].
        up: Second matrix, [out, rank] or [out, rank, 1, 1].
        alpha: The product is multiplied by alpha / rank.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return len(self.down)

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / self.rank


Adapters = dict[str, Adapter]
"""Layer of the denoiser, by its name in diffusers with "unet." or "transformer." before it -> its adapter."""


# --- reading ---------------------------------------------------------------------------------------------------------


def read_adapters(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Adapters:
    """The adapters in a LoRA file's tensors, whatever their layout.

    Args:
        tensors: The file's content.
        metadata: Of the file; holds alpha in the diffusers layout, where no metadata mean alpha = rank.

    Raises:
        ValueError: If a key is not understood, or text encoders or DoRA's magnitudes are among them, which are not
            converted: a file without them would draw other images, and that silently.
    """
    layers = _by_layer(tensors)
    config = json.loads((metadata or {}).get(METADATA, "null"))
    adapters: Adapters = {}
    for layer, parts in layers.items():
        prefix = next(prefix for prefix in _PREFIXES if layer.startswith(prefix))
        name = layer.removeprefix(prefix)
        down, up = parts["down"], parts["up"]
        if up.shape[1] != len(down):
            raise ValueError(f"layer {layer!r} has ranks {len(down)} and {up.shape[1]} in its two matrices")
        adapter = Adapter(down, up, float(parts["alpha"]) if "alpha" in parts else float(len(down)))
        if prefix in ("unet.", "transformer."):
            if "alpha" not in parts and config:
                adapter = replace(adapter, alpha=_configured_alpha(config, prefix, name, adapter.rank))
            adapters[layer] = adapter
            continue
        if prefix == "lora_unet_":
            name = dotted(name)
        if name.startswith(("double_blocks.", "single_blocks.")):
            names = [f"transformer.{part}" for part in diffusers_flux(name)]
            adapters |= _split(adapter, names)
        else:
            adapters[f"unet.{diffusers_unet(name)}"] = adapter
    return adapters


def _by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Layer -> {"down", "up" and perhaps "alpha"}; refuses what is not understood."""
    if any(word in key for key in tensors for word in _DORA):
        raise ValueError(
            "the adapter is a DoRA, which is not converted: diffusers drops its magnitudes when it reads a kohya file; "
            "use the file in the diffusers layout"
        )
    if text := [key for key in tensors if key.startswith(_TEXT)]:
        raise ValueError(
            f"{len(text)} tensors belong to text encoders ({text[0]}, ...), which are not converted: "
            "diffalign adapts denoisers only; load the file with diffusers"
        )
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        suffix = next((suffix for suffix in _SUFFIXES if key.endswith(suffix)), None)
        if suffix is None or not key.startswith(_PREFIXES):
            raise ValueError(f"key {key!r} is not understood; expected the LoRA matrices of a denoiser")
        layers.setdefault(key.removesuffix(suffix), {})[_SUFFIXES[suffix]] = tensor
    for layer, parts in layers.items():
        if not {"down", "up"} <= set(parts):
            raise ValueError(f"layer {layer!r} has only {', '.join(sorted(parts))}; expected both matrices of a LoRA")
    if not layers:
        raise ValueError("the file holds no tensors; expected the LoRA matrices of a denoiser")
    return layers


def _configured_alpha(config: Mapping[str, Any], prefix: str, name: str, rank: int) -> float:
    """A layer's alpha by peft's configuration; for rank-stabilised LoRA the one that scales alike without it."""
    patterns = config.get(f"{prefix}alpha_pattern") or {}
    alpha = next(
        (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)),
        config.get(f"{prefix}lora_alpha", rank),
    )
    return float(alpha * rank**0.5 if config.get(f"{prefix}use_rslora") else alpha)


def _split(adapter: Adapter, names: list[str]) -> Adapters:
    """The adapters of a fused layer's parts.

    Where the matrices were stacked from one adapter per part, these come back, and a part that is all zero had none.
    Otherwise all parts have the first matrix and their own rows of the second one.
    """
    if len(names) == 1:
        return {names[0]: adapter}
    rows = [MLP_RATIO if name.endswith("proj_mlp") else 1 for name in names]
    unit = len(adapter.up) // sum(rows)
    ups = torch.split(adapter.up, [unit * share for share in rows])
    rank, rest = divmod(adapter.rank, len(names))
    if rest or any(_outside(up, place * rank, rank).any() for place, up in enumerate(ups)):
        return {
            name: Adapter(adapter.down.clone(), up.contiguous(), adapter.alpha)
            for name, up in zip(names, ups, strict=True)
        }
    adapters: Adapters = {}
    for place, (name, up) in enumerate(zip(names, ups, strict=True)):
        own = slice(place * rank, (place + 1) * rank)
        down, up = adapter.down[own], up[:, own]
        used = down.flatten(1).any(1) | up.any(0)  # narrower adapters were padded with zeros
        if used.any():
            down, up = down[used].contiguous(), up[:, used].contiguous()
            adapters[name] = Adapter(down, up, adapter.scale * len(down))
    return adapters


def _outside(up: Tensor, start: int, length: int) -> Tensor:
    return torch.cat([up[:, :start], up[:, start + length :]], dim=1)


# --- writing ---------------------------------------------------------------------------------------------------------


def write_adapters(
    adapters: Adapters, layout: Layout, family: Family | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a LoRA file.

    Args:
        adapters: As `read_adapters` gives them.
        layout: See the module's description.
        family: Of the model; not needed for the diffusers layout.

    Returns:
        The tensors by their keys, and the file's metadata.

    Raises:
        ValueError: If a layer has no name in this layout.
    """
    if layout == "diffusers":
        return _diffusers(adapters)
    if family is None:
        raise ValueError(f"the {layout} layout depends on the model; give its family")
    prefix = "transformer." if family == "flux" else "unet."
    if wrong := [name for name in adapters if not name.startswith(prefix)]:
        raise ValueError(f"layer {wrong[0]!r} is none of the family {family}, whose layers start with {prefix!r}")
    named = {name.removeprefix(prefix): adapter for name, adapter in adapters.items()}
    if family == "flux":
        named = _fuse(named)
    elif layout == "comfyui":
        named = {original_unet(name, family): adapter for name, adapter in named.items()}
    else:
        original = {name: original_unet(name, family) for name in named} if family != "sd" else {}
        named = {original.get(name, name): adapter for name, adapter in _with_one_alpha(named).items()}
    spell: Callable[[str], str] = underscored if layout == "kohya" else str
    start = "lora_unet_" if layout == "kohya" else "diffusion_model."
    tensors: dict[str, Tensor] = {}
    for name, adapter in named.items():
        key = start + spell(name)
        tensors[f"{key}.lora_down.weight"] = adapter.down
        tensors[f"{key}.lora_up.weight"] = adapter.up
        tensors[f"{key}.alpha"] = torch.tensor(adapter.alpha, dtype=torch.float32)
    return tensors, {}


def _diffusers(adapters: Adapters) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As runs write it: with peft's suffixes; UNets with adapters on attentions alone have diffusers' older ones.

    The older suffixes exist for attentions alone, and diffusers fails on files in which both occur.
    """
    from diffusers.utils import convert_state_dict_to_diffusers

    tensors: dict[str, Tensor] = {}
    for name, adapter in adapters.items():
        tensors |= {f"{name}.lora_A.weight": adapter.down, f"{name}.lora_B.weight": adapter.up}
    prefix = "unet" if next(iter(adapters)).startswith("unet.") else "transformer"
    if prefix == "unet":
        older = convert_state_dict_to_diffusers(tensors)
        tensors = tensors if any("lora_A" in key for key in older) else older
    layers = {name.removeprefix(f"{prefix}."): adapter for name, adapter in adapters.items()}
    rank = _most_common(adapter.rank for adapter in layers.values())
    alpha = _most_common(_number(adapter.alpha) for adapter in layers.values())
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(n)}": a.rank for n, a in layers.items() if a.rank != rank},
        "alpha_pattern": {f"^{re.escape(n)}": _number(a.alpha) for n, a in layers.items() if a.alpha != alpha},
        "target_modules": sorted(layers),
    }
    packed = {f"{prefix}.{key}": value for key, value in config.items()}
    return tensors, {METADATA: json.dumps(packed, indent=2, sort_keys=True)}


def _with_one_alpha(adapters: Adapters) -> Adapters:
    """The same products with one alpha, the most common one; nothing changes where there is one already.

    diffusers reads different alphas of one kohya file wrongly: it spells attention layers differently in the matrices
    and in the alphas, and gives all of them the most common one.
    """
    alpha = _most_common(adapter.alpha for adapter in adapters.values())
    return {
        name: adapter if adapter.alpha == alpha else Adapter(adapter.down, adapter.up * (adapter.alpha / alpha), alpha)
        for name, adapter in adapters.items()
    }


def _fuse(adapters: Adapters) -> Adapters:
    """FLUX.1 adapters by their original layers: block-diagonal where one layer holds several of them."""
    groups: dict[str, dict[int, Adapter]] = {}
    for name, adapter in adapters.items():
        layer, place = original_flux(name)
        groups.setdefault(layer, {})[place] = adapter
    fused: Adapters = {}
    for layer, parts in groups.items():
        names = diffusers_flux(layer)
        if len(names) == 1:
            fused[layer] = parts[0]
            continue
        rows = [MLP_RATIO if name.endswith("proj_mlp") else 1 for name in names]
        place, one = next(iter(parts.items()))
        unit, rank = len(one.up) // rows[place], max(part.rank for part in parts.values())
        down = one.down.new_zeros(rank * len(rows), one.down.shape[1])
        up = one.up.new_zeros(unit * sum(rows), rank * len(rows))
        scale = _most_common(part.scale for part in parts.values())
        for place, part in parts.items():
            first, row = rank * place, unit * sum(rows[:place])
            down[first : first + part.rank] = part.down
            ours = part.up if part.scale == scale else part.up * (part.scale / scale)
            up[row : row + len(part.up), first : first + part.rank] = ours
        fused[layer] = Adapter(down, up, scale * len(down))
    return fused


def _most_common(values: Any) -> Any:
    return Counter(values).most_common(1)[0][0]


def _number(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha

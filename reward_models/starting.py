"""Where the training of a reward model starts: its own published layout, or that of the model it was made from.

A base model becomes a scorer by new parts (a head, a cross model, people). These are drawn from the run's seed and
written, with the base's weights, in the scorer's own layout to `<output_dir>/start`, which is then loaded as any other
weights are: completely or not at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffalign.processes import Processes
from diffalign.reward_config import ScorerConfig
from diffalign.reward_models import load_reward_model, reward_model_class
from diffalign.reward_models.base import RewardInfo, RewardModel, WeightsError, WeightSpec
from diffalign.reward_models.blip import read_text_config
from diffalign.reward_models.checkpoints import find_file, read_shards, read_tensors
from diffalign.reward_models.clip_towers import DualEncoder
from diffalign.reward_models.hpsv2 import HPSv2
from diffalign.reward_models.hpsv3 import BASE, HPSv3
from diffalign.reward_models.hpsv3 import head as hpsv3_head
from diffalign.reward_models.image_reward import ImageReward
from diffalign.reward_models.mps import MPS
from diffalign.reward_models.mps_network import CrossConfig, CrossModel
from diffalign.reward_models.pal import PAL
from diffalign.reward_models.pal_heads import PALConfig, PALHead
from diffalign.reward_models.qwen_heads import published_name
from diffalign.reward_models.trainable import (
    Trainable,
    TrainableBLIP,
    TrainableCLIP,
    TrainableMPS,
    TrainablePAL,
)
from diffalign.reward_models.trainable_hpsv3 import TrainableHPSv3
from diffalign.reward_models.weights import CLIP_H, TOKENIZER_FILES, folder_with, load_clip, load_tokenizer

__all__ = ["UNTRAINED", "start_training"]

UNTRAINED = "diffalign://shapes/untrained"
"""Name of the embedded world's scorer with random weights."""

HPS_OLDER = "HPS_v2_compressed.pt"
"""File of version 2.0; that of 2.1 is in the class's `info`."""
OPEN_CLIP = WeightSpec(CLIP_H, "open_clip_pytorch_model.bin", "torch")
BLIP_LARGE = WeightSpec("", "model_large.pth", "torch", url="https://github.com/salesforce/BLIP")
_BLIP_PARTS = ("visual_encoder.", "text_encoder.")

Builder = Callable[[RewardInfo, ScorerConfig, dict[str, Any], list[str], Path, torch.Generator], None]


def start_training(
    config: ScorerConfig,
    folder: Path,
    *,
    people: Sequence[str] = (),
    seed: int = 0,
    device: str | torch.device = "cpu",
    processes: Processes | None = None,
) -> Trainable:
    """The reward model of a configuration, thawed as it says.

    Args:
        config: The section `reward`.
        folder: Where a base model is written as a scorer, if it has to be.
        people: Names of those who decided, for a new head of `pal`.
        seed: Of new parts.
        device: Where it is trained.
        processes: Who shares `folder`; the first one writes.

    Raises:
        ValueError: If that reward model cannot be trained, or an option is unknown.
        WeightsError: If weights are missing, damaged, or of another model.
    """
    model_class = reward_model_class(config.name)
    found = next((row for row in _TRAINABLE if issubclass(model_class, row[0])), None)
    if found is None:
        raise ValueError(f"reward model {config.name!r} cannot be trained; expected one on CLIP, BLIP or Qwen2-VL")
    _, trainable_class, builder = found
    options = dict(config.options)
    if isinstance(options.get("cross_config"), Mapping):
        options["cross_config"] = CrossConfig(**options["cross_config"])
    if config.start == UNTRAINED:
        builder = _untrained_shapes
    path: str | Path = config.start
    if builder is not None and not _is_published(model_class.info, config.start):
        build, chance = builder, torch.Generator().manual_seed(seed)
        (processes or Processes()).on_first(
            lambda: build(model_class.info, config, options, list(people), folder, chance)
        )
        path = folder
        if folder_with(folder, (*TOKENIZER_FILES, "vocab.txt")) is not None:
            options.pop("processor", None)
            options.pop("tokenizer", None)
            if issubclass(model_class, HPSv3):  # which does not look beside its weights
                options["tokenizer"] = folder
    trainable = trainable_class(load_reward_model(config.name, path=path, device=device, **options))
    trainable.requires_grad_(False)
    trainable.thaw(config.image_groups, config.text_groups)
    return trainable


def _is_published(info: RewardInfo, start: str) -> bool:
    """Whether it is a scorer's own file, a folder with one, or its own Hub id, rather than what it is made from."""
    names = {spec.filename for spec in info.weights} | ({HPS_OLDER} if info.name.startswith("hpsv2") else set())
    path = Path(start).expanduser()
    if path.is_dir():
        inside = {file.name for file in path.iterdir()}
        # A folder with a configuration is a model of transformers, whose file has the name that others' own file has.
        return bool(names & (inside - ({"model.safetensors"} if "config.json" in inside else set())))
    return path.name in names if path.is_file() else start in {spec.repo for spec in info.weights} - {CLIP_H, ""}


def _untrained_shapes(
    info: RewardInfo, config: ScorerConfig, options: dict[str, Any], people: list[str], folder: Path, chance: Any
) -> None:
    from diffalign.shapes.networks import build_scorer, build_tokenizer

    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(chance.initial_seed())
        scorer = build_scorer(tokenizer)
    scorer.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _hpsv2_from_clip(
    info: RewardInfo, config: ScorerConfig, options: dict[str, Any], people: list[str], folder: Path, chance: Any
) -> None:
    """open_clip's own file of the pretrained CLIP, under the key that HPSv2's has."""
    state = read_tensors(info, find_file(info, config.start, OPEN_CLIP))
    folder.mkdir(parents=True, exist_ok=True)
    older = config.name.lower() == "hpsv2.0" or options.get("version") == "2.0"
    torch.save({"state_dict": state}, folder / (HPS_OLDER if older else info.weights[0].filename))


def _image_reward_from_blip(
    info: RewardInfo, config: ScorerConfig, options: dict[str, Any], people: list[str], folder: Path, chance: Any
) -> None:
    """BLIP's towers and a new head, N(0, 1 / (768 + 1)) with zero biases as ImageReward starts it.

    Beside the file must be a med_config.json. The names of BLIP's file are not confirmed here: its tensors are
    expected under "model", those of momentum copies, queues and the decoder are left out.
    """
    path = find_file(info, config.start, BLIP_LARGE)
    state = read_tensors(info, path, "model")
    text = read_text_config(info, path.parent / "med_config.json")
    named = {f"blip.{name}": value for name, value in state.items() if name.startswith(_BLIP_PARTS)}
    widths = [int(text["hidden_size"]), 1024, 128, 64, 16, 1]
    deviation = (widths[0] + 1) ** -0.5
    for place, (inner, outer) in zip((0, 2, 4, 6, 7), itertools.pairwise(widths), strict=True):
        named[f"mlp.layers.{place}.weight"] = torch.randn(outer, inner, generator=chance) * deviation
        named[f"mlp.layers.{place}.bias"] = torch.zeros(outer)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(named, folder / info.weights[0].filename)
    (folder / "med_config.json").write_bytes((path.parent / "med_config.json").read_bytes())
    for name in ("vocab.txt", "tokenizer.json"):
        if (path.parent / name).is_file():
            (folder / name).write_bytes((path.parent / name).read_bytes())


def _mps_from_clip(
    info: RewardInfo, config: ScorerConfig, options: dict[str, Any], people: list[str], folder: Path, chance: Any
) -> None:
    """A CLIPModel with a cross model whose weights are torch's own random ones; the original's are not confirmed."""
    clip = load_clip(info, config.start)
    cross = CrossModel(options.get("cross_config") or CrossConfig())
    _draw_linear(cross, chance)
    state = {f"model.{name}": value for name, value in clip.state_dict().items()}
    state |= {f"cross_model.{name}": value for name, value in cross.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
    words = load_tokenizer(info, options.get("processor", config.start), clip.config.text_config)
    words.save_pretrained(folder)


def _pal_from_clip(
    info: RewardInfo, config: ScorerConfig, options: dict[str, Any], people: list[str], folder: Path, chance: Any
) -> None:
    """A new head for these people beside the CLIP whose embeddings it reads."""
    if not people:
        raise ValueError("pal needs people: name the column with who decided in data.person_column")
    clip = load_clip(info, config.start)
    width = int(clip.config.projection_dim)
    shape: dict[str, Any] = {"in_dim": width, "out_dim": width, **config.head}
    try:
        head = PALHead(PALConfig(users=tuple(people), **shape))
    except TypeError as error:
        raise ValueError(f"reward.head: {error}; see pal_heads.PALConfig") from error
    _draw_linear(head, chance)
    with torch.no_grad():
        # Equal weights would give every prototype the same gradient, and none could become another's.
        head.user_logits.copy_(0.1 * torch.randn(head.user_logits.shape, generator=chance))
        if hasattr(head, "prototypes"):
            head.prototypes.copy_(torch.randn(head.prototypes.shape, generator=chance) * width**-0.5)
    folder.mkdir(parents=True, exist_ok=True)
    head.save(folder / "pal.safetensors")
    clip.save_pretrained(folder)
    words = load_tokenizer(info, options.get("processor", config.start), clip.config.text_config)
    words.save_pretrained(folder)


def _hpsv3_from_qwen(
    info: RewardInfo, config: ScorerConfig, options: dict[str, Any], people: list[str], folder: Path, chance: Any
) -> None:
    """Qwen2-VL, its embeddings cut or filled to the tokenizer's length with the reward token, and a new head."""
    from transformers import Qwen2Tokenizer

    state = read_shards(info, config.start, BASE)
    named = {n: value for name, value in state.items() if (n := published_name(name)) is not None}
    table = "model.language_model.embed_tokens.weight"
    if table not in named:
        raise WeightsError(f"{config.start!r} holds no Qwen2-VL: no {table!r} among {len(named)} tensors")
    words = Qwen2Tokenizer.from_pretrained(options.get("tokenizer", config.start))
    embeddings = named[table].float()
    known = min(len(words), len(embeddings))
    mean, deviation = embeddings[:known].mean(0), embeddings[:known].std(0)
    new = mean + deviation * torch.randn(1, embeddings.shape[1], generator=chance)
    named[table] = torch.cat([embeddings[: len(words)], new]).to(named[table].dtype)
    top = hpsv3_head(embeddings.shape[1])
    _draw_linear(top, chance)
    named |= {f"rm_head.{name}": value for name, value in top.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in named.items()}, folder / info.weights[0].filename)
    words.save_pretrained(folder)


_TRAINABLE: tuple[tuple[type[RewardModel], Callable[[Any], Trainable], Builder | None], ...] = (
    (PAL, TrainablePAL, _pal_from_clip),  # before two towers, of which it is a kind
    (HPSv2, TrainableCLIP, _hpsv2_from_clip),
    (DualEncoder, TrainableCLIP, None),  # which are published as the CLIPModel that they start from
    (MPS, TrainableMPS, _mps_from_clip),
    (ImageReward, TrainableBLIP, _image_reward_from_blip),
    (HPSv3, TrainableHPSv3, _hpsv3_from_qwen),
)
"""Kinds of reward models, what trains them, and what makes one of its base model."""


@torch.no_grad()
def _draw_linear(module: nn.Module, chance: torch.Generator) -> None:
    """The initial law that torch has for linear layers, uniform within 1 / sqrt(inputs), from one generator."""

    def draw(tensor: Tensor, bound: float) -> None:
        tensor.copy_((2 * torch.rand(tensor.shape, generator=chance) - 1) * bound)

    for part in module.modules():
        if isinstance(part, nn.Linear):
            bound = part.in_features**-0.5
            draw(part.weight, bound)
            if part.bias is not None:
                draw(part.bias, bound)

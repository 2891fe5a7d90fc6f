"""Reward models as something to train: rewards of two pictures of a prompt with a graph to the weights.

`load_reward_model` gives frozen scorers. A `Trainable` is one of them with some weights thawed, in the form that the
loop trains: tensors in, rewards out, and saved in the layout that the scorer is published in, so that
`load_reward_model(name, path=...)` reads what was trained.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from diffalign.data.compared import Comparison
from diffalign.reward_models.base import RewardModel
from diffalign.reward_models.blip import TEXT_KEYS, own_to_published
from diffalign.reward_models.clip_towers import DualEncoder, HFTowers, unit
from diffalign.reward_models.hpsv2 import HPSv2
from diffalign.reward_models.image_reward import ImageReward
from diffalign.reward_models.mps import MPS
from diffalign.reward_models.pal import PAL
from diffalign.reward_models.shapes import ShapesScore

__all__ = [
    "TrainableBLIP",
    "TrainableCLIP",
    "TrainableMPS",
    "TrainablePAL",
    "Trainable",
    "TrainingDropout",
    "halves",
    "thaw",
]

Tensors = dict[str, Tensor]


class Trainable(nn.Module, ABC):
    """A reward model with weights to train.

    Attributes:
        model: The scorer; its module stays in evaluation mode.
    """

    model: RewardModel

    def __init__(self, model: RewardModel) -> None:
        super().__init__()
        self.model = model

    def prepare(self, image: Image.Image) -> Any:
        """What the network reads for an RGB picture, on the CPU; the scorer's own way, which all recipes train with."""
        return self.model.preprocess(image)

    def collate(self, first: Sequence[Any], second: Sequence[Any]) -> tuple[Tensor, Tensor, Tensors]:
        """Prepared pictures of B comparisons as two tensors, and what else describes them, [B, ...] each."""
        return torch.stack(list(first)), torch.stack(list(second)), {}

    @abstractmethod
    def read_texts(self, comparisons: Sequence[Comparison]) -> Tensors:
        """What the network reads for the prompts of B comparisons, [B, ...] each, on the CPU."""

    @abstractmethod
    def forward(self, first: Tensor, second: Tensor, texts: Mapping[str, Tensor]) -> Tensors:
        """`rewards` [2, B] of both pictures of B comparisons, in float32 at least, on the scale that losses expect.

        Perhaps more: `log_deviations` [2, B]; or `images` [2, B, D], `texts` [B, D], unit embeddings, and `scale`.
        """

    @abstractmethod
    def thaw(self, image_groups: int | None, text_groups: int | None) -> None:
        """Lets the last groups of the towers be trained, and what lies behind them; see `thaw`."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the scorer as it is published."""

    def clamp(self, largest: float) -> None:
        """Keeps exp(logit_scale) in [1, `largest`], for models that have one."""
        for name, parameter in self.named_parameters():
            if name.endswith("logit_scale"):
                with torch.no_grad():
                    parameter.clamp_(0.0, float(torch.tensor(largest).log()))

    def _state(self, prefix: str) -> Tensors:
        """Tensors below `prefix` by the rest of their names; by way of `state_dict`, which shows averages if asked."""
        state = self.state_dict()
        return {n.removeprefix(prefix): v.detach().cpu().contiguous() for n, v in state.items() if n.startswith(prefix)}


class TrainableCLIP(Trainable):
    """Scorers that are a function of two towers' cosine; the reward is exp(logit_scale) times it, for HPSv2 too."""

    model: DualEncoder

    def read_texts(self, comparisons: Sequence[Comparison]) -> Tensors:
        """Token ids, [B, L]."""
        return {"ids": _token_ids(self.model, comparisons)}

    def forward(self, first: Tensor, second: Tensor, texts: Mapping[str, Tensor]) -> Tensors:
        """See `Trainable`."""
        towers = self.model.towers
        images = halves(unit(towers.encode_images(torch.cat([first, second]))))
        words = unit(towers.encode_ids(texts["ids"]))
        scale = towers.get_parameter("model.logit_scale").exp()
        return {"rewards": scale * (images * words).sum(-1), "images": images, "texts": words, "scale": scale}

    def thaw(self, image_groups: int | None, text_groups: int | None) -> None:
        """See `Trainable`; the scale is always trained."""
        towers = self.model.towers
        text = {id(weight) for weight in towers.text_weights()}
        named = [(n, p) for n, p in towers.named_parameters() if not n.endswith("logit_scale")]
        thaw([(n, p) for n, p in named if id(p) in text], text_groups)
        thaw([(n, p) for n, p in named if id(p) not in text], image_groups)
        towers.get_parameter("model.logit_scale").requires_grad_(True)

    def save(self, folder: Path) -> None:
        """A folder of transformers with the tokenizer, or the file of HPSv2."""
        folder.mkdir(parents=True, exist_ok=True)
        state = self._state("model.towers.model.")
        towers = self.model.towers
        if isinstance(self.model, HPSv2):
            torch.save({"state_dict": state}, folder / self.model.info.weights[0].filename)
            return
        assert isinstance(towers, HFTowers)
        towers.model.save_pretrained(folder, state_dict=state)
        towers.tokenizer.save_pretrained(folder)
        if isinstance(self.model, ShapesScore):
            statistics = {"image_mean": self.model.mean, "image_std": self.model.std}
            _write_json(folder / "preprocessor_config.json", statistics)


class TrainableMPS(Trainable):
    """MPS, each comparison under its own condition; which words are visible is decided without a gradient."""

    model: MPS

    def read_texts(self, comparisons: Sequence[Comparison]) -> Tensors:
        """Token ids of prompts [B, L] and of their conditions [B, L], and the conditions' numbers [B]."""
        names = list(self.model.conditions)
        asked = [names[-1] if item.condition is None else item.condition for item in comparisons]
        for name in asked:
            if name not in names:
                raise ValueError(f"a comparison is under the condition {name!r}; the model has {', '.join(names)}")
        conditions = self.model.towers.token_ids([self.model.conditions[name] for name in asked])
        return {"ids": _token_ids(self.model, comparisons), "conditions": conditions.cpu()}

    def forward(self, first: Tensor, second: Tensor, texts: Mapping[str, Tensor]) -> Tensors:
        """See `Trainable`."""
        clip = self.model.towers.model
        words, pooled = self._read(texts["ids"])
        with torch.no_grad():
            conditions, _ = self._read(texts["conditions"])
            wide = torch.promote_types(words.dtype, torch.float32)
            matches = torch.einsum("bld,bkd->blk", words.to(wide), conditions.to(wide)).amax(-1)
            visible = self.model.visible(matches[:, None])[:, 0]
        hidden = clip.vision_model(pixel_values=torch.cat([first, second])).last_hidden_state
        tokens = clip.visual_projection(hidden)
        looked = self.model.cross_model(tokens, words.repeat(2, 1, 1), visible.repeat(2, 1))[:, 0]
        cosine = (halves(unit(looked)) * unit(pooled)).sum(-1)
        return {"rewards": clip.logit_scale.exp() * cosine}

    def _read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Projected states [B, L, D] of all tokens and [B, D] of the end-of-text token."""
        clip = self.model.towers.model
        hidden = clip.text_model(input_ids=ids)
        return clip.text_projection(hidden.last_hidden_state), clip.text_projection(hidden.pooler_output)

    def thaw(self, image_groups: int | None, text_groups: int | None) -> None:
        """See `Trainable`; the cross model and the scale are always trained, the unused last image norm never."""
        towers = self.model.towers
        text = {id(weight) for weight in towers.text_weights()}
        named = [(n, p) for n, p in towers.named_parameters() if not n.endswith(("logit_scale", "post_layernorm.weight",
                                                                                "post_layernorm.bias"))]  # fmt: skip
        thaw([(n, p) for n, p in named if id(p) in text], text_groups)
        thaw([(n, p) for n, p in named if id(p) not in text], image_groups)
        towers.model.logit_scale.requires_grad_(True)
        self.model.cross_model.requires_grad_(True)

    def save(self, folder: Path) -> None:
        """`model.safetensors` with the names of the ports, and the tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        clip, cross = self._state("model.towers.model."), self._state("model.cross_model.")
        names = {f"model.{n}": v for n, v in clip.items()} | {f"cross_model.{n}": v for n, v in cross.items()}
        save_file(names, folder / "model.safetensors")
        self.model.towers.tokenizer.save_pretrained(folder)


class TrainingDropout(nn.Module):
    """Active whenever a gradient is computed: the scorer around it never leaves evaluation mode."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return F.dropout(x, self.rate, training=torch.is_grad_enabled())


class TrainableBLIP(Trainable):
    """ImageReward and its relatives; the reward is the raw one, before mean and deviation.

    The head's dropout (0.2, 0.2, 0.1) is active in training, that of the text encoder is not, as transformers'
    evaluation mode has it; whether the original's was is not confirmed here.
    """

    model: ImageReward

    def __init__(self, model: ImageReward) -> None:
        super().__init__(model)
        for place, rate in zip((1, 3, 5), (0.2, 0.2, 0.1), strict=True):
            model.mlp[place] = TrainingDropout(rate)

    def read_texts(self, comparisons: Sequence[Comparison]) -> Tensors:
        """Token ids and mask, [B, 2, 35]."""
        return {"ids": torch.as_tensor(self.model.encode_text([item.prompt for item in comparisons], 1))}

    def forward(self, first: Tensor, second: Tensor, texts: Mapping[str, Tensor]) -> Tensors:
        """See `Trainable`."""
        ids, mask = texts["ids"].repeat(2, 1, 1).unbind(1)
        states = self.model.towers(torch.cat([first, second]), ids, mask)
        # In full precision, as `score_pixels` computes it, whatever the towers run in.
        with torch.autocast(states.device.type, enabled=False):
            wide = states.to(torch.promote_types(states.dtype, torch.float32))
            return {"rewards": halves(self.model.mlp(wide).squeeze(-1))}

    def thaw(self, image_groups: int | None, text_groups: int | None) -> None:
        """See `Trainable`; the head is always trained. There are no projections, so groups are blocks."""
        thaw(list(self.model.towers.text.named_parameters()), text_groups)
        thaw(list(self.model.towers.vision.named_parameters()), image_groups)
        self.model.mlp.requires_grad_(True)

    def save(self, folder: Path) -> None:
        """ImageReward.pt (VPScore.pt), med_config.json and the tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        own = {n: v for n, v in self._state("model.").items() if n.startswith(("towers.", "mlp."))}
        state = {own_to_published(name): value for name, value in own.items()}
        torch.save(state, folder / self.model.info.weights[0].filename)
        config = self.model.towers.text.config
        _write_json(folder / "med_config.json", {key: getattr(config, key) for key in TEXT_KEYS})
        self.model.tokenizer.save_pretrained(folder)


class TrainablePAL(Trainable):
    """PAL's head and its people's weights, on a CLIP that stays as it is."""

    model: PAL

    def read_texts(self, comparisons: Sequence[Comparison]) -> Tensors:
        """Token ids [B, L] and the numbers of the persons [B]."""
        users = {name: number for number, name in enumerate(self.model.head.config.users)}
        for item in comparisons:
            if item.person not in users:
                raise ValueError(f"comparison {item.pair_id!r} is by {item.person!r}, who is none of the model's users")
        persons = torch.tensor([users[str(item.person)] for item in comparisons])
        return {"ids": _token_ids(self.model, comparisons), "persons": persons}

    def forward(self, first: Tensor, second: Tensor, texts: Mapping[str, Tensor]) -> Tensors:
        """See `Trainable`."""
        with torch.no_grad():
            images = unit(self.model.towers.encode_images(torch.cat([first, second])))
            words = unit(self.model.towers.encode_ids(texts["ids"]))
        head = self.model.head
        weights = head.user_logits[texts["persons"]].softmax(-1)
        rewards = head(images, words.repeat(2, 1), weights.repeat(2, 1))
        return {"rewards": halves(rewards)}

    def thaw(self, image_groups: int | None, text_groups: int | None) -> None:
        """The head and the people's weights; an exponent that distances do not use is left out."""
        self.model.head.requires_grad_(True)
        self.model.head.logit_scale.requires_grad_(self.model.head.config.preference == "angle")

    def clamp(self, largest: float) -> None:
        """The head limits its scale to 100 by itself."""

    def save(self, folder: Path) -> None:
        """pal.safetensors, beside the CLIP that it belongs to."""
        folder.mkdir(parents=True, exist_ok=True)
        self.model.head.save(folder / "pal.safetensors")
        towers = self.model.towers
        assert isinstance(towers, HFTowers)
        towers.model.save_pretrained(folder)
        towers.tokenizer.save_pretrained(folder)


_BLOCK = re.compile(r"(?:^|\.)(?:layers?|resblocks|blocks)\.(\d+)\.")
_PROJECTIONS = re.compile(r"(?:^|\.)(?:visual_projection\.weight|text_projection(\.weight)?|visual\.proj|merger\..*)$")
_LAST_NORMS = re.compile(r"(?:^|\.)(?:post_layernorm|ln_post|final_layer_norm|ln_final|norm)\.(?:weight|bias)$")


def thaw(named: Iterable[tuple[str, nn.Parameter]], groups: int | None) -> None:
    """Lets the last groups of a tower be trained; None is all of them.

    Groups are counted from the output as open_clip's `lock` counts them: the projection, if there is one; the last
    block with the norm behind it; every other block; the embeddings with all that comes before the first block.
    """
    named = list(named)
    blocks = [int(found[1]) for name, _ in named if (found := _BLOCK.search(name))]
    last = max(blocks, default=-1) + 1

    def depth(name: str) -> int:
        if found := _BLOCK.search(name):
            return int(found[1]) + 1
        return last + 1 if _PROJECTIONS.search(name) else last if _LAST_NORMS.search(name) else 0

    depths = [depth(name) for name, _ in named]
    top = max(depths, default=0)
    for (_, parameter), own in zip(named, depths, strict=True):
        parameter.requires_grad_(groups is None or top - own < groups)


def halves(both: Tensor) -> Tensor:
    """Rows of the first pictures, then of the second ones, [2B, ...], as [2, B, ...]."""
    return torch.stack(both.chunk(2))


def _token_ids(model: Any, comparisons: Sequence[Comparison]) -> Tensor:
    prompts = [item.prompt for item in comparisons]
    wrapped = [model.wrap_prompt(prompt) for prompt in prompts] if isinstance(model, DualEncoder) else prompts
    ids: Tensor = model.towers.token_ids(wrapped)
    return ids.cpu()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

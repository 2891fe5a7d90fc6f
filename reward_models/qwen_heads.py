"""What scorers on Qwen2-VL share: the way of pixels and prompts into it, its decoder read at marked tokens, its files.

The originals (HPSv3, VideoReward) put the vision tower's output among the token embeddings themselves and call the
decoder without position ids, which then counts 0, 1, 2, ... on all three rotary axes. So they were trained, and so they
are called here: the multimodal positions of a normal forward of Qwen2-VL give other, wrong scores.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLModel

from diffalign.devices import resolve_device
from diffalign.reward_models.base import RewardInfo, RewardModel, WeightsError
from diffalign.reward_models.checkpoints import load_complete
from diffalign.reward_models.clip_towers import CLIP_MEAN, CLIP_STD, normalise
from diffalign.reward_models.media import InvalidMediaError
from diffalign.reward_models.published_texts import PublishedText, read_text
from diffalign.reward_models.weights import folder_with, read_tokenizer

__all__ = [
    "MarkedText",
    "QwenReward",
    "QwenScorer",
    "VisionTokens",
    "empty",
    "load_scorer",
    "load_template",
    "load_tokenizer",
    "pad_rows",
    "patchify",
    "published_name",
    "smart_resize",
    "splice",
]

M = TypeVar("M", bound=nn.Module)

PATCH = 14
CELL = 2 * PATCH
"""Pixels per side of what becomes one token: two by two patches are merged."""
_MAX_ASPECT = 200

_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
_BEFORE = _SYSTEM + "<|im_start|>user\n<|vision_start|>"
_BEHIND = "<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
"""Qwen2-VL's chat template with its default system turn, and the answer's header."""

_SHARED_CONFIG: dict[str, Any] = {"num_hidden_layers": 28, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768}
_ROPE = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]}
_VISION: dict[str, Any] = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16}
QWEN2_VL_7B: dict[str, Any] = {
    "text_config": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
        "rope_parameters": _ROPE, **_SHARED_CONFIG,
    },
    "vision_config": {"hidden_size": 3584, **_VISION},
}  # fmt: skip
QWEN2_VL_2B: dict[str, Any] = {
    "text_config": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2,
        "rope_parameters": _ROPE, **_SHARED_CONFIG,
    },
    "vision_config": {"hidden_size": 1536, **_VISION},
}  # fmt: skip


def smart_resize(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width to which Qwen2-VL resizes: multiples of 28, of about the same ratio, of an area within limits.

    A picture that must grow may end a little above `max_pixels`: its sides are then rounded up.

    Raises:
        InvalidMediaError: If one side is more than 200 times the other.
    """
    if max(height, width) > _MAX_ASPECT * min(height, width):
        raise InvalidMediaError(f"expected sides of a ratio up to {_MAX_ASPECT}:1, got {width}x{height}")
    # Python's round: halves go to the even number, as in the original.
    new_height, new_width = (max(CELL, CELL * round(side / CELL)) for side in (height, width))
    if new_height * new_width > max_pixels:
        factor = math.sqrt(height * width / max_pixels)
        new_height, new_width = (max(CELL, CELL * math.floor(side / factor / CELL)) for side in (height, width))
    elif new_height * new_width < min_pixels:
        factor = math.sqrt(min_pixels / (height * width))
        new_height, new_width = (CELL * math.ceil(side * factor / CELL) for side in (height, width))
    return new_height, new_width


@dataclass(frozen=True)
class VisionTokens:
    """A preprocessed picture or clip.

    Attributes:
        patches: Normalised pixels [t * h * w, 1176], two frames to a patch; the four patches of a token are neighbours.
        grid: (t, h, w): pairs of frames, and patches per column and row.
    """

    patches: Tensor
    grid: tuple[int, int, int]

    @property
    def count(self) -> int:
        """How many tokens they become."""
        t, h, w = self.grid
        return t * h * w // 4


def patchify(frames: Tensor) -> VisionTokens:
    """Patches of RGB frames [T, 3, H, W] in [0, 1], with even T and H, W multiples of 28; differentiable."""
    pixels = normalise(frames, CLIP_MEAN, CLIP_STD)
    time, channels, height, width = pixels.shape
    blocks = pixels.reshape(time // 2, 2, channels, height // CELL, 2, PATCH, width // CELL, 2, PATCH)
    rows = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, channels * 2 * PATCH * PATCH)
    return VisionTokens(rows, (time // 2, height // PATCH, width // PATCH))


@dataclass(frozen=True)
class MarkedText:
    """What follows the vision tokens of a prompt.

    Attributes:
        ids: Token ids.
        marks: Where among them the reward tokens are, one place per reward token.
    """

    ids: tuple[int, ...]
    marks: tuple[int, ...]


class QwenScorer(nn.Module):
    """Qwen2-VL without its language-model head, and a head of the reward model; names as in newer published files."""

    def __init__(self, config: Qwen2VLConfig, rm_head: nn.Module):
        super().__init__()
        self.model = Qwen2VLModel(config)
        self.rm_head = rm_head


class QwenReward(RewardModel):
    """A reward model that reads Qwen2-VL's decoder at added tokens of its instruction.

    Subclasses load the files, say how media get in, and turn the outputs of the head into scores.
    """

    reward_tokens: tuple[str, ...]
    vision_token: Literal["<|image_pad|>", "<|video_pad|>"]
    placeholder: str

    def __init__(self, scorer: QwenScorer, tokenizer: Qwen2Tokenizer, template: str, device: str | torch.device):
        super().__init__()
        device = resolve_device(device)
        self.scorer = scorer
        self.tokenizer = tokenizer
        self.template = template
        self._before = tuple(tokenizer(_BEFORE, add_special_tokens=False)["input_ids"])
        self._vision_id = tokenizer.convert_tokens_to_ids(self.vision_token)
        # The device only: in half precision the rotary frequencies, which are no weights, would be wrong.
        self.to(device).requires_grad_(False).train(False)

    @abstractmethod
    def preprocess(self, item: Any) -> VisionTokens:
        """See `RewardModel`."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the body; the head is wider."""
        dtype: torch.dtype = self.scorer.model.dtype
        return dtype

    def encode_text(self, prompts: Sequence[str], batch_size: int) -> list[MarkedText]:
        """The instruction with each prompt in its place, as token ids. Long prompts are not cut."""
        return [self._encode(prompt) for prompt in prompts]

    def _encode(self, prompt: str) -> MarkedText:
        text = self.template.replace(self.placeholder, self._harmless(prompt))
        ids = self.tokenizer(_BEHIND.replace("{text}", text), add_special_tokens=False)["input_ids"]
        marks = []
        for token in self.reward_tokens:
            wanted = self.tokenizer.convert_tokens_to_ids(token)
            places = [i for i, found in enumerate(ids) if found == wanted]
            assert len(places) == 1, f"{token} is {len(places)} times in the instruction"
            marks.append(places[0])
        return MarkedText(tuple(ids), tuple(marks))

    def _harmless(self, prompt: str) -> str:
        """The prompt without control tokens: a second reward or vision token would be read as one."""
        for token in self.tokenizer.get_added_vocab():
            prompt = prompt.replace(token, f"{token[0]} {token[1:]}")
        return prompt

    def outputs(self, media: Sequence[VisionTokens], texts: Sequence[MarkedText]) -> Tensor:
        """The head's outputs [B, reward tokens, outputs], float32 at least, with a graph to the patches."""
        model = self.scorer.model
        patches = torch.cat([item.patches.to(self.device) for item in media])
        grid = torch.tensor([item.grid for item in media], device=self.device)
        # Also for clips: the features of pictures and of clips are computed alike.
        features = torch.cat(model.get_image_features(patches, grid).pooler_output)
        rows = [(*self._before, *[self._vision_id] * item.count, *text.ids)
                for item, text in zip(media, texts, strict=True)]  # fmt: skip
        # Padding stands on the right, where a causal decoder never looks.
        ids, mask = pad_rows(rows, self.device)
        embeddings = splice(model.get_input_embeddings()(ids), (ids == self._vision_id) & mask.bool(), features)
        positions = torch.arange(ids.shape[1], device=self.device).expand(3, *ids.shape)
        states = model.language_model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        marks = [
            [len(row) - len(text.ids) + mark for mark in text.marks] for row, text in zip(rows, texts, strict=True)
        ]
        marked = states[torch.arange(len(rows), device=self.device)[:, None], torch.tensor(marks, device=self.device)]
        outputs: Tensor = self.scorer.rm_head(marked.to(next(self.scorer.rm_head.parameters()).dtype))
        return outputs

    def settings(self) -> dict[str, str]:
        """The body's type; the instruction is checked when it is read."""
        return {"dtype": str(self.dtype)}


def pad_rows(rows: Sequence[Sequence[int]], device: torch.device, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids [B, L] and mask [B, L] of rows of unequal lengths; what stands in the gaps does not matter."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids.to(device), mask.to(device)


def splice(embeddings: Tensor, places: Tensor, features: Tensor) -> Tensor:
    """Embeddings [B, L, D] with features [N, D] in the N marked places [B, L], in order; differentiable."""
    return embeddings.masked_scatter(places[..., None].expand_as(embeddings), features.to(embeddings.dtype))


def load_scorer(
    info: RewardInfo,
    state: Mapping[str, Tensor],
    source: str | Path,
    config: Mapping[str, Any],
    head: Callable[[int], nn.Module],
    dtype: torch.dtype,
) -> QwenScorer:
    """A scorer with the tensors of a file; the body in `dtype`, the head in float32 at least.

    Args:
        info: For the messages.
        state: Tensors by published name, of either layout; the language-model head is left out.
        source: Where they come from, for the messages.
        config: Qwen2VLConfig's `text_config` and `vision_config`; the number of embeddings is the file's.
        head: The head for states of a given size.
        dtype: Type of the body.

    Raises:
        WeightsError: If a tensor is missing, superfluous or of another shape.
    """
    parts = copy.deepcopy(dict(config))
    for name, value in state.items():
        if published_name(name) == "model.language_model.embed_tokens.weight":
            parts["text_config"]["vocab_size"] = len(value)
    full = Qwen2VLConfig(**parts)
    scorer = empty(lambda: QwenScorer(full, head(full.text_config.hidden_size)), dtype)
    scorer.rm_head.to(torch.promote_types(dtype, torch.float32))
    load_complete(info, scorer, state, source, rename=published_name)
    return scorer


def published_name(name: str) -> str | None:
    """A tensor's name here; None for the language-model head, which no score needs.

    Up to transformers 4.51 the decoder was `model.*` and the vision tower `visual.*`; since 4.52, and here, they are
    `model.language_model.*` and `model.visual.*`. Files of PEFT have a prefix before either.
    """
    name = name.removeprefix("base_model.model.")
    if name == "lm_head.weight":
        return None
    if name.startswith("visual."):
        return "model." + name
    if name.startswith("model.") and not name.startswith(("model.language_model.", "model.visual.")):
        return "model.language_model." + name.removeprefix("model.")
    return name


def empty(build: Callable[[], M], dtype: torch.dtype) -> M:
    """A model of transformers in `dtype` whose weights are not allocated yet, ready for `load_complete`."""
    with torch.device("meta"):
        model = build()
    model = model.to(dtype)
    # Rotary frequencies are in no file, and half precision would spoil them: made anew in float32.
    for parent in model.modules():
        for name, child in list(parent.named_children()):
            if child._non_persistent_buffers_set:
                setattr(parent, name, type(child)(child.config))
    return model


def load_tokenizer(
    info: RewardInfo,
    path_or_id: str | Path | None,
    default: str,
    added: Sequence[str],
    rows: int,
    local_files_only: bool | None,
) -> Qwen2Tokenizer:
    """Qwen2-VL's tokenizer with the reward tokens added to it.

    Args:
        info: For the messages.
        path_or_id: Folder or Hub id; None for `default`.
        default: Where it is published.
        added: The reward tokens, in the order of their ids.
        rows: How many embeddings the model has; the last ones are those of the reward tokens.
        local_files_only: Never ask the Hub.

    Raises:
        WeightsError: If it cannot be loaded or belongs to another model.
    """
    files = f"tokenizer.json, or vocab.json and merges.txt, of Hub id {default!r}"
    place = path_or_id if path_or_id is not None else default
    source, tokenizer = read_tokenizer(info, Qwen2Tokenizer, place, files, local_files_only)
    tokenizer.add_tokens(list(added), special_tokens=True)
    known = tokenizer.get_added_vocab()
    ids = [known.get(token) for token in added]
    control = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    if ids != list(range(rows - len(added), rows)) or not set(control) <= set(known):
        raise WeightsError(
            f"the tokenizer in {source!r} does not belong to {info.name}: {', '.join(added)} have ids {ids}; the model "
            f"has {rows} embeddings, of which the last are for them, after the control tokens of Qwen2-VL"
        )
    return tokenizer


def load_template(
    text: PublishedText, folder: str | Path | None, path_or_id: str | Path | None, local_files_only: bool | None
) -> str:
    """The instruction, from `folder`, else from beside local weights, else as `read_text` finds it."""
    return read_text(text, folder if folder is not None else folder_with(path_or_id, [text.filename]), local_files_only)

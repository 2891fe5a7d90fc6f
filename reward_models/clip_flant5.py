"""CLIP-FlanT5, the model of the VQAScore paper: a CLIP that sees, two layers between, a T5 that answers.

Source: Lin et al. 2024, "Evaluating Text-to-Visual Generation with Image-to-Text Generation" (arXiv:2404.01291), and
the released checkpoints `zhiqiulin/clip-flant5-xxl` and `-xl`, which are a T5 with a projector and without the CLIP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from diffalign.reward_models.base import RewardInfo, WeightsError, WeightSpec
from diffalign.reward_models.checkpoints import find_file, load_complete, read_tensors
from diffalign.reward_models.clip_towers import CLIP_MEAN, CropPreprocessing
from diffalign.reward_models.media import InvalidMediaError, Media, to_rgb
from diffalign.reward_models.weights import locate, number_positions, one_line

__all__ = ["CLIPFlanT5", "is_clip_flant5", "load_clip_flant5"]

VISION_TOWER = "openai/clip-vit-large-patch14-336"
TOKENIZERS = {4096: "google/flan-t5-xxl", 2048: "google/flan-t5-xl"}
"""By width of the language model, where the tokenizer is published."""
BACKGROUND = tuple(int(255 * mean) for mean in CLIP_MEAN)
"""Colour of the bars that make a picture square: (122, 116, 104)."""
_LARGEST_SIDE = 16384
"""A longer picture would need gigabytes when it is made square."""
_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
_BEFORE, _BEHIND = f"{_SYSTEM} USER: ", "\n{question} ASSISTANT: "
_ANSWER = "Yes"
_CONFIG = "config.json"
_NOT_OF_T5 = {"model_type", "architectures", "torch_dtype", "dtype", "transformers_version"}
_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WHOLE = ("model.safetensors", "pytorch_model.bin")


class CLIPFlanT5(nn.Module):
    """The probability of an answer, with a graph to the pixels.

    The parameters keep the type they are loaded in; the logits and what follows are float32 at least.

    Attributes:
        t5: The language model.
        mm_projector: From features of the picture to its embeddings.
        vision_tower: The CLIP.
    """

    def __init__(self, content: Mapping[str, Any], vision: transformers.CLIPVisionConfig):
        """Builds it without weights, from a published config."""
        super().__init__()
        config = transformers.T5Config(**{k: v for k, v in content.items() if k not in _NOT_OF_T5})
        self.t5 = transformers.T5ForConditionalGeneration(config)
        # transformers 5 says "tied" of every T5. FLAN-T5 is not: its output layer is stored beside the embeddings.
        self.tied = bool(content.get("tie_word_embeddings", True))
        self.start = int(content.get("decoder_start_token_id", config.pad_token_id))
        width = config.d_model
        self.mm_projector = nn.Sequential(nn.Linear(vision.hidden_size, width), nn.GELU(), nn.Linear(width, width))
        self.vision_tower = transformers.CLIPVisionModel(vision)
        self.layer = int(content.get("mm_vision_select_layer", -2))
        self.crop = CropPreprocessing(vision.image_size)
        self.tokenizer: Any = None

    def tie(self) -> None:
        """Makes encoder and decoder read the one table of embeddings that is stored."""
        self.t5.encoder.embed_tokens = self.t5.shared
        self.t5.decoder.embed_tokens = self.t5.shared
        if self.tied:
            self.t5.lm_head.weight = self.t5.shared.weight

    def preprocess(self, item: Media) -> Tensor:
        """Float32 pixels [3, S, S]: centred bars to a square, bicubic resize of the 8 bits, CLIP's normalisation."""
        image = to_rgb(item)
        side = _side(image.height, image.width)
        square = Image.new("RGB", (side, side), BACKGROUND)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return self.crop.image(square)

    def preprocess_tensor(self, pixels: Tensor) -> Tensor:
        """The same for pixels [B, 3, H, W] in [0, 1], differentiable, without rounding to 8 bits."""
        height, width = pixels.shape[-2:]
        side = _side(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        square = pixels.new_tensor(BACKGROUND)[:, None, None].div(255).repeat(len(pixels), 1, side, side)
        # Written into a fresh tensor: autograd follows the copy, and the pixels stay as they are.
        square[..., top : top + height, left : left + width] = pixels
        return self.crop.tensor(square)

    def encode_question(self, question: str) -> tuple[list[int], list[int]]:
        """Token ids before and behind the picture.

        The original cuts the text at its mark for the picture and tokenises both chunks by themselves, so that the
        first ends in </s> as well.
        """
        return self._ids(_BEFORE), self._ids(_BEHIND.replace("{question}", question))

    def forward(self, pixels: Tensor, questions: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """Scores [B]: exp of the mean log-probability of "Yes" and </s>, that is sqrt(p(Yes) p(</s> | Yes)).

        Args:
            pixels: As from `preprocess`, [B, 3, S, S].
            questions: As from `encode_question`, B of them.
        """
        table = self.t5.shared
        device = table.weight.device
        seen = self.vision_tower(pixels.to(device, table.weight.dtype), output_hidden_states=True)
        pictures = self.mm_projector(seen.hidden_states[self.layer][:, 1:])
        rows = []
        for picture, (before, behind) in zip(pictures, questions, strict=True):
            words = table(torch.tensor([*before, *behind], device=device))
            rows.append(torch.cat([words[: len(before)], picture, words[len(before) :]]))
        embeddings = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = (torch.arange(embeddings.shape[1], device=device) < lengths[:, None]).long()
        labels = torch.tensor(self._ids(_ANSWER), device=device)
        start = torch.tensor([self.start], device=device)
        logits = self.t5(
            inputs_embeds=embeddings,
            attention_mask=mask,
            decoder_input_ids=torch.cat([start, labels[:-1]]).expand(len(rows), -1),
            use_cache=False,
        ).logits
        wide = torch.promote_types(logits.dtype, torch.float32)
        chances = F.log_softmax(logits.to(wide), -1).gather(-1, labels.expand(len(rows), -1)[..., None])[..., 0]
        return chances.mean(1).exp()

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text).input_ids
        return ids


def is_clip_flant5(info: RewardInfo, path_or_id: str | Path, local_files_only: bool | None = None) -> bool:
    """Whether the config at a folder or Hub id says it is one.

    Raises:
        WeightsError: If there is no config to read.
    """
    return _read_config(info, path_or_id, local_files_only).get("model_type") == "clip_t5"


def load_clip_flant5(
    info: RewardInfo,
    path_or_id: str | Path,
    *,
    vision_tower: str | Path | None = None,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | Literal["auto"] = "auto",
    local_files_only: bool | None = None,
) -> CLIPFlanT5:
    """The model with its weights, complete or not at all.

    Args:
        info: For which reward model.
        path_or_id: Folder or Hub id in the published layout: config.json and one or several weight files.
        vision_tower: Folder or Hub id of the CLIP; None takes the one the config names, which the files leave out.
        tokenizer: Folder or Hub id of the tokenizer; None takes the one beside the weights, else FLAN-T5's.
        dtype: Type of the parameters; "auto" is float32.
        local_files_only: Never ask the Hub; None follows HF_HUB_OFFLINE.

    Raises:
        WeightsError: If anything is missing, damaged, or of another model.
    """
    content = _read_config(info, path_or_id, local_files_only)
    if content.get("model_type") != "clip_t5":
        raise WeightsError(f"{str(path_or_id)!r} is no CLIP-FlanT5: model_type is {content.get('model_type')!r}")
    known = {"model_type": "clip_t5", "mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch"}
    for key, value in known.items():
        if content.get(key, value) != value:
            raise WeightsError(f"{str(path_or_id)!r} has {key}={content[key]!r}; only {value!r} is known here")
    tower = vision_tower if vision_tower is not None else content.get("mm_vision_tower", VISION_TOWER)
    tower_info = _part(info, str(tower))
    vision = _vision_config(_read_config(tower_info, tower, local_files_only))
    with torch.device("meta"):
        model = CLIPFlanT5(content, vision).to(torch.float32 if dtype == "auto" else dtype)
    state = _read_all(info, path_or_id, local_files_only)
    if not any(name.startswith("vision_tower.") for name in state):
        seen = _read_all(tower_info, tower, local_files_only)
        state |= {f"vision_tower.{name}": value for name, value in seen.items()}
    copies = {"t5.encoder.embed_tokens.weight", "t5.decoder.embed_tokens.weight"}
    copies |= {"t5.lm_head.weight"} if model.tied else set()
    load_complete(info, model, state, path_or_id, rename=lambda name: _rename(name, copies), may_lack=copies)
    model.tie()
    number_positions(model)
    words = tokenizer if tokenizer is not None else _tokenizer_home(path_or_id, model.t5.config.d_model)
    model.tokenizer = _load_tokenizer(info, words, model.t5.config.vocab_size, local_files_only)
    return model.eval().requires_grad_(False)


def _side(height: int, width: int) -> int:
    side = max(height, width)
    if side > _LARGEST_SIDE:
        raise InvalidMediaError(f"expected sides of at most {_LARGEST_SIDE} pixels, got {width}x{height}")
    return side


def _rename(name: str, copies: set[str]) -> str | None:
    """A published name in this module; None for copies of the embeddings and for what only a whole CLIP has."""
    if name.startswith("vision_tower."):
        # LLaVA's wrapper and transformers before 5 each put a prefix; files of a whole CLIP hold its text side too.
        inner = name.removeprefix("vision_tower.").removeprefix("vision_tower.")
        other = inner.startswith(("text_model.", "text_projection.", "visual_projection.")) or inner == "logit_scale"
        if other or inner.endswith("position_ids"):
            return None
        return f"vision_tower.{inner.removeprefix('vision_model.')}"
    if name.startswith("mm_projector."):
        return name
    own = f"t5.{name}"
    return None if own in copies or name == "embed_tokens.weight" else own


def _part(info: RewardInfo, repo: str) -> RewardInfo:
    """An info for the messages about the CLIP."""
    spec = WeightSpec(repo if repo.count("/") == 1 else VISION_TOWER, _WHOLE[0])
    return RewardInfo(name=f"the vision tower of {info.name}", license=info.license, weights=(spec,))


def _read_config(info: RewardInfo, path_or_id: str | Path, local_files_only: bool | None) -> dict[str, Any]:
    path = find_file(info, path_or_id, WeightSpec(info.weights[0].repo, _CONFIG), local_files_only)
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise WeightsError(f"cannot read {str(path)!r} as the config of {info.name}: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{str(path)!r} holds no config of {info.name} but {type(content).__name__}")
    return content


def _vision_config(content: Mapping[str, Any]) -> transformers.CLIPVisionConfig:
    return transformers.CLIPVisionConfig(**content.get("vision_config", content))


def _read_all(info: RewardInfo, path_or_id: str | Path, local_files_only: bool | None) -> dict[str, Tensor]:
    """The tensors of one file or of all that an index names; safetensors are preferred."""
    repo = info.weights[0].repo
    source, local = locate(info, path_or_id, local_files_only)
    folder = Path(source)
    names = [name for name in (*_WHOLE, *_INDEX) if folder.is_dir() and (folder / name).is_file()]
    if folder.is_dir():
        # A missing file is reported by the name that is published.
        path = find_file(info, path_or_id, WeightSpec(repo, names[0] if names else info.weights[0].filename), local)
    else:
        path = find_file(info, path_or_id, info.weights[0], local)
    if path.suffix != ".json":
        return read_tensors(info, path)
    try:
        shards = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"cannot read {str(path)!r} as the index of {info.name}: {one_line(error)}") from error
    state: dict[str, Tensor] = {}
    for shard in shards:
        state |= read_tensors(info, find_file(info, path_or_id, WeightSpec(repo, shard), local))
    return state


def _tokenizer_home(path_or_id: str | Path, width: int) -> str | Path:
    folder = Path(path_or_id).expanduser()
    if any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        return path_or_id
    return TOKENIZERS.get(width, TOKENIZERS[4096])


def _load_tokenizer(info: RewardInfo, source: str | Path, vocab_size: int, local_files_only: bool | None) -> Any:
    words, local = locate(info, source, local_files_only)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(words, local_files_only=local)
        if len(tokenizer) > vocab_size:
            raise ValueError(f"it has {len(tokenizer)} tokens, the model {vocab_size}")
        if tokenizer("a").input_ids[-1:] != [tokenizer.eos_token_id] or tokenizer.eos_token_id is None:
            raise ValueError("it does not end texts with an end token")
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
        raise WeightsError(
            f"cannot load the tokenizer of {info.name} from {words!r}: {one_line(error)}; expected tokenizer.json of "
            "FLAN-T5 beside the weights or as `tokenizer`"
        ) from error
    return tokenizer

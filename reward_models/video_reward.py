"""VideoReward: visual quality, motion quality and text alignment of a generated clip."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor
from torchvision.transforms.functional import resize as torchvision_resize

from diffalign.reward_models.base import RewardInfo, WeightsError, WeightSpec
from diffalign.reward_models.checkpoints import find_file, read_shards, read_tensors
from diffalign.reward_models.clip_towers import resize
from diffalign.reward_models.media import InvalidMediaError, Media, read_clip
from diffalign.reward_models.published_texts import PublishedText
from diffalign.reward_models.qwen_heads import (
    QWEN2_VL_2B,
    MarkedText,
    QwenReward,
    VisionTokens,
    load_scorer,
    load_template,
    load_tokenizer,
    patchify,
    published_name,
    smart_resize,
)
from diffalign.reward_models.weights import TOKENIZER_FILES, folder_with

__all__ = ["VideoReward"]

BASE = "Qwen/Qwen2-VL-2B-Instruct"
"""Where the tokenizer is published, and the weights below an adapter."""

INSTRUCTION = PublishedText(
    "videoreward_user_text.txt",
    "https://raw.githubusercontent.com/KwaiVGI/VideoAlign/3e5ebc600aebc4d28300e9132b0a23ee8e1bc47c/prompt_template.py",
    "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700",
    literal=True,
)

_FULL, _CONFIG = "model.pth", "model_config.json"
_ADAPTER, _REST = "adapter_model.safetensors", "non_lora_state_dict.pth"
_DIMS = ("VQ", "MQ", "TA")
_STATISTICS = {"VQ": (3.6757, 2.2476), "MQ": (1.1646, 1.3811), "TA": (2.8105, 2.5121)}
"""Mean and deviation of the raw scores, as published; model_config.json has them too."""

MIN_PIXELS, MAX_PIXELS = 128 * 28 * 28, 256 * 28 * 28
"""Area of a frame in pixels; the upper one is the value of the released training script."""
_FEWEST, _MOST = 4, 768
_LORA = re.compile(r"(?P<place>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")


class VideoReward(QwenReward):
    """z-scores of visual quality (VQ), motion quality (MQ) and text alignment (TA), and their sum, Overall.

    Source: Liu et al. 2025, "Improving Video Generation with Human Feedback" (arXiv:2501.13918). A Qwen2-VL-2B with
    LoRA is read at three added tokens, and one linear map without bias gives a score at each. The prompt stands behind
    the tokens of VQ and MQ, which therefore cannot depend on it. `compare` uses Overall at temperature one.

    Clips: two frames per second, at least four, evenly spaced from first to last, each resized (bicubic, on its 8
    bits) to about 336x336 to 448x448 pixels of area. Frames that come without a rate need `source_fps`. LoRA is merged
    in float32 when it is loaded. The head is computed in float32, where the original keeps the body's type.
    """

    info = RewardInfo(
        name="video_reward",
        license="Apache-2.0",
        weights=(WeightSpec("KwaiVGI/VideoReward", f"checkpoint-11352/{_FULL}", "torch"),),
        kind=frozenset({"video"}),
        dims=(*_DIMS, "Overall"),
        nominal_range=(-9.0, 9.0),
        tau=1.0,
        min_vram_gb=12.0,
    )
    item_ndim = 4
    reward_tokens = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
    vision_token = "<|video_pad|>"
    placeholder = "{text_prompt}"

    def __init__(
        self,
        path_or_id: str | Path | None = None,
        *,
        base: str | Path | None = None,
        fps: float | None = None,
        max_pixels: int | None = None,
        source_fps: float | None = None,
        normalise: bool = True,
        tokenizer: str | Path | None = None,
        template: str | Path | None = None,
        model_config: Mapping[str, Any] | None = None,
        device: str | torch.device = "auto",
        dtype: torch.dtype | Literal["auto"] = "auto",
        local_files_only: bool | None = None,
    ):
        """Loads the weights; see `RewardModel.from_pretrained`.

        Args:
            path_or_id: Folder with model_config.json and checkpoint-<step>/ (the last step is taken), such a
                checkpoint's folder, its model.pth, or a Hub id. A checkpoint is model.pth, or
                adapter_model.safetensors and non_lora_state_dict.pth.
            base: Folder or Hub id of Qwen2-VL-2B-Instruct, below an adapter; None is the published one.
            fps: Frames per second that are looked at; None is the value of model_config.json, else 2.
            max_pixels: Largest area of a frame; None is the value of model_config.json, else 256 * 28 * 28.
            source_fps: Frames per second of tensors, arrays and lists, which do not say.
            normalise: False leaves the scores as the head gives them; Overall is their sum all the same.
            tokenizer: Folder or Hub id of Qwen2-VL's tokenizer; None is "tokenizer" in the checkpoint's folder, if
                it is there, else Qwen2-VL's own.
            template: Folder with videoreward_user_text.txt; None looks beside local weights, then as `read_text` does.
            model_config: `text_config` and `vision_config` of the checkpoint; None is Qwen2-VL-2B.
            device: As in `from_pretrained`.
            dtype: Type of the body; the original runs in bfloat16.
            local_files_only: As in `from_pretrained`.

        Raises:
            ValueError: If `fps` or `source_fps` is not positive.
            WeightsError: If the checkpoint is missing, damaged or of another model, or tokenizer or instruction are.
        """
        for name, rate in (("fps", fps), ("source_fps", source_fps)):
            if rate is not None and not rate > 0:
                raise ValueError(f"{name} must be positive, got {rate}")
        instruction = load_template(INSTRUCTION, template, path_or_id, local_files_only)
        folder, full = _find(self.info, path_or_id, local_files_only)
        config = _read_config(self.info, folder)
        if full is not None:
            state = read_tensors(self.info, full)
        else:
            below = read_shards(self.info, base, BASE, local_files_only)
            state = _overlay(below, read_tensors(self.info, folder / _REST), read_tensors(self.info, folder / _ADAPTER))
        state = merge_lora(self.info, state, float(config["peft_lora_config"].get("lora_alpha", 128)), folder)
        outputs = _outputs(self.info, state, folder)
        scorer = load_scorer(
            self.info,
            state,
            full or folder,
            model_config if model_config is not None else QWEN2_VL_2B,
            lambda size: nn.Linear(size, outputs, bias=False),
            torch.float32 if dtype == "auto" else dtype,
        )
        rows = scorer.model.get_input_embeddings().num_embeddings
        words = tokenizer if tokenizer is not None else folder_with(folder / "tokenizer", TOKENIZER_FILES)
        tokens = load_tokenizer(self.info, words, BASE, self.reward_tokens, rows, local_files_only)
        super().__init__(scorer, tokens, instruction, device)
        data, published = config["data_config"], config["inference_config"]
        self.fps = float(fps if fps is not None else data.get("fps") or 2.0)
        self.max_pixels = int(max_pixels if max_pixels is not None else data.get("max_frame_pixels") or MAX_PIXELS)
        self.source_fps = source_fps
        self.statistics = {
            name: (float(published.get(f"{name}_mean", mean)), float(published.get(f"{name}_std", deviation)))
            for name, (mean, deviation) in _STATISTICS.items()
        } if normalise else dict.fromkeys(_DIMS, (0.0, 1.0))  # fmt: skip

    def preprocess(self, item: Media) -> VisionTokens:
        """See `RewardModel`."""
        images = read_clip(item, self._choose)
        height, width = smart_resize(images[0].height, images[0].width, MIN_PIXELS, self.max_pixels)
        frames = torch.stack([pil_to_tensor(image) for image in images])
        # Bytes in and bytes out: rounded and clamped after the resize, as in the original.
        frames = torchvision_resize(frames, [height, width], InterpolationMode.BICUBIC, antialias=True)
        return patchify(frames.float() / 255)

    def _choose(self, total: int, fps: float | None) -> list[int]:
        rate = fps if fps is not None else self.source_fps
        if rate is None:
            raise InvalidMediaError(
                f"{self.info.name} needs frames per second: pass media.Video(frames, fps) or a video file, or load it "
                "with source_fps"
            )
        return frame_numbers(total, rate, self.fps)

    def score_prepared(self, prepared: Sequence[VisionTokens], texts: Sequence[MarkedText]) -> dict[str, Tensor]:
        """See `RewardModel`."""
        outputs = self.outputs(prepared, texts)
        # One shared output is read at all three tokens; of three, each has its own token.
        raw = outputs.squeeze(-1) if outputs.shape[-1] == 1 else outputs.diagonal(dim1=1, dim2=2)
        scores = {
            name: (raw[:, i] - self.statistics[name][0]) / self.statistics[name][1] for i, name in enumerate(_DIMS)
        }
        return {**scores, "Overall": scores["VQ"] + scores["MQ"] + scores["TA"]}

    def score_tensor(self, pixels: Tensor, prompts: str | Sequence[str]) -> Tensor:
        """Overall [B] on the model's device, with a graph to `pixels`; the model's own weights get no gradient.

        Resized as tensors, which skips the 8-bit rounding of `score`. Values are used as they are: clamp pixels that
        leave [0, 1] yourself.

        Args:
            pixels: RGB clips [B, T, 3, H, W] in [0, 1], at `source_fps` frames per second, any floating type.
            prompts: One prompt, or B.

        Raises:
            InvalidMediaError: If `pixels` has another shape or is not floating, or there is no `source_fps`.
        """
        if pixels.ndim != 5 or pixels.shape[2] != 3 or not pixels.is_floating_point():
            raise InvalidMediaError(f"expected floats [B, T, 3, H, W], got {pixels.dtype} {tuple(pixels.shape)}")
        unique, rows = self._texts(prompts, len(pixels))
        texts = self.encode_text(unique, len(unique))
        size = smart_resize(pixels.shape[-2], pixels.shape[-1], MIN_PIXELS, self.max_pixels)
        chosen = pixels[:, self._choose(pixels.shape[1], None)]
        wide = chosen.to(self.device, torch.promote_types(pixels.dtype, torch.float32))
        media = [patchify(resize(clip, *size)) for clip in wide]
        return self.score_prepared(media, [texts[row] for row in rows])["Overall"]

    def settings(self) -> dict[str, str]:
        """See `RewardModel`."""
        frames = {"fps": f"{self.fps:g}", "max_pixels": str(self.max_pixels), "source_fps": str(self.source_fps)}
        return {**super().settings(), **frames, "statistics": str(sorted(self.statistics.items()))}


def frame_numbers(total: int, rate: float, fps: float) -> list[int]:
    """Which of `total` frames at `rate` per second are looked at: an even number of them, about `fps` per second.

    Raises:
        InvalidMediaError: If there are fewer than two frames.
    """
    count = min(max(total / rate * fps, _FEWEST), 2 * (min(_MOST, total) // 2))
    count = 2 * round(count / 2)
    if count < 2:
        raise InvalidMediaError(f"expected a clip of at least 2 frames, got {total}")
    # torch's rounding: halves go to the even number.
    return [int(number) for number in torch.linspace(0, total - 1, count).round()]


def merge_lora(info: RewardInfo, state: Mapping[str, Tensor], alpha: float, source: Path) -> dict[str, Tensor]:
    """Tensors of a plain model: W + alpha / r * B A, in float32, for every weight W with factors A [r, n], B [m, r].

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685), Eq. 3.

    Raises:
        WeightsError: If a factor lacks its partner or its weight, or their shapes do not fit.
    """
    plain: dict[str, Tensor] = {}
    factors: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        if found := _LORA.fullmatch(name):
            factors.setdefault(found["place"], {})[found["factor"]] = value
        else:
            plain[name.replace(".base_layer.", ".")] = value
    for place, pair in factors.items():
        weight, a, b = plain.get(f"{place}.weight"), pair.get("A"), pair.get("B")
        if weight is None or a is None or b is None or (b.shape[0], a.shape[1]) != weight.shape or len(a) != b.shape[1]:
            shapes = [None if tensor is None else list(tensor.shape) for tensor in (weight, a, b)]
            raise WeightsError(
                f"cannot load {info.name} from {str(source)!r}: the LoRA of {place!r} does not fit: expected its "
                f"weight [m, n], A [r, n] and B [m, r], found {shapes}"
            )
        wide = torch.promote_types(weight.dtype, torch.float32)
        plain[f"{place}.weight"] = weight.to(wide) + alpha / len(a) * (b.to(wide) @ a.to(wide))
    return plain


def _overlay(*states: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of several files by the names used here; a later file wins."""
    return {new: value for state in states for old, value in state.items() if (new := published_name(old)) is not None}


def _outputs(info: RewardInfo, state: Mapping[str, Tensor], source: Path) -> int:
    """One shared output, or one per token: released training scripts and users of the weights have either."""
    heads = [value for name, value in state.items() if published_name(name) == "rm_head.weight"]
    if len(heads) != 1 or heads[0].ndim != 2 or len(heads[0]) not in (1, 3):
        found = [list(value.shape) for value in heads]
        raise WeightsError(
            f"cannot load {info.name} from {str(source)!r}: expected one rm_head.weight [1, n] or [3, n], found {found}"
        )
    return len(heads[0])


def _find(
    info: RewardInfo, path_or_id: str | Path | None, local_files_only: bool | None
) -> tuple[Path, Path | None]:  # fmt: skip
    """The folder of the checkpoint, and its file with all weights; None if it is an adapter's."""
    given = Path(path_or_id).expanduser() if path_or_id is not None else None
    if given is not None and given.is_dir():
        steps = [folder for folder in given.glob("checkpoint-*") if folder.name.rpartition("-")[2].isdigit()]
        for folder in (given, *sorted(steps, key=lambda f: int(f.name.rpartition("-")[2]), reverse=True)):
            if (folder / _FULL).is_file():
                return folder, folder / _FULL
            if (folder / _ADAPTER).is_file() and (folder / _REST).is_file():
                return folder, None
    path = find_file(info, path_or_id, local_files_only=local_files_only)
    if given is None or not given.exists():  # from the Hub: its settings are a second file
        repo = info.weights[0].repo
        find_file(info, path_or_id, WeightSpec(repo, _CONFIG), local_files_only)
    return path.parent, path


def _read_config(info: RewardInfo, folder: Path) -> dict[str, dict[str, Any]]:
    """The sections of model_config.json, in the checkpoint's folder or above it; empty where there is none."""
    content: Any = {}
    for path in (folder / _CONFIG, folder.parent / _CONFIG):
        if path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise WeightsError(
                    f"{str(path)!r} is no JSON file with the settings of {info.name}: {error}"
                ) from error
            break
    names = ("data_config", "peft_lora_config", "inference_config")
    sections = {name: (content.get(name) or {}) if isinstance(content, dict) else None for name in names}
    if not all(isinstance(section, dict) for section in sections.values()):
        raise WeightsError(f"{_CONFIG} beside {str(folder)!r} does not hold the sections {', '.join(names)}")
    return {name: section for name, section in sections.items() if section is not None}

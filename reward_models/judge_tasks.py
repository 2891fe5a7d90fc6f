"""The published forms of judgement of UnifiedReward: which template, how many frames, and how the answer is read."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Literal

from diffalign.reward_models import judge_answers as read
from diffalign.reward_models.base import WeightsError, WeightSpec

__all__ = ["TASKS", "Task", "read_template"]

HOME = "https://github.com/CodeGoat24/UnifiedReward"
TEMPLATES_FILE = "unifiedreward_templates.json"
"""Name of a file with templates by task: {"unifiedreward_point_image": {"template": ...}, ...}."""

_POINT = WeightSpec("CodeGoat24/UnifiedReward-qwen-7b", "model.safetensors.index.json")
_V2 = WeightSpec("CodeGoat24/UnifiedReward-2.0-qwen-7b", "model.safetensors.index.json")
_THINK = WeightSpec("CodeGoat24/UnifiedReward-Think-qwen-7b", "model.safetensors.index.json")
_FLEX = WeightSpec("CodeGoat24/UnifiedReward-Flex-qwen3vl-8b", "model.safetensors.index.json")

Reader = Callable[[str], Mapping[str, float]]


@dataclass(frozen=True)
class Task:
    """One published form of judgement.

    Attributes:
        key: Of its template in `TEMPLATES_FILE`.
        script: The published script that holds the template.
        digest: SHA-256 of the template with "{prompt}" for the prompt.
        weights: A model that was trained for it.
        read: From the answer to values by dimension; the last is the total. Of a pair, shares of the first.
        dims: The dimensions, in order.
        kind: What is judged.
        pair: Whether two media are judged.
        frames: Of a video, how many are shown.
    """

    key: str
    script: str
    digest: str
    weights: WeightSpec
    read: Reader
    dims: tuple[str, ...] = ("overall",)
    kind: Literal["image", "video"] = "image"
    pair: bool = False
    frames: int = 8


_VIDEO_LINES = (
    "visual quality",
    "temporal consistency",
    "dynamic degree",
    "text-to-video alignment",
    "factual consistency",
)


def _read_point_image(text: str) -> dict[str, float]:
    return {"overall": read.final_score(text, 1, 5) / 5}


def _read_point_video(text: str) -> dict[str, float]:
    lines = read.named_scores(text, _VIDEO_LINES, 1, 4)
    return {**{_name(line): value for line, value in lines.items()}, "overall": read.final_score(text, 1, 10) / 10}


def _read_graded(names: Sequence[str], text: str) -> dict[str, float]:
    labels = {name: f"{name} Score (1-5)" for name in names}
    found = read.named_scores(text, list(labels.values()), 1, 5)
    scores = {_name(name): found[label] for name, label in labels.items()}
    return {**scores, "overall": fmean(scores.values()) / 5}


def _read_pair(reader: Callable[[str, str], float], noun: str, text: str) -> dict[str, float]:
    return {"overall": reader(text, noun)}


def _read_shares(noun: str, text: str) -> dict[str, float]:
    shares = {_name(k): v for k, v in read.pair_scores(text, noun, ("Alignment", "Coherence", "Style")).items()}
    return {**shares, "overall": fmean(shares.values())}


def _name(label: str) -> str:
    return label.lower().replace(" ", "_").replace("-", "_")


_ACS = ("alignment", "coherence", "style", "overall")
_SCRIPTS, _SCRIPTS2 = "inference_qwen", "inference_qwen/UnifiedReward-2.0-inference"
_THINK_SCRIPTS = "UnifiedReward-Think/inference_qwen"

TASKS: dict[str, Task] = {
    "point_image": Task(
        "unifiedreward_point_image",
        f"{_SCRIPTS}/image_generation/qwen_point_score_image_generation.py",
        "f56f919ce3bc6aab3c173a5f836defe195e17e9614753e8b4c3dc2405bd4975b",
        _POINT, _read_point_image,
    ),
    "pair_image": Task(
        "unifiedreward_pair_image",
        f"{_SCRIPTS}/image_generation/qwen_pair_rank_image_generation.py",
        "0fd2f5c43a06516503fde3e64ffc98fff6f3a8815b5eac8dc5f0d81cee686614",
        _POINT, partial(_read_pair, read.better_sentence, "Image"), pair=True,
    ),
    "point_video": Task(
        "unifiedreward_point_video",
        f"{_SCRIPTS}/video_generation/qwen_point_score_video_generation.py",
        "514a6343388979f80886656c5cb7d05f2286f2c837f5d1e1435ae0daf00ece68",
        _POINT, _read_point_video, (*map(_name, _VIDEO_LINES), "overall"), "video", frames=16,
    ),
    "pair_video": Task(
        "unifiedreward_pair_video",
        f"{_SCRIPTS}/video_generation/qwen_pair_rank_video_generation.py",
        "c76ba521846dcdd36e30046c8ceac18840cb6b0ad5f5a7bc731102b2267f2db9",
        _POINT, partial(_read_pair, read.better_sentence, "Video"), kind="video", pair=True,
    ),
    "point_image_acs": Task(
        "unifiedreward2_point_image_acs",
        f"{_SCRIPTS2}/point_score_ACS_image_generation.py",
        "75d52d3ae771f89b682db3b74cdaca1c7bde373a39162bc1c9dabd63cdc9b851",
        _V2, partial(_read_graded, ("Alignment", "Coherence", "Style")), _ACS,
    ),
    "point_video_aps": Task(
        "unifiedreward2_point_video_aps",
        f"{_SCRIPTS2}/point_score_APS_video_generation.py",
        "707411fb9175547e74f145ae3efa459d621f11afcca076659a5588848e91e1c7",
        _V2, partial(_read_graded, ("Alignment", "Physics", "Style")), ("alignment", "physics", "style", "overall"),
        "video", frames=16,
    ),
    "pair_image_score": Task(
        "unifiedreward2_pair_image_score",
        f"{_SCRIPTS2}/pair_score_image_generation.py",
        "828e9ab2f81c3b6d42fb68dd5b8ea1b7647063c4b5d79a98d003ff25de5c5ca8",
        _V2, partial(_read_shares, "Image"), _ACS, pair=True,
    ),
    "pair_video_score": Task(
        "unifiedreward2_pair_video_score",
        f"{_SCRIPTS2}/pair_score_video_generation.py",
        "2604f95ceb958851760b5c5cfca7db848f8d69046b7da701802621860fa415ba",
        _V2, partial(_read_shares, "Video"), _ACS, "video", pair=True,
    ),
    "think_pair_image": Task(
        "unifiedreward_think_pair_image",
        f"{_THINK_SCRIPTS}/image_generation/qwen_infer_cot_image_generation.py",
        "342f6a4bd0efdae0ca754259d78404e534aae5f1c5527dd47f6062028305e3ff",
        _THINK, partial(_read_pair, read.tagged_answer, "Image"), pair=True,
    ),
    "think_pair_video": Task(
        "unifiedreward_think_pair_video",
        f"{_THINK_SCRIPTS}/video_generation/qwen_infer_cot_video_generation.py",
        "f45197425b810d08e0067579cfd59e105a1f9bf8e5850ba879c638080cadc61e",
        _THINK, partial(_read_pair, read.tagged_answer, "Video"), kind="video", pair=True,
    ),
    "flex_pair_image": Task(
        "unifiedreward_flex_pair_image",
        "UnifiedReward-Flex/flex_pair_rank_image_generation.py",
        "bd0c2d5635a7b6b3f382416789dad5c71563d9b68eeacfe75ece5795dff5ebda",
        _FLEX, partial(_read_pair, read.json_winner, "Image"), pair=True,
    ),
    "flex_pair_video": Task(
        "unifiedreward_flex_pair_video",
        "UnifiedReward-Flex/flex_pair_rank_video_generation.py",
        "dd95da9d5f2b830a2d6f497454dac025547f1d118d01f477778bd1a7ffa07534",
        _FLEX, partial(_read_pair, read.json_winner, "Video"), kind="video", pair=True,
    ),
}  # fmt: skip


def read_template(task: Task, folder: str | Path | None) -> str:
    """The template of a task, with "{prompt}" for the prompt.

    Raises:
        WeightsError: If it is not there or not the published one.
    """
    how = f"clone {HOME} and pass its folder as `texts`"
    if folder is None:
        raise WeightsError(f"the templates of UnifiedReward are not part of this package: {how}")
    table, script = Path(folder).expanduser() / TEMPLATES_FILE, Path(folder).expanduser() / task.script
    try:
        if table.is_file():
            found = [json.loads(table.read_bytes())[task.key]["template"]]
        elif script.is_file():
            found = list(_texts_in(ast.parse(script.read_bytes())))
        else:
            raise WeightsError(f"{str(folder)!r} has neither {TEMPLATES_FILE!r} nor {task.script!r}; {how}")
    except (ValueError, KeyError, TypeError, SyntaxError) as error:
        raise WeightsError(
            f"cannot read the template {task.key!r} in {str(folder)!r}: {error!r:.100}; {how}"
        ) from error
    for text in found:
        if isinstance(text, str) and sha256(text.encode()).hexdigest() == task.digest:
            return text
    raise WeightsError(
        f"the template {task.key!r} in {str(folder)!r} is not the published one (SHA-256 {task.digest[:16]}...); "
        f"answers to another text are those of another judge; {how}"
    )


def _texts_in(tree: ast.AST) -> list[str]:
    """The texts of a script, those with one variable in them with "{prompt}" in its place."""
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{prompt}" for part in node.values]
            texts.append("".join(str(part) for part in parts))
    return texts

"""What people say about a round: kinds of labels, several annotators, what is refused; the page that makes labels."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.labelling_page import labelling_page
from diffalign.rollout_config import RolloutConfig, RoundPlan
from diffalign.rollout_labels import labels_digest, preferences, read_labels, to_do
from diffalign.rollout_store import RoundFolder

CONFIG = RolloutConfig(labels="human", prompts_per_round=2, num_images_per_prompt=3)
NAN = math.nan


@pytest.fixture
def folder(tmp_path: Path) -> RoundFolder:
    found = RoundFolder(tmp_path, 4, {})
    found.path.mkdir()
    found.index.write_text("")
    return found


def name(image: int, group: int = 0) -> str:
    return f"r4-{group:05d}-{image:02d}"


def write(folder: RoundFolder, *rows: dict[str, Any], file: str = "labels.jsonl") -> None:
    (folder.path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def table(folder: RoundFolder, group: int = 0) -> list[float]:
    """Preferences of 0 over 1, 0 over 2 and 1 over 2."""
    found = read_labels(folder, CONFIG)[group]
    assert torch.equal(found.nan_to_num(), -found.T.nan_to_num())
    return [float(found[i, j]) for i, j in ((0, 1), (0, 2), (1, 2))]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"ranking": [name(1), [name(0), name(2)]], "annotator": "anna"}], [-1, 0, 1]),
        ([{"ranking": [name(2), name(0)]}], [NAN, -1, NAN]),
        ([{"better": name(2), "worse": name(1)}, {"tie": [name(0), name(1)]}], [0, NAN, -1]),
        (
            [{"image": name(0), "score": 1}, {"image": name(1), "score": 3.5}, {"image": name(2), "score": 1}],
            [-1, 0, 1],
        ),
        ([{"image": name(0), "score": 1}, {"image": name(2), "score": 0}], [NAN, 1, NAN]),
    ],
)
def test_kinds_of_labels(folder: RoundFolder, rows: list[dict[str, Any]], expected: list[float]) -> None:
    write(folder, *rows)
    assert table(folder) == pytest.approx(expected, nan_ok=True)
    assert list(read_labels(folder, CONFIG)) == [0]  # nobody said anything about the other prompt


def test_annotators_are_averaged(folder: RoundFolder) -> None:
    """Scores image by image, comparisons pair by pair; where two balance it is a tie, and a third one decides."""
    write(folder, {"image": name(0), "score": 4}, {"image": name(1), "score": 1}, {"image": name(2), "score": 2})
    scores = [{"image": name(0), "score": 0}, {"image": name(1), "score": 3.5}]
    write(folder, *scores, {"ranking": [name(0, 1), name(1, 1), name(2, 1)]}, file="labels-ben.jsonl")
    assert table(folder) == [-1, 0, 1]  # means 2, 2.25 and 2
    write(folder, {"better": name(1, 1), "worse": name(0, 1)}, file="labels-cora.jsonl")
    assert table(folder, 1) == [0, 1, 1]
    before = labels_digest(folder)
    write(folder, {"better": name(1, 1), "worse": name(0, 1)}, file="labels-dan.jsonl")
    assert table(folder, 1) == [-1, 1, 1]
    assert labels_digest(folder) != before
    write(folder, {"image": name(0), "score": 9}, file="other.jsonl")
    assert table(folder) == [-1, 0, 1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"image": "r3-00000-00", "score": 1},
            "unknown image 'r3-00000-00'; this round's are r4-00000-00 to r4-00001-02",
        ),
        ({"better": name(0), "worse": 7}, "unknown image 7;"),
        ({"image": name(0), "score": True}, "a score must be a finite number, got True"),
        ({"image": name(0), "score": "good"}, "a score must be a finite number, got 'good'"),
        ({"image": name(0)}, 'is no label; expected {"ranking": [...]}'),
        ({"ranking": name(0)}, "is no label"),
        ({"ranking": [name(0)]}, f"expected at least two different images of one prompt, got {name(0)}"),
        ({"tie": [name(0), name(0)]}, "expected at least two different images of one prompt"),
        ({"better": name(0), "worse": name(0, 1)}, "expected at least two different images of one prompt"),
        ({"better": name(1), "worse": name(2)}, "labels again what line 1 did"),
        ({"image": name(1), "score": 2}, "the images of one prompt have both scores and comparisons"),
    ],
)
def test_wrong_lines_are_named(folder: RoundFolder, row: dict[str, Any], message: str) -> None:
    write(folder, {"better": name(2), "worse": name(1)}, row)
    with pytest.raises(ValueError, match=r"line 2 of \S*labels.jsonl") as error:
        read_labels(folder, CONFIG)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_labels(folder: RoundFolder) -> None:
    path = folder.path / "labels.jsonl"
    path.write_text('\n{"tie": [\n')
    with pytest.raises(ValueError, match=r"line 2 of \S*labels.jsonl is no JSON"):
        read_labels(folder, CONFIG)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"labels.jsonl is not UTF-8 text"):
        read_labels(folder, CONFIG)


def test_what_is_to_do(folder: RoundFolder) -> None:
    assert (to_do(folder, CONFIG) or "").startswith(f"label the 6 images in {folder.path} (open label.html there")
    write(folder, {"image": name(0), "score": 1})
    assert to_do(folder, CONFIG) is not None  # one score compares nothing
    write(folder, {"image": name(0), "score": 1}, {"image": name(1), "score": 1})
    assert to_do(folder, CONFIG) is None
    folder.index.unlink()
    assert (to_do(folder, CONFIG) or "").startswith("round 4 has no images yet: run `diffalign rollout`")


def test_preferences_of_scores() -> None:
    found = preferences(torch.tensor([1.0, 1.0 + 1e-7, NAN, 0.0]))
    expected = [[NAN, 0, NAN, 1], [0, NAN, NAN, 1], [NAN] * 4, [-1, -1, NAN, NAN]]
    assert torch.equal(found.nan_to_num(9), torch.tensor(expected).nan_to_num(9))
    dominated = preferences(torch.tensor([[1.0, 2.0], [1.0, 1.0], [2.0, 0.0]]))
    assert [float(dominated[0, 1]), float(dominated[0, 2])] == [1, 0]


def test_the_page_shows_every_image_and_runs_nothing_of_a_prompt() -> None:
    rows = [
        {"id": name(i, g), "prompt_id": f"r4-{g:05d}", "prompt": prompt, "image": f"images/{name(i, g)}.png"}
        for g, prompt in enumerate(("a cat", "</script><script>alert(1)"))
        for i in range(2)
    ]
    text = labelling_page("round 4, abc", rows)
    assert text.count("</script>") == 1
    assert all(row["image"] in text for row in rows)
    assert "<title>Labels of round 4, abc</title>" in text
    data = json.loads(text.partition("const groups = ")[2].partition(", key = ")[0])
    assert [group["prompt"] for group in data] == ["a cat", "</script><script>alert(1)"]
    assert data[0]["images"][1] == {"id": name(1), "file": f"images/{name(1)}.png", "video": False}


def test_plans() -> None:
    """D3PO's released scales: 80 pairs on four processes, one each in a step; 7 images have 21 pairs."""
    released = RoundPlan(RolloutConfig(prompts_per_round=80), 20, 1, 20, num_processes=4)
    assert (released.steps_per_round, list(released.groups(1))[:2]) == (20, [1, 5])
    human = RolloutConfig(labels="human", prompts_per_round=144, num_images_per_prompt=7, inner_epochs=2)
    assert RoundPlan(human, 20, 16, 40).steps_per_round == 2 * 144 * 21 // 32
    with pytest.raises(ValueError, match="a round has 6048 visits of pairs for each process, which is no multiple"):
        RoundPlan(human, 20, 5, 20)
    with pytest.raises(ValueError, match="labels: human takes no reward_model"):
        RolloutConfig(labels="human", reward_model="pickscore")

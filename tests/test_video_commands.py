"""Video models from the command line: pairs of clips, a training step, resuming, drawing, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from diffalign import commands, configured, plugins
from diffalign.backbones import ModelSource
from diffalign.config import ConfigError, load_config
from diffalign.data import DataConfig, EncodedPairs
from diffalign.generation import Request, SamplingConfig, generate
from diffalign.media_checks import check_judges, check_media_settings, check_scorers
from diffalign.predictions import Prediction
from diffalign.reward_models import RewardInfo, RewardModel, reward_model_info
from diffalign.videos import read_frames
from tests.backbones.families.animatediff import save_tiny
from tests.clips import clip, counting

SIZE = (8, 16)
FRAMES = 3
IMAGES = ModelSource("sd", "sd", "StableDiffusionPipeline", Prediction.EPSILON)
WAN = ModelSource("wan", "wan", "WanPipeline", Prediction.VELOCITY)
LTX = ModelSource("ltx", "ltx", "LTXPipeline", Prediction.VELOCITY)


class Brightness(RewardModel):
    """A reward model of videos, named `tests.test_video_commands:Brightness` in a configuration."""

    info = RewardInfo("brightness", "Apache-2.0", (), kind=frozenset({"video"}))

    def __init__(self, path_or_id: Any = None, *, device: Any = None, dtype: Any = None, local_files_only: Any = None):
        super().__init__()

    def preprocess(self, item: Any) -> float:
        with Path(item).open("rb") as file:
            frames = list(read_frames(file, FRAMES, 8))
        return sum(frame.convert("L").resize((1, 1)).getpixel((0, 0)) + n for n, frame in enumerate(frames))

    def score_prepared(self, prepared: Sequence[Any], texts: Sequence[Any]) -> Mapping[str, Tensor]:
        return {"overall": torch.tensor([float(value) for value in prepared])}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny AnimateDiff pipeline."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "animatediff")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pairs of clips of 24x32 pixels, one of them damaged."""
    folder = tmp_path_factory.mktemp("clips")
    frames = counting(8, (24, 32))
    rows = []
    for number in range(5):
        for name, shown in (("a", frames[number % 3 :]), ("b", frames[::-1])):
            (folder / f"{number}{name}.mp4").write_bytes(clip(shown))
        rows.append(
            {"id": f"p{number}", "prompt": "a red cube", "chosen": f"{number}a.mp4", "rejected": f"{number}b.mp4"}
        )
    torn = folder / "2b.mp4"
    torn.write_bytes(torn.read_bytes()[:400])
    (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_config(folder: Path, model: Path, **sections: Any) -> Path:
    config = {
        "output_dir": str(folder / "run"),
        "model": {
            "pretrained_model_name_or_path": str(model),
            "num_frames": FRAMES,
            "resolution": list(SIZE),
            "lora": {"rank": 2},
        },
        "training": {"max_train_steps": 2, "per_device_train_batch_size": 2, "checkpointing_steps": 1},
        "sampling": {"num_inference_steps": 1, "guidance_scale": 1.0},
        **sections,
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))  # which is YAML
    return path


@pytest.mark.slow
def test_train_from_clips_to_weights_and_on_from_a_checkpoint(model: Path, clips: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path, model, data={"train_data_dir": str(clips), "max_corrupt_fraction": 0.2, "random_flip": True}
    )
    overrides = ["training.validation_steps=2", "training.validation_prompts=[a star, a cube]"]
    commands.train(str(config), overrides)
    run = tmp_path / "run"
    (cache,) = (run / "cache").iterdir()
    encoded = EncodedPairs.open(cache)
    assert encoded.ids == ["p0", "p1", "p3", "p4"]
    assert encoded.report.corrupt == ("p2",)
    reason = json.loads((cache / "report.json").read_text())["unreadable"][0]["reason"]
    assert reason.startswith("rejected: no readable video")
    assert encoded.moments([0])[0].mean.shape == (1, 4, FRAMES, *(side // 2 for side in SIZE))
    with (run / "validation" / "step-000002.mp4").open("rb") as file:
        assert next(read_frames(file, FRAMES, 8)).size == (2 * SIZE[1], SIZE[0])  # side by side

    weights = run / "pytorch_lora_weights.safetensors"
    whole = load_file(weights)
    shutil.rmtree(run / "checkpoint-2")
    weights.unlink()
    commands.train(str(config), [*overrides, "training.resume_from_checkpoint=latest"])
    again = load_file(weights)
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.mark.slow
def test_sample_writes_videos_and_goes_on(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red cube\na blue star\n")
    out = tmp_path / "out"

    def sample(**more: Any) -> str:
        settings = {"num_inference_steps": 1, "guidance_scale": 1.0, **more}
        prompts = str(tmp_path / "prompts.txt")
        return commands.sample(str(model), prompts, str(out), None, None, settings, SIZE, FRAMES)

    assert sample() == f"videos and index: {out / 'index.jsonl'}"
    rows = [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]
    assert [row["video"] for row in rows] == ["videos/00000-00.mp4", "videos/00001-00.mp4"]
    assert "image" not in rows[0]
    with (out / rows[0]["video"]).open("rb") as file:
        assert len(list(read_frames(file, FRAMES, 8))) == FRAMES  # AnimateDiff's own rate
    settings = json.loads((out / "settings.json").read_text())
    drawn = settings["pipeline"]
    assert (settings["fps"], drawn["num_frames"], drawn["height"], settings["batch_size"]) == (8.0, FRAMES, 8, 1)

    whole = contents(out)
    assert len(whole) == 4
    (out / rows[1]["video"]).unlink()
    (out / f"{rows[1]['video']}.tmp").write_bytes(b"half a video")
    kept = (out / rows[0]["video"]).stat().st_mtime_ns
    sample()
    assert contents(out) == whole
    assert (out / rows[0]["video"]).stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match=r"other settings \(fps 8.0 -> 12.0\)"):
        sample(fps=12)


@pytest.mark.slow
def test_pairs_of_a_video_model_are_drawn_scored_and_trained_on(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red cube\na blue star\n")
    section = {
        "prompts": str(tmp_path / "prompts.txt"),
        "num_images_per_prompt": 2,
        "reward_model": "tests.test_video_commands:Brightness",
    }
    config = write_config(tmp_path, model, pairs=section)
    overrides = ["sampling.fps=4", "training.max_train_steps=1"]
    commands.pairs(str(config), overrides)
    folder = tmp_path / "run" / "pairs"
    rows = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    assert rows[0]["chosen"].startswith("candidates/videos/")
    assert (folder / rows[0]["chosen"]).is_file()
    assert rows[0]["score_chosen"] > rows[0]["score_rejected"]
    commands.train(str(config), overrides)  # reads the clips at the rate they were written with
    (cache,) = (tmp_path / "run" / "cache").iterdir()
    assert EncodedPairs.open(cache).report.corrupt == ()


@pytest.fixture
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configured, "load_policy", lambda *args, **options: pytest.fail("loaded weights"))


@pytest.mark.usefixtures("_no_weights")
def test_what_does_not_fit_is_refused_before_weights_load(model: Path, clips: Path, tmp_path: Path) -> None:
    still = tmp_path / "still"
    still.mkdir()
    Image.new("RGB", (32, 32)).save(still / "a.png")
    (still / "index.jsonl").write_text('{"prompt": "x", "chosen": "a.png", "rejected": "a.png"}\n')
    config = write_config(tmp_path, model, data={"train_data_dir": str(still)}, pairs={"reward_model": "shapes"})
    with pytest.raises(ValueError, match="is of still images, and the model draws videos; give pairs of clips"):
        commands.train(str(config))
    with pytest.raises(ValueError, match="scores images, and AnimateDiffPipeline draws videos; take a reward"):
        commands.pairs(str(config))
    with pytest.raises(ValueError, match=r"scores images, and AnimateDiffPipeline draws videos"):
        commands.evaluate(str(config))
    with pytest.raises(ValueError, match="is of clips, and the model draws images"):
        commands.train(
            str(config),
            [
                "model={pretrained_model_name_or_path: 'diffalign://shapes'}",
                f"data.train_data_dir={clips}",
            ],
        )


def test_settings_of_videos_are_refused_for_images() -> None:
    check_media_settings(IMAGES, data=DataConfig(dataset_name="x"), sampling=SamplingConfig())
    with pytest.raises(ValueError, match="model.num_frames is 9, and StableDiffusionPipeline draws images; leave it"):
        check_media_settings(IMAGES, num_frames=9)
    with pytest.raises(ValueError, match="data.fps is 7.5, and StableDiffusionPipeline draws images"):
        check_media_settings(IMAGES, data=DataConfig(dataset_name="x", fps=7.5))
    with pytest.raises(ValueError, match="sampling.fps is 8, and"):
        check_media_settings(IMAGES, sampling=SamplingConfig(fps=8))
    with pytest.raises(ValueError, match="data.center_crop is false"):
        check_media_settings(IMAGES, data=DataConfig(dataset_name="x", center_crop=False))
    check_media_settings(WAN, num_frames=9, data=DataConfig(dataset_name="x", center_crop=False, fps=7.5))


def test_a_rate_that_the_network_is_not_told_is_refused() -> None:
    data = DataConfig(dataset_name="x", fps=24)
    with pytest.raises(ValueError, match=r"data.fps is 24, and the network is told 25 frames per second; set "
                       r"model.options.frame_rate: 24 and leave out data.fps"):  # fmt: skip
        check_media_settings(LTX, data=data)
    check_media_settings(LTX, data=data, options={"frame_rate": 24})
    check_media_settings(LTX, data=data.model_copy(update={"fps": None}))


def test_scorers_are_of_what_the_model_draws() -> None:
    videos, images = reward_model_info("tests.test_video_commands:Brightness"), reward_model_info("pickscore")
    check_scorers(WAN, [videos])
    check_scorers(IMAGES, [images])
    for source, infos in ((WAN, [videos, images]), (IMAGES, [videos])):
        with pytest.raises(ValueError, match=r"scores (image|video)s, and \w+ draws (image|video)s"):
            check_scorers(source, infos)
    check_judges(IMAGES, [], plugins.find("eval", "shapes"))


def test_ranks_among_the_images_of_a_prompt_need_all_of_them_in_one_call() -> None:
    ranks = reward_model_info("group_rank(pickscore)")
    check_scorers(IMAGES, [ranks], in_groups=True)
    for check in (lambda: check_scorers(IMAGES, [ranks]), lambda: check_judges(IMAGES, [ranks], None)):
        with pytest.raises(ValueError, match="compares the images of one prompt with each other, and here each is"):
            check()


def test_requests_are_of_what_the_model_draws(tiny_pipeline: Path, tmp_path: Path) -> None:
    from diffalign.backbones import load_policy

    request = Request("a", "x", 0, is_video=True)
    with pytest.raises(ValueError, match="request a asks for a video, and the model draws images"):
        generate(load_policy(str(tiny_pipeline)), [request], tmp_path / "out", SamplingConfig(), settings={})


@pytest.mark.parametrize(
    ("model", "data", "expected"),
    [
        (None, None, None),
        ("16", None, (16, 16)),
        ("[16, 24]", None, (16, 24)),
        (None, "[16, 24]", (16, 24)),
        (None, "24", (24, 24)),
        ("[16, 16]", "16", (16, 16)),
        ("[16, 24]", "[16, 24]", (16, 24)),
        ("[16, 24]", "[24, 16]", "model.resolution is (16, 24) and data.resolution is (24, 16); leave out"),
        ("[16, 24]", "16", "model.resolution is (16, 24) and data.resolution is 16; leave out"),
    ],
)
def test_height_and_width_of_both_sections(model: str | None, data: str | None, expected: Any, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("output_dir: x\nmodel: {pretrained_model_name_or_path: y}\ndata: {train_data_dir: z}\n")
    overrides = [f"model.resolution={model}"] * (model is not None) + [f"data.resolution={data}"] * (data is not None)
    config = load_config(path, overrides)
    if not isinstance(expected, str):
        assert configured.picture_size(config) == expected
        return
    with pytest.raises(ConfigError) as error:
        configured.picture_size(config)
    assert expected in str(error.value)


def test_the_packaged_recipe_fits_its_family() -> None:
    config = load_config("configs/wan_diffusion_dpo.yaml")
    assert config.model.num_frames is not None
    check_media_settings(WAN, num_frames=config.model.num_frames, data=config.data, sampling=config.sampling)
    assert (config.model.num_frames - 1) % 4 == 0
    size = configured.picture_size(config)
    assert size is not None
    assert [side % 16 for side in size] == [0, 0]

"""The build of the embedded world, with a handful of steps: whole, resumable, and loadable afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffalign.backbones import load_policy
from diffalign.reward_models import ShapesScore
from diffalign.shapes.build import STAGES, Lengths, NoisyBatches, build
from diffalign.shapes.networks import build_vae
from diffalign.shapes.scene_batches import SceneBatches, encode_scenes
from diffalign.shapes.stages import Stage


def _stage(work: Path) -> tuple[Stage, nn.Linear]:
    torch.manual_seed(0)
    layer = nn.Linear(3, 1)
    return Stage("tiny", work, {"layer": layer}, lr=1e-2, steps=9, ema=0.9), layer


def test_a_stage_that_was_killed_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    def loss_of(layer: nn.Linear, step: int, dies_at: int | None = None) -> Tensor:
        if step == dies_at:
            raise KeyboardInterrupt
        rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        error: Tensor = (layer(rows) - rows.sum(1, keepdim=True)).square().mean()
        return error

    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, whole_layer = _stage(tmp_path / "whole")
    whole.run(lambda step: loss_of(whole_layer, step), save_every=2)
    killed, killed_layer = _stage(tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        killed.run(lambda step: loss_of(killed_layer, step, dies_at=5), save_every=2)
    again, again_layer = _stage(tmp_path / "killed")
    assert again.step == 4  # the last state that was saved
    again.run(lambda step: loss_of(again_layer, step), save_every=2)
    assert again.losses == whole.losses
    again.load_average()
    whole.load_average()
    assert torch.equal(again_layer.weight, whole_layer.weight)


@pytest.mark.slow
def test_batches_mix_clean_and_poor_drawings_in_the_share_that_is_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = build_vae()
    clean, poor = (encode_scenes(vae, tmp_path, 0, 100, poor=poor) for poor in (False, True))
    assert clean[0].shape == poor[0].shape == (100, 16, 8, 8)
    # The poor rows' prompts are replaced by the empty one, so that a batch shows which of its rows are poor.
    batches = NoisyBatches(SceneBatches(clean, (poor[0], [""] * 100), scaling=1.0))
    for share in (0.0, 0.6, 1.0):
        ids = batches.draw(torch.Generator().manual_seed(0), share, size=4000)[3]
        empty = float((ids == batches.scenes.empty).all(1).float().mean())
        assert empty == pytest.approx(share + 0.1 * (1 - share), abs=0.02)  # a tenth has lost its prompt besides


@pytest.mark.slow
def test_the_whole_build_leaves_models_that_load(tmp_path: Path) -> None:
    lengths = Lengths(**dict.fromkeys(STAGES, 2), scenes=100, clips=6)
    build(tmp_path, seed=3, lengths=lengths, per_task=1, guidance_scales=(2.0,))
    record = json.loads((tmp_path / "build.json").read_text(encoding="utf-8"))
    assert set(record["seconds"]) == set(STAGES)
    assert all(size < 15 for size in record["megabytes"].values())
    wanted = {"pipeline: judge score, guidance 2", "video_pipeline: judge score, guidance 2", "scorer accuracy"}
    assert set(record["scores"]) >= wanted
    prompt = "a photo of a red circle"
    for part in ("pipeline", "flow_pipeline"):
        images = load_policy(tmp_path / part).sample([prompt], [0], guidance_scale=2.0, num_inference_steps=2)
        assert images.shape == (1, 3, 64, 64)
    assert ShapesScore(tmp_path / "scorer")(images, [prompt]).shape == (1,)
    videos = load_policy(tmp_path / "video_pipeline").sample([prompt], [0], num_inference_steps=2)
    assert videos.shape == (1, 6, 3, 64, 64)
    assert not [f for f in tmp_path.rglob("*config.json") if str(tmp_path) in f.read_text(encoding="utf-8")]

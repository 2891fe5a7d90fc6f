"""Training of scorers that starts from other models: plain CLIP and BLIP, nothing at all, a language model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign.data.compared import Comparison
from diffalign.data.images import ImageSource
from diffalign.reward_config import ScorerConfig, ScorerRun
from diffalign.reward_models import hpsv3, load_reward_model
from diffalign.reward_models.starting import UNTRAINED, start_training
from diffalign.reward_models.training import ScorerTrainer, train_scorer
from tests.reward_models.qwen_files import (
    CONFIG,
    PROMPTS,
    published,
    random_model,
    rows_of,
    save_tokenizer,
    template_folder,
)
from tests.reward_models.scorer_training import batch_of, picture, rewards_of, scores
from tests.reward_models.test_image_reward import VISION


def test_hpsv2_starts_from_open_clips_file(hps_folder: Path, hps_config: dict, tmp_path: Path) -> None:
    state = torch.load(hps_folder / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    (tmp_path / "clip").mkdir()
    torch.save(state, tmp_path / "clip" / "open_clip_pytorch_model.bin")
    options = {"model_config": hps_config}
    config = ScorerConfig(name="hpsv2.1", start=str(tmp_path / "clip"), options=options)
    trainable = start_training(config, tmp_path / "start")
    expected = load_reward_model("hpsv2.1", path=hps_folder, device="cpu", **options)
    assert trainable.model.fingerprint() == expected.fingerprint()


def test_image_reward_starts_from_blip_with_a_new_head(blip_folder: Path, tmp_path: Path) -> None:
    published = torch.load(blip_folder / "ImageReward.pt", weights_only=True)
    blip = {n.removeprefix("blip."): v for n, v in published.items() if n.startswith("blip.")}
    blip |= {"visual_encoder_m.norm.weight": torch.ones(3), "image_queue": torch.ones(2, 2)}
    shutil.copytree(blip_folder, tmp_path / "blip")
    (tmp_path / "blip" / "ImageReward.pt").unlink()
    torch.save({"model": blip}, tmp_path / "blip" / "model_large.pth")
    config = ScorerConfig(name="image_reward", start=str(tmp_path / "blip"), options={"vision_config": VISION})
    trainable = start_training(config, tmp_path / "start", seed=1)
    state = trainable.model.state_dict()
    torch.testing.assert_close(
        state["towers.vision.post_layernorm.weight"], published["blip.visual_encoder.norm.weight"]
    )
    assert float(state["mlp.0.weight"].std()) == pytest.approx(33**-0.5, rel=0.05)
    assert float(state["mlp.7.bias"].abs().max()) == 0.0
    again = start_training(config, tmp_path / "again", seed=1).model.fingerprint()
    assert again == trainable.model.fingerprint() != start_training(config, tmp_path / "b", seed=2).model.fingerprint()


# --- the embedded world ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_embedded_clip_from_nothing(tmp_path: Path) -> None:
    """Contrast alone, then pairs on top: scenes are drawn, the judge decides only about the held-out ones."""
    loop = {"max_train_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "validation_steps": 2}
    world = {"dataset_name": "diffalign://shapes/train"}
    held_out = {"dataset_name": "diffalign://shapes/held_out", "max_train_samples": 12}
    before = ScorerRun.model_validate(
        {"output_dir": str(tmp_path / "before"), "data": world, "validation_data": held_out, "training": loop,
         "reward": {"name": "shapes", "start": UNTRAINED, "loss": "none", "contrastive_weight": 1.0}}
    )  # fmt: skip
    folder, found = train_scorer(before)
    assert found["before"] is not None
    reward = {"name": "shapes", "start": str(folder), "contrastive_weight": 0.5}
    run = {**before.model_dump(), "output_dir": str(tmp_path / "after"), "reward": reward}
    after, second = train_scorer(ScorerRun.model_validate(run))
    assert second["before"] == pytest.approx(found["accuracy"])
    assert (
        load_reward_model("shapes", path=after).fingerprint() != load_reward_model("shapes", path=folder).fingerprint()
    )


# --- HPSv3 -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_hpsv3_from_qwen_with_its_token_and_uncertainty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts from Qwen2-VL; of the embeddings the new token's row moves and no other; saved and loaded as published."""
    template_folder("hpsv3_user_text.txt")
    monkeypatch.setattr(hpsv3, "AREA", 56 * 56)
    base = save_tokenizer(tmp_path / "qwen")
    rows = rows_of(base, 0)
    qwen = random_model(rows + 6, 6, torch.nn.Identity())  # Qwen's matrix has more rows than its tokenizer words
    save_file({n: v.contiguous() for n, v in published(qwen).items()}, base / "model.safetensors")
    options = {"tokenizer": str(base), "template": str(PROMPTS), "model_config": CONFIG}
    config = ScorerConfig(name="hpsv3", start=str(base), options=options, loss="uncertainty", noise_samples=5)
    trainable = start_training(config, tmp_path / "start", seed=2)
    trainer = ScorerTrainer(trainable, config)
    wide = [picture(200, 1).resize((90, 40)), picture(10, 2)]  # grids of their own
    items = [
        Comparison(str(i), f"prompt {i}", ImageSource(a), ImageSource(b), 1.0)
        for i, (a, b) in enumerate([(wide[0], wide[1]), (wide[1], wide[0])])
    ]
    table = trainable.model.scorer.model.get_input_embeddings().weight.clone()
    assert len(table) == rows + 1
    optimizer = torch.optim.SGD(trainer.policy.trainable_parameters(), lr=0.05)
    loss = trainer.loss(batch_of(trainable, items)).loss
    loss.backward()
    assert all(p.grad is not None for _, p in trainer.policy.named_trainable())
    optimizer.step()
    found = rewards_of(trainable, items)
    trainable.save(tmp_path / "saved")
    names = set(load_file(tmp_path / "saved" / "HPSv3.safetensors"))
    assert names == set(published(qwen)) - {"lm_head.weight"} | {
        f"rm_head.{place}.{kind}" for place in (0, 3, 5) for kind in ("weight", "bias")
    }
    model = load_reward_model("hpsv3", path=tmp_path / "saved", device="cpu", **options)
    torch.testing.assert_close(scores(model, items), found, atol=1e-4, rtol=1e-4)
    moved = (model.scorer.model.get_input_embeddings().weight - table).abs().amax(1) > 0
    assert moved.nonzero().flatten().tolist() == [rows]
    output = model.score(items[0].first.decode(), items[0].prompt)
    batch = batch_of(trainable, items)
    with torch.no_grad():
        log_deviations = trainable(batch.chosen, batch.rejected, batch.conditioning.tensors)["log_deviations"]
    assert output.uncertainty is not None
    assert float(output.uncertainty[0]) == pytest.approx(float(log_deviations[0, 0].exp()), rel=1e-4)

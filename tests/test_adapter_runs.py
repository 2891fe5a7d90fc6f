"""`train` on top of an earlier run's weights, and what `evaluate` then compares; options that reach the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign import commands, configured, training
from diffalign.backbones import LoRA, inspect_model, load_policy
from diffalign.backbones.base import LORA_FILE
from diffalign.backbones.starting import check_start, read_lora
from diffalign.config import RunConfig
from diffalign.estimate import estimate_run
from diffalign.generation import weights_fingerprint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def earlier(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory, policies: Any) -> dict[str, Path]:
    """Finished runs: an adapter, and whole weights."""
    folders = {}
    for name, lora in (("lora", LoRA(rank=3, alpha=6.0)), ("full", None)):
        policy: Any = load_policy(str(tiny_pipeline), lora=lora, train=True)
        policies.move_away(policy, 0.1 if lora else 0.01)
        folders[name] = tmp_path_factory.mktemp(name)
        policy.save_trained(folders[name])
    return folders


@pytest.fixture
def config(tiny_pipeline: Path, tmp_path: Path) -> Any:
    def build(**model: Any) -> RunConfig:
        settings = {"pretrained_model_name_or_path": str(tiny_pipeline), **model}
        return RunConfig.model_validate({"output_dir": str(tmp_path / "run"), "model": settings})

    return build


def test_the_policy_of_a_run_starts_as_the_earlier_one(config: Any, earlier: dict[str, Path], batches: Any) -> None:
    run = config(adapter=str(earlier["lora"]))
    policy: Any = training.training_policy(run, training.checked(run), torch.device("cpu"))
    assert (policy.lora.rank, policy.lora.alpha) == (3, 6.0)
    batch = batches(2)
    arguments = (batch.chosen, torch.tensor([10, 700]), batch.conditioning)
    alone: Any = load_policy(run.model.pretrained_model_name_or_path, adapter=earlier["lora"])
    with torch.no_grad():
        expected = alone.predict(*arguments)
        assert torch.equal(policy.predict(*arguments), expected)
        assert torch.equal(policy.frozen().predict(*arguments), expected)
        assert not torch.equal(alone.frozen().predict(*arguments), expected)


def test_what_cannot_be_gone_on_from_is_refused_before_weights_load(
    config: Any, earlier: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    for model, message in (
        ({"adapter": str(tmp_path)}, f"holds neither {LORA_FILE} nor safetensors in unet"),
        (
            {"adapter": str(earlier["lora"]), "lora": {"rank": 8}},
            "model.lora.rank is 8 .* has 3 .*leave out model.lora",
        ),
        ({"adapter": str(earlier["lora"]), "lora": {"rank": 3}}, "model.lora.alpha is 3 .* has 6"),
        ({"adapter": str(earlier["full"]), "lora": {"rank": 3}}, "whole weights, on which a new LoRA would fit no"),
        ({"options": {"embedded_guidance": 1.0}}, r"unknown config key 'model.options.embedded_guidance'"),
    ):
        with pytest.raises(ValueError, match=message):
            training.checked(config(**model))
    same = training.checked(config(adapter=str(earlier["lora"]), lora={"rank": 3, "alpha": 6}))
    found = check_start(same, earlier["lora"], None)
    assert found == read_lora(earlier["lora"] / LORA_FILE)
    assert check_start(same, earlier["full"], None) is None


def test_the_plan_counts_both_adapters(config: Any, earlier: dict[str, Path]) -> None:
    source = inspect_model(config().model.pretrained_model_name_or_path)
    found = estimate_run(config(adapter=str(earlier["lora"])), source)
    alone = estimate_run(config(lora={"rank": 3, "alpha": 6}), source)
    assert found.trainable == alone.trainable
    assert found.memory["adapters of the reference"] == found.memory["adapters"] == alone.memory["adapters"]
    assert alone.memory["adapters of the reference"] == 0


def test_evaluation_compares_a_run_with_what_it_started_from(
    config: Any, earlier: dict[str, Path], tmp_path: Path, policies: Any
) -> None:
    start = str(earlier["lora"])
    source = training.checked(config(adapter=start))
    assert commands.trained_weights(config(adapter=start), source) == {"adapter": start}  # nothing was trained yet
    assert commands.trained_weights(config(), source) == {"adapter": str(tmp_path / "run")}
    run = config(adapter=start)
    policy: Any = training.training_policy(run, source, torch.device("cpu"))
    policies.move_away(policy, 0.1)
    policy.save_trained(tmp_path / "run")
    compared = commands.trained_weights(run, source)
    assert compared == {"start": start, "adapter": str(tmp_path / "run")}
    both: Any = configured.load_model(run.model, source, **compared)
    only: Any = configured.load_model(run.model, source, adapter=start)
    base = weights_fingerprint(load_policy(source), reference=True)
    assert weights_fingerprint(only, reference=True) == base
    assert weights_fingerprint(both, reference=True) != base
    with torch.no_grad():
        drawn = [p.sample(["a"], [0], num_inference_steps=2, reference=r) for p, r in ((both, True), (only, False))]
    torch.testing.assert_close(*drawn)


def test_gradient_checkpointing_is_refused_where_a_denoiser_cannot(tiny_pipeline: Path) -> None:
    import dataclasses

    from diffalign.backbones.loading import check_gradient_checkpointing

    source = inspect_model(str(tiny_pipeline))
    check_gradient_checkpointing(source)
    video = dataclasses.replace(source, family="TextToVideoSDPipeline", parts={"unet": "UNet3DConditionModel"})
    with pytest.raises(ValueError, match=r"model\.gradient_checkpointing: UNet3DConditionModel of .* cannot do it"):
        check_gradient_checkpointing(video)


def test_compiled_blocks_are_refused_where_a_denoiser_names_none(tiny_pipeline: Path) -> None:
    import dataclasses

    from diffalign.backbones.loading import check_repeated_blocks

    source = inspect_model(str(tiny_pipeline))
    check_repeated_blocks(source)
    flow = dataclasses.replace(
        source, family="StableDiffusion3Pipeline", parts={"transformer": "SD3Transformer2DModel"}
    )
    with pytest.raises(ValueError, match=r"model\.torch_compile: SD3Transformer2DModel of .* names no blocks"):
        check_repeated_blocks(flow)


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_a_tokenizer_without_vocabulary_is_named_with_its_folder(
    tiny_pipeline: Path, tmp_path: Path, part: str
) -> None:
    import dataclasses
    import shutil

    from diffalign.backbones.loading import load_tokenizers

    folder = tmp_path / "model"
    shutil.copytree(tiny_pipeline / "tokenizer", folder / part)
    source = inspect_model(str(tiny_pipeline))
    source = dataclasses.replace(source, name="mine", location=str(folder), parts={part: "CLIPTokenizer"})
    assert set(load_tokenizers(source)) == {part}
    for file in (folder / part).glob("*"):
        if file.name != "tokenizer_config.json":
            file.unlink()
    with pytest.raises(ValueError, match=f"mine: the CLIPTokenizer in the folder {part} has no vocabulary"):
        load_tokenizers(source)

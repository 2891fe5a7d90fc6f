from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from diffalign import configured, training
from diffalign.backbones import inspect_model
from diffalign.cli import cli
from diffalign.config import ConfigError, RunConfig, trainer_settings
from diffalign.estimate import Estimate, estimate_run
from diffalign.optimizers import make_optimizer
from diffalign.trainers.diffusion_dpo import DiffusionDPO

pytestmark = pytest.mark.slow


@pytest.fixture
def run_config(tiny_pipeline: Path, tmp_path: Path) -> Any:
    def build(model: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **training: Any) -> RunConfig:
        settings = {"pretrained_model_name_or_path": str(tiny_pipeline), **(model or {})}
        content: dict[str, Any] = {"output_dir": str(tmp_path / "run"), "model": settings, "training": training}
        return RunConfig.model_validate(content | ({"data": data} if data else {}))

    return build


def estimate(config: RunConfig) -> Estimate:
    return estimate_run(config, inspect_model(config.model.pretrained_model_name_or_path))


def size(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def state_size(optimizer: Any) -> int:
    tensors = (v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor))
    return size(t for t in tensors if t.ndim)


@pytest.mark.parametrize("lora", [None, {"rank": 3}, {"rank": 3, "use_dora": True, "target_modules": ["to_q"]}])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_estimate_is_what_the_loaded_policy_holds(run_config: Any, lora: Any, precision: str) -> None:
    config = run_config({"lora": lora}, mixed_precision=precision, use_ema=True)
    found = estimate(config)
    source = inspect_model(config.model.pretrained_model_name_or_path)
    policy: Any = training.training_policy(config, source, torch.device("cpu"))
    trained = policy.trainable_parameters()
    assert found.trainable == sum(p.numel() for p in trained)
    own = {id(p) for p in trained}
    frozen = [p for p in policy.denoiser.parameters() if id(p) not in own]
    if lora is None:
        assert found.memory["denoiser"] == size(trained)
        assert found.memory["reference copy"] == size(policy._frozen.parameters())
        assert found.parameters == found.trainable
    else:
        assert found.memory["denoiser"] == size(frozen)
        assert found.memory["adapters"] == size(trained)
        assert found.parameters == sum(p.numel() for p in frozen)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = make_optimizer(trained, config.training, 1)
    optimizer.step()
    assert found.memory["gradients"] == found.memory["moving average"] == size(p.grad for p in trained)
    assert found.memory["optimizer (adamw)"] == state_size(optimizer)
    encoders = (policy.pipeline.vae, policy.pipeline.text_encoder)
    assert found.encoders == sum(size(e.parameters()) for e in encoders)
    assert (found.memory["rounded copies for autocast"] > 0) == (precision == "bf16")
    assert found.total == sum(found.memory.values())


def test_adafactor_keeps_rows_and_columns(run_config: Any) -> None:
    config = run_config({"lora": {"rank": 2}}, optimizer="adafactor")
    source = inspect_model(config.model.pretrained_model_name_or_path)
    policy: Any = training.training_policy(config, source, torch.device("cpu"))
    trained = policy.trainable_parameters()
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer = make_optimizer(trained, config.training, 1)
    optimizer.step()
    assert estimate(config).memory["optimizer (adafactor)"] == state_size(optimizer)


def test_forward_passes_are_counted_as_the_papers_of_speed_count_them(
    run_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sum(estimate(run_config()).forwards.values()) == 8
    assert sum(estimate(run_config({"lora": {}})).forwards.values()) == 6
    assert sum(estimate(run_config({"lora": {}, "gradient_checkpointing": True})).forwards.values()) == 8
    monkeypatch.setenv("WORLD_SIZE", "3")
    found = estimate(run_config(per_device_train_batch_size=2, gradient_accumulation_steps=5))
    assert found.pairs_per_step == 30
    assert "240 per optimizer step of 30 pairs" in str(found)


def test_quantized_weights_are_small(run_config: Any) -> None:
    whole = estimate(run_config({"lora": {}}, mixed_precision="bf16"))
    packed = estimate(run_config({"lora": {}, "quantization": "nf4"}, mixed_precision="bf16"))
    assert packed.memory["denoiser"] < whole.memory["denoiser"]
    assert packed.memory["adapters"] == whole.memory["adapters"]


def test_the_full_size_of_sd15_without_its_weights(tmp_path: Path, tiny_pipeline: Path, run_config: Any) -> None:
    """859,520,964 parameters as published, of which full fine-tuning holds four float32 copies and half a fifth."""
    folder = tmp_path / "sd15"
    for part in tiny_pipeline.rglob("*"):
        target = folder / part.relative_to(tiny_pipeline)
        target.parent.mkdir(parents=True, exist_ok=True)
        if part.is_file():
            target.write_bytes(part.read_bytes())
    unet = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    }
    (folder / "unet" / "config.json").write_text(json.dumps(unet))
    found = estimate(run_config({"pretrained_model_name_or_path": str(folder)}, mixed_precision="bf16"))
    assert found.trainable == 859_520_964
    assert found.memory["denoiser"] == 4 * 859_520_964
    assert found.memory["optimizer (adamw)"] == 8 * 859_520_964
    assert 2 * 859_520_964 < found.memory["reference copy"] < 2.01 * 859_520_964
    adapters = estimate(
        run_config({"pretrained_model_name_or_path": str(folder), "lora": {"rank": 8}}, mixed_precision="bf16")
    )
    assert adapters.trainable == 1_594_368  # as diffusers' own LoRA script trains at rank 8


@pytest.mark.parametrize("lora", [None, {"rank": 3}], ids=["full", "lora"])
def test_two_experts_are_both_counted(run_config: Any, tmp_path: Path, lora: Any) -> None:
    """Wan 2.2: two denoisers are held and trained, and each row of a batch goes through one of them."""
    from tests.backbones.families import wan

    folder = wan.save_tiny(tmp_path / "experts", ("transformer", "transformer_2"))
    model = {"pretrained_model_name_or_path": str(folder), "lora": lora, "resolution": [32, 48], "num_frames": 5}
    config = run_config(model)
    found = estimate(config)
    policy: Any = training.training_policy(config, inspect_model(str(folder)), torch.device("cpu"))
    trained = policy.trainable_parameters()
    assert found.trainable == sum(p.numel() for p in trained)
    own = {id(p) for p in trained}
    frozen = [p for p in policy.denoiser.parameters() if id(p) not in own]
    assert found.memory["denoiser"] == size(frozen or trained)
    assert found.memory.get("reference copy", 0) == (size(policy._frozen.parameters()) if lora is None else 0)
    assert found.forwards["policy"] == found.forwards["reference"] == 2
    assert "trainable: " in str(found)


def test_dry_run_writes_nothing_and_says_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    result = CliRunner().invoke(cli, ["train", "configs/demo.yaml", "--dry-run", "training.max_train_steps=7"])
    assert result.exit_code == 0, result.output
    for word in (
        "trainable: ",
        "denoiser",
        "adapters",
        "gradients",
        "optimizer (adamw)",
        "encoders, until",
        "together",
    ):
        assert word in result.output
    assert "cost: 6 forward passes per pair (policy 2, reference 2, backward 2)" in result.output
    assert "steps: 7; 224 pairs seen, pairs not known yet" in result.output
    assert not list(tmp_path.iterdir())


def test_epochs_where_the_pairs_are_known(run_config: Any, tmp_path: Path) -> None:
    from PIL import Image

    data = tmp_path / "pairs"
    data.mkdir()
    rows = []
    for i in range(6):
        for side in ("chosen", "rejected"):
            Image.new("RGB", (8, 8), (i, 0, 0 if side == "chosen" else 9)).save(data / f"{i}-{side}.png")
        rows.append({"id": str(i), "prompt": "x", "chosen": f"{i}-chosen.png", "rejected": f"{i}-rejected.png"})
    (data / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = run_config(
        data={"train_data_dir": str(data)},
        max_train_steps=10,
        per_device_train_batch_size=2,
        num_validation_pairs=1,
        resume_from_checkpoint="latest",
    )
    found = estimate(config)
    assert found.pairs == 5
    assert "steps: 10; 20 pairs seen, 4.00 epochs of 5 pairs" in str(found)
    done = tmp_path / "run" / "checkpoint-4"
    done.mkdir(parents=True)
    (done / "state.pt").touch()
    assert "steps: 10, 4 of them done;" in str(estimate(config))


# --- what `model` says reaches the policy -----------------------------------------------------------------------------


def test_lora_settings_reach_peft(run_config: Any) -> None:
    config = run_config({"lora": {"rank": 3, "alpha": 6, "use_dora": True, "use_rslora": True}})
    source = inspect_model(config.model.pretrained_model_name_or_path)
    policy: Any = training.training_policy(config, source, torch.device("cpu"))
    settings = policy.denoiser.peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.use_dora, settings.use_rslora) == (3, 6, True, True)
    assert set(settings.target_modules) == set(policy.lora_targets)
    assert any("magnitude" in name for name, _ in policy.named_trainable())


def test_size_and_frames_reach_the_policy(run_config: Any) -> None:
    def policy(model: dict[str, Any], data: dict[str, Any] | None = None) -> Any:
        config = run_config(model, data)
        source = inspect_model(config.model.pretrained_model_name_or_path)
        return configured.load_model(config.model, source, size=configured.picture_size(config), device="cpu")

    assert policy({}).size == (8, 8)
    assert policy({"resolution": 16}).latent_shape == (4, 8, 8)
    assert policy({"resolution": [16, 32]}).latent_shape == (4, 8, 16)
    assert policy({}, {"train_data_dir": "x", "resolution": 32}).size == (32, 32)
    with pytest.raises(ConfigError, match=r"model.resolution is 16 and data.resolution is 32; leave out"):
        configured.picture_size(run_config({"resolution": 16}, {"train_data_dir": "x", "resolution": 32}))


def test_vae_switches_survive_a_reload_and_change_no_or_another_cache(run_config: Any) -> None:
    def policy(**model: Any) -> Any:
        config = run_config(model)
        return configured.load_model(config.model, inspect_model(str(config.model.pretrained_model_name_or_path)))

    plain, sliced, tiled = policy(), policy(vae_slicing=True), policy(vae_slicing=True, vae_tiling=True)
    assert (plain.pipeline.vae.use_slicing, sliced.pipeline.vae.use_slicing) == (False, True)
    assert tiled.pipeline.vae.use_tiling
    assert plain.encoder_fingerprint() == sliced.encoder_fingerprint() != tiled.encoder_fingerprint()
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sliced.encode(images), plain.encode(images))
    tiled.free_encoders()
    tiled.reload_encoders()
    assert tiled.pipeline.vae.use_tiling
    assert tiled.pipeline.vae.use_slicing


def moved_policy(config: RunConfig) -> Any:
    """The run's policy, a little away from its reference."""
    source = inspect_model(config.model.pretrained_model_name_or_path)
    policy: Any = training.training_policy(config, source, torch.device("cpu"))
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.01)
    return policy


def test_channels_last_changes_no_numbers(run_config: Any, batches: Any) -> None:
    losses = []
    for lora in (None, {"rank": 2}):
        for switches in ({}, {"channels_last": True}):
            policy = moved_policy(run_config({**switches, "lora": lora}))
            losses.append(DiffusionDPO(policy, beta=500.0).loss(batches(2)).loss)
        assert policy.denoiser.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(losses[-1], losses[-2], rtol=1e-4, atol=1e-5)
    assert losses[0] != losses[2]


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["full", "lora"])
def test_compiling_changes_no_numbers(run_config: Any, tmp_path: Path, lora: Any) -> None:
    """With a backend that only captures: what is tested is that both halves go through it, each as it is."""
    from tests.backbones.families import flux

    folder = flux.save_tiny(tmp_path / "flux", dev=False)  # fewer operations than a UNet, so that it is captured sooner
    model = {"pretrained_model_name_or_path": str(folder), "resolution": [16, 24], "lora": lora}
    plain = moved_policy(run_config(model))
    compiled = moved_policy(run_config({**model, "torch_compile": True, "torch_compile_backend": "eager"}))
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    latents = torch.randn(2, *plain.latent_shape, generator=torch.Generator().manual_seed(0))
    arguments = (latents, plain.schedule.timesteps_at(torch.tensor([0.3, 0.8])), plain.encode_prompts(["a", "b"]))
    outputs = []
    for policy in (plain, compiled):
        outputs.append([policy.predict(*arguments), policy.frozen().predict(*arguments)])
        assert graphs["unique_graphs"] == (0 if policy is plain else 2)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs[0][0], outputs[0][1], atol=1e-4)


def test_the_fused_optimizer_takes_the_same_steps(run_config: Any) -> None:
    def after(fused: bool, optimizer: str = "adamw") -> torch.Tensor:
        config = run_config(fused_optimizer=fused, optimizer=optimizer)
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 7))
        made = make_optimizer([parameter], config.training, 1)
        for i in range(3):
            parameter.grad = torch.linspace(0, i + 1, 7)
            made.step()
        assert bool(made.param_groups[0].get("fused")) == fused
        return parameter.detach()

    torch.testing.assert_close(after(True), after(False), rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="fused_optimizer is for optimizer 'adamw', found 'adafactor'"):
        after(True, "adafactor")


def test_an_adapter_that_is_not_there_is_refused_before_anything_is_loaded(
    run_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configured, "load_policy", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"model\.adapter: somewhere holds neither .*; give the output folder of a"):
        training.train_config(run_config({"adapter": "somewhere"}))


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({"name": "diffusion_dpo"}, 4),
        ({"name": "sft"}, 2),
        ({"name": "sft", "log_reference": False}, 1),
        ({"name": "seppo", "num_inference_steps": 10, "guidance_scale": 2.0, "sgn_draws": 3}, 4 + 4 + 20),
        ({"name": "inpo"}, 4 + 11),
        ({"name": "inpo", "inversion_net": "reference", "cache_inversion": True}, 4 + 2),
        ({"name": "self_npo"}, 1 + 6),
        ({"name": "self_npo", "w": -5.0}, 1 + 12),
        ({"name": "d3po", "guidance_scale": 1.0}, 6),
    ],
)
def test_every_method_says_what_a_visit_costs(settings: dict[str, Any], passes: float) -> None:
    config = RunConfig.model_validate({"output_dir": "x", "model": {"pretrained_model_name_or_path": "x"},
                                       "trainer": settings})  # fmt: skip
    trainer, checked = trainer_settings(config)
    assert sum(trainer.forwards(checked).values()) == passes

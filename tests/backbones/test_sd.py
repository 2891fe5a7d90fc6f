"""The contract of every backbone, on a tiny Stable Diffusion pipeline in the published layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.backbones import LoRA, inspect_model, load_policy
from diffalign.backbones.sd import StableDiffusionPolicy
from diffalign.batches import PairBatch
from diffalign.policy import Policy
from diffalign.predictions import Prediction
from diffalign.trainers.diffusion_dpo import DiffusionDPO

Batches = Callable[..., PairBatch]
PROMPTS = ["a red circle", "two blue squares", ""]


@pytest.fixture(scope="module")
def base(tiny_pipeline: Path) -> Any:
    """The plain model; no test may change it."""
    return load_policy(str(tiny_pipeline))


@pytest.fixture(params=["lora", "full"])
def trained(request: pytest.FixtureRequest, tiny_pipeline: Path, policies: Any) -> Any:
    """A policy whose weights have moved, with adapters or as a whole."""
    lora = LoRA(rank=3, alpha=12.0) if request.param == "lora" else None
    policy = load_policy(str(tiny_pipeline), lora=lora, train=True)
    policies.move_away(policy, 0.1)
    return policy


def inputs(batches: Batches, count: int = 2) -> tuple[Any, ...]:
    batch = batches(count)
    return batch.chosen, torch.arange(count) * 300 + 7, batch.conditioning


def sample(policy: Policy, **options: Any) -> Tensor:
    return policy.sample(PROMPTS, [0, 1, 2], **{"guidance_scale": 3.0, "num_inference_steps": 3, **options})


def near(a: Tensor, b: Tensor) -> None:
    """Equal up to the last bits that two copies of the same weights in memory may differ by."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def same_weights(a: Any, b: Any) -> None:
    first, second = a.denoiser.state_dict(), b.denoiser.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- loading ---------------------------------------------------------------------------------------------------------


def test_the_family_and_prediction_are_read_from_the_folder(tiny_pipeline: Path, tiny_v_pipeline: Path) -> None:
    source = inspect_model(str(tiny_pipeline))
    assert source.family == "StableDiffusionPipeline"
    assert source.prediction is Prediction.EPSILON
    assert inspect_model(str(tiny_v_pipeline)).prediction is Prediction.V
    assert load_policy(str(tiny_v_pipeline)).prediction is Prediction.V


def test_shapes_of_everything(base: Any, batches: Batches) -> None:
    assert base.latent_shape == (4, 4, 4)
    assert base.resolution == 8
    assert len(base.schedule) == 1000
    conditioning = base.encode_prompts(PROMPTS)
    assert len(conditioning) == 3
    assert conditioning.tensors["hidden"].shape == (3, base.max_tokens, 16)
    moments = base.encode(torch.rand(2, 3, 8, 8))
    assert moments.mean.shape == moments.std.shape == (2, 4, 4, 4)
    assert moments.mean.dtype == moments.std.dtype == torch.float32
    assert bool((moments.std > 0).all())
    images = base.decode(moments.mean)
    assert images.shape == (2, 3, 8, 8)
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    latents, timesteps, conditioning = inputs(batches)
    assert base.predict(latents, timesteps, conditioning).shape == latents.shape
    assert sample(base).shape == (3, 3, 8, 8)


def test_everything_is_in_eval_mode_and_nothing_trains_unasked(base: Any) -> None:
    for module in (base.denoiser, base.pipeline.vae, base.pipeline.text_encoder):
        assert not any(m.training for m in module.modules())
        assert not any(p.requires_grad for p in module.parameters())
    assert base.trainable_parameters() == []


@pytest.mark.slow
def test_only_what_was_asked_for_is_trained(tiny_pipeline: Path) -> None:
    lora: Any = load_policy(str(tiny_pipeline), lora=LoRA(rank=3, target_modules=("to_q",)), train=True)
    names = [name for name, parameter in lora.denoiser.named_parameters() if parameter.requires_grad]
    assert names == [name for name, _ in lora.named_trainable()]
    assert all("to_q.lora_" in name for name in names)
    assert {min(p.shape) for p in lora.trainable_parameters()} == {3}
    full: Any = load_policy(str(tiny_pipeline), train=True)
    assert [n for n, _ in full.named_trainable()] == [n for n, _ in full.denoiser.named_parameters()]
    assert not any(m.training for m in full.denoiser.modules())


@pytest.mark.slow
def test_adapters_start_from_their_seed(tiny_pipeline: Path) -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        torch.rand(3)  # the global generator stands elsewhere at every load
        policy: Any = load_policy(str(tiny_pipeline), lora=LoRA(rank=8, seed=seed), train=True)
        return {name: p.detach().clone() for name, p in policy.named_trainable()}

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    down = [name for name in first if "lora_A" in name]
    assert all(not torch.equal(first[name], other[name]) for name in down)
    assert not any(bool(first[name].any()) for name in first if "lora_B" in name)
    values = torch.cat([first[name].flatten() for name in down])
    assert float(values.std()) == pytest.approx(1 / 8, rel=0.05)
    assert len({tuple(first[name].flatten()[:4].tolist()) for name in down}) == len(down)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trained_weights_stay_single_precision(tiny_pipeline: Path, dtype: torch.dtype, batches: Batches) -> None:
    lora: Any = load_policy(str(tiny_pipeline), lora=LoRA(rank=2), train=True, dtype=dtype)
    assert {p.dtype for p in lora.trainable_parameters()} == {torch.float32}
    assert lora.denoiser.conv_in.weight.dtype == dtype
    full: Any = load_policy(str(tiny_pipeline), train=True, dtype=dtype)
    assert {p.dtype for p in full.trainable_parameters()} == {torch.float32}
    assert full._frozen.dtype == dtype
    if dtype == torch.bfloat16:
        assert lora.predict(*inputs(batches)).shape == (2, 4, 4, 4)


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="lora.rank must be at least 1, got 0"):
        LoRA(rank=0)


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_image_depends_on_its_seed_and_prompt_only(base: Any) -> None:
    whole = sample(base)
    torch.rand(3)
    assert torch.equal(sample(base), whole)
    assert whole.dtype == torch.float32
    assert not torch.equal(whole[0], base.sample([PROMPTS[0]], [9], guidance_scale=3.0, num_inference_steps=3)[0])
    for i, prompt in enumerate(PROMPTS):
        alone = base.sample([prompt], [i], guidance_scale=3.0, num_inference_steps=3)[0]
        torch.testing.assert_close(alone, whole[i], rtol=0, atol=2e-5)
    other = base.sample(["a green star"], [0], guidance_scale=3.0, num_inference_steps=3)[0]
    assert not torch.allclose(other, whole[0], atol=2e-5)


def test_sampling_is_the_diffusers_pipeline(base: Any, tiny_pipeline: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline, dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    images = pipeline(PROMPTS, guidance_scale=3.0, num_inference_steps=3, generator=generators, output_type="pt").images
    near(sample(base), images)


@pytest.mark.slow
@pytest.mark.parametrize(("lora", "train"), [(LoRA(rank=2), True), (None, True), (None, False)])
def test_weights_in_half_precision_are_sampled_too(
    lora: LoRA | None, train: bool, tiny_pipeline: Path, base: Any
) -> None:
    policy = load_policy(str(tiny_pipeline), lora=lora, train=train, dtype=torch.bfloat16)
    for reference in (False, True):
        images = sample(policy, reference=reference)
        assert images.dtype == torch.float32
        torch.testing.assert_close(images, sample(base), rtol=0, atol=0.05)


def test_prompts_and_seeds_go_together(base: Any) -> None:
    with pytest.raises(ValueError, match="expected one seed per prompt, got 2 prompts and 1 seeds"):
        base.sample(["a", "b"], [0])


@pytest.mark.slow
def test_sampling_shows_the_trained_model_or_its_reference(trained: Any, base: Any) -> None:
    reference = sample(trained, reference=True)
    near(reference, sample(base))
    assert not torch.allclose(sample(trained), reference, atol=1e-3)
    assert trained.pipeline.unet is trained.denoiser
    assert all(parameter.requires_grad for parameter in trained.trainable_parameters())


# --- reference -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LoRA(rank=3, alpha=12.0), None], ids=["lora", "full"])
def test_the_reference_equals_the_base_bit_for_bit(
    lora: LoRA | None, tiny_pipeline: Path, policies: Any, batches: Batches
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline, dtype=torch.float32, safety_checker=None)
    latents, timesteps, conditioning = inputs(batches)
    with torch.no_grad():
        expected = pipeline.unet.eval()(latents, timesteps, conditioning.tensors["hidden"]).sample
    policy: Any = StableDiffusionPolicy(pipeline, inspect_model(str(tiny_pipeline)), lora=lora, train=True)
    policies.move_away(policy, 0.1)
    reference = policy.frozen().predict(latents, timesteps, conditioning)
    assert torch.equal(reference, expected)
    assert not reference.requires_grad
    moved = policy.predict(latents, timesteps, conditioning)
    assert moved.requires_grad
    assert not torch.allclose(moved, expected, atol=1e-3)
    if lora is not None:
        with policy.adapter_off():
            assert torch.equal(policy.predict(latents, timesteps, conditioning), expected)
        assert torch.equal(policy.predict(latents, timesteps, conditioning), moved)


# --- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_saved_weights_come_back(trained: Any, tiny_pipeline: Path, tmp_path: Path, batches: Batches) -> None:
    trained.save_trained(tmp_path / "out")
    files = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
    if trained.lora is not None:
        assert files == ["pytorch_lora_weights.safetensors"]
    else:
        assert files == ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    arguments = inputs(batches)
    fresh: Any = load_policy(str(tiny_pipeline), adapter=tmp_path / "out")
    same_weights(fresh, trained)
    near(fresh.predict(*arguments), trained.predict(*arguments))
    near(fresh.frozen().predict(*arguments), trained.frozen().predict(*arguments))
    near(sample(fresh), sample(trained))
    near(sample(fresh, reference=True), sample(trained, reference=True))
    assert not any(m.training for m in fresh.denoiser.modules())


@pytest.mark.slow
def test_loading_into_a_policy_under_training_replaces_its_weights(
    trained: Any, tiny_pipeline: Path, tmp_path: Path, batches: Batches
) -> None:
    trained.save_trained(tmp_path)
    other: Any = load_policy(str(tiny_pipeline), lora=LoRA(rank=2) if trained.lora else None, train=True)
    other.load_trained(tmp_path)
    arguments = inputs(batches)
    same_weights(other, trained)
    near(other.predict(*arguments), trained.predict(*arguments))
    near(other.frozen().predict(*arguments), trained.frozen().predict(*arguments))
    if trained.lora is not None:
        assert (other.lora.rank, other.lora.alpha) == (3, 12.0)


@pytest.mark.slow
def test_plain_diffusers_reads_the_weights(trained: Any, tiny_pipeline: Path, tmp_path: Path) -> None:
    """Alpha is not the rank here: its scale must travel with the file."""
    trained.save_trained(tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline, dtype=torch.float32, safety_checker=None)
    if trained.lora is not None:
        pipeline.load_lora_weights(tmp_path)
    else:
        pipeline.unet = type(pipeline.unet).from_pretrained(tmp_path / "unet")
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    images = pipeline(PROMPTS, guidance_scale=3.0, num_inference_steps=3, generator=generators, output_type="pt").images
    near(images, sample(trained))


@pytest.mark.slow
def test_layers_beyond_attention_go_through_the_file_too(tiny_pipeline: Path, tmp_path: Path, policies: Any) -> None:
    targets = ("to_q", "conv1", "ff.net.0.proj", "proj_in")
    policy: Any = load_policy(str(tiny_pipeline), lora=LoRA(rank=2, target_modules=targets), train=True)
    policies.move_away(policy, 0.1)
    policy.save_trained(tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline, dtype=torch.float32, safety_checker=None)
    pipeline.load_lora_weights(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    images = pipeline(PROMPTS, guidance_scale=3.0, num_inference_steps=3, generator=generators, output_type="pt").images
    near(images, sample(policy))


def test_a_folder_without_trained_weights(base: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected pytorch_lora_weights.safetensors or a unet folder"):
        base.load_trained(tmp_path)


# --- encoders --------------------------------------------------------------------------------------------------------


def test_encoding_and_decoding_agree_on_the_scaling(base: Any) -> None:
    """Our latents are the autoencoder's, less the shift, times the scale; decoding takes exactly that back."""
    images = torch.rand(2, 3, 8, 8)
    moments = base.encode(images)
    with torch.no_grad():
        posterior = base.pipeline.vae.encode(images * 2 - 1).latent_dist
        torch.testing.assert_close(moments.mean, posterior.mean * 0.18215)
        torch.testing.assert_close(moments.std, posterior.std * 0.18215)
        raw = base.pipeline.vae.decode(posterior.mean).sample
    torch.testing.assert_close(base.decode(moments.mean), (raw / 2 + 0.5).clamp(0, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_shift_in_the_autoencoder_is_respected(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_pipeline, tmp_path / "shifted")
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "shift_factor": 0.0609, "scaling_factor": 1.5305}))
    images = torch.rand(1, 3, 8, 8)
    plain: Any = load_policy(str(tiny_pipeline))
    shifted: Any = load_policy(str(folder))
    mean = plain.encode(images).mean / 0.18215
    moments = shifted.encode(images)
    torch.testing.assert_close(moments.mean, (mean - 0.0609) * 1.5305, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments.std, plain.encode(images).std / 0.18215 * 1.5305, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shifted.decode(moments.mean), plain.decode(mean * 0.18215), rtol=1e-5, atol=1e-6)


def test_prompts_are_encoded_as_the_pipeline_does(base: Any) -> None:
    positive, negative = base.pipeline.encode_prompt(PROMPTS[:2], torch.device("cpu"), 1, True)
    torch.testing.assert_close(base.encode_prompts(PROMPTS[:2]).tensors["hidden"], positive)
    torch.testing.assert_close(base.encode_prompts([""]).tensors["hidden"], negative[:1])


def test_token_counts_see_what_would_be_cut(base: Any) -> None:
    short, long = base.token_counts(["", "a photo of a red circle " * 40])
    assert short == 2
    assert long > base.max_tokens
    assert base.encode_prompts(["a photo of a red circle " * 40]).tensors["hidden"].shape[1] == base.max_tokens


@pytest.mark.slow
def test_the_fingerprint_follows_the_encoders_and_nothing_else(
    tiny_pipeline: Path, tiny_v_pipeline: Path, tmp_path: Path
) -> None:
    def fingerprint(folder: Path, **options: Any) -> str:
        return str(load_policy(str(folder), **options).encoder_fingerprint())

    known = fingerprint(tiny_pipeline)
    moved = shutil.copytree(tiny_pipeline, tmp_path / "moved")
    assert fingerprint(moved) == known
    assert fingerprint(moved, lora=LoRA(rank=2), train=True, dtype=torch.bfloat16) == known
    assert fingerprint(tiny_v_pipeline) == known  # another scheduler, the same encoders
    unet = moved / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: v + 1 for k, v in load_file(unet).items()}, unet)
    assert fingerprint(moved) == known
    seen = {known}
    for part in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        weights = load_file(moved / part)
        last = sorted(name for name, tensor in weights.items() if tensor.is_floating_point())[-1]
        weights[last].view(-1)[-1] += 1e-3
        save_file(weights, moved / part, metadata={"format": "pt"})
        seen.add(fingerprint(moved))
    path = moved / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scaling_factor": 0.2}))
    seen.add(fingerprint(moved))
    assert len(seen) == 4


@pytest.mark.slow
def test_encoders_are_freed_and_come_back(tiny_pipeline: Path, batches: Batches) -> None:
    policy: Any = load_policy(str(tiny_pipeline))
    known, images = policy.encoder_fingerprint(), torch.rand(1, 3, 8, 8)
    before, prompts, drawn = policy.encode(images), policy.encode_prompts(PROMPTS), sample(policy)
    policy.free_encoders()
    assert policy.pipeline.vae is None
    assert policy.pipeline.text_encoder is None
    for call in (lambda: policy.encode(images), lambda: policy.encode_prompts(PROMPTS)):
        with pytest.raises(RuntimeError, match=r"was freed; call reload_encoders\(\) first"):
            call()
    assert policy.predict(*inputs(batches)).shape == (2, 4, 4, 4)
    assert policy.encoder_fingerprint() == known
    policy.free_encoders()
    assert torch.equal(sample(policy), drawn)  # sampling fetches them itself
    policy.reload_encoders()
    assert torch.equal(policy.encode(images).mean, before.mean)
    assert torch.equal(policy.encode_prompts(PROMPTS).tensors["hidden"], prompts.tensors["hidden"])
    assert not any(p.requires_grad for p in policy.pipeline.vae.parameters())


# --- memory and kernels ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_gradient_checkpointing_changes_memory_and_no_number(trained: Any, batches: Batches) -> None:
    def gradients() -> dict[str, Tensor]:
        for parameter in trained.trainable_parameters():
            parameter.grad = None
        DiffusionDPO(trained, beta=10.0).loss(batches(2)).loss.backward()
        return {name: p.grad.clone() for name, p in trained.named_trainable()}

    calls = []
    trained.denoiser.mid_block.resnets[1].register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    plain = gradients()
    assert calls.count(True) == 1
    trained.denoiser.enable_gradient_checkpointing()
    again = gradients()
    assert calls.count(True) == 3  # the policy's activations are computed again in the backward pass
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({"cross_attention_dim": 768, "attention_head_dim": 8}, 859_520_964),
        (
            {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
            865_910_724,
        ),
    ],
    ids=["sd1", "sd2"],
)
def test_published_sizes(changes: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, **changes)
    assert sum(p.numel() for p in unet.parameters()) == parameters

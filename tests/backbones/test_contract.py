"""The contract that every family keeps, on tiny random pipelines saved in the published layout.

The heart is `test_predict_is_the_pipelines_own_loop`: it hooks the scheduler while the diffusers pipeline draws, runs
our `predict` from the same state, and compares both as noise - x0. It catches a wrong unit of time, a wrong sign, a
missing time id or a wrong mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.backbones import LoRA, inspect_model
from diffalign.predictions import Prediction
from diffalign.trainers.diffusion_dpo import DiffusionDPO
from tests.backbones.families import PROMPTS, Family
from tests.backbones.tiny_family import STEPS, Tiny, move_away


def some_timesteps(policy: Any) -> Tensor:
    return torch.as_tensor(policy.schedule.timesteps_at(torch.tensor([0.31, 0.83])))


def test_it_is_recognised_and_its_shapes_are_known(tiny: Tiny) -> None:
    family, policy = tiny.family, tiny.base
    assert inspect_model(str(tiny.folder)).family == family.pipeline_class
    assert policy.latent_shape == family.latent_shape
    assert policy.size == family.size
    assert policy.num_frames == family.num_frames
    conditioning = policy.encode_prompts(PROMPTS)
    assert len(conditioning) == 2
    assert len(conditioning[[1]]) == 1
    assert all(len(tensor) == 2 for tensor in conditioning.tensors.values())
    assert all(t.dtype == torch.float32 for t in conditioning.tensors.values() if t.is_floating_point())
    moments = policy.encode(tiny.media())
    assert moments.mean.shape == moments.std.shape == (2, *family.latent_shape)
    assert moments.mean.dtype == moments.std.dtype == torch.float32
    decoded = policy.decode(moments.mean)
    assert decoded.shape == tiny.media().shape
    assert 0 <= float(decoded.min()) <= float(decoded.max()) <= 1
    output = policy.predict(tiny.latents(), some_timesteps(policy), conditioning)
    assert output.shape == (2, *family.latent_shape)
    assert output.isfinite().all()
    assert not any(m.training for m in policy.denoiser.modules())
    assert policy.trainable_parameters() == []
    assert policy.guidance_scale > 0
    assert policy.num_inference_steps > 0
    assert min(policy.token_counts(PROMPTS)) >= 2


def test_rows_do_not_see_each_other(tiny: Tiny) -> None:
    """Every row has its own timestep and prompt; prompts of different lengths change nothing for each other."""
    policy, timesteps = tiny.base, some_timesteps(tiny.base)
    conditioning = policy.encode_prompts(PROMPTS)
    with torch.no_grad():
        together = policy.predict(tiny.latents(), timesteps, conditioning)
        for i, prompt in enumerate(PROMPTS):
            alone = policy.predict(tiny.latents()[i : i + 1], timesteps[i : i + 1], policy.encode_prompts([prompt]))
            torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=2e-5)
        swapped = policy.predict(tiny.latents(), timesteps.flip(0), conditioning)
        others = policy.predict(tiny.latents(), timesteps, conditioning[[1, 0]])
    assert not torch.allclose(swapped, together, atol=1e-4)
    assert not torch.allclose(others, together, atol=1e-6)


@pytest.mark.parametrize("guided", [False, True], ids=["guidance-off", "guidance-on"])
def test_predict_is_the_pipelines_own_loop(tiny: Tiny, guided: bool) -> None:
    family, policy = tiny.family, tiny.base
    if guided and family.guidance_on is None:
        pytest.skip("no classifier-free guidance in this family")
    guidance = family.guidance_on if guided else family.guidance_off
    assert guidance is not None
    pipeline = tiny.pipeline()
    seen = record_steps(family, pipeline)
    tiny.draw(pipeline, guidance)
    check_steps(tiny, pipeline.scheduler, seen, policy, policy if guided else None)


def record_steps(family: Family, pipeline: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(output after guidance, timestep, sample as the denoiser reads it) of every step of the pipeline to come."""
    scheduler, seen = pipeline.scheduler, []
    step = scheduler.step

    def recording(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        read = family.model_input(scheduler, sample, timestep)
        seen.append((model_output.clone(), torch.as_tensor(timestep), read.clone()))
        return step(model_output, timestep, sample, *args, **kwargs)

    scheduler.step = recording
    return seen


def check_steps(tiny: Tiny, scheduler: Any, seen: Sequence[Any], policy: Any, negative: Any | None) -> None:
    """Every step's output is the policy's prediction, guided away from the one of `negative` for the empty prompt."""
    family, guidance = tiny.family, tiny.family.guidance_on
    assert len(seen) >= STEPS
    conditional = policy.encode_prompts(PROMPTS)
    unconditional = policy.encode_unconditional(len(PROMPTS))
    for output, timestep, sample in seen:
        theirs = family.latents(policy, family.velocity(scheduler, output, sample, timestep))
        noisy = family.latents(policy, sample)
        timesteps = family.timesteps(timestep).reshape(1).expand(len(PROMPTS))
        alphas, sigmas = policy.schedule.scales(timesteps)
        assert float(sigmas[0]) == pytest.approx(family.noise_level(scheduler, timestep), abs=1e-5)
        with torch.no_grad():
            ours = policy.predict(noisy, timesteps, conditional)
            if negative is not None:
                assert guidance is not None
                ours = family.guide(ours, negative.predict(noisy, timesteps, unconditional), guidance)
        ours = policy.prediction.convert(ours.double(), Prediction.VELOCITY, noisy.double(), alphas, sigmas).float()
        scale = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=family.tolerance)


def test_sampling_is_the_pipelines_and_follows_seed_and_prompt(tiny: Tiny) -> None:
    guidance = tiny.family.guidance_on or tiny.family.guidance_off
    drawn = tiny.drawn(guidance)
    torch.testing.assert_close(drawn, tiny.draw(tiny.pipeline(), guidance), rtol=0, atol=1e-5)
    torch.rand(3)
    assert torch.equal(
        tiny.sample(tiny.base, PROMPTS, [0, 1], guidance_scale=guidance, num_inference_steps=STEPS), drawn
    )
    alone = tiny.sample(tiny.base, PROMPTS[1:], [1], guidance_scale=guidance, num_inference_steps=STEPS)
    torch.testing.assert_close(alone[0], drawn[1], rtol=0, atol=3e-4)  # sums in another order
    other = tiny.sample(tiny.base, PROMPTS[1:], [2], guidance_scale=guidance, num_inference_steps=STEPS)
    assert not torch.allclose(other[0], drawn[1], atol=1e-2)


def test_a_negative_model_is_the_unconditional_branch(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    """Check 7.5.2: the same weights change nothing, others take the empty prompt's part alone, and none at scale 1."""
    family, policy, guidance, other = tiny.family, tiny.load(), tiny.family.guidance_on, tiny.trained
    if guidance is None:
        with pytest.raises(ValueError, match="draws without an unconditional branch"):
            policy.put_negative(tiny.adapter)
        return

    def sample(scale: float, **options: Any) -> Tensor:
        return tiny.sample(policy, PROMPTS, [0, 1], guidance_scale=scale, num_inference_steps=STEPS, **options)

    usual = tiny.drawn(guidance)
    policy.put_negative(tiny.adapter, scale=0.0)
    torch.testing.assert_close(sample(guidance, negative=True), usual, rtol=0, atol=1e-4)
    policy.put_negative(tiny.adapter)
    scheduler = policy.pipeline.scheduler
    seen, step = record_steps(family, policy.pipeline), scheduler.step
    changed = sample(guidance, negative=True)
    assert step is scheduler.step
    del scheduler.step
    check_steps(tiny, scheduler, seen, tiny.base, other)
    assert not torch.allclose(changed, usual, atol=1e-4)
    assert torch.equal(sample(guidance), usual)  # nothing of it is left behind
    assert "guidance is off" not in caplog.text
    assert torch.equal(sample(family.guidance_off, negative=True), tiny.drawn(family.guidance_off))
    assert "guidance is off: the negative model was not asked" in caplog.text


def test_decoding_undoes_the_scaling_of_encoding(tiny: Tiny) -> None:
    """Against the pipeline's own latents: what it decodes at the end of its loop is what our `decode` gives."""
    pipeline = tiny.pipeline()
    final: list[Tensor] = []

    def last(pipe: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        final.append(values["latents"].clone())
        return values

    drawn = _draw_with_callback(tiny, pipeline, last)
    torch.testing.assert_close(tiny.base.decode(tiny.family.latents(tiny.base, final[-1])), drawn, rtol=0, atol=1e-4)
    moments = tiny.base.encode(tiny.media())
    vae = tiny.base.pipeline.vae
    pixels = tiny.media() * 2 - 1
    with torch.no_grad():
        raw, _ = tiny.base._raw_moments(vae, pixels.transpose(1, 2) if tiny.family.num_frames > 1 else pixels)
        again = tiny.base._pixels(vae, raw)
    again = (again.transpose(1, 2) if tiny.family.num_frames > 1 else again) / 2 + 0.5
    torch.testing.assert_close(tiny.base.decode(moments.mean), again.clamp(0, 1), rtol=0, atol=1e-4)


def _draw_with_callback(tiny: Tiny, pipeline: Any, callback: Any) -> Tensor:
    own = tiny.family.call
    object.__setattr__(tiny.family, "call", {**own, **tiny.family.callback(callback)})
    try:
        return tiny.draw(pipeline, tiny.family.guidance_off)
    finally:
        object.__setattr__(tiny.family, "call", own)


@pytest.mark.parametrize("lora", [LoRA(rank=2, alpha=4.0), None], ids=["lora", "full"])
def test_the_reference_is_the_base_bit_for_bit(tiny: Tiny, lora: LoRA | None) -> None:
    policy = tiny.load(lora=lora, train=True)
    arguments = (tiny.latents(), some_timesteps(policy), policy.encode_prompts(PROMPTS))
    with torch.no_grad():
        expected = tiny.base.predict(*arguments)
    assert torch.equal(policy.predict(*arguments), expected)
    move_away(policy)
    reference = policy.frozen().predict(*arguments)
    assert torch.equal(reference, expected)
    assert not reference.requires_grad
    moved = policy.predict(*arguments)
    assert moved.requires_grad
    assert not torch.allclose(moved, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LoRA(rank=4), None], ids=["lora", "full"])
def test_training_lowers_the_loss_of_a_fixed_pair(tiny: Tiny, lora: LoRA | None) -> None:
    policy = tiny.load(lora=lora, train=True)
    trainer, batch = DiffusionDPO(policy, beta=500.0), tiny.batch(policy)
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=1e-3 if lora else 1e-4)
    losses = []
    for _ in range(4):
        output = trainer.loss(batch)
        output.loss.backward()
        if not losses:
            assert all(parameter.grad is not None for parameter in policy.trainable_parameters() if lora)
            assert any(bool(p.grad.abs().any()) for p in policy.trainable_parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output.loss.detach()))
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[1] < losses[0]
    assert losses[-1] < losses[0] - 1e-4


def test_trained_weights_go_through_their_file(tiny: Tiny) -> None:
    """The LoRA file, read by plain diffusers and by a fresh policy, draws what the trained policy draws."""
    guidance = tiny.family.guidance_off
    expected = tiny.sample(tiny.trained, PROMPTS, [0, 1], guidance_scale=guidance, num_inference_steps=STEPS)
    assert not torch.allclose(expected, tiny.drawn(guidance), atol=1e-4)
    fresh = tiny.load(adapter=tiny.adapter)
    drawn = tiny.sample(fresh, PROMPTS, [0, 1], guidance_scale=guidance, num_inference_steps=STEPS)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-5)
    if tiny.family.has_lora_loader:
        pipeline = tiny.pipeline()
        tiny.family.load_lora(pipeline, tiny.adapter)
        torch.testing.assert_close(tiny.draw(pipeline, guidance), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_training_goes_on_from_trained_weights(tiny: Tiny, tmp_path: Path, lora: bool) -> None:
    """Policy and reference start as the given weights, exactly; what is saved fits the original base model."""
    if lora:
        first, folder = tiny.trained, tiny.adapter
    else:
        first, folder = tiny.load(train=True), tmp_path / "first"
        move_away(first, 0.01)
        first.save_trained(folder)
    arguments = (tiny.latents(), some_timesteps(first), first.encode_prompts(PROMPTS))
    policy = tiny.load(start=folder, train=True)
    with torch.no_grad():
        expected = first.predict(*arguments)
        assert not torch.equal(expected, tiny.base.predict(*arguments))
        assert torch.equal(policy.predict(*arguments), expected)
        assert torch.equal(policy.frozen().predict(*arguments), expected)
    batch = tiny.batch(policy)
    trainer = DiffusionDPO(policy, beta=500.0)
    loss = trainer.loss(batch).loss
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-7)
    loss.backward()
    named = dict(policy.denoiser.named_parameters())
    own = {name for name, _ in policy.named_trainable()}
    assert {name for name, p in named.items() if p.grad is not None} <= own
    assert any(bool(named[name].grad.abs().any()) for name in own if named[name].grad is not None)
    assert not any("reference" in name for name in own)
    move_away(policy, 0.1 if lora else 0.01)
    with torch.no_grad():
        moved = policy.predict(*arguments)
        assert torch.equal(policy.frozen().predict(*arguments), expected)
    assert not torch.allclose(moved, expected, atol=1e-6)
    policy.save_trained(tmp_path / "second")
    with torch.no_grad():
        alone = tiny.load(adapter=tmp_path / "second")
        torch.testing.assert_close(alone.predict(*arguments), moved)
        compared = tiny.load(start=folder, adapter=tmp_path / "second")
        torch.testing.assert_close(compared.predict(*arguments), moved)
        assert torch.equal(compared.frozen().predict(*arguments), expected)


@pytest.mark.slow
def test_full_weights_go_through_their_folder(tiny: Tiny, tmp_path: Path) -> None:
    policy = tiny.load(train=True)
    move_away(policy, 0.01)
    policy.save_trained(tmp_path)
    fresh = tiny.load(adapter=tmp_path)
    arguments = (tiny.latents(), some_timesteps(policy), policy.encode_prompts(PROMPTS))
    with torch.no_grad():
        assert torch.equal(fresh.predict(*arguments), policy.predict(*arguments))
        assert torch.equal(fresh.frozen().predict(*arguments), tiny.base.predict(*arguments))


def test_encoders_are_freed_and_come_back(tiny: Tiny) -> None:
    policy = tiny.load()
    known, moments, embedded = policy.encoder_fingerprint(), policy.encode(tiny.media()), policy.encode_prompts(PROMPTS)
    policy.free_encoders()
    with pytest.raises(RuntimeError, match=r"was freed; call reload_encoders\(\) first"):
        policy.encode(tiny.media())
    with pytest.raises(RuntimeError, match=r"was freed; call reload_encoders\(\) first"):
        policy.encode_prompts(PROMPTS)
    policy.reload_encoders()
    assert torch.equal(policy.encode(tiny.media()).mean, moments.mean)
    again = policy.encode_prompts(PROMPTS)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in embedded.tensors.items())
    assert tiny.base.encoder_fingerprint() == known


@pytest.mark.slow
def test_a_denoiser_in_bfloat16_predicts_and_draws(tiny: Tiny) -> None:
    policy = tiny.load(lora=LoRA(rank=2), train=True, dtype=torch.bfloat16)
    assert {p.dtype for p in policy.trainable_parameters()} == {torch.float32}
    arguments = (tiny.latents(), some_timesteps(policy), policy.encode_prompts(PROMPTS))
    output = policy.predict(*arguments)
    with torch.no_grad():
        torch.testing.assert_close(output.float(), tiny.base.predict(*arguments), rtol=0.1, atol=0.1)
    drawn = tiny.sample(policy, PROMPTS, [0, 1], num_inference_steps=2)
    assert drawn.dtype == torch.float32
    assert drawn.isfinite().all()

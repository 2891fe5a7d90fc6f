"""What is special to Qwen-Image: packing, statistics per channel, the template's cut, true guidance, dead layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffalign.backbones import LoRA, load_policy
from tests.backbones.families.base import PROMPTS
from tests.backbones.families.qwen_image import save_tiny

pytestmark = pytest.mark.slow  # as those of all families but the first ones

SIZE = (8, 12)
UNREAD = ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("qwen-image") / "pipeline")


@pytest.fixture(scope="module")
def base(folder: Path) -> Any:
    """The plain model; no test may change it."""
    return load_policy(str(folder), size=SIZE)


def inputs(policy: Any) -> tuple[Any, ...]:
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    return latents, torch.tensor([300.0, 800.0]), policy.encode_prompts(PROMPTS)


def test_latents_are_the_autoencoders_with_a_mean_and_a_deviation_per_channel(base: Any) -> None:
    images = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    moments, config = base.encode(images), base.pipeline.vae.config
    with torch.no_grad():
        posterior = base.pipeline.vae.encode(images[:, :, None] * 2 - 1).latent_dist
    for channel, (mean, std) in enumerate(zip(config.latents_mean, config.latents_std, strict=True)):
        expected = (posterior.mean[:, channel, 0] - mean) / std
        torch.testing.assert_close(moments.mean[:, channel], expected)
        torch.testing.assert_close(moments.std[:, channel], posterior.std[:, channel, 0] / std)


def test_latents_reach_the_network_packed_as_the_pipeline_packs_them(base: Any) -> None:
    seen: dict[str, Any] = {}

    def look(module: nn.Module, arguments: Any, options: dict[str, Any]) -> None:
        seen.update(options)

    latents, timesteps, conditioning = inputs(base)
    hook = base.denoiser.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        base.predict(latents, timesteps, conditioning)
    hook.remove()
    assert torch.equal(seen["hidden_states"], base.pipeline._pack_latents(latents, *latents.shape))
    assert seen["img_shapes"] == [[(1, 2, 3)]] * 2
    torch.testing.assert_close(seen["timestep"], torch.tensor([0.3, 0.8]))
    counts = base.token_counts(PROMPTS)
    assert seen["encoder_hidden_states"].shape[1] == max(counts)  # not the 512 that are kept
    assert seen["encoder_hidden_states_mask"].sum(dim=1).tolist() == counts


def test_the_prompt_begins_where_the_published_cut_ends(base: Any) -> None:
    pipeline = base.pipeline
    text = pipeline.prompt_template_encode.format(PROMPTS[0])
    kept = pipeline.tokenizer(text).input_ids[pipeline.prompt_template_encode_start_idx :]
    assert pipeline.tokenizer.decode(kept) == f"{PROMPTS[0]}<|im_end|>\n<|im_start|>assistant\n"
    assert base.token_counts(PROMPTS[:1]) == [len(kept)]


def test_prompts_are_padded_to_one_length_and_cut_at_it(base: Any) -> None:
    prompts = [*PROMPTS, "a star " * 200]
    counts = base.token_counts(prompts)
    assert counts[-1] > base.max_tokens == 512
    tensors = base.encode_prompts(prompts).tensors
    assert tensors["hidden"].shape == (3, 512, 16)
    assert tensors["mask"].dtype == torch.bool
    assert tensors["mask"].sum(dim=1).tolist() == [min(count, 512) for count in counts]
    theirs, mask = base.pipeline.encode_prompt(list(PROMPTS), max_sequence_length=512)
    for row in range(2):
        torch.testing.assert_close(tensors["hidden"][row][tensors["mask"][row]], theirs[row][mask[row].bool()])
    assert not tensors["hidden"][0][~tensors["mask"][0]].any()


def test_the_empty_prompt_is_the_published_negative_prompt(base: Any) -> None:
    empty, blank = base.encode_prompts([""]).tensors, base.encode_prompts([" "]).tensors
    assert torch.equal(empty["hidden"], blank["hidden"])
    assert base.token_counts([""]) == base.token_counts([" "]) == [6]


def test_what_padding_holds_changes_nothing(base: Any) -> None:
    latents, timesteps, conditioning = inputs(base)
    tensors = conditioning.tensors
    noise = torch.where(tensors["mask"][..., None], tensors["hidden"], torch.full_like(tensors["hidden"], 7.0))
    filled = type(conditioning)({"hidden": noise, "mask": tensors["mask"]})
    with torch.no_grad():
        expected = base.predict(latents, timesteps, conditioning)
        torch.testing.assert_close(base.predict(latents, timesteps, filled), expected)


def test_guidance_changes_what_is_drawn_and_is_off_at_one(base: Any) -> None:
    def draw(scale: float) -> Tensor:
        images: Tensor = base.sample(PROMPTS[:1], [0], guidance_scale=scale, num_inference_steps=2)
        return images

    assert "negative_prompt" not in base._sampling_arguments(1.0)
    assert base._sampling_arguments(4.0)["true_cfg_scale"] == 4.0
    assert not torch.allclose(draw(4.0), draw(1.0), atol=1e-4)


def test_layers_that_nothing_reads_are_not_trained(folder: Path) -> None:
    """The last block's text goes nowhere: distributed training would wait for its gradients for ever."""
    for lora in (LoRA(rank=2), LoRA(rank=2, target_modules=("to_add_out", "txt_mlp.net.2")), None):
        policy: Any = load_policy(str(folder), size=SIZE, lora=lora, train=True)
        with torch.no_grad():
            for parameter in policy.trainable_parameters():
                parameter.add_(0.1)  # away from B = 0, where the gradient of A is zero
        policy.predict(*inputs(policy)).square().mean().backward()
        named = policy.named_trainable()
        assert all(parameter.grad is not None for _, parameter in named)
        assert any("transformer_blocks.0.attn.to_add_out" in name for name, _ in named)
        assert not any(f"transformer_blocks.1.{part}" in name for name, _ in named for part in UNREAD)
        if lora is None:
            assert sum(not parameter.requires_grad for parameter in policy.denoiser.parameters()) == 9


def test_adapters_sit_on_both_streams(folder: Path) -> None:
    policy: Any = load_policy(str(folder), size=SIZE, lora=LoRA(rank=2), train=True)
    layers = {name.split(".lora_")[0].split("transformer_blocks.")[1] for name, _ in policy.named_trainable()}
    image, text = ("to_q", "to_k", "to_v", "to_out.0"), ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    assert layers == {
        *(f"0.attn.{name}" for name in (*image, *text)),
        *(f"1.attn.{name}" for name in (*image, "add_k_proj", "add_v_proj")),
    }


def test_sizes_that_cannot_be_packed_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"size must be multiples of 4 pixels here, got \(8, 10\)"):
        load_policy(str(folder), size=(8, 10))


def test_the_published_transformer_has_twenty_billion_parameters() -> None:
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=64,
            out_channels=16,
            num_layers=60,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=3584,
            guidance_embeds=False,
            axes_dims_rope=(16, 56, 56),
        )
        vae = AutoencoderKLQwenImage(base_dim=96, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2)
    assert sum(p.numel() for p in transformer.parameters()) / 1e9 == pytest.approx(20.43, abs=0.01)
    assert sum(p.numel() for p in vae.parameters()) / 1e6 == pytest.approx(126.9, abs=0.1)
    assert transformer.config.in_channels == 4 * vae.config.z_dim == 4 * len(vae.config.latents_mean)

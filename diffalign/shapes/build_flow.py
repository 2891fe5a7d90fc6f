"""The embedded world's flow transformer: a tiny Stable Diffusion 3 on the same scenes and the same autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPTextModel

from diffalign.schedules import FlowSchedule
from diffalign.shapes import networks
from diffalign.shapes.scene_batches import SceneBatches, encode_scenes
from diffalign.shapes.stages import Stage, generators


def moments_scale(moments: Tensor) -> tuple[float, float]:
    """Shift and scaling factors that give latents of these moments [N, 16, 8, 8] mean zero and deviation one."""
    mean, std = moments.chunk(2, dim=1)
    return float(mean.mean()), float(1.0 / (mean.var() + std.square().mean()).sqrt())


def embed(encoders: nn.ModuleList, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the pipeline tells its transformer: hidden states [B, 21, 144], the last one T5's zeros, and [B, 144]."""
    outputs: list[Any] = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
    return torch.cat([hidden, hidden.new_zeros(len(ids), 1, hidden.shape[-1])], dim=1), pooled


def train_flow(
    work: Path, vae: AutoencoderKL, text_encoder: CLIPTextModel, seed: int, steps: tuple[int, int], scenes: int,
    poor_share: float, *, compiled: bool = False,
) -> StableDiffusion3Pipeline:  # fmt: skip
    """Transformer and text encoders together, on clean drawings and then on drawings of mixed quality.

    The loss is rectified flow's (Esser et al. 2024, arXiv:2403.03206): squared error of noise - x0, with timesteps of
    logit-normal density.

    Args:
        work: Folder of the states and of the encoded scenes.
        vae: The trained autoencoder, shared with the UNet's pipeline; this one gets factors of its own.
        text_encoder: The UNet's text encoder, whose weights the first text encoder starts from.
        seed: Of everything random.
        steps: On clean drawings, and then on mixed ones.
        scenes: How many scenes are encoded.
        poor_share: Share of poor drawings among the mixed ones.
        compiled: Compile the transformer; a third faster after a minute, with numbers that differ in the last digits.
    """
    torch.manual_seed(seed + 3)
    tokenizer = networks.build_tokenizer()
    encoders = nn.ModuleList(networks.build_flow_text_encoders(tokenizer))
    taught = {f"text_model.{name}": weight for name, weight in text_encoder.state_dict().items()}
    encoders[0].load_state_dict({name: taught.get(name, own) for name, own in encoders[0].state_dict().items()})
    transformer = networks.build_flow_transformer()
    clean = encode_scenes(vae, work, seed, scenes)
    poor = encode_scenes(vae, work, seed, scenes * 2 // 5, poor=True)
    shift, scaling = moments_scale(clean[0])
    batches = SceneBatches(clean, poor, scaling, shift)
    schedule = FlowSchedule(1000, float(networks.build_flow_scheduler().config.shift))
    predict: Any = torch.compile(transformer) if compiled else transformer
    modules = {"encoders": encoders, "transformer": transformer}
    for name, length, share, key in (("flow", steps[0], 0.0, 10), ("flow_mixed", steps[1], poor_share, 11)):
        stage = Stage(name, work, modules, lr=1e-3, steps=length, ema=0.998, cooldown=0.25)

        def loss_of(step: int, share: float = share, key: int = key) -> Tensor:
            generator = generators(seed, key, step)[1]
            latents, rows = batches.draw(generator, share, 32)
            noise = torch.randn(latents.shape, generator=generator)
            levels = torch.randn(32, generator=generator, dtype=torch.float64).sigmoid()
            timesteps = schedule.timestep_of_index((1000 * (1 - levels)).long().clamp(max=999))
            hidden, pooled = embed(encoders, batches.ids(rows, generator))
            output = predict(
                hidden_states=schedule.add_noise(latents, noise, timesteps),
                timestep=timesteps.float(),
                encoder_hidden_states=hidden,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
            loss: Tensor = (output - (noise - latents)).square().mean()
            return loss

        stage.run(loss_of)
    stage.load_average()
    own = AutoencoderKL.from_config(vae.config)
    own.load_state_dict(vae.state_dict())
    own.register_to_config(scaling_factor=scaling, shift_factor=shift)
    return networks.build_flow_pipeline(tokenizer, tuple(encoders), own, transformer)

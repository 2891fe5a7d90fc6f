"""Reward models on noisy latents: the first blocks of a flow transformer, and a small head.

Liu et al. 2025, "Improving Video Generation with Human Feedback" (arXiv:2501.13918), for guidance by a reward's
gradient. Such a model reads what the denoiser reads, x_t with t and the prompt, so that no gradient goes through the
autoencoder; trained on clean latents only, it misleads the sampler.

The trunk is the policy's own transformer cut off after `layers` blocks, with the weights it has, and is called by the
policy's family as any denoiser is. Its tokens are taken where they would enter the last projection, averaged, and
turned into one number for each dimension. That place has one name, `proj_out`, in all families that are supported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from diffalign.backbones.base import PipelinePolicy
from diffalign.backbones.loading import ModelSource, policy_class, read_part
from diffalign.batches import Conditioning
from diffalign.predictions import Prediction
from diffalign.randomness import generator
from diffalign.resumable import write_atomically

__all__ = ["KIND", "NoisyReward", "RewardCard", "check_trunk", "read_card"]

KIND = "noisy_latent"
CARD, WEIGHTS = "reward.json", "model.safetensors"
"""Not config.json, which is a checkpoint's own file: every checkpoint is a reward model that can be read."""
SHIPPED = "diffalign://shapes_flow_reward"
"""Name of the one that ships, trained by `diffalign train-reward configs/shapes_flow_nrg.yaml`."""
FAMILIES = ("StableDiffusion3Pipeline", "SanaPipeline", "WanPipeline", "HunyuanVideoPipeline")
"""Pipelines whose samplers hold latents in the policy's own shape, and whose transformers have a `proj_out`."""
BLOCKS = ("transformer_blocks", "blocks")
"""Names of a transformer's list of blocks, of which the first `layers` are kept."""
LATER_BLOCKS = "single_transformer_blocks"
"""Blocks that come after those, where there are any; all of them are left out."""


@dataclass(frozen=True)
class RewardCard:
    """What a reward model is, as its folder's `reward.json` says.

    Attributes:
        model: Name of the model whose transformer the trunk was.
        family: Its pipeline's class.
        denoiser: Class of the transformer.
        denoiser_config: Its configuration, JSON values.
        layers: Blocks that were kept.
        dimensions: Names of the rewards.
        ties: k of the law of comparisons it was trained with; see `diffalign.comparisons`.
        encoder: Fingerprint of the autoencoder and text encoders whose latents and embeddings it reads.
        kind: Always `noisy_latent`.
    """

    model: str
    family: str
    denoiser: str
    denoiser_config: Mapping[str, Any]
    layers: int
    dimensions: tuple[str, ...]
    ties: float
    encoder: str
    kind: str = KIND

    def check(self, source: ModelSource) -> None:
        """Refuses a reward model that was trained for another kind of model; loads no weights.

        Raises:
            ValueError: If pipeline or transformer differ.
        """
        mine = f"the reward model was trained for {self.model} ({self.family})"
        if source.family != self.family:
            raise ValueError(f"{mine}, and {source.name} is a {source.family}; train one with `diffalign train-reward`")
        found = read_part(source, policy_class(source).part)
        for key, value in found.items():
            own = self.denoiser_config.get(key, value)
            if own != value:
                raise ValueError(
                    f"{mine}, whose transformer has {key} {own}, and {source.name} has {value}; train one with "
                    "`diffalign train-reward`"
                )

    def weights(self, wanted: Mapping[str, float]) -> list[float]:
        """The weight of every dimension: as given, 0 where others are given, 1 for all if none is.

        Raises:
            ValueError: If a name is no dimension.
        """
        unknown = [name for name in wanted if name not in self.dimensions]
        if unknown:
            known = ", ".join(self.dimensions)
            raise ValueError(f"reward_weights: no dimension {unknown[0]!r} in the reward model (it has {known})")
        return [float(wanted.get(name, 0.0 if wanted else 1.0)) for name in self.dimensions]


def reward_folder(name: str | Path) -> Path:
    """Where a reward model lies: a folder, or the one that ships for the embedded flow transformer, `SHIPPED`."""
    if str(name) == SHIPPED:
        return Path(str(resources.files("diffalign.shapes").joinpath("assets/flow_reward")))
    return Path(name)


def read_card(folder: str | Path) -> RewardCard:
    """What a folder's reward model is, or `SHIPPED`; loads no weights.

    Raises:
        ValueError: If the folder holds no reward model on noisy latents.
    """
    path = reward_folder(folder) / CARD
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); train the reward model again") from error
    if not isinstance(found, dict) or found.get("kind") != KIND or not (path.parent / WEIGHTS).is_file():
        raise ValueError(
            f"{folder} holds no reward model on noisy latents ({CARD} of kind {KIND!r} and {WEIGHTS}); train one with "
            "`diffalign train-reward` and give its folder"
        )
    return RewardCard(**{**found, "dimensions": tuple(found["dimensions"])})


def check_trunk(source: ModelSource, layers: int) -> None:
    """Refuses a model whose transformer cannot be the trunk; loads no weights.

    Raises:
        ValueError: If it cannot, or has fewer blocks.
    """
    if source.family not in FAMILIES or source.prediction is not Prediction.VELOCITY:
        raise ValueError(
            f"reward models on noisy latents are for flow models of {', '.join(FAMILIES)}; {source.name} is a "
            f"{source.family} that predicts {source.prediction.value!r}"
        )
    kind = policy_class(source)
    if any(source.parts.get(part) is not None for part in kind.more_parts):
        raise ValueError(f"{source.name} has two transformers, and a reward model reads one; take a model with one")
    found = read_part(source, kind.part).get("num_layers")
    if found is not None and layers > int(found):
        raise ValueError(f"reward.layers is {layers}, and the transformer of {source.name} has {found} blocks")


class NoisyReward(nn.Module):
    """r(x_t, t, c): rewards [B, D] of noisy latents [B, C, ...] at timesteps [B] with their prompts' embeddings.

    Args:
        policy: Knows how its family's transformer is called; its weights are not used.
        trunk: The transformer, cut already.
        card: What it is.
    """

    def __init__(self, policy: PipelinePolicy, trunk: Any, card: RewardCard) -> None:
        super().__init__()
        self.policy, self.card = policy, card
        self.trunk = trunk
        width = int(trunk.proj_out.in_features)
        self.head = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, len(card.dimensions)))

    @classmethod
    def start(
        cls,
        policy: PipelinePolicy,
        layers: int,
        dimensions: Sequence[str] = ("overall",),
        *,
        trained: bool = True,
        ties: float = 1.0,
        seed: int = 0,
    ) -> NoisyReward:
        """An untrained reward model on the policy's own transformer, which is cut in place: it cannot draw any more.

        All rewards are 0 at the start: the head's last layer is.

        Args:
            policy: As `load_policy` gives it without adapters; its text encoders must be there.
            layers: Blocks to keep.
            dimensions: Names of the rewards.
            trained: Whether the trunk is trained with the head.
            ties: k of the law of comparisons it will be trained with.
            seed: Of the head's initial weights.
        """
        trunk: Any = policy.denoiser
        config = json.loads(json.dumps({k: v for k, v in trunk.config.items() if not k.startswith("_")}, default=str))
        source = policy.source
        kind = type(trunk).__name__
        card = RewardCard(
            source.name, source.family, kind, config, layers, tuple(dimensions), ties, policy.encoder_fingerprint()
        )
        _cut(trunk, layers)
        reward = cls(policy, trunk, card).to(policy.device)
        for name, parameter in reward.head.named_parameters():
            bound = 0.0 if name.startswith("2.") else int(trunk.proj_out.in_features) ** -0.5
            drawn = torch.rand(parameter.shape, generator=generator(seed, "reward head", name))
            parameter.data.copy_(bound * (2 * drawn - 1))
        reward.trunk.requires_grad_(trained)
        if trained:
            reward._leave_out_the_unreached()
        return reward.eval()

    @classmethod
    def from_pretrained(cls, folder: str | Path, policy: PipelinePolicy) -> NoisyReward:
        """Reads what `save_pretrained` wrote, frozen, on the policy's device.

        Args:
            folder: Of the reward model, or `SHIPPED`.
            policy: Of the same family; whatever adapters it has, the trunk's weights are the folder's.

        Raises:
            ValueError: If the folder holds none, or one that reads other latents or embeddings than the policy's.
        """
        card = read_card(folder)
        if card.encoder != policy.encoder_fingerprint():
            raise ValueError(
                f"the reward model in {folder} was trained for {card.model}, whose autoencoder or text encoders are "
                f"not those of {policy.source.name}; train one with `diffalign train-reward`"
            )
        with init_empty_weights():  # buffers are real: some are in no file
            trunk = getattr(diffusers, card.denoiser).from_config(dict(card.denoiser_config))
        _cut(trunk, card.layers)
        reward, path = cls(policy, trunk, card), reward_folder(folder) / WEIGHTS
        try:
            reward.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()}, assign=True)
        except (SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} cannot be read ({reason}); train the model again") from error
        return reward.to(policy.device).eval().requires_grad_(False)

    def save_pretrained(self, folder: Path) -> None:
        """Writes `reward.json` and `model.safetensors`: head and trunk, so that no other file is needed to read it."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_atomically(folder / WEIGHTS, save(state))
        write_atomically(folder / CARD, (json.dumps(asdict(self.card), indent=2) + "\n").encode())

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Rewards [B, D], float32."""
        tokens: list[Tensor] = []
        hook = self.trunk.proj_out.register_forward_pre_hook(lambda _, arguments: tokens.append(arguments[0]))
        try:
            self.policy._call(self.trunk, self.trunk.dtype, noisy_latents, timesteps, conditioning)
        finally:
            hook.remove()
        pooled = tokens[0].flatten(1, -2).mean(dim=1)
        rewards: Tensor = self.head(pooled.to(next(self.head.parameters()).dtype)).float()
        return rewards

    def _leave_out_the_unreached(self) -> None:
        """Freezes parameters that no gradient reaches: the last projection, and the last block's update of the text."""
        policy = self.policy
        latents = torch.zeros(1, *policy.latent_shape, device=policy.device)
        timesteps = policy.schedule.timesteps_at(torch.tensor([0.5]))
        parameters = list(self.trunk.parameters())
        with torch.enable_grad():
            rewards = self(latents, timesteps, policy.encode_prompts([""]))
            gradients = torch.autograd.grad(rewards.sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)


def _cut(trunk: Any, layers: int) -> None:
    """Keeps the first blocks of a transformer."""
    name = next(name for name in BLOCKS if hasattr(trunk, name))
    blocks = getattr(trunk, name)
    if not 1 <= layers <= len(blocks):
        raise ValueError(f"reward.layers must be 1 to {len(blocks)} for {type(trunk).__name__}, got {layers}")
    setattr(trunk, name, blocks[:layers])
    if hasattr(trunk, LATER_BLOCKS):
        setattr(trunk, LATER_BLOCKS, nn.ModuleList())

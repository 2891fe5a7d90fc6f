"""`diffalign train-reward`: a reward model on noisy latents, trained on the pairs of a run.

Both samples of a pair are noised with one timestep and one noise, and what was preferred is explained by the difference
of their rewards; see `diffalign.comparisons`. The loop is `fit`'s, so that checkpoints, resuming, several processes and
metrics are those of `diffalign train`. Everything goes into `<output_dir>/reward`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import DistributedType
from torch import Tensor

from diffalign.backbones import ModelSource, inspect_model
from diffalign.backbones.loading import check_gradient_checkpointing, check_options, policy_class
from diffalign.batches import PairBatch
from diffalign.checkpointing import recompute_activations
from diffalign.comparisons import comparison_loss
from diffalign.config import ConfigError, RewardConfig, RunConfig, dump_config
from diffalign.configured import data_config, load_model, picture_size
from diffalign.data import EncodedPairs, PairSource, RunPairs
from diffalign.devices import send, send_like
from diffalign.loop import fit, make_accelerator
from diffalign.media_checks import check_media_settings
from diffalign.noisy_rewards import NoisyReward, check_trunk
from diffalign.processes import launched
from diffalign.randomness import Draw
from diffalign.resumable import write_atomically
from diffalign.timesteps import TimestepLaw, draw_timesteps
from diffalign.training import check_resume
from diffalign.training_checks import check_training

__all__ = ["RewardTrainer", "held_out_accuracy", "train_reward"]

logger = logging.getLogger("diffalign")

FOLDER = "reward"
"""Folder of the reward model in a run's own."""
ACCURACY_FILE = "accuracy.json"
LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Shares of noise, t, at which the held-out accuracy is told."""


class RewardLoss(NamedTuple):
    """What `fit` asks of a loss: the scalar, the loss of each pair [B], and metrics."""

    loss: Tensor
    losses: Tensor
    metrics: dict[str, Tensor]


class _Model:
    """A reward model as `fit` sees a policy."""

    def __init__(self, reward: NoisyReward) -> None:
        self.reward = reward
        self.denoiser: Any = reward
        self.wrapped: Any = reward

    @property
    def forwards(self) -> int:
        """Samples that went through the trunk so far."""
        return self.reward.policy.forwards

    @forwards.setter
    def forwards(self, count: int) -> None:
        self.reward.policy.forwards = count

    def named_trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.reward.named_parameters() if parameter.requires_grad]

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for _, parameter in self.named_trainable()]

    def shard_reference(self) -> None:
        """There is none."""

    def save_trained(self, folder: Path) -> None:
        self.reward.save_pretrained(folder)


class RewardTrainer:
    """Turns batches of pairs into the loss of a reward model.

    Args:
        reward: The model.
        preferences: Pair id -> what was preferred in each dimension, [D]: positive for the chosen sample, negative for
            the rejected one, 0 for a tie. Pairs that are not there have their chosen sample preferred in all.
        timestep_sampling: Law of the timesteps.
    """

    def __init__(
        self,
        reward: NoisyReward,
        preferences: Mapping[str, Tensor] | None = None,
        timestep_sampling: TimestepLaw = "uniform",
    ) -> None:
        self.policy = _Model(reward)
        self.reward, self.preferences = reward, preferences or {}
        self.schedule, self._law = reward.policy.schedule, timestep_sampling

    def begin(self, step: int, folder: Path) -> None:
        """Nothing to prepare."""

    def state(self) -> dict[str, Any]:
        """Nothing beside the weights."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Likewise."""

    def update(self, step: int) -> None:
        """Nothing moves but the weights."""

    def loss(self, batch: PairBatch) -> RewardLoss:
        """The batch's loss, the mean over dimensions, pairs weighted."""
        timesteps = draw_timesteps(self.schedule, batch.draws, self._law)
        difference, preference = self.differences(batch, timesteps), self._preference(batch)
        losses = comparison_loss(difference, preference, self.reward.card.ties).mean(dim=1)
        return RewardLoss(
            loss=(batch.weight.to(losses) * losses).mean(),
            losses=losses.detach(),
            metrics=self._metrics(losses, difference, preference),
        )

    def differences(self, batch: PairBatch, timesteps: Tensor) -> Tensor:
        """Rewards of the chosen samples minus those of the rejected ones, [B, D], at timesteps [B] and equal noise."""
        noise = torch.stack([draw.normal("noise", batch.chosen.shape[1:]) for draw in batch.draws])
        noise = send_like(noise, batch.chosen)
        both = [self.schedule.add_noise(latents, noise, timesteps) for latents in (batch.chosen, batch.rejected)]
        rewards = self.policy.wrapped(torch.cat(both), timesteps.repeat(2), batch.conditioning.repeat(2))
        first, second = rewards.float().chunk(2)
        difference: Tensor = first - second
        return difference

    @torch.no_grad()
    def agreement(self, batch: PairBatch, t: float) -> tuple[Tensor, Tensor]:
        """How many comparisons come out right at a share of noise `t`, and how many were decided, both [D].

        Equal rewards are right by half.
        """
        timesteps = self.schedule.timesteps_at(torch.full((len(batch),), t, dtype=torch.float64))
        difference, preference = self.differences(batch, timesteps), self._preference(batch)
        right = (difference * preference).sign() / 2 + 0.5
        decided = (preference != 0).to(right)
        return (right * decided).sum(dim=0), decided.sum(dim=0)

    def _preference(self, batch: PairBatch) -> Tensor:
        ones = torch.ones(len(self.reward.card.dimensions))
        return send(torch.stack([self.preferences.get(d.pair_id, ones) for d in batch.draws]), batch.chosen.device)

    @torch.no_grad()
    def _metrics(self, losses: Tensor, difference: Tensor, preference: Tensor) -> dict[str, Tensor]:
        """Detached scalars; a tie counts as half right, whatever the rewards."""
        agreement = (difference * preference).sign() / 2 + 0.5
        names = self.reward.card.dimensions
        each = {f"accuracy_{name}": agreement[:, i].mean() for i, name in enumerate(names)} if len(names) > 1 else {}
        size = difference.detach().abs().mean()
        return {"loss": losses.detach().mean(), "accuracy": agreement.mean(), "difference": size, **each}


def train_reward(config: RunConfig) -> tuple[Path, dict[str, dict[str, float]]]:
    """Trains the reward model that `config.reward` describes on the run's pairs.

    Args:
        config: The run; its section `training` holds for the reward model, and no other section of a method.

    Returns:
        The folder, and the held-out accuracy by dimension and noise level; empty without `num_validation_pairs`.

    Raises:
        ValueError: If configuration, model, data or checkpoint cannot be used; before any weights are loaded.
    """
    source, settings = checked_reward(config)
    folder = Path(config.output_dir) / FOLDER
    training = config.training.model_copy(update={"output_dir": str(folder)})
    data = data_config(config)
    pairs = RunPairs(data, config.output_dir)
    own = config.model_dump(mode="json", include={"seed", "model", "data", "reward", "training"})
    check_resume(training, own)
    accelerator = make_accelerator(training)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ConfigError("train-reward keeps the model whole on every process; use configs/accelerate/ddp.yaml")
    pairs.read(policy_class(source))
    policy: Any = load_model(config.model, source, size=picture_size(config), device=accelerator.device)
    recompute_activations(policy.denoiser, config.model.gradient_checkpointing)
    encoded = pairs.encoded(policy, launched())
    dimensions = data.reward_columns or ("overall",)
    reward = NoisyReward.start(
        policy, settings.layers, dimensions, trained=settings.trunk == "trained", ties=settings.ties, seed=config.seed
    )
    policy.free_encoders()
    train_view, held_out = encoded, None
    if training.num_validation_pairs:
        train_view, held_out = encoded.split(training.num_validation_pairs, config.seed)
    trainer = RewardTrainer(reward, preferences_of(encoded), settings.timestep_sampling)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.yaml", dump_config(config).encode())
    batches = PairSource(
        train_view,
        seed=config.seed,
        batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
    )
    size = training.per_device_train_batch_size

    def validate(step: int) -> dict[str, float]:
        found = held_out_accuracy(trainer, held_out, config.seed, size, training.validation_draws)
        return {f"accuracy_{name}": sum(row.values()) / len(row) for name, row in found.items()}

    fit(trainer, batches, training, settings=own, accelerator=accelerator, validate=validate if held_out else None)
    found = held_out_accuracy(trainer, held_out, config.seed, size, training.validation_draws)
    if accelerator.is_main_process:
        write_atomically(folder / ACCURACY_FILE, (json.dumps(found, indent=2) + "\n").encode())
    return folder, found


def checked_reward(config: RunConfig) -> tuple[ModelSource, RewardConfig]:
    """The model of a reward model's training, if it and the settings fit together; loads no weights."""
    settings, model = config.reward, config.model
    if settings is None:
        raise ConfigError("config has no section 'reward'; say for example reward: {kind: noisy_latent, layers: 8}")
    for name in ("lora", "adapter", "quantization"):
        if getattr(model, name) is not None:
            raise ConfigError(f"model.{name}: a reward model starts from the base model's own weights; leave it out")
    source = inspect_model(model.pretrained_model_name_or_path, model.revision, model.variant)
    check_options(source, model.options)
    if model.gradient_checkpointing:
        check_gradient_checkpointing(source)
    check_trunk(source, settings.layers)
    check_training(config, source.prediction, settings.timestep_sampling)
    if config.data is not None and config.data.aspect_ratio_buckets:
        raise ConfigError("data.aspect_ratio_buckets: train-reward takes pictures of one size; leave the buckets out")
    picture_size(config)
    check_media_settings(
        source, num_frames=model.num_frames, options=model.options, data=config.data, sampling=config.sampling
    )
    return source, settings


def preferences_of(pairs: EncodedPairs) -> dict[str, Tensor]:
    """Pair id -> signs [D] of the pairs' own `data.reward_columns`; nothing for pairs without."""
    rewards = pairs.rewards(range(len(pairs)))
    return dict(zip(pairs.ids, rewards.sign(), strict=True)) if rewards.shape[1] else {}


@torch.no_grad()
def held_out_accuracy(
    trainer: RewardTrainer, pairs: EncodedPairs | None, seed: int, batch_size: int, draws: int
) -> dict[str, dict[str, float]]:
    """Share of the pairs whose better sample has the larger reward, by dimension and noise level.

    Ties are left out, and dimensions in which all pairs are tied.

    Args:
        trainer: With the reward model.
        pairs: Held out; None gives an empty result.
        seed: Of the fixed noise.
        batch_size: Pairs per forward pass.
        draws: Noises per pair and level.
    """
    if pairs is None or not len(pairs):
        return {}
    device = next(trainer.reward.parameters()).device
    table: dict[str, dict[str, float]] = {}
    for level in LEVELS:
        found = [trainer.agreement(batch.to(device), level) for batch in _fixed(pairs, seed, batch_size, draws)]
        for i, name in enumerate(trainer.reward.card.dimensions):
            right, decided = (sum(float(part[i]) for part in parts) for parts in zip(*found, strict=True))
            if decided:
                table.setdefault(name, {})[f"{level:g}"] = right / decided
    return table


def _fixed(pairs: EncodedPairs, seed: int, batch_size: int, draws: int) -> Iterator[PairBatch]:
    """The pairs with the same noise at every call."""
    source = PairSource(pairs, seed=seed, batch_size=batch_size, prefetch=False)
    for batch in source.fixed_batches(len(pairs)):
        for k in range(draws):
            yield replace(batch, draws=tuple(Draw(d.seed, d.epoch - k, d.pair_id) for d in batch.draws))


def render_accuracy(found: Mapping[str, Mapping[str, float]]) -> str:
    """The table of `held_out_accuracy` as lines of text."""
    if not found:
        return "no pairs were held out (training.num_validation_pairs)"
    head = "held-out accuracy at t = " + "".join(f"{level:g}".rjust(8) for level in LEVELS)
    rows: Sequence[str] = [
        name.rjust(len("held-out accuracy at t =")) + " " + "".join(f"{value:8.3f}" for value in row.values())
        for name, row in found.items()
    ]
    return "\n".join([head, *rows])

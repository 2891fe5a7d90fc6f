"""Every method with a batch to learn from, on a tiny model of the kind it is for; no test by itself."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffalign import trainers
from diffalign.backbones import LoRA, load_policy
from diffalign.batches import Conditioning, PairBatch
from diffalign.config import TrainingConfig
from diffalign.devices import pick_device
from diffalign.loop import fit
from diffalign.noisy_rewards import NoisyReward
from diffalign.reference_errors import ReferencedPairs
from diffalign.reference_samples import SampledPairs
from diffalign.references import INITIAL
from diffalign.reward_training import RewardTrainer
from diffalign.rollouts import TransitionPairs
from tests.backbones.families import FAMILIES
from tests.tiny import move_away, random_batch
from tests.trainers.kept import inverted_pairs

BY_NAME = {family.name: family for family in FAMILIES}
PAIRS = 3

Make = Callable[[Any, PairBatch, Conditioning], tuple[Any, PairBatch]]
"""A policy, random pairs and one row of the empty prompt to a trainer and what it learns from."""


def _plain(trainer: type[Any], **options: Any) -> Make:
    def make(policy: Any, batch: PairBatch, empty: Conditioning) -> tuple[Any, PairBatch]:
        return trainer(policy, **options), batch

    return make


def _cached(policy: Any, batch: PairBatch, empty: Conditioning) -> tuple[Any, PairBatch]:
    errors = torch.rand(2, PAIRS)
    known = ReferencedPairs(**vars(batch), chosen_error=errors[0], rejected_error=errors[1])
    return trainers.DiffusionDPO(policy, reference="cached", draws_per_pair=1), known


def _inverted(policy: Any, batch: PairBatch, empty: Conditioning) -> tuple[Any, PairBatch]:
    trainer = trainers.InPO(policy, inversion_net="reference", cache_inversion=True)
    return trainer, inverted_pairs(trainer, batch)


def _self_npo(**options: Any) -> Make:
    def make(policy: Any, batch: PairBatch, empty: Conditioning) -> tuple[Any, PairBatch]:
        trainer = trainers.SelfNPO(policy, **options)
        trainer._unconditional = empty
        policy.put_reference(policy.trained_state())  # a place for the teacher, as after the first step
        return trainer, batch

    return make


def _seppo(policy: Any, batch: PairBatch, empty: Conditioning) -> tuple[Any, PairBatch]:
    trainer = trainers.SePPO(policy, sgn_warmup=0, sgn_draws=2, phase_steps=1000)
    return trainer, SampledPairs(**vars(batch), reference=INITIAL, sample_draws=batch.draws)


def _d3po(policy: Any, batch: PairBatch, empty: Conditioning) -> tuple[Any, PairBatch]:
    trainer = trainers.D3PO(policy, num_inference_steps=4)
    grid, steps = trainer.sampler.grid, torch.arange(PAIRS)
    pairs = TransitionPairs(
        **vars(batch),
        next_chosen=batch.chosen + 0.1,
        next_rejected=batch.rejected - 0.1,
        timesteps=grid[steps],
        next_timesteps=grid[steps + 1],
        preference=torch.tensor([1.0, -1.0, 0.0]),
        unconditional=empty,
    )
    return trainer, pairs


def _reward(policy: Any, batch: PairBatch, empty: Conditioning) -> tuple[Any, PairBatch]:
    known = {batch.draws[0].pair_id: torch.tensor([-1.0])}
    return RewardTrainer(NoisyReward.start(policy, 1, ["overall"]), known, "logit_normal"), batch


@dataclass(frozen=True)
class Method:
    """A method on a tiny model.

    Attributes:
        family: Name of the tiny model; see `tests.backbones.families`.
        make: The trainer and its batch.
        lora: Whether adapters are trained; all weights otherwise.
        trains: Whether the policy is prepared for training; a reward model takes a plain one.
    """

    family: str
    make: Make
    lora: bool = True
    trains: bool = True

    def start(self, root: Path) -> tuple[Any, PairBatch]:
        """The trainer, its policy away from its reference, and a batch; all on the CPU."""
        policy = load(self.family, root, self.trains, self.lora)
        empty = policy.unconditional(policy.encode_prompts([""]))
        prompts = policy.encode_prompts([f"a photo of {count} circles" for count in range(PAIRS)])
        batch = replace(random_batch(PAIRS, shape=policy.latent_shape), conditioning=prompts)
        trainer, batch = self.make(policy, batch, empty)
        if self.trains:
            policy.free_encoders()
            move_away(policy)
        return trainer, batch


def move(trainer: Any, device: str | torch.device) -> None:
    """Policy and reference to the device."""
    for module in (trainer.policy.denoiser, getattr(trainer.policy, "_frozen", None)):
        if module is not None:
            module.to(device)


class Same:
    """A source of one batch at every step."""

    def __init__(self, batch: PairBatch) -> None:
        self._batch = batch

    def batch(self, step: int, micro_step: int) -> PairBatch:
        """The batch, on the CPU."""
        return self._batch

    def update(self, step: int) -> None:
        """Nothing moves."""


def learn(name: str, folder: Path, steps: int, watched: Callable[[Any], Any] = lambda source: source) -> list[Any]:
    """Losses of so many steps of a method in the real loop, all read together after the last one.

    Args:
        name: Of `METHODS`.
        folder: Of the model and the run.
        steps: How many.
        watched: What is put around the source.
    """
    trainer, batch = METHODS[name].start(folder / "models")
    move(trainer, pick_device())
    together = {"max_train_steps": steps, "sync_steps": steps, "checkpointing_steps": steps, "fused_optimizer": True}
    config = TrainingConfig(output_dir=str(folder / "run"), **together)
    run = fit(trainer, watched(Same(batch)), config)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


def load(name: str, root: Path, train: bool = True, lora: bool = True) -> Any:
    """A family's tiny policy, from its folder in `root`."""
    family = BY_NAME[name]
    if not (root / name).exists():
        family.save(root / name)
    frames = {"num_frames": family.num_frames} if family.num_frames > 1 else {}
    how: dict[str, Any] = {"lora": LoRA(rank=2) if lora else None, "train": True} if train else {}
    return load_policy(str(root / name), size=family.size, options=family.options, **frames, **how)


SD, FLOW, VIDEO = "sd-epsilon", "sd3", "wan"
FLOW_DPO = functools.partial(_plain, trainers.FlowDPO)

METHODS: dict[str, Method] = {
    "diffusion_dpo": Method(SD, _plain(trainers.DiffusionDPO)),
    "diffusion_dpo, all weights": Method(SD, _plain(trainers.DiffusionDPO, loss_type="ipo"), lora=False),
    "diffusion_dpo, cached": Method(SD, _cached),
    "diffusion_dpo, sdxl": Method("sdxl", _plain(trainers.DiffusionDPO)),
    "npo": Method(SD, _plain(trainers.NPO)),
    "sft": Method(SD, _plain(trainers.SFT)),
    "inpo": Method(SD, _plain(trainers.InPO)),
    "inpo, released": Method(SD, _plain(trainers.InPO, inversion="release", eta=0.1)),
    "inpo, cached": Method(SD, _inverted),
    "self_npo": Method(SD, _self_npo()),
    "self_npo, guided from noise": Method(SD, _self_npo(w=-5.0, start="noise", loss_type="l2"), lora=False),
    "seppo": Method(SD, _seppo),
    "d3po": Method(SD, _d3po),
    "flow_dpo": Method(FLOW, FLOW_DPO()),
    "flow_dpo, beta of t": Method(FLOW, FLOW_DPO(beta_schedule="timestep")),
    "flow_rwr": Method(FLOW, _plain(trainers.FlowRWR, log_reference=True)),
    "d3po, flow": Method(FLOW, _d3po),
    "seppo, flow": Method(FLOW, _seppo),
    "train-reward": Method(FLOW, _reward, trains=False),
    "flow_dpo, video": Method(VIDEO, FLOW_DPO()),
    "d3po, video": Method(VIDEO, _d3po, lora=False),
}

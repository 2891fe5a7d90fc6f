"""Configurations of `diffalign train-reward` for reward models of pictures: one YAML file, checked like a run's."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from diffalign.config import TrainingConfig
from diffalign.data.compared import ComparisonsConfig


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


LossName = Literal["preference", "divergence", "bradley_terry", "ties", "hinge", "displacement", "uncertainty", "none"]


class ScorerConfig(_Strict):
    """A published kind of reward model, trained on comparisons.

    Attributes:
        kind: "scorer".
        name: Which, as `load_reward_model` calls it: CLIP with two towers (hpsv2.1, pickscore, clipscore, shapes), mps,
            image_reward, vp_score, hpsv3, pal.
        start: Weights to start from: a folder or Hub id in the layout of `name`, or of what it was made from (CLIP,
            BLIP, Qwen2-VL; see `reward_models.starting`).
        options: Further arguments of the reward model's constructor, such as `processor`.
        head: Shape of the head of `pal`, as `PALConfig` has it.
        loss: "preference": cross entropy of the softmax (HPSv2); "divergence": the same minus the label's entropy
            (PickScore); "bradley_terry" (ImageReward; ties are left alone); "ties": the law with ties;
            "hinge" (PAL); "displacement" and "uncertainty" (HPSv3); "none": nothing but the contrastive term.
        margin: Of "bradley_terry" and "hinge".
        ties: k of "ties".
        temper: tau of "displacement".
        noise_samples: Draws per comparison for "uncertainty"; 0 integrates without chance.
        contrastive_weight: Weight of CLIP's loss over the preferred pictures of a batch; for two towers only.
        weighting: "prompt" weighs a comparison with 1 / the number of comparisons of its prompt, as PickScore does.
        image_groups: How many groups of the image tower's layers are trained, from the output: the projection, the last
            block with its norm, the other blocks one by one, the embeddings. None is all.
        text_groups: The same for the text tower; 0 freezes it.
        learning_rates: Rates of weights by a part of their names, beside `training.learning_rate` for the others.
        max_logit_scale: exp(logit_scale) is kept at most this and at least 1 after each step; None leaves it alone.
    """

    kind: Literal["scorer"] = "scorer"
    name: str
    start: str
    options: dict[str, Any] = Field(default_factory=dict)
    head: dict[str, Any] = Field(default_factory=dict)
    loss: LossName = "preference"
    margin: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    ties: float = Field(default=5.0, gt=1, allow_inf_nan=False)
    temper: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    noise_samples: int = Field(default=0, ge=0)
    contrastive_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    weighting: Literal["none", "prompt"] = "none"
    image_groups: int | None = Field(default=None, ge=0)
    text_groups: int | None = Field(default=None, ge=0)
    learning_rates: dict[str, float] = Field(default_factory=dict)
    max_logit_scale: float | None = Field(default=None, ge=1, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check(self) -> ScorerConfig:
        if self.loss == "none" and not self.contrastive_weight:
            raise ValueError("loss: none leaves nothing to train on; set contrastive_weight")
        if self.loss == "uncertainty" and self.name != "hpsv3":
            raise ValueError(f"loss: uncertainty needs a model that says how sure it is, as hpsv3; found {self.name!r}")
        if self.head and self.name != "pal":
            raise ValueError(f"reward.head is for pal, and this is {self.name!r}; leave it out")
        return self


class ChecklistConfig(_Strict):
    """VisionReward's weights of a checklist, fitted to comparisons of which both sides have answers.

    Attributes:
        kind: "checklist".
        answers: A JSONL or parquet of rows with `first` and `second`, the features of both sides (numbers by name, or
            lists), and `preference` in [0, 1]; 1 where it is not given, the first is better.
        held_out_fraction: Share of the rows, by a hash of their prompt or number, that the accuracy is measured on.
        ridge: See `checklist_regression.fit_checklist`.
    """

    kind: Literal["checklist"] = "checklist"
    answers: str
    held_out_fraction: float = Field(default=0.2, ge=0, lt=1)
    ridge: float = Field(default=1e-4, gt=0)


class ScorerRun(_Strict):
    """A training of a reward model of pictures.

    Attributes:
        output_dir: Where the run writes; at the end it holds the weights in the model's published layout.
        seed: Of every random draw.
        reward: The model and its loss.
        data: Comparisons to learn from.
        validation_data: Comparisons held out; without them `training.num_validation_pairs` of `data`, by prompt.
        training: The loop, as for diffusion models; validation is by `validation_steps`.
        workers: Threads that read and preprocess pictures.
    """

    output_dir: str
    seed: int = 0
    reward: ScorerConfig
    data: ComparisonsConfig
    validation_data: ComparisonsConfig | None = None
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    workers: int = Field(default=4, ge=1)


class ChecklistRun(_Strict):
    """A regression of a checklist's weights; see `ChecklistConfig`."""

    output_dir: str
    seed: int = 0
    reward: ChecklistConfig


RUNS: dict[str, type[ScorerRun] | type[ChecklistRun]] = {"scorer": ScorerRun, "checklist": ChecklistRun}
"""What a configuration is, by `reward.kind`; "noisy_latent" is a section of a diffusion model's run."""

"""What a family can be told beyond a model's files: `model.options` of a configuration, `options=` of `load_policy`.

Each family names its class of options as `Options`; unknown keys are refused before any weights load. What is left out
(None) is the published pipeline's own.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator


class FamilyOptions(BaseModel):
    """Of a family without options."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FlowOptions(FamilyOptions):
    """Of the flow-matching families.

    Attributes:
        timestep_shift: Shift of the table that `timestep_sampling: logit_normal` draws from, or "dynamic", what the
            sampler uses at the run's own size; see `PipelinePolicy._flow_schedule` for the default.
    """

    timestep_shift: PositiveFloat | Literal["dynamic"] | None = None


class GuidedOptions(FlowOptions):
    """Of families whose network reads a guidance scale.

    Attributes:
        embedded_guidance: The scale that it is told in training, policy and reference alike; sampling has its own.
    """

    embedded_guidance: float | None = Field(default=None, ge=0, allow_inf_nan=False)


class TokenOptions(FlowOptions):
    """Of families with text of a length one can choose.

    Attributes:
        max_sequence_length: Tokens of a prompt that are kept, padding included.
    """

    max_sequence_length: PositiveInt | None = None


class PromptTemplate(BaseModel):
    """Text around every prompt.

    Attributes:
        template: With one "{}" where the prompt goes.
        crop_start: How many of its first tokens are cut from the embeddings again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    template: str
    crop_start: int = Field(ge=0)

    @field_validator("template")
    @classmethod
    def _has_one_place(cls, template: str) -> str:
        if template.count("{}") != 1:
            raise ValueError(f"expected one {{}} for the prompt, found {template.count('{}')}")
        return template

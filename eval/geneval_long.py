"""GenEval with prompts that a language model has made longer, as many papers since 2025 report it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from diffalign.eval.geneval import GenEval
from diffalign.reward_models.geneval_prompts import LONG_METADATA

__all__ = ["GenEvalLong"]


class GenEvalLong(GenEval):
    """The 553 prompts of GenEval, each rewritten at length; tasks, objects and rules are the same.

    The texts are those of UniWorld-V1. Scores are usually higher than with the original prompts and may not stand in
    one column with them, so this is a benchmark of its own, and GenEval's published scores are not shown beside it.
    """

    name = "geneval_long"
    metadata = LONG_METADATA
    reference: ClassVar[tuple[Mapping[str, Any], ...]] = ()

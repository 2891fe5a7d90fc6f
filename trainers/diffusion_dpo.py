"""Diffusion-DPO: the five steps of the base class, unchanged.

Wallace et al. 2023, "Diffusion Model Alignment Using Direct Preference Optimization" (arXiv:2311.12908), Eq. 14.
Deviations from the paper's text, all as in the authors' released code: shared noise, mean errors, factor one half.
"""

from __future__ import annotations

from diffalign.trainers.base import PairTrainer

__all__ = ["DiffusionDPO"]


class DiffusionDPO(PairTrainer):
    """Pairs ranked offline, forward noise, frozen reference; see `PairTrainer` for every step."""

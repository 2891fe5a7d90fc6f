"""What a denoiser predicts, and the way from one parametrisation to another. All the algebra is here.

With x_t = alpha * x0 + sigma * noise, a network predicts one of

    epsilon   noise
    sample    x0
    v         alpha * noise - sigma * x0      (Salimans & Ho 2022, arXiv:2202.00512; needs alpha^2 + sigma^2 = 1)
    velocity  noise - x0                      (rectified flow, alpha = 1 - t and sigma = t; the diffusers sign)

Each is a linear map of (x0, noise), so any prediction together with x_t gives back both.
"""

from __future__ import annotations

from enum import StrEnum

from torch import Tensor

from diffalign.schedules import expand


class Prediction(StrEnum):
    """Kind of a network's output."""

    EPSILON = "epsilon"
    V = "v"
    SAMPLE = "sample"
    VELOCITY = "velocity"

    @classmethod
    def from_diffusers(cls, name: str) -> Prediction:
        """The kind that a diffusers scheduler's `prediction_type` names.

        Raises:
            ValueError: If the name is unknown.
        """
        names = {
            "epsilon": cls.EPSILON,
            "v_prediction": cls.V,
            "sample": cls.SAMPLE,
            "flow_prediction": cls.VELOCITY,
        }
        if name not in names:
            raise ValueError(f"unknown prediction type {name!r}; expected one of {', '.join(names)}")
        return names[name]

    def _weights(self, alphas: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) such that the output is a * x0 + b * noise."""
        one, zero = alphas.new_ones(alphas.shape), alphas.new_zeros(alphas.shape)
        return {
            Prediction.EPSILON: (zero, one),
            Prediction.SAMPLE: (one, zero),
            Prediction.V: (-sigmas, alphas),
            Prediction.VELOCITY: (-one, one),
        }[self]

    def target(self, latents: Tensor, noise: Tensor, alphas: Tensor, sigmas: Tensor) -> Tensor:
        """What a perfect network answers, [B, C, ...], for clean latents, noise and scales [B]."""
        if self is Prediction.EPSILON:
            return noise
        if self is Prediction.SAMPLE:
            return latents
        a, b = self._weights(alphas, sigmas)
        return expand(a, latents) * latents + expand(b, latents) * noise

    def to_sample_and_noise(
        self, output: Tensor, noisy_latents: Tensor, alphas: Tensor, sigmas: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The (x0, noise) that an output stands for at noisy latents; all [B, C, ...], scales [B].

        Solves [[alpha, sigma], [a, b]] (x0, noise) = (x_t, output). An epsilon output at alpha = 0, and a sample
        at sigma = 0, leave the other half undetermined: the result is then infinite or not a number.
        """
        a, b = self._weights(alphas, sigmas)
        determinant = alphas * b - sigmas * a
        x0 = expand(b / determinant, output) * noisy_latents - expand(sigmas / determinant, output) * output
        noise = expand(alphas / determinant, output) * output - expand(a / determinant, output) * noisy_latents
        return x0, noise

    def convert(self, output: Tensor, to: Prediction, noisy_latents: Tensor, alphas: Tensor, sigmas: Tensor) -> Tensor:
        """The same prediction in another parametrisation, [B, C, ...]."""
        x0, noise = self.to_sample_and_noise(output, noisy_latents, alphas, sigmas)
        return to.target(x0, noise, alphas, sigmas)

    def epsilon_weight(self, alphas: Tensor, sigmas: Tensor) -> Tensor:
        """The factor [B] that turns this kind's squared error into the epsilon kind's.

        Both errors belong to one prediction at one x_t: SE_eps = (alpha / (alpha b - sigma a))^2 SE. For v it is
        abar_t, for a flow's velocity (1 - t)^2, for a sample abar_t / (1 - abar_t).
        """
        a, b = self._weights(alphas, sigmas)
        return (alphas / (alphas * b - sigmas * a)) ** 2

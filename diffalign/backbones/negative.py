"""A second set of weights for the unconditional branch of guidance: Diffusion-NPO's use when sampling.

Wang et al. 2025, "Diffusion-NPO" (arXiv:2505.11245): with g the guidance scale,

    output = negative(x_t, empty prompt) + g * (positive(x_t, prompt) - negative(x_t, empty prompt))

The family's own diffusers pipeline does the sum; here its calls of the denoiser are divided, so that every sampler,
rescaling of latents and treatment of the sum stays the pipeline's. At g = 1 pipelines ask for no unconditional output,
and the negative model is not called.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from diffalign.backbones.loading import ModelSource
from diffalign.backbones.negative_files import NegativeModel, find_negative, mix, read_weights
from diffalign.backbones.precision import EXACT_INPUTS, to_own_dtype
from diffalign.backbones.trained_weights import ADAPTER, TrainedWeights
from diffalign.weight_hashes import hash_weights

logger = logging.getLogger("diffalign")

Guides = Literal["unconditional_first", "conditional_first", "twice", "never"]
"""How a family's pipeline calls the denoiser for a step with guidance: once, both branches stacked on the batch in the
order said; once for each branch, telling which one to `cache_context`; or not at all, being distilled from guidance."""

SHARED_INPUTS = tuple(name for name in EXACT_INPUTS if name != "time_ids")
"""Inputs without a batch axis: their first axis runs over tokens, and may have any length."""


class NegativeBranch(TrainedWeights):
    """The negative model of a policy, see the module's description.

    It is a second denoiser. Where positive and negative model are adapters, it shares all tensors with the first one
    but the negative adapter's; else it has whole weights of its own.
    """

    guides: ClassVar[Guides] = "unconditional_first"
    """How this family's pipeline guides."""

    source: ModelSource
    _negative: Any = None
    _negative_digest: str = ""

    @classmethod
    def check_negative(cls, source: ModelSource) -> None:
        """Refuses a family whose pipeline has no unconditional branch, before its weights load.

        Raises:
            ValueError: If it has none.
        """
        if cls.guides == "never":
            raise ValueError(
                f"{source.name}: {source.family} draws without an unconditional branch (its guidance is distilled), so "
                "a negative model has no place in it; leave out the negative model"
            )

    def put_negative(self, model: NegativeModel | str | Path | None, *, alpha: float = 1.0, scale: float = 1.0) -> None:
        """See `Policy.put_negative`."""
        self._negative = None
        if model is None:
            return
        if not (0 <= alpha <= 1 and 0 <= scale <= 1):
            raise ValueError(f"expected alpha and scale of a negative model in 0..1, got {alpha} and {scale}")
        found = model if isinstance(model, NegativeModel) else find_negative(self.source, model)
        terms = [(found, scale)]
        if found.started_from is not None:
            terms.append((found.started_from, -scale))
        adapters = self._frozen is None and (self.lora is None or not self.lora.use_dora)
        asked = [(parameter, parameter.requires_grad) for parameter in self.denoiser.parameters()]
        if adapters and all(term.kind == "lora" and term.additive for term, _ in terms):
            self._negative = self._with_adapters(alpha, terms)
        else:
            self._negative = self._with_whole_weights(alpha, terms)
        self._negative.eval().requires_grad_(False)
        for parameter, wanted in asked:  # shared ones
            parameter.requires_grad_(wanted)

    def negative_fingerprint(self) -> str:
        """See `Policy.negative_fingerprint`."""
        if self._negative is None:
            raise ValueError("the policy has no negative model; call put_negative first")
        return self._negative_digest

    # --- its weights -------------------------------------------------------------------------------------------------

    def _with_adapters(self, alpha: float, terms: list[tuple[NegativeModel, float]]) -> Any:
        """The denoiser again, its tensors shared, with the adapters of both models on it."""
        tensors = (*self.denoiser.parameters(), *self.denoiser.buffers())
        twin = copy.deepcopy(self.denoiser, {id(tensor): tensor for tensor in tensors})
        weights = {} if self.lora is None else {ADAPTER: alpha}
        digest = hashlib.blake2b(f"adapters {alpha}".encode(), digest_size=16)
        for number, (term, weight) in enumerate(terms):
            name = f"negative_{number}"
            self._read_adapter(term.lora_file, twin, name)
            weights[name] = weight
            digest.update(f"{weight}".encode())
            own = {key: tensor for key, tensor in twin.state_dict().items() if f".{name}" in key}
            _hash(digest, own)
        for layer in twin.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.enable_adapters(True)
                layer.set_adapter(list(weights))
                for name, weight in weights.items():
                    if name in layer.scaling:
                        layer.scaling[name] *= weight
        self._negative_digest = digest.hexdigest()
        return twin

    def _with_whole_weights(self, alpha: float, terms: list[tuple[NegativeModel, float]]) -> Any:
        """A second denoiser with the mixed weights written out."""
        if getattr(self.denoiser, "is_quantized", False):
            raise ValueError("quantized weights cannot be mixed; give the negative model as a LoRA, or leave out alpha")
        self.wake_reference()
        base = _plain(self._frozen if self._frozen is not None else self.denoiser)
        states: list[tuple[Mapping[str, Tensor], float]] = []
        if self.lora is not None:
            states.append((_merged(copy.deepcopy(self.denoiser), ADAPTER), alpha))
        elif self._frozen is not None:
            states.append((_plain(self.denoiser), alpha))
        states += [(self._whole(term, base), weight) for term, weight in terms]
        mixed = mix(base, states)
        twin = copy.deepcopy(self.denoiser)
        with torch.no_grad():
            for name, tensor in twin.state_dict().items():
                if "lora_" not in name:
                    tensor.copy_(mixed[name.replace(".base_layer.", ".")])
        for layer in twin.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.enable_adapters(False)
        digest = hashlib.blake2b(b"whole", digest_size=16)
        _hash(digest, mixed)
        self._negative_digest = digest.hexdigest()
        return twin

    def _whole(self, model: NegativeModel, base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A model's whole weights under the names of the base's."""
        if model.kind == "lora":
            module = copy.deepcopy(self._frozen if self._frozen is not None else self.denoiser)
            self._read_adapter(model.lora_file, module, "negative")
            return _merged(module, "negative")
        state: dict[str, Tensor] = {}
        parts = self._called(self.denoiser)
        for part in parts:
            prefix = f"{part}." if len(parts) > 1 else ""
            names = [name.removeprefix(prefix) for name in base if name.startswith(prefix)]
            state |= {f"{prefix}{name}": tensor for name, tensor in read_weights(model.files[part], names).items()}
        return state

    # --- drawing -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _negative_branch(self, module: Any, prompts: int) -> Iterator[None]:
        """Inside the block the pipeline's calls of `module` run their unconditional rows with the negative model.

        Args:
            module: What the pipeline draws with.
            prompts: How many prompts are drawn at once.
        """
        if self._negative is None:
            raise ValueError("the policy has no negative model; call put_negative first")
        negatives = self._called(self._negative)
        branches = [
            _Branches(called, negatives[part], self.guides, prompts) for part, called in self._called(module).items()
        ]
        try:
            for branch in branches:
                branch.divide()
            yield
        finally:
            for branch in branches:
                branch.undo()
        if not any(branch.used for branch in branches):
            logger.warning("guidance is off: the negative model was not asked; raise the guidance scale above 1")


class _Branches:
    """One denoiser's calls, divided between two models.

    Args:
        module: The denoiser that the pipeline calls, the positive model.
        negative: Another one for the unconditional branch.
        guides: How the pipeline calls it.
        prompts: Rows of one branch.
    """

    def __init__(self, module: Any, negative: Any, guides: Guides, prompts: int) -> None:
        self.module, self.negative, self.guides, self.prompts = module, negative, guides, prompts
        self.positive: Callable[..., Any] = module.forward
        self.cache_context = getattr(module, "cache_context", None)
        self.branch = ""
        self.used = False
        self._before = {name: value for name, value in vars(module).items() if name in ("forward", "cache_context")}
        self._cast: Any = None

    def divide(self) -> None:
        """Puts itself in the place of the denoiser's forward pass."""
        self._cast = self.negative.register_forward_pre_hook(to_own_dtype(self.negative), with_kwargs=True)
        if self.guides == "twice":
            self.module.forward, self.module.cache_context = self._one_branch, self._named
        else:
            self.module.forward = self._both_branches

    def undo(self) -> None:
        """Leaves the denoiser as it was."""
        if self._cast is not None:
            self._cast.remove()
        for name in ("forward", "cache_context"):
            vars(self.module).pop(name, None)
        vars(self.module).update(self._before)

    @contextmanager
    def _named(self, name: str, **where: Any) -> Iterator[None]:
        """The denoiser's `cache_context`, by which pipelines say which branch they are about to ask for."""
        assert self.cache_context is not None
        self.branch = name
        with self.cache_context(name, **where):
            yield

    def _one_branch(self, *args: Any, **kwargs: Any) -> Any:
        if self.branch != "uncond":
            return self.positive(*args, **kwargs)
        self.used = True
        return self.negative(*args, **kwargs)

    def _both_branches(self, *args: Any, **kwargs: Any) -> Any:
        latents = args[0] if args else kwargs["hidden_states"]
        if len(latents) != 2 * self.prompts:  # guidance is off
            return self.positive(*args, **kwargs)
        self.used = True
        calls = []
        for half in range(2):
            inputs = [self._half(value, half) for value in args]
            named = {name: self._half(value, half, name) for name, value in kwargs.items()}
            unconditional = (half == 0) == (self.guides == "unconditional_first")
            calls.append((self.negative if unconditional else self.positive)(*inputs, **named))
        return _joined(*calls)

    def _half(self, value: Any, half: int, name: str = "") -> Any:
        """One branch's rows of an input; what has no rows, whole."""
        if isinstance(value, dict):
            return {key: self._half(item, half, key) for key, item in value.items()}
        has_rows = isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 0)
        if name in SHARED_INPUTS or not has_rows or len(value) % (2 * self.prompts):
            return value
        middle = len(value) // 2
        return value[middle:] if half else value[:middle]


def _joined(first: Any, second: Any) -> Any:
    """Two outputs of a denoiser as one with the rows of both."""
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    if isinstance(first, list):
        return first + second
    if isinstance(first, Mapping):  # an output class of diffusers
        return type(first)(**{name: _joined(first[name], second[name]) for name in first})
    return tuple(_joined(a, b) for a, b in zip(first, second, strict=True))


def _plain(module: Any) -> dict[str, Tensor]:
    """A denoiser's state without adapters, under the names that it has without them."""
    state: dict[str, Tensor] = module.state_dict()
    return {name.replace(".base_layer.", "."): t for name, t in state.items() if "lora_" not in name}


def _merged(module: Any, adapter: str) -> dict[str, Tensor]:
    """A denoiser's state with an adapter worked into its weights; changes the denoiser."""
    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge(adapter_names=[adapter])
    return _plain(module)


def _hash(digest: Any, state: Mapping[str, Tensor]) -> None:
    hash_weights(digest, ((f"{name} {tuple(tensor.shape)}", tensor) for name, tensor in sorted(state.items())))

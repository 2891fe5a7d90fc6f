"""The half of a policy that is trained: adapters or all weights of the denoiser, the frozen reference, their files."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from diffalign.backbones.loading import LORA_FILE, LoRA
from diffalign.backbones.precision import halve
from diffalign.policy import Policy
from diffalign.randomness import generator
from diffalign.sharding import cut_like, is_sharded, whole
from diffalign.weight_hashes import hash_weights

ADAPTER = "default"
"""Name of the trained adapter inside peft."""
REFERENCE = "reference"
"""Name of the frozen one beside it, where training goes on from an adapter; see `TrainedWeights.start_from`."""


class TrainedWeights(Policy):
    """Adapters, the switch between policy and reference, saving and loading; see `PipelinePolicy`.

    The reference is one of three, and trainers cannot tell which: the denoiser with its adapter switched off; with a
    second, frozen adapter, where training started from one or `put_reference` gave it other weights; or a frozen copy,
    where all weights are trained.
    """

    part: ClassVar[str] = "transformer"
    """Attribute of the pipeline that holds the denoiser."""
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    """Layers that get adapters unless the user names others."""

    pipeline: Any
    denoiser: Any
    lora: LoRA | None
    _frozen: Any
    _has_reference_adapter = False
    _started_from_adapter = False
    _adapted: tuple[BaseTunerLayer, ...] | None = None
    """The layers with adapters once they were looked for, which takes long; None after adapters came or went."""
    _initial: dict[str, Tensor] | None = None
    """The reference's first weights, by the trained parameters' names, once others were put in their place."""

    # --- adapters ----------------------------------------------------------------------------------------------------

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """The denoiser is the reference inside the block and the policy again after it, whatever happens."""
        if self.lora is None:
            yield
            return
        self._switch_adapter(False)
        try:
            yield
        finally:
            self._switch_adapter(True)

    def _switch_adapter(self, on: bool) -> None:
        if self._adapted is None:
            self._adapted = tuple(layer for layer in self.denoiser.modules() if isinstance(layer, BaseTunerLayer))
        for layer in self._adapted:
            if self._has_reference_adapter:
                layer.set_adapter(ADAPTER if on else REFERENCE)
            else:
                layer.enable_adapters(on)

    def _add_adapter(self, lora: LoRA) -> None:
        self._inject(self._adapter_settings(lora))
        self._adapted = None
        self._upcast_adapter()
        self._initialise_adapter(lora)

    def _adapter_settings(self, lora: LoRA) -> LoraConfig:
        return LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha if lora.alpha is not None else lora.rank,
            init_lora_weights="gaussian",
            target_modules=list(lora.target_modules or self.lora_targets),
            use_dora=lora.use_dora,
            use_rslora=lora.use_rslora,
        )

    @classmethod
    def add_adapter_to(cls, denoiser: Any, lora: LoRA) -> None:
        """Puts untrained adapters into a denoiser that no pipeline holds, to be counted."""
        policy = cls.__new__(cls)
        policy.denoiser = denoiser
        policy._inject(policy._adapter_settings(lora))

    def _inject(self, settings: LoraConfig, name: str = ADAPTER) -> None:
        self.denoiser.add_adapter(settings, adapter_name=name)

    def _upcast_adapter(self) -> None:
        upcast(self.denoiser, ADAPTER)

    def _initialise_adapter(self, lora: LoRA) -> None:
        """B = 0 as peft left it, and A normal with deviation 1 / rank (peft's "gaussian"), drawn from the seed.

        A run that is killed before its first checkpoint then starts again from the same numbers.
        """
        for name, parameter in self.named_trainable():
            if "lora_A" in name:
                normal = torch.randn(parameter.shape, generator=generator(lora.seed, "adapter", name))
                parameter.data.copy_(normal / lora.rank)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The adapter's parameters, or all of the denoiser's."""
        return [parameter for _, parameter in self.named_trainable()]

    def named_trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Trainable parameters with their names, in a fixed order."""
        named = self.denoiser.named_parameters()
        if self.lora is not None:
            return [(n, p) for n, p in named if f".{ADAPTER}" in n and "lora_" in n]
        return [(n, p) for n, p in named if p.requires_grad]

    # --- all weights -------------------------------------------------------------------------------------------------

    def _keep_copy(self, reference_dtype: torch.dtype | None) -> None:
        """Keeps the frozen copy that full fine-tuning needs, and lets the denoiser be trained."""
        self._frozen = copy.deepcopy(self.denoiser)
        if reference_dtype is not None and reference_dtype != self.denoiser.dtype:
            self._halve(self._frozen, reference_dtype)
            self.autocast = reference_dtype
        self.denoiser.requires_grad_(True)

    def _halve(self, module: Any, dtype: torch.dtype) -> None:
        """Rounds the frozen copy; see `halve`."""
        halve(module, dtype)

    def rest_reference(self) -> None:
        """See `Policy.rest_reference`; with adapters the reference has no weights of its own."""
        if self._frozen is not None and not is_sharded(self._frozen) and place_of(self._frozen).type != "cpu":
            self._frozen.to("cpu")

    def wake_reference(self) -> None:
        """Brings the frozen copy to the denoiser, if it rests."""
        if self._frozen is not None and place_of(self._frozen) != place_of(self.denoiser):
            self._frozen.to(place_of(self.denoiser))

    # --- the reference's weights -------------------------------------------------------------------------------------

    def put_reference(self, state: Mapping[str, Tensor] | None) -> None:
        """See `Policy.put_reference`; with adapters, the reference is a second one on the same base, or none."""
        if self.lora is not None:
            if state is None and not self._started_from_adapter:
                self._switch_adapter(True)
                self._has_reference_adapter = False
                return
            if not self._reference_adapter():
                self._add_reference_adapter()
            self._has_reference_adapter = True
        targets = self._reference_adapter() if self.lora is not None else dict(self._frozen.named_parameters())
        names = [name for name, _ in self.named_trainable()]
        if self._initial is None:
            self._initial = {name: whole(targets[name]).to("cpu", copy=True) for name in names}
        wanted = self._initial if state is None else state
        if wanted.keys() != set(names):
            raise ValueError("expected the parameters that are trained, as trained_state() names them")
        with torch.no_grad():
            for name in names:
                targets[name].copy_(cut_like(wanted[name], targets[name]))

    def reference_fingerprint(self) -> str:
        """See `Policy`; of the reference in use, bit by bit. The adapters that are trained have no part in it."""
        uniform = torch.linspace(0, 1, 65, dtype=torch.float64)
        timesteps = self.schedule.timesteps_at(uniform.clamp(max=1 - 1e-9))
        scales = zip(("alphas", "sigmas"), self.schedule.scales(timesteps), strict=True)
        digest = hashlib.blake2b(self.prediction.value.encode(), digest_size=16)
        named = (*self._reference_state().items(), *scales)
        hash_weights(digest, ((f"{name} {t.dtype} {tuple(t.shape)}", t) for name, t in named), exact=True)
        return digest.hexdigest()

    def _reference_state(self) -> dict[str, Tensor]:
        if self.lora is None:
            return dict(sorted(self._frozen.state_dict().items()))
        state = {n: t for n, t in self.denoiser.state_dict().items() if not ("lora_" in n and f".{ADAPTER}" in n)}
        return {n.replace(".base_layer.", "."): t for n, t in sorted(state.items())}  # peft's name under an adapter

    def _reference_adapter(self) -> dict[str, nn.Parameter]:
        """The second adapter's parameters under the names of the first's."""
        named = self.denoiser.named_parameters()
        return {n.replace(f".{REFERENCE}", f".{ADAPTER}"): p for n, p in named if f".{REFERENCE}" in n}

    def _add_reference_adapter(self) -> None:
        """Adds the frozen second adapter, with the weights of the first."""
        settings: LoraConfig = copy.deepcopy(next(iter(self._modules().values())).peft_config[ADAPTER])
        with two_adapters():
            self._inject(settings, REFERENCE)
        self._adapted = None
        named = dict(self.denoiser.named_parameters())
        for name, parameter in named.items():
            if f".{REFERENCE}" in name:
                parameter.data = named[name.replace(f".{REFERENCE}", f".{ADAPTER}")].data.clone()
        self._has_reference_adapter = True
        self._switch_adapter(True)
        self.denoiser.eval()

    # --- files -------------------------------------------------------------------------------------------------------

    def save_trained(self, folder: Path) -> None:
        """LoRA: `pytorch_lora_weights.safetensors`, as diffusers' `load_lora_weights` reads it. Full: `<part>/`."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.lora is None:
            self.denoiser.save_pretrained(folder / self.part)
            return
        type(self.pipeline).save_lora_weights(
            folder,
            safe_serialization=True,
            **{
                f"{self.part}_lora_layers": self._lora_layers(),
                f"{self.part}_lora_adapter_metadata": adapter_metadata(self.denoiser),
            },
        )

    def _lora_layers(self) -> dict[str, Tensor]:
        """The adapter's tensors under the names that diffusers writes."""
        layers: dict[str, Tensor] = get_peft_model_state_dict(self.denoiser, adapter_name=ADAPTER)
        return layers

    def load_trained(self, folder: Path) -> None:
        """Reads `save_trained`'s folder into the policy; the reference stays what it is.

        Raises:
            ValueError: If the folder holds neither a LoRA file nor the denoiser's folder.
        """
        if self._has_lora(folder):
            with two_adapters():
                self._load_adapter(folder)
            self._adapted = None
            if self._has_reference_adapter:
                self._switch_adapter(True)
        else:
            states = self._full_weights(folder)
            self._frozen = self._frozen or copy.deepcopy(self.denoiser).requires_grad_(False)
            self._put(states, self.denoiser)
        self.denoiser.eval()

    def start_from(self, folder: Path) -> None:
        """Policy *and* reference take `save_trained`'s weights: training goes on from them.

        An adapter is trained further itself, and the reference is a frozen second adapter with the weights it had. So
        the file that is saved in the end fits the original base model, and replaces the one that training started
        from. Both are exact: at the start, policy and reference are the same numbers.

        Raises:
            ValueError: See `load_trained`.
        """
        if not self._has_lora(folder):
            states = self._full_weights(folder)
            for module in (self.denoiser, self._frozen):
                if module is not None:
                    self._put(states, module)
            return
        self._load_adapter(folder)
        self._add_reference_adapter()  # which looks for the layers anew
        self._started_from_adapter = True

    def _modules(self) -> Mapping[str, Any]:
        """Parts of the pipeline that are trained, by their names."""
        return {self.part: self.denoiser}

    def _has_lora(self, folder: Path) -> bool:
        return (folder / LORA_FILE).is_file()

    def _load_adapter(self, folder: Path) -> None:
        """Reads a LoRA file as the trained adapter, in the place of the one that is there."""
        if self.lora is not None:
            self.denoiser.delete_adapters(ADAPTER)
        self._read_adapter(folder / LORA_FILE, self.denoiser, ADAPTER)
        self._take_settings(self.denoiser.peft_config[ADAPTER])

    def _read_adapter(self, path: Path, denoiser: Any, name: str) -> None:
        """Reads a LoRA file into a denoiser, the policy's or a copy of it, as the adapter of a name."""
        self._place(denoiser)
        try:
            with two_adapters():
                self.pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
        finally:
            self._place(self.denoiser)
        upcast(denoiser, name)

    def _take_settings(self, config: LoraConfig) -> None:
        """Makes a loaded adapter the policy's own."""
        targets = tuple(sorted(config.target_modules))
        self.lora = LoRA(config.r, config.lora_alpha, targets, use_dora=config.use_dora, use_rslora=config.use_rslora)
        self._upcast_adapter()

    def _full_weights(self, folder: Path) -> dict[str, dict[str, Tensor]]:
        """Part -> state of the whole weights in a folder."""
        modules = self._modules()
        if not all(any((folder / part).glob("*.safetensors")) for part in modules):
            folders = " and ".join(f"a {part} folder" for part in modules)
            raise ValueError(f"{folder}: expected {self._lora_names()} or {folders} with safetensors, found neither")
        return {
            part: type(module).from_pretrained(folder / part, torch_dtype=module.dtype).state_dict()
            for part, module in modules.items()
        }

    def _lora_names(self) -> str:
        """The LoRA files that a folder must hold, for messages."""
        return LORA_FILE

    def _put(self, states: Mapping[str, Mapping[str, Tensor]], module: Any) -> None:
        """Writes whole weights into the denoiser or its copy."""
        module.load_state_dict(states[self.part])

    def _called(self, module: Any) -> Mapping[str, Any]:
        """What the pipeline calls of a denoiser, by the pipeline's attributes."""
        return {self.part: module}

    def _place(self, module: Any) -> None:
        """Makes the pipeline draw with `module`, the denoiser or a copy of it."""
        for part, called in self._called(module).items():
            setattr(self.pipeline, part, called)


def upcast(denoiser: Any, adapter: str) -> None:
    """Makes an adapter at least float32, whatever the weights are that it lies on."""
    for name, parameter in denoiser.named_parameters():
        if f".{adapter}" in name and "lora_" in name:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


@contextmanager
def two_adapters() -> Iterator[None]:
    """What peft warns of is meant here: two adapters, of which one is active at any time, and one that is replaced."""
    with warnings.catch_warnings():
        for message in (
            "Already found a `peft_config` attribute",
            f"Adapter {ADAPTER} was active which is now deleted",
        ):
            warnings.filterwarnings("ignore", message, UserWarning)
        yield


def adapter_metadata(denoiser: Any) -> dict[str, Any]:
    """The adapter's settings as a LoRA file's metadata hold them; without them alpha is taken to be the rank."""
    settings = denoiser.peft_config[ADAPTER].to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}


def place_of(module: nn.Module) -> torch.device:
    """Where a module's weights are."""
    return next(module.parameters()).device

"""Negative models: their arithmetic in both forms, what their files are, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.backbones import LoRA, inspect_model, load_policy
from diffalign.backbones.loading import LORA_FILE, ModelSource
from diffalign.backbones.negative_files import find_negative, mix
from diffalign.predictions import Prediction

ADAPTER = LoRA(rank=2, alpha=6.0)


def state(value: float) -> dict[str, Tensor]:
    return {"a": torch.full((2,), value), "b": torch.full((3,), 2 * value)}


@pytest.mark.parametrize("m", [0.0, 0.3, 1.0])
def test_mixing(m: float) -> None:
    """Check 7.5.3, and the released formula: W_npo + (1 - m) (W_pos - W_base) is alpha = 1 - m, b = 1."""
    base, positive, negative = state(1.0), state(1.5), state(0.25)
    torch.testing.assert_close(mix(base, [(positive, 0.0), (negative, 0.0)]), base)
    torch.testing.assert_close(mix(base, [(positive, 1.0), (negative, 0.0)]), positive)
    torch.testing.assert_close(mix(base, [(positive, 1.0), (state(0.5), 1.0)]), base)  # delta = -eta
    released = {name: negative[name] + (1 - m) * (positive[name] - base[name]) for name in base}
    torch.testing.assert_close(mix(base, [(positive, 1 - m), (negative, 1.0)]), released)


def test_mixing_is_in_float32_and_by_name() -> None:
    base = {"a": torch.ones(2, dtype=torch.bfloat16), "steps": torch.tensor(3)}
    other = {"steps": torch.tensor(9), "a": torch.full((2,), 1 + 2**-6, dtype=torch.bfloat16)}
    mixed = mix(base, [(other, 0.5)])
    torch.testing.assert_close(mixed["a"], torch.full((2,), 1 + 2**-7))
    assert int(mixed["steps"]) == 3


def test_guidance_makes_as_much_noise_of_independent_branches_as_the_paper_says() -> None:
    """Check 7.5.5: 2 omega^2 + 2 omega + 1 of independent errors, 98.5 at omega 6.5; 1 of equal ones."""
    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(2, 400_000, generator=generator, dtype=torch.float64)
    guided = negative + 7.5 * (positive - negative)
    assert float(guided.var()) == pytest.approx(98.5, rel=0.01)
    assert float((positive + 7.5 * (positive - positive)).var()) == pytest.approx(1.0, rel=0.01)


def test_the_forms_of_the_combination_agree() -> None:
    """Check 7.5.2: affine in g with slope 1 - g in the negative output, and the same in epsilon and v."""
    generator = torch.Generator().manual_seed(0)
    positive, negative, noisy, nudge = torch.randn(4, 3, 4, generator=generator, dtype=torch.float64)
    alphas = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
    sigmas = (1 - alphas.square()).sqrt()

    def guided(g: float, positive: Tensor, negative: Tensor) -> Tensor:
        return negative + g * (positive - negative)

    for g in (1.0, 3.0, 7.5):
        moved = guided(g, positive, negative + nudge) - guided(g, positive, negative)
        torch.testing.assert_close(moved, (1 - g) * nudge)
        v = [Prediction.EPSILON.convert(x, Prediction.V, noisy, alphas, sigmas) for x in (positive, negative)]
        back = Prediction.V.convert(guided(g, v[0], v[1]), Prediction.EPSILON, noisy, alphas, sigmas)
        torch.testing.assert_close(back, guided(g, positive, negative))


# --- weights on a pipeline -------------------------------------------------------------------------------------------


def save_moved(model: Path, folder: Path, policies: Any, lora: LoRA | None, scale: float, seed: int = 0) -> Path:
    policy: Any = load_policy(str(model), lora=lora, train=True)
    with torch.no_grad():
        for number, (_, parameter) in enumerate(policy.named_trainable()):
            generator = torch.Generator().manual_seed(1000 * seed + number)
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    policy.save_trained(folder)
    return folder


@pytest.fixture(scope="module")
def weights(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory, policies: Any) -> dict[str, Path]:
    """Positive and negative models, as adapters and as whole weights; the whole negative is the adapter written out."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("positive", "negative", "whole", "whole_positive")}
    save_moved(tiny_pipeline, folders["positive"], policies, LoRA(rank=3), 0.1)
    save_moved(tiny_pipeline, folders["negative"], policies, ADAPTER, 0.1, seed=1)
    for name in ("positive", "negative"):
        policy: Any = load_policy(str(tiny_pipeline), adapter=folders[name])
        whole = load_policy(str(tiny_pipeline), train=True)
        fused = predict_state(policy)
        whole.denoiser.load_state_dict(fused)
        whole.save_trained(folders["whole" if name == "negative" else "whole_positive"])
    return folders


def predict_state(policy: Any) -> dict[str, Tensor]:
    """A denoiser's weights with its adapter worked in: W + (alpha / r) B A."""
    named = policy.denoiser.state_dict()
    fused = {name.replace(".base_layer.", "."): tensor for name, tensor in named.items() if "lora_" not in name}
    for name, down in named.items():
        if "lora_A" in name:
            layer = name.partition(".lora_A")[0]
            up = named[name.replace("lora_A", "lora_B")]
            fused[f"{layer}.weight"] = fused[f"{layer}.weight"] + policy.lora.alpha / policy.lora.rank * up @ down
    return fused


def outputs(policy: Any, module: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        return policy._call(module, torch.float32, batch.chosen, torch.tensor([10, 700]), batch.conditioning)


@pytest.mark.parametrize("positive", [None, pytest.param("positive", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_adapters_and_whole_weights_are_one_model(
    positive: str | None, tiny_pipeline: Path, weights: dict[str, Path], batches: Any
) -> None:
    """Check 7.5.4: two adapters on one base compute what W + alpha eta + b delta, written out, computes."""
    policy: Any = load_policy(str(tiny_pipeline), adapter=weights[positive] if positive else None)
    batch = batches(2)
    before = outputs(policy, policy.denoiser, batch)
    for alpha, scale in ((0.5, 0.8), (0.0, 0.0)):
        policy.put_negative(weights["negative"], alpha=alpha, scale=scale)
        shared = {id(p) for p in policy.denoiser.parameters()}
        own = [name for name, p in policy._negative.named_parameters() if id(p) not in shared]
        assert own
        assert all("lora_" in name for name in own)  # one base in memory, not two
        adapters, first = outputs(policy, policy._negative, batch), policy.negative_fingerprint()
        policy.put_negative(weights["whole"], alpha=alpha, scale=scale)
        torch.testing.assert_close(outputs(policy, policy._negative, batch), adapters, rtol=1e-4, atol=1e-4)
        assert policy.negative_fingerprint() != first
    torch.testing.assert_close(adapters, outputs(load_policy(str(tiny_pipeline)), policy._negative, batch))
    assert torch.equal(outputs(policy, policy.denoiser, batch), before)  # the positive model is left alone


@pytest.mark.slow
def test_the_corners_of_the_mixture(tiny_pipeline: Path, weights: dict[str, Path], batches: Any) -> None:
    """alpha = b = 0 is the base, alpha = 1 with b = 0 the positive model; whole positive weights mix as adapters do."""
    batch = batches(2)
    base: Any = load_policy(str(tiny_pipeline))
    policy: Any = load_policy(str(tiny_pipeline), adapter=weights["positive"])
    whole: Any = load_policy(str(tiny_pipeline), adapter=weights["whole_positive"])
    for alpha, expected in ((0.0, outputs(base, base.denoiser, batch)), (1.0, outputs(policy, policy.denoiser, batch))):
        for positive in (policy, whole):
            positive.put_negative(weights["negative"], alpha=alpha, scale=0.0)
            torch.testing.assert_close(outputs(positive, positive._negative, batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_run_that_went_on_from_an_adapter_counts_from_there(
    tiny_pipeline: Path, weights: dict[str, Path], tmp_path: Path, batches: Any
) -> None:
    """On the adapter that it went on from it is itself: the adapter's own part is not added twice."""
    run = tmp_path / "run"
    run.mkdir()
    (run / LORA_FILE).write_bytes((weights["negative"] / LORA_FILE).read_bytes())
    (run / "run.json").write_text(json.dumps({"started_from": str(weights["positive"])}))
    policy: Any = load_policy(str(tiny_pipeline), adapter=weights["positive"])
    policy.put_negative(run)
    itself: Any = load_policy(str(tiny_pipeline), adapter=weights["negative"])
    expected = outputs(itself, itself.denoiser, batches(2))
    torch.testing.assert_close(outputs(policy, policy._negative, batches(2)), expected, rtol=1e-4, atol=1e-4)
    (run / "run.json").write_text(json.dumps({"started_from": str(tmp_path / "gone")}))
    with pytest.raises(ValueError, match="went on from .*gone.* does not exist"):
        policy.put_negative(run)


@pytest.mark.slow
def test_a_policy_under_training_keeps_what_it_trains(
    tiny_pipeline: Path, weights: dict[str, Path], batches: Any
) -> None:
    policy: Any = load_policy(str(tiny_pipeline), lora=LoRA(rank=2), train=True)
    policy.put_negative(weights["negative"])
    assert all(parameter.requires_grad for parameter in policy.trainable_parameters())
    assert not any("negative" in name for name, _ in policy.denoiser.named_parameters())
    assert sum(p.requires_grad for p in policy.denoiser.parameters()) == len(policy.trainable_parameters())
    with pytest.raises(ValueError, match=r"alpha and scale of a negative model in 0\.\.1, got 1\.5 and 1\.0"):
        policy.put_negative(weights["negative"], alpha=1.5)
    with pytest.raises(ValueError, match="no negative model; call put_negative first"):
        policy.sample(["a"], [0], num_inference_steps=1, negative=True)


@pytest.mark.slow
def test_a_reference_draws_with_it_too(tiny_pipeline: Path, weights: dict[str, Path]) -> None:
    policy: Any = load_policy(str(tiny_pipeline), adapter=weights["positive"])
    base: Any = load_policy(str(tiny_pipeline))
    for one in (policy, base):
        one.put_negative(weights["negative"], alpha=0.0)
    options = {"guidance_scale": 3.0, "num_inference_steps": 2, "negative": True}
    torch.testing.assert_close(
        policy.sample(["a"], [0], reference=True, **options), base.sample(["a"], [0], **options), rtol=0, atol=1e-4
    )


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_files_hold_is_told_by_their_content(
    tiny_pipeline: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    source = inspect_model(str(tiny_pipeline))
    whole = weights["whole"] / "unet"
    named_lora = tmp_path / "sdxl_npo_lora.safetensors"  # as a published one: whole weights, called LoRA
    save_file(load_file(whole / "diffusion_pytorch_model.safetensors"), named_lora)
    for path, kind in (
        (weights["negative"], "lora"),
        (weights["negative"] / LORA_FILE, "lora"),
        (weights["whole"], "whole"),
        (whole, "whole"),
        (named_lora, "whole"),
    ):
        found = find_negative(source, path)
        assert (found.kind, found.started_from) == (kind, None)
    policy: Any = load_policy(source)
    digests = []
    for path in (weights["whole"], whole, named_lora):
        policy.put_negative(path)
        digests.append(policy.negative_fingerprint())
    assert len(set(digests)) == 1


@pytest.mark.slow
def test_what_cannot_be_read_is_one_line(tiny_pipeline: Path, weights: dict[str, Path], tmp_path: Path) -> None:
    source = inspect_model(str(tiny_pipeline))
    pickle = tmp_path / "unet.bin"
    torch.save({"a": torch.zeros(1)}, pickle)
    hidden = tmp_path / "weights.safetensors"  # a pickle under the good name, as one is published
    hidden.write_bytes(pickle.read_bytes())
    text = tmp_path / "text.safetensors"
    save_file({"text_encoder.layer.lora_A.weight": torch.zeros(1)}, text)
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, message in (
        (tmp_path / "nothing", "does not exist; give a run's output folder, a LoRA file"),
        (pickle, "is no safetensors file; pickles can run code"),
        (hidden, "is no safetensors file; pickles can run code"),
        (text, "is for text encoders too"),
        (empty, f"expected {LORA_FILE}, or safetensors of unet, found neither"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            find_negative(source, path)
        assert "\n" not in str(error.value)
    other = tmp_path / "other.safetensors"
    save_file({"conv_in.weight": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match="expected the denoiser's .* tensors, found 1, .* it belongs to another model"):
        load_policy(source).put_negative(other)


@pytest.mark.parametrize("family", ["FluxPipeline", "Flux2Pipeline", "HunyuanVideoPipeline"])
def test_families_without_an_unconditional_branch_are_refused_by_name(family: str, tmp_path: Path) -> None:
    source = ModelSource("mine", str(tmp_path), family, Prediction.VELOCITY)
    with pytest.raises(ValueError, match=f"mine: {family} draws without an unconditional branch"):
        find_negative(source, tmp_path)

"""Samples of a reference: the pipelines' own deterministic sampler, files to go on with, and their provenance."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from safetensors import safe_open

from diffalign import reference_samples
from diffalign.backbones import load_policy
from diffalign.data import DataConfig, EncodedPairs, encode_pairs, load_pairs
from diffalign.processes import Processes
from diffalign.randomness import Draw
from diffalign.reference_samples import Provenance, ReferenceSamples
from diffalign.rollouts import DeterministicSampler
from tests.trainers.winners import winners_folder

pytestmark = pytest.mark.slow

T = TypeVar("T")

PROMPTS = ("one circle", "two squares", "three stars")
STEPS = 4
PROVENANCE = Provenance(
    phase=2,
    reference="step-2",
    weights="abc",
    seed=7,
    data="data",
    num_inference_steps=2,
    guidance_scale=3.0,
    batch_size=2,
)


# --- the sampler -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v", "flow"])
def test_it_is_the_pipelines_own_sampler(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Grid, guidance and unconditional branch against diffusers' own loop: DDIM at eta 0, Euler on the flow."""
    if kind == "flow":
        from tests.backbones.families.sd3 import save_tiny

        folder = save_tiny(tmp_path / "sd3", t5=False)
    else:
        folder = request.getfixturevalue("tiny_pipeline" if kind == "epsilon" else "tiny_v_pipeline")
    policy: Any = load_policy(str(folder))
    sampler = DeterministicSampler(policy, num_inference_steps=STEPS, guidance_scale=5.0)
    draws = [Draw(3, 0, f"prompt-{i}") for i in range(3)]
    conditioning = policy.encode_prompts(PROMPTS)
    found = sampler.draw(policy, draws, conditioning, policy.unconditional(policy.encode_prompts([""])))
    expected = policy.pipeline(
        list(PROMPTS),
        latents=torch.stack([draw.normal("initial noise", policy.latent_shape) for draw in draws]),
        guidance_scale=5.0,
        num_inference_steps=STEPS,
        output_type="latent",
        **({} if kind == "flow" else {"eta": 0.0}),
    ).images
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * scale)
    other = DeterministicSampler(policy, num_inference_steps=STEPS, guidance_scale=1.0)
    plain = other.draw(policy, draws, conditioning, policy.encode_unconditional(1))
    assert not torch.allclose(plain, expected, atol=1e-2 * scale)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoded(policy: Any, tmp_path_factory: pytest.TempPathFactory) -> EncodedPairs:
    folder = tmp_path_factory.mktemp("data")
    config = DataConfig(train_data_dir=winners_folder(folder / "winners"))
    return encode_pairs(load_pairs(config, winners_only=True), policy, config, folder / "cache")


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_samples, "SAMPLES_PER_FILE", 3)


@pytest.fixture
def drawn(policy: Any, encoded: EncodedPairs) -> Callable[..., ReferenceSamples]:
    """Draws into a folder what the policy's reference makes of five rows."""

    def drawn(folder: Path, processes: Processes | None = None, **changed: Any) -> ReferenceSamples:
        provenance = dataclasses.replace(PROVENANCE, **changed)
        samples = ReferenceSamples(folder, encoded, [4, 2, 0, 1, 5], provenance)
        sampler = DeterministicSampler(
            policy, num_inference_steps=provenance.num_inference_steps, guidance_scale=provenance.guidance_scale
        )
        samples.draw(sampler, policy.frozen(), processes)
        return samples

    return drawn


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_sample_is_its_own_prompts_and_says_where_it_is_from(
    policy: Any, encoded: EncodedPairs, drawn: Any, tmp_path: Path
) -> None:
    samples = drawn(tmp_path)
    assert list(contents(tmp_path)) == ["00000.safetensors", "00001.safetensors"]
    with safe_open(tmp_path / "00001.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["provenance"])
    assert header == {**dataclasses.asdict(PROVENANCE), "pairs": ["w1", "w5"]}
    sampler = DeterministicSampler(policy, num_inference_steps=2, guidance_scale=3.0)
    for row in (5, 0):
        name = encoded.pair_id(row)
        alone = sampler.draw(
            policy.frozen(), [Draw(7, 2, name)], encoded.conditioning([row]), encoded.empty_conditioning()
        )
        torch.testing.assert_close(samples.latents([name]), alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(samples.latents(["w0", "w5"]), torch.cat([samples.latents([name]) for name in ("w0", "w5")]))
    with pytest.raises(ValueError, match="no sample was drawn for pair 'w3' in phase 2"):
        samples.latents(["w3"])


class Sharing(Processes):
    """One of two processes that come one after the other."""

    def on_first(self, function: Callable[[], T]) -> T:
        return function()

    def wait(self) -> None:
        pass


def test_any_number_of_processes_draws_the_same_bytes_and_goes_on_where_it_was(drawn: Any, tmp_path: Path) -> None:
    drawn(tmp_path / "alone")
    (tmp_path / "two").mkdir()
    drawn(tmp_path / "two", Sharing(1, 2))
    assert list(contents(tmp_path / "two")) == ["00001.safetensors"]
    before = (tmp_path / "two" / "00001.safetensors").stat().st_mtime_ns
    drawn(tmp_path / "two", Sharing(0, 2))
    assert (tmp_path / "two" / "00001.safetensors").stat().st_mtime_ns == before
    assert contents(tmp_path / "two") == contents(tmp_path / "alone")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"reference": "step-4"}, "reference 'step-2', expected 'step-4'; remove .*, or choose another output_dir"),
        ({"seed": 8}, "seed 7, expected 8"),
        ({"data": "other"}, "data 'data', expected 'other'"),
        ({"guidance_scale": 1.0}, r"guidance_scale 3\.0, expected 1\.0"),
    ],
)
def test_files_of_another_origin_are_an_error(drawn: Any, tmp_path: Path, changed: Any, message: str) -> None:
    """Check 7.3.6, of the files."""
    drawn(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        drawn(tmp_path, **changed)
    assert "\n" not in str(error.value)
    assert contents(tmp_path) == before


def test_files_of_other_pairs_or_without_provenance_are_an_error(
    policy: Any, encoded: EncodedPairs, drawn: Any, tmp_path: Path
) -> None:
    drawn(tmp_path)
    sampler = DeterministicSampler(policy, num_inference_steps=2, guidance_scale=3.0)
    with pytest.raises(ValueError, match=r"pairs \['w4', 'w2', 'w0'\], expected \['w2', 'w4', 'w0'\]"):
        ReferenceSamples(tmp_path, encoded, [2, 4, 0], PROVENANCE).draw(sampler, policy.frozen())
    (tmp_path / "00000.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"00000.safetensors holds no samples with a provenance; remove"):
        drawn(tmp_path)


def test_samples_of_weights_that_were_trained_again_are_drawn_again(
    drawn: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    drawn(tmp_path)
    drawn(tmp_path, weights="def")
    assert "the weights of step-2 are others now; drawn again" in caplog.text
    with safe_open(tmp_path / "00000.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["provenance"])["weights"] == "def"


def test_samples_that_are_no_numbers_stop_the_run(policy: Any, encoded: EncodedPairs, tmp_path: Path) -> None:
    class Broken:
        def predict(self, noisy_latents: Any, timesteps: Any, conditioning: Any) -> Any:
            return torch.full_like(noisy_latents, float("nan"))

    sampler = DeterministicSampler(policy, num_inference_steps=2, guidance_scale=1.0)
    with pytest.raises(ValueError, match="step-2 draws values that are not finite for pair 'w3'"):
        ReferenceSamples(tmp_path, encoded, [3], PROVENANCE).draw(sampler, Broken())
    assert list(tmp_path.iterdir()) == []

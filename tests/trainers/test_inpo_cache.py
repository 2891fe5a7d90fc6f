"""DDIM-InPO with the reference's inversions on disk: the same numbers for fewer passes, files, kills, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from diffalign import commands, inversions, sharding
from diffalign.backbones import LoRA, load_policy
from diffalign.batches import Conditioning, PairBatch
from diffalign.data import DataConfig, EncodedPairs, PairSource, encode_pairs, load_pairs
from diffalign.inversions import Inversions, InvertedPairs, InvertedSource
from diffalign.trainers.inpo import InPO, InPOConfig
from tests.trainers.gaussian import GaussianPolicy, random_pairs, some_draws
from tests.trainers.kept import Killed, Sharing, contents, inverted_pairs, metrics, pairs_folder
from tests.trainers.winners import COUNT, winners_config

T = TypeVar("T")

CACHED: dict[str, Any] = {"inversion_net": "reference", "cache_inversion": True}
SEED = 3


class Told(GaussianPolicy):
    """A perfect network that inverts as its reference does, with a weight to be told apart by."""

    def __init__(self) -> None:
        super().__init__()
        self.denoiser = nn.Linear(1, 1)

    def frozen(self) -> Any:
        return self


# --- without files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 10, 20])
def test_a_walk_that_starts_from_the_grid_arrives_where_the_whole_walk_does(steps: int) -> None:
    trainer, batch = InPO(Told(), inversion_steps=steps, **CACHED), random_pairs(32)
    whole, rest = trainer.noisy_states(batch), trainer.noisy_states(inverted_pairs(trainer, batch))
    torch.testing.assert_close(rest.noisy_latents, whole.noisy_latents, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rest.target, whole.target, rtol=1e-12, atol=1e-12)
    assert torch.equal(rest.timesteps, whole.timesteps)


def test_what_is_left_of_the_walk_is_one_move() -> None:
    policy, batch = Told(), random_pairs(4)
    trainer = InPO(policy, **CACHED)
    pairs = inverted_pairs(trainer, batch)
    policy.told.clear()
    trainer.noisy_states(pairs)
    assert policy.told == [trainer.draw_timesteps(batch.draws).repeat(2).tolist()]


@pytest.mark.parametrize(
    ("options", "grid"),
    [({}, [0, *range(101, 902, 100)]), ({"timestep_sampling": "refiner"}, [0, 101]), ({"inversion_steps": 1}, [0])],
)
def test_the_grid_has_the_levels_below_some_timestep(options: Any, grid: list[int]) -> None:
    trainer = InPO(Told(), **CACHED, **options)
    assert trainer.grid().tolist() == grid
    timesteps = torch.tensor([2, 101, 102, 199])
    assert trainer.grid()[inversions.below(trainer.grid(), timesteps)].tolist() == [
        max(level for level in grid if level < t) for t in timesteps.tolist()
    ]


def test_batches_of_the_wrong_kind_are_errors() -> None:
    trainer, batch = InPO(Told(), **CACHED), random_pairs(4)
    pairs = inverted_pairs(trainer, batch)
    with pytest.raises(TypeError, match="with cache_inversion=true InPO learns from InvertedPairs, got a PairBatch"):
        trainer.loss(batch)
    with pytest.raises(TypeError, match="with cache_inversion=false .* not inverted before, got a InvertedPairs"):
        InPO(Told(), inversion_net="reference").loss(pairs)
    with pytest.raises(
        ValueError, match=r"inverted to levels \[.*\], expected \[.*\]; take batches from trainer.source"
    ):
        InPO(Told(), **CACHED, inversion_steps=20).loss(pairs)
    with pytest.raises(ValueError, match="inverted to levels"):
        trainer.loss(replace(pairs, draws=some_draws(4, epoch=1)))


def test_fixed_pairs_are_validated_by_a_whole_walk() -> None:
    policy = Told()
    trainer, batch = InPO(policy, **CACHED), random_pairs(4)
    found, expected = trainer.validate(batch), InPO(policy, inversion_net="reference").loss(batch).metrics
    assert {name: float(value) for name, value in found.items()} == {n: float(v) for n, v in expected.items()}


def test_a_batch_moves_and_is_saved_for_replay_with_all_it_holds() -> None:
    trainer = InPO(Told(), **CACHED)
    pairs = inverted_pairs(trainer, random_pairs(2))
    moved = pairs.to("cpu", torch.bfloat16)
    assert moved.start_chosen.dtype == moved.start_rejected.dtype == torch.bfloat16
    assert moved.captions.tensors["hidden"].dtype == torch.bfloat16
    assert moved.start_levels.dtype == torch.long
    again = PairBatch.from_state(pairs.to_state())
    assert isinstance(again, InvertedPairs)
    assert torch.equal(trainer.noisy_states(again).noisy_latents, trainer.noisy_states(pairs).noisy_latents)


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"inversion_net": "policy"}, "policy, exact and 0"),
        ({"inversion_net": "reference", "eta": 0.1}, "reference, exact and 0.1"),
        ({"inversion_net": "reference", "inversion": "release"}, "reference, release and 0"),
    ],
)
def test_inversions_that_change_are_not_kept(options: Any, got: str) -> None:
    with pytest.raises(ValidationError, match=f"needs inversion_net=reference.* got {got}; set them, or"):
        InPOConfig(cache_inversion=True, **options)
    assert InPOConfig().cache_inversion is False


def test_the_start_up_line_says_that_they_are_kept() -> None:
    assert InPO(Told(), **CACHED).describe().endswith("eta 0, all but the last one kept on disk")


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pairs_folder(tmp_path_factory.mktemp("data") / "pairs")


@pytest.fixture(scope="module")
def encode(policy: Any, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., EncodedPairs]:
    folder = tmp_path_factory.mktemp("encoded")

    def encode(**options: Any) -> EncodedPairs:
        config = DataConfig(train_data_dir=data, **options)
        return encode_pairs(load_pairs(config), policy, config, folder / "-".join(["cache", *options]))

    return encode


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inversions, "PAIRS_PER_FILE", 2)


def source_of(encoded: EncodedPairs, **options: Any) -> PairSource:
    return PairSource(encoded, seed=SEED, batch_size=COUNT, prefetch=False, **options)


def begun(policy: Any, encoded: EncodedPairs, folder: Path, dropout: float = 0.0, **options: Any) -> Any:
    """A trainer and its source, after the inversion."""
    trainer = InPO(policy, **CACHED, **options)
    source = trainer.source(source_of(encoded, caption_dropout=dropout), SEED)
    trainer.begin(0, folder)
    return trainer, source


@pytest.mark.slow
def test_kept_inversions_are_those_of_every_visit_for_fewer_passes(policy: Any, encode: Any, tmp_path: Path) -> None:
    """Float32, to 1e-6 of the states' scale; in the first epoch against the data's own batches."""
    encoded, live = encode(), InPO(policy, inversion_net="reference")
    spent = policy.forwards
    trainer, source = begun(policy, encoded, tmp_path)
    assert policy.forwards - spent == 2 * COUNT * 9
    clean = source.batch(0, 0)
    plain = source_of(encoded).batch(0, 0)
    assert isinstance(clean, InvertedPairs)
    assert torch.equal(clean.chosen, plain.chosen)
    assert torch.equal(clean.rejected, plain.rejected)
    for step in range(3):  # epochs
        batch = source.batch(step, 0)
        order = [[draw.pair_id for draw in plain.draws].index(draw.pair_id) for draw in batch.draws]
        assert torch.equal(batch.chosen, plain.chosen[order])
        same = PairBatch(batch.conditioning, batch.chosen, batch.rejected, batch.weight, batch.draws)
        spent = policy.forwards
        found = trainer.noisy_states(batch)
        assert policy.forwards - spent == 2 * COUNT
        expected = live.noisy_states(same)
        moves = [1 + sum(level < t for level in range(101, 902, 100)) for t in expected.timesteps.tolist()]
        assert policy.forwards - spent == 2 * COUNT + sum(moves) > 2 * 2 * COUNT
        torch.testing.assert_close(found.noisy_latents, expected.noisy_latents, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.target, expected.target, rtol=1e-5, atol=1e-5)
        if step:
            assert not torch.equal(batch.chosen, source_of(encoded).batch(step, 0).chosen)  # which draws anew


@pytest.mark.slow
def test_the_caption_is_dropped_in_the_loss_and_not_in_the_inversion(policy: Any, encode: Any, tmp_path: Path) -> None:
    encoded = encode()
    kept_trainer, kept_source = begun(policy, encoded, tmp_path)
    dropping = kept_trainer.source(source_of(encoded, caption_dropout=1.0), SEED)
    dropping.inversions.fill(0, tmp_path / "inversions", kept_trainer.invert_to_grid, 4)
    batch, undropped = dropping.batch(0, 0), kept_source.batch(0, 0)
    empty = encoded.empty_conditioning()
    for name, tensor in batch.conditioning.tensors.items():
        assert torch.equal(tensor, empty.tensors[name].expand_as(tensor))
        assert torch.equal(batch.captions.tensors[name], undropped.conditioning.tensors[name])
        assert not torch.equal(batch.captions.tensors[name], tensor)
    found, expected = kept_trainer.noisy_states(batch), kept_trainer.noisy_states(undropped)
    assert torch.equal(found.noisy_latents, expected.noisy_latents)
    other = kept_trainer.noisy_states(replace(batch, captions=Conditioning(batch.conditioning.tensors)))
    assert not torch.equal(other.noisy_latents, expected.noisy_latents)


@pytest.mark.slow
def test_any_number_of_processes_writes_the_same_bytes(
    policy: Any, encode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inversions, "PAIRS_PER_FILE", 4)
    trainer, _ = begun(policy, encode(), tmp_path / "alone")
    (tmp_path / "two").mkdir()
    for rank in (1, 0):
        trainer.inversions.fill(0, tmp_path / "two", trainer.invert_to_grid, 4, Sharing(rank, 2))
        names = sorted(path.name for path in (tmp_path / "two").glob("*.safetensors"))
        assert names == [f"00000{n}.safetensors" for n in ((1,) if rank else (0, 1))]
    assert contents(tmp_path / "two") == contents(tmp_path / "alone" / "inversions")


@pytest.mark.slow
def test_inversions_of_another_origin_are_errors(
    policy: Any, policies: Any, encode: Any, tiny_pipeline: Path, tmp_path: Path
) -> None:
    encoded = encode()
    begun(policy, encoded, tmp_path)
    folder = tmp_path / "inversions"
    before = contents(folder)
    with safe_open(folder / "000001.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["provenance"])
        assert list(file.get_slice("latents").get_shape()) == [2, 2, 10, 4, 4, 4]
    assert header["pairs"] == ["p2", "p3"]
    assert header["settings"] == json.loads(before["settings.json"])
    other: Any = load_policy(str(tiny_pipeline), lora=LoRA(rank=2), train=True)
    with torch.no_grad():
        next(other.denoiser.parameters()).add_(1e-3)
    for changed, message in (
        ({"policy": other}, r'weights "\w+" -> "\w+"'),
        ({"inversion_steps": 5}, r"grid \[0, 101, .* -> \[0, 201, "),
        ({"inversion_batch_size": 1}, "batch_size 4 -> 1"),
    ):
        with pytest.raises(ValueError, match=f"holds results of other settings .*{message}") as error:
            begun(changed.pop("policy", policy), encoded, tmp_path, **changed)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="seed 3 -> 4"):
        Inversions(encoded, torch.tensor(header["settings"]["grid"]), 4, policy).fill(0, folder, None, 4)  # type: ignore[arg-type]
    assert contents(folder) == before
    (folder / "000001.safetensors").write_bytes(before["000000.safetensors"])
    with pytest.raises(ValueError, match=r"000001.safetensors holds inversions of other pairs or settings; remove"):
        begun(policy, encoded, tmp_path)
    (folder / "000001.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"000001.safetensors is not a readable safetensors file .*; remove it"):
        begun(policy, encoded, tmp_path)


@pytest.mark.slow
def test_inversions_say_what_they_were_rounded_to(encode: Any, tiny_pipeline: Path, tmp_path: Path) -> None:
    """All weights trained are float32 in both runs; what inverts is the frozen copy."""
    half: Any = load_policy(str(tiny_pipeline), train=True, dtype=torch.bfloat16)
    plain: Any = load_policy(str(tiny_pipeline), train=True)
    assert (half.autocast, plain.autocast) == (torch.bfloat16, None)
    begun(plain, encode(), tmp_path)
    assert "autocast" not in json.loads((tmp_path / "inversions" / "settings.json").read_text())
    with pytest.raises(ValueError, match=r'holds results of other settings \(autocast none -> "bfloat16"\)'):
        begun(half, encode(), tmp_path)


@pytest.mark.slow
def test_what_cannot_be_kept_is_an_error(policy: Any, encode: Any, tmp_path: Path) -> None:
    trainer = InPO(policy, **CACHED)
    source: Any = trainer.source(source_of(encode()), SEED)
    with pytest.raises(ValueError, match="no pair was inverted yet; call trainer.begin as fit does"):
        source.batch(0, 0)
    bad = InvertedSource(source.pairs, source.inversions, trainer.draw_timesteps).inversions
    with pytest.raises(ValueError, match="the inversion of pair 'p0' is infinite or not a number"):
        bad.fill(0, tmp_path, lambda latents, _: torch.full_like(latents, float("nan"))[:, None], 4)
    with pytest.raises(ValueError, match="data.random_flip shows it mirrored too; set one of them to false"):
        trainer.source(source_of(encode(random_flip=True)), SEED)
    with pytest.raises(ValueError, match="pair 'elsewhere' was not inverted"):
        bad.latents(["elsewhere"], [0])


@pytest.mark.slow
def test_spread_weights_are_refused(policy: Any, encode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not sharding.is_sharded(policy.denoiser)
    monkeypatch.setattr(sharding, "is_sharded", lambda _: True)
    with pytest.raises(ValueError, match="each process inverts pairs by itself, .*; train with DDP"):
        begun(policy, encode(), tmp_path)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_reads_what_is_there_and_ends_with_the_same_bits(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it inverts, and again before its third checkpoint."""
    trainer = {"name": "inpo", "beta": 100.0, "inversion_batch_size": 2, **CACHED}
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    configs = []
    for folder in (whole, pieces):
        data = {"train_data_dir": str(pairs_folder(folder / "pairs"))}
        configs.append(str(winners_config(folder, tiny_pipeline, trainer, data=data)))
    commands.train(configs[0], ["training.max_train_steps=6"])
    write, update, written = Inversions._write, InPO.update, []

    def killing_write(self: Inversions, number: int, *args: Any) -> None:
        write(self, number, *args)
        written.append(self._path(number))
        if len(written) == 2:
            raise Killed

    monkeypatch.setattr(Inversions, "_write", killing_write)
    with pytest.raises(Killed):
        commands.train(configs[1], ["training.max_train_steps=6"])
    ages = {path: path.stat().st_mtime_ns for path in written}

    def killing_update(self: InPO, step: int) -> None:
        update(self, step)
        if step == 3:
            raise Killed

    monkeypatch.setattr(InPO, "update", killing_update)
    with pytest.raises(Killed):
        commands.train(configs[1], ["training.max_train_steps=6"])
    assert len(written) == 3
    monkeypatch.setattr(InPO, "update", update)
    commands.train(configs[1], ["training.max_train_steps=6"])
    assert len(written) == 3
    assert all(path.stat().st_mtime_ns == age for path, age in ages.items())
    found, expected = contents(pieces / "run" / "inversions"), contents(whole / "run" / "inversions")
    assert list(found) == ["000000.safetensors", "000001.safetensors", "000002.safetensors", "settings.json"]
    assert found == expected
    assert metrics(pieces / "run") == metrics(whole / "run")
    ours, theirs = (load_file(folder / "run" / "pytorch_lora_weights.safetensors") for folder in (pieces, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # 9 passes an image, then one for the last move, one of the reference and one of the policy at every visit
    assert metrics(whole / "run")[-1]["train/forwards"] == 2 * COUNT * 9 + 6 * 2 * 2 * 3

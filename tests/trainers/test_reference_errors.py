"""The reference's errors on disk: the live step's numbers without its forward passes; kills, sharing, refusals."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from diffalign import commands, reference_errors, sharding
from diffalign.backbones import LoRA, load_policy, trained_weights
from diffalign.batches import PairBatch
from diffalign.config import ConfigError, load_config, trainer_settings
from diffalign.data import DataConfig, EncodedPairs, PairSource, encode_pairs, load_pairs
from diffalign.reference_errors import ReferencedPairs, ReferenceErrors
from diffalign.trainers import NPO, DiffusionDPO
from diffalign.trainers.base import PairTrainer
from diffalign.trainers.d3po import D3POConfig
from diffalign.trainers.inpo import InPOConfig
from diffalign.trainers.seppo import SePPOConfig
from tests.trainers.gaussian import random_pairs
from tests.trainers.kept import Killed, Sharing, contents, metrics, pairs_folder
from tests.trainers.winners import COUNT, winners_config

CACHED: dict[str, Any] = {"reference": "cached", "draws_per_pair": 2, "reference_batch_size": 4}
SEED = 3


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_errors, "PAIRS_PER_FILE", 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pairs_folder(tmp_path_factory.mktemp("data") / "pairs")


@pytest.fixture(scope="module")
def encoded(policy: Any, data: Path, tmp_path_factory: pytest.TempPathFactory) -> EncodedPairs:
    config = DataConfig(train_data_dir=data, random_flip=True)
    return encode_pairs(load_pairs(config), policy, config, tmp_path_factory.mktemp("encoded") / "cache")


def source_of(encoded: EncodedPairs, draws: int | None = 2, size: int = COUNT, **options: Any) -> PairSource:
    options = {"seed": SEED, "caption_dropout": 0.4, "prefetch": False, **options}
    return PairSource(encoded, batch_size=size, draws_per_pair=draws, **options)


def begun(
    policy: Any, encoded: EncodedPairs, kind: type[PairTrainer] = DiffusionDPO, size: int = COUNT, **options: Any
) -> Any:
    """A trainer and its source, after the first pass."""
    trainer = kind(policy, **CACHED | options)
    source = trainer.source(source_of(encoded, trainer.config.draws_per_pair, size), SEED)
    trainer.begin(0, encoded.folder)
    return trainer, source


def test_exchanging_a_pair_exchanges_what_is_known_of_it() -> None:
    one, other = torch.ones(3), torch.zeros(3)
    pairs = ReferencedPairs(**vars(random_pairs(3)), chosen_error=one, rejected_error=other)
    exchanged = pairs.exchanged()
    assert torch.equal(exchanged.chosen, pairs.rejected)
    assert torch.equal(exchanged.rejected, pairs.chosen)
    assert exchanged.chosen_error is other
    assert exchanged.rejected_error is one
    again = PairBatch.from_state(pairs.to("cpu", torch.bfloat16).to_state())
    assert isinstance(again, ReferencedPairs)
    assert again.chosen_error.dtype == torch.float32


@pytest.mark.parametrize("kind", [InPOConfig, SePPOConfig, D3POConfig])
def test_methods_whose_reference_sees_other_states_refuse(kind: Any) -> None:
    with pytest.raises(ValidationError, match="this method's reference sees other states at every visit; set it to"):
        kind(reference="cached")


def test_rollouts_repeat_no_draw() -> None:
    with pytest.raises(
        ValidationError, match="rollouts are drawn anew in every round and repeat no draw; leave it out"
    ):
        D3POConfig(draws_per_pair=2)


def test_what_is_cached_has_to_repeat(tmp_path: Path) -> None:
    path = winners_config(tmp_path, Path("m"), {"name": "diffusion_dpo", "reference": "cached"})
    with pytest.raises(ConfigError, match=r"reference: cached needs draws_per_pair, the visits after which"):
        trainer_settings(load_config(str(path)))
    with pytest.raises(ValueError, match="draws_per_pair must be at least 1, got 0"):
        source_of([0], draws=0)  # type: ignore[arg-type]


def test_the_estimate_counts_no_reference() -> None:
    assert DiffusionDPO.forwards(DiffusionDPO.Config(**CACHED)) == {"policy": 2}
    assert DiffusionDPO.forwards(DiffusionDPO.Config()) == {"policy": 2, "reference": 2}


@pytest.mark.slow
def test_draws_repeat_and_visits_do_not(encoded: EncodedPairs) -> None:
    """Each epoch has an order of its own; the third one draws what the first did."""
    source, fresh = source_of(encoded), source_of(encoded, draws=None)
    epochs = [source.visits(step) for step in range(4)]
    assert [{draw.epoch for _, draw in visits} for visits in epochs] == [{0}, {1}, {0}, {1}]
    assert [row for row, _ in epochs[0]] != [row for row, _ in epochs[2]]
    assert sorted(epochs[0], key=lambda v: v[0]) == sorted(epochs[2], key=lambda v: v[0])
    assert epochs[:2] == [fresh.visits(step) for step in range(2)]
    first, third = source.batch(0, 0), source.batch(2, 0)
    order = [first.draws.index(draw) for draw in third.draws]
    assert torch.equal(third.chosen, first.chosen[order])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DiffusionDPO, NPO])
def test_a_step_is_the_live_one_without_the_reference(policy: Any, encoded: EncodedPairs, kind: Any) -> None:
    """Loss, gradients and every metric to 1e-6, mirrored images and dropped captions among them, in any order."""
    trainer, source = begun(policy, encoded, kind)
    live = kind(policy, draws_per_pair=2)
    dropped = 0
    for step in range(3):
        batch = source.batch(step, 0)
        plain = source_of(encoded).batch(step, 0)
        assert plain.draws == batch.draws
        spent, results = policy.forwards, []
        for method, pairs in ((trainer, batch), (live, plain)):
            output = method.loss(pairs)
            output.loss.backward()
            gradients = [p.grad.clone() for p in policy.trainable_parameters()]
            policy.denoiser.zero_grad()
            results.append((output, gradients))
            spent += 2 * COUNT * (1 if method is trainer else 2)
            assert policy.forwards == spent
        (found, ours), (expected, theirs) = results
        torch.testing.assert_close(found.losses, expected.losses, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.metrics, expected.metrics, rtol=1e-5, atol=1e-6)
        for our, their in zip(ours, theirs, strict=True):
            torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-6 * float(their.abs().max()) + 1e-12)
        dropped += sum(draw.uniform("caption") < 0.4 for draw in batch.draws)
    assert 0 < dropped < 3 * COUNT


@pytest.mark.slow
def test_validation_asks_the_reference(policy: Any, encoded: EncodedPairs) -> None:
    trainer, source = begun(policy, encoded)
    (fixed,) = source.pairs.fixed_batches(2)
    spent = policy.forwards
    trainer.validate(fixed)
    assert policy.forwards == spent + 8


@pytest.mark.slow
def test_runs_share_what_does_not_depend_on_them(policy: Any, encoded: EncodedPairs, tiny_pipeline: Path) -> None:
    """Another method, beta, batch size or rank asks nothing; other draws, captions or weights lie apart."""
    trainer, _ = begun(policy, encoded)
    folder = trainer.cached.folder
    before = contents(folder)
    assert sorted(before) == ["errors.npy", "settings.json"]
    assert np.load(folder / "errors.npy").shape == (2, COUNT, 2)
    spent = policy.forwards
    other: Any = load_policy(str(tiny_pipeline), lora=LoRA(rank=4, target_modules=("to_q",)), train=True)
    for model, kind, options in ((policy, NPO, {"beta": 7.0}), (other, DiffusionDPO, {"size": 2})):
        trainer, _ = begun(model, encoded, kind, **options)
        assert trainer.cached.folder == folder
    assert policy.forwards == spent + 2 * 2 * COUNT  # counted as if it had asked
    assert contents(folder) == before
    found = {folder}
    with torch.no_grad():
        next(p for n, p in other.denoiser.named_parameters() if "lora_" not in n).add_(1e-3)
    for source, model, law in (
        (source_of(encoded, draws=1), policy, "uniform"),
        (source_of(encoded, seed=4), policy, "uniform"),
        (source_of(encoded, caption_dropout=0.0), policy, "uniform"),
        (source_of(encoded.split(2, 0)[0]), policy, "uniform"),
        (source_of(encoded), policy, "turbo"),
        (source_of(encoded), other, "uniform"),
    ):
        found.add(ReferenceErrors(source, model, {"timestep_sampling": law}, folder.parent).folder)
    assert len(found) == 7


def test_errors_that_were_rounded_lie_apart(policy: Any, encoded: EncodedPairs, tmp_path: Path) -> None:
    errors = ReferenceErrors(source_of(encoded), policy, {}, tmp_path)
    exact, before = errors.folder, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        rounded = errors.folder
    finally:
        torch.set_float32_matmul_precision(before)
    policy.autocast = torch.bfloat16
    try:
        assert errors.settings["autocast"] == "bfloat16"
        half = errors.folder
    finally:
        policy.autocast = None
    assert len({exact, rounded, half}) == 3
    assert errors.folder == exact


@pytest.mark.slow
def test_the_reference_of_all_weights_is_named_by_the_frozen_copy(tiny_pipeline: Path) -> None:
    full: Any = load_policy(str(tiny_pipeline), train=True)
    name = full.reference_fingerprint()
    with torch.no_grad():
        next(full.denoiser.parameters()).add_(1.0)
    assert full.reference_fingerprint() == name
    lora: Any = load_policy(str(tiny_pipeline), lora=LoRA(rank=2), train=True)
    assert lora.reference_fingerprint() == name
    lora.put_reference({n: t + 1 for n, t in lora.trained_state().items()})
    assert lora.reference_fingerprint() != name
    half: Any = load_policy(str(tiny_pipeline), train=True, dtype=torch.bfloat16)
    assert half.reference_fingerprint() != name


@pytest.mark.slow
def test_any_number_of_processes_writes_the_same_bytes(policy: Any, encoded: EncodedPairs, tmp_path: Path) -> None:
    trainer = DiffusionDPO(policy, **CACHED)

    def errors(folder: str) -> ReferenceErrors:
        return ReferenceErrors(source_of(encoded), policy, {}, tmp_path / folder)

    alone, two = errors("alone"), errors("two")
    alone.fill(0, trainer._measure, 4)
    missing = two._missing()
    with ThreadPoolExecutor(1) as reader:
        for number in (*missing[1::2], *missing[::2]):
            two._write(number, trainer._measure, 4, reader, reference_errors.tqdm(disable=True))
    two.fill(0, trainer._measure, 4, Sharing(1, 2))
    assert contents(two.folder) == contents(alone.folder)


@pytest.mark.slow
def test_what_cannot_be_cached_is_an_error(
    policy: Any, encoded: EncodedPairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = ReferenceErrors(source_of(encoded), policy, {}, tmp_path)
    with pytest.raises(ValueError, match="the reference's error on pair 'p0' is infinite or not a number; try"):
        errors.fill(0, lambda batch: torch.full((2 * len(batch),), float("nan")), 4)
    assert not list(tmp_path.rglob("*.npy"))
    monkeypatch.setattr(sharding, "is_sharded", lambda _: True)
    with pytest.raises(ValueError, match=r"trainer.reference: each process computes .*; train with DDP .* live"):
        errors.fill(0, lambda batch: torch.zeros(2 * len(batch)), 4)


@pytest.mark.slow
def test_a_reference_that_is_not_asked_rests(
    tiny_pipeline: Path, encoded: EncodedPairs, tmp_path: Path, batches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its place is only written down here: a machine without an accelerator has no other memory to rest in."""
    policy: Any = load_policy(str(tiny_pipeline), train=True)
    places = {id(policy.denoiser): "cuda", id(policy._frozen): "cuda"}
    monkeypatch.setattr(trained_weights, "place_of", lambda module: torch.device(places[id(module)]))
    moved: list[str] = []

    def to(place: Any) -> None:
        moved.append(str(place))
        places[id(policy._frozen)] = str(place)

    monkeypatch.setattr(policy._frozen, "to", to)
    trainer = DiffusionDPO(policy, reference="cached", draws_per_pair=1)
    batches_of_pairs = trainer.source(source_of(encoded, draws=1), 0)
    trainer.begin(0, tmp_path)
    assert moved == ["cpu"]
    trainer.loss(batches_of_pairs.batch(0, 0))
    trainer.update(1)
    assert moved == ["cpu"], "training asks it nothing"
    trainer.validate(batches(2))
    assert moved == ["cpu", "cuda"]
    trainer.update(2)
    assert moved == ["cpu", "cuda", "cpu"]
    policy.sample(["a"], [0], num_inference_steps=1, reference=True)
    assert moved[3:] == ["cuda"]
    DiffusionDPO(policy).update(3)
    assert moved[3:] == ["cuda"], "only a reference whose answers are cached rests"


@pytest.mark.slow
def test_runs_that_start_together_measure_once(policy: Any, encoded: EncodedPairs, tmp_path: Path) -> None:
    """Two runs that know nothing of each other, as trials of a search are: one measures, the other waits and reads."""
    measured: list[int] = []

    def measure(batch: PairBatch) -> torch.Tensor:
        measured.append(len(batch))
        time.sleep(0.01)
        return torch.arange(2.0 * len(batch))

    runs = [ReferenceErrors(source_of(encoded), policy, {}, tmp_path) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(run.fill, 0, measure, 2) for run in runs]:
            done.result()
    assert sum(measured) == 2 * COUNT
    visits = [(row, 1) for row in range(COUNT)]
    torch.testing.assert_close(runs[0].of(visits), runs[1].of(visits), rtol=0, atol=0)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_reads_what_is_there_and_a_second_one_asks_nothing(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it measures; the run equals an uninterrupted one bit for bit, and nearly the live one."""
    trainer = {"name": "diffusion_dpo", "beta": 100.0, **CACHED}
    data = pairs_folder(tmp_path / "pairs")

    def config(name: str, encoded: str, **changes: Any) -> str:
        section = {"train_data_dir": str(data), "encoded_dir": str(tmp_path / encoded)}
        folder = tmp_path / name
        folder.mkdir()
        return str(winners_config(folder, tiny_pipeline, trainer | changes, data=section))

    whole, pieces = config("whole", "cache"), config("pieces", "cache_of_pieces")
    more, live = config("more", "cache", beta=50.0), config("live", "cache", reference="live")
    steps = ["training.max_train_steps=8"]
    commands.train(whole, steps)
    write: Callable[..., None] = ReferenceErrors._write
    written: list[int] = []

    def killing(self: ReferenceErrors, number: int, *args: Any) -> None:
        write(self, number, *args)
        written.append(number)
        if len(written) == 2:
            raise Killed

    monkeypatch.setattr(ReferenceErrors, "_write", killing)
    with pytest.raises(Killed):
        commands.train(pieces, steps)
    commands.train(pieces, steps)
    assert written == [0, 1, 2]
    assert metrics(tmp_path / "pieces" / "run") == metrics(tmp_path / "whole" / "run")
    ours, theirs = (
        load_file(tmp_path / name / "run" / "pytorch_lora_weights.safetensors") for name in ("whole", "pieces")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    commands.train(live, steps)
    commands.train(more, steps)
    assert len(written) == 3
    assert len(list((tmp_path / "cache").rglob("errors.npy"))) == 1
    rows = metrics(tmp_path / "whole" / "run")
    for row, other in zip(rows, metrics(tmp_path / "live" / "run"), strict=True):
        assert row["train/loss"] == pytest.approx(other["train/loss"], abs=1e-6)
    # two passes a draw before the first step, then two of the policy a visit; live, two of the reference more
    assert rows[-1]["train/forwards"] == 2 * 2 * COUNT + 8 * 2 * 2
    assert metrics(tmp_path / "live" / "run")[-1]["train/forwards"] == 8 * 2 * 4

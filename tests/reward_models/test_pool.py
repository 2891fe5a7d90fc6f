"""Reward models that take turns on a device: what stays on it, what comes back, and that scores are the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffalign.reward_models import RewardInfo, RewardModel, RewardPool, ShapesScore


class Linear(RewardModel):
    """The mean colour times a weight, of as many bytes as a test wants."""

    info = RewardInfo(name="linear", license="none", weights=(), needs_prompt=False)

    def __init__(self, name: str, kilobytes: int):
        super().__init__()
        self.info = replace(self.info, name=name)
        self.weight = torch.nn.Parameter(torch.full((250 * kilobytes - 1,), float(kilobytes)), requires_grad=False)
        self.register_buffer("offset", torch.ones(1), persistent=False)

    def preprocess(self, item: torch.Tensor) -> torch.Tensor:
        return item

    def score_prepared(self, prepared: list[torch.Tensor], texts: list[str]) -> dict[str, torch.Tensor]:
        means = torch.stack([item.mean() for item in prepared]).to(self.weight.device)
        return {"overall": means * self.weight[0] + self.offset}


IMAGES = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def pool_of(*kilobytes: int, **options: object) -> RewardPool:
    return RewardPool([Linear(f"m{k}", k) for k in kilobytes], **{"device": "cpu", **options})  # type: ignore[arg-type]


def test_scores_are_the_models(shapes_folder, photos):
    shapes = ShapesScore(shapes_folder)
    expected = shapes.score(photos, "a")
    pool = RewardPool([ShapesScore(shapes_folder), Linear("m3", 3)], device="cpu")
    found = pool([photo.resize((8, 8)) for photo in photos[:0]], "a")
    assert {name: scores.shape for name, scores in found.items()} == {"shapes": (0,), "m3": (0,)}
    with pool.on_device("shapes") as model:
        torch.testing.assert_close(model.score(photos, "a").score, expected.score, rtol=0, atol=0)
    torch.testing.assert_close(pool_of(3)(IMAGES, "")["m3"], IMAGES.mean((1, 2, 3)) * 3 + 1)


def test_what_was_used_longest_ago_makes_room():
    pool = pool_of(1, 2, 3, 4, budget_gb=6.1e-6)
    assert [pool.size(f"m{k}") for k in (1, 2, 3, 4)] == [1000, 2000, 3000, 4000]
    for name, resident in {
        "m1": ("m1",),
        "m2": ("m1", "m2"),
        "m3": ("m1", "m2", "m3"),  # 6000 bytes
        "m1 again": ("m2", "m3", "m1"),
        "m4": ("m1", "m4"),  # 2 and 3 go: without the latter there would be 8000
    }.items():
        with pool.on_device(name.partition(" ")[0]):
            assert pool.resident == resident
    pool.offload("m1")
    assert pool.resident == ("m4",)
    with pool.on_device("m4"), pytest.raises(ValueError, match="m3 does not fit beside what is in use: m4"):
        pool.score(IMAGES)  # m1 and m2 find room, m3 would take m4's place
    pool.offload()
    assert pool.resident == ()


def test_a_round_starts_with_what_is_there():
    pool = pool_of(1, 2, 3, budget_gb=5e-6)
    loads: list[str] = []
    put = pool._put
    pool._put = lambda name: (loads.append(name), put(name))[1]  # type: ignore[method-assign, assignment]
    for _ in range(3):
        assert list(pool.score(IMAGES)) == ["m1", "m2", "m3"]
    assert loads == ["m1", "m2", "m3", "m1", "m2"], "one of the three finds its place taken in each round"


def test_weights_leave_the_device_and_come_back():
    """The meta device stands for another one: what is there has no values, and those at home keep theirs."""
    pool = pool_of(1, 2, budget_gb=2.5e-6, device="meta")
    one, two = pool.models["m1"], pool.models["m2"]
    before = one.fingerprint()

    def places(model: RewardModel) -> set[str]:
        return {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}

    assert places(one) == places(two) == {"cpu"}
    with pool.on_device("m1") as model:
        assert model is one
        assert places(one) == {"meta"}
    with pool.on_device("m2"):
        assert (places(one), places(two)) == ({"cpu"}, {"meta"})
    pool.offload()
    assert places(two) == {"cpu"}
    assert one.fingerprint() == before
    assert float(one.offset) == 1.0


@pytest.mark.parametrize(
    ("kilobytes", "options", "message"),
    [
        ((), {}, r"expected models with different names, got \[\]"),
        ((2, 2), {}, r"expected models with different names, got \['m2', 'm2'\]"),
        ((2, 3), {"budget_gb": 2.5e-6}, r"m3 has 3e-06 GB of weights, more than budget_gb 2.5e-06"),
        ((2,), {"budget_gb": 0.0}, "budget_gb must be positive, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(kilobytes, options, message):
    with pytest.raises(ValueError, match=message):
        pool_of(*kilobytes, **options)


def test_models_come_from_the_cpu():
    model = Linear("m1", 1)
    model.to("meta")
    with pytest.raises(ValueError, match="m1 is not on the CPU; load it with device='cpu'"):
        RewardPool([model], device="cpu")
    with pytest.raises(KeyError, match="m9"), pool_of(1).on_device("m9"):
        pass

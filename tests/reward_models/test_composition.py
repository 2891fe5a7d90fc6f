"""Sums, groups and win rates of real scorers, and the formulas that name them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.reward_models import (
    Grouped,
    InvalidMediaError,
    JPEGSize,
    Part,
    PickScore,
    RewardInfo,
    RewardModel,
    ShapesScore,
    Weighted,
    WinRate,
    load_reward_model,
    reward_model_info,
)
from diffalign.reward_models.base import PairOutput
from diffalign.reward_models.formulas import Term, read_name, terms

PROMPTS = ["a red circle", "two blue squares", "a red circle", "two blue squares", "a red circle"]


class Brightness(RewardModel):
    """Mean of all channels and of one, times 10; refuses pictures that are too small."""

    info = RewardInfo(name="brightness", license="none", weights=(), dims=("red", "overall"), needs_prompt=False,
                      nominal_range=(0.0, 10.0))  # fmt: skip

    def preprocess(self, item):
        if isinstance(item, Image.Image) and item.width < 40:
            raise InvalidMediaError("too small to be bright")
        return torch.from_numpy(np.array(item)).permute(2, 0, 1).double() / 255

    def score_prepared(self, prepared, texts):
        return {"red": torch.stack([10 * p[0].mean() for p in prepared]),
                "overall": torch.stack([10 * p.mean() for p in prepared])}  # fmt: skip

    def score_tensor(self, pixels, prompts):
        return 10 * pixels.mean((1, 2, 3))


class Judge(RewardModel):
    """Prefers the wider of two pictures; cannot tell very small ones apart."""

    info = RewardInfo(name="judge", license="none", weights=(), pairwise_native=True, differentiable=False)

    def __init__(self):
        super().__init__()
        self.asked = 0

    def preprocess(self, item):
        return item

    def score_prepared(self, prepared, texts):
        raise NotImplementedError("judges pairs only")

    def compare(self, a, b, prompts, *, batch_size=32, on_invalid="raise"):
        self.asked += len(a)
        widths = torch.tensor([[x.width, y.width] for x, y in zip(a, b, strict=True)]).double()
        p_a = torch.sigmoid((widths[:, 0] - widths[:, 1]) / 50).float()
        valid = (widths >= 10).all(1)
        return PairOutput(p_a.masked_fill(~valid, float("nan")), widths[:, 0] == widths[:, 1], valid)


@pytest.fixture(scope="module")
def shapes() -> ShapesScore:
    return ShapesScore()


@pytest.fixture
def pictures(make_photo) -> list[Image.Image]:
    sizes = [(64, 64), (70, 90), (50, 64), (64, 100), (80, 80)]
    return [Image.fromarray(make_photo(h, w, seed=i)) for i, (h, w) in enumerate(sizes)]


@pytest.fixture
def three(shapes) -> tuple[RewardModel, ...]:
    return shapes, Brightness(), JPEGSize()


def raw(models, pictures, prompts=PROMPTS) -> torch.Tensor:
    return torch.stack([m.score(pictures, prompts).score for m in models], dim=1)


def test_weighted_sum_of_transformed_parts(three, pictures):
    parts = [
        Part(three[0], weight=0.7, mean=2.0, std=4.0),
        Part(three[1], weight=-0.5, low=4.9, high=5.05),
        Part(three[1], dim="red"),
        {"model": three[2], "weight": 0.25},
    ]
    model = Weighted(of=parts)
    output = model.score(pictures, PROMPTS, batch_size=2)
    s = raw(three, pictures)
    red = three[1].score(pictures).dims["red"]
    expected = 0.7 * (s[:, 0] - 2) / 4 - 0.5 * s[:, 1].clamp(4.9, 5.05) + red + 0.25 * s[:, 2]
    torch.testing.assert_close(output.score, expected, rtol=1e-5, atol=1e-5)
    assert list(output.dims) == ["shapes", "brightness", "brightness[red]", "jpeg_compressibility", "overall"]
    for name, column in zip(output.dims, [s[:, 0], s[:, 1], red, s[:, 2]], strict=False):
        torch.testing.assert_close(output.dims[name], column, rtol=1e-5, atol=1e-5)  # raw, before the transform
    assert len(model.models) == 3  # two dimensions of one model are one model
    assert ((s[:, 1] < 4.9) | (s[:, 1] > 5.05)).any(), "the bounds are never met"


def test_a_part_that_fails_takes_the_total_with_it(three, pictures, make_photo):
    pictures[1] = Image.fromarray(make_photo(64, 30))
    model = Weighted(of=[Part(m) for m in three])
    output = model.score(pictures, PROMPTS, on_invalid="nan")
    assert output.valid.tolist() == [True, False, True, True, True]
    assert output.score[1].isnan()
    assert output.errors[1] == "medium 1: brightness: too small to be bright"
    with pytest.raises(InvalidMediaError, match="medium 1: brightness: too small"):
        model(pictures, PROMPTS)
    three[1].score_prepared = lambda prepared, texts: dict.fromkeys(("red", "overall"), torch.zeros(4) / 0)
    output = model.score(pictures, PROMPTS, on_invalid="nan")
    assert not output.valid.any()
    assert output.errors[0] == "medium 0: brightness: the score is not finite"


def test_gradient_of_a_sum_is_right(clip_folder, make_photo):
    """Central differences in float64 through a CLIP and a plain mean, with an affine part and one that is clipped."""
    clip = PickScore(clip_folder, device="cpu", dtype=torch.float64)
    model = Weighted(
        of=[Part(clip, 0.7, mean=1.0, std=3.0), Part(Brightness(), -2.0, high=5.0), Part(Brightness2(), 1.0)]
    )
    assert model.info.differentiable
    pixels = torch.from_numpy(make_photo(60, 50)).permute(2, 0, 1)[None].double() / 255
    pixels.requires_grad_(True)
    total = model.score_tensor(pixels, "a red circle")
    (gradient,) = torch.autograd.grad(total.sum(), pixels)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        direction = torch.randn(pixels.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            up, down = (model.score_tensor(pixels + s * 1e-5 * direction, "a red circle") for s in (1, -1))
        expected = float((up - down) / 2e-5)
        assert abs(expected) > 1e-6
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-9)


class Brightness2(Brightness):
    info = RewardInfo(name="brightness2", license="none", weights=())


def test_sums_without_a_gradient_say_so(three, pictures):
    for parts in ([Part(m) for m in three], [Part(three[1], dim="red")]):
        model = Weighted(of=parts)
        assert not model.info.differentiable
        with pytest.raises(NotImplementedError, match="has no gradient path"):
            model.score_tensor(torch.zeros(1, 3, 8, 8), "a")


def test_formulas_load_and_describe_the_same(pictures):
    name = "shapes:0.7+jpeg_incompressibility:-0.25"
    model = load_reward_model(name, device="cpu")
    assert model.info.name == name
    s = raw((load_reward_model("shapes"), JPEGSize(goal="incompressibility")), pictures)
    torch.testing.assert_close(model(pictures, PROMPTS), 0.7 * s[:, 0] - 0.25 * s[:, 1], rtol=1e-5, atol=1e-5)
    info = reward_model_info(name)
    assert (info.name, info.needs_prompt, info.differentiable) == (name, True, False)
    assert info.license == "Apache-2.0; no weights"
    listed = [{"model": "shapes", "weight": 0.7}, {"model": "jpeg_incompressibility", "weight": -0.25}]
    assert load_reward_model("weighted", of=listed).fingerprint() == model.fingerprint()
    scaled = [{**listed[0], "std": 2.0}, listed[1]]
    assert load_reward_model("weighted", of=scaled).fingerprint() != model.fingerprint()


def test_info_of_a_sum_is_that_of_its_parts(three):
    info = Weighted(of=[Part(three[1], 2.0, mean=5.0, std=5.0), Part(Brightness2(), -1.0)]).info
    assert info.name == "brightness:2+brightness2:-1"
    assert info.nominal_range is None
    assert info.needs_prompt
    assert Weighted(of=[Part(three[1], -2.0, mean=5.0, std=5.0, high=0.5)]).info.nominal_range == (-1.0, 2.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", [Term("a")]),
        ("hpsv2.1:0.7+pickscore:0.3", [Term("hpsv2.1", None, 0.7), Term("pickscore", None, 0.3)]),
        (" a : 2 + b[VQ] : -1e-3 + c[x] ", [Term("a", None, 2.0), Term("b", "VQ", -1e-3), Term("c", "x")]),
        ("my.mod:Class:.5+my.mod:Other", [Term("my.mod:Class", None, 0.5), Term("my.mod:Other")]),
        ("win_rate(a+b:2)+c", [Term("win_rate(a+b:2)"), Term("c")]),
    ],
)  # fmt: skip
def test_formulas_are_read(text, expected):
    assert terms(text) == expected


def test_names_are_told_from_formulas():
    assert read_name("pickscore") == ("pickscore", {})
    assert read_name("my.mod:Class") == ("my.mod:Class", {})
    assert read_name("a:0.5") == ("weighted", {"of": "a:0.5"})
    assert read_name("a[x]") == ("weighted", {"of": "a[x]"})
    assert read_name("majority_vote(a+b)") == ("majority_vote", {"of": "a+b"})
    assert read_name("majority_vote(a)+win_rate(b)")[0] == "weighted"
    # A variant's own name has a plus sign.
    assert reward_model_info("laion_aesthetic-ava+logos").name == "laion_aesthetic-ava+logos"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shapes+", "a summand is missing in reward 'shapes\\+'"),
        ("majority_vote(shapes", "parentheses do not match"),
        ("shapes:1-2", "the weight of 'shapes' in reward 'shapes:1-2' must be a number such as 0.3, got '1-2'"),
        ("shapes:0.5+pikscore", "unknown reward model 'pikscore'; did you mean 'pickscore'"),
        ("shapes+shapes:2", "shapes is there twice; add its weights"),
        ("shapes[VQ]", r"shapes has no dimension 'VQ' \(available: overall\)"),
        ("majority_vote(win_rate(shapes))", "gives no scores of single media"),
        ("win_rate(majority_vote(shapes))", "scores groups already"),
        ("weighted", "weighted needs parts: pass of='hpsv2.1:0.7"),
        ("win_rate", "win_rate needs a judge"),
    ],
)
def test_formulas_that_mean_nothing_are_named(name, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_reward_model(name)
    assert "\n" not in str(caught.value)


def test_parts_that_mean_nothing_are_named(three):
    with pytest.raises(ValueError, match="std must be positive, got 0"):
        Part("shapes", std=0.0)
    with pytest.raises(ValueError, match="low must be less than high, got 2 and 1"):
        Part("shapes", low=2, high=1)
    with pytest.raises(ValueError, match="model among them; got {'modle': 'shapes'}"):
        Weighted(of=[{"modle": "shapes"}])
    with pytest.raises(ValueError, match="has no weights of its own: give parts a path"):
        Weighted("somewhere", of="shapes")
    clips = type("Clips", (Brightness,), {"info": RewardInfo("clips", "none", (), frozenset({"video"}))})
    with pytest.raises(ValueError, match="do not go together: brightness scores image, clips scores video"):
        Weighted(of=[Part(three[1]), Part(clips())])


GROUPS = [[0, 2, 4], [1, 3]]


def test_group_zscores_by_hand(three, pictures):
    model = Grouped(of=[Part(three[0], 0.4), Part(three[2], 0.6)], normalise="zscore")
    assert model.info.name == "group_zscore(shapes:0.4+jpeg_compressibility:0.6)"
    s = raw((three[0], three[2]), pictures).double()
    for batch_size in (1, 32):
        output = model.score(pictures, PROMPTS, batch_size=batch_size)
        for group in GROUPS:
            z = (s[group] - s[group].mean(0)) / (s[group].std(0) + 1e-8)
            expected = (z * torch.tensor([0.4, 0.6])).sum(1).float()
            torch.testing.assert_close(output.score[group], expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(output.dims["jpeg_compressibility"], s[:, 1].float())


def test_group_ranks_by_sorting(three, pictures):
    model = Grouped(of=[Part(m) for m in three], normalise="rank")
    s = raw(three, pictures)
    found = model(pictures, PROMPTS)
    for group in GROUPS:
        for i in group:
            assert found[i].item() == sum(1 + sum(s[j, k] < s[i, k] for j in group).item() for k in range(3))


def test_majority_vote_by_tournament(three, pictures):
    model = Grouped(of=[Part(m) for m in three], normalise="vote")
    s = raw(three, pictures)
    found = model(pictures, PROMPTS)
    for group in GROUPS:
        for i in group:
            wins = [float((s[i] > s[j]).sum() > 1.5) for j in group if j != i]
            assert found[i].item() == pytest.approx(sum(wins) / len(wins))
    pairs = list(itertools.combinations(range(5), 2))
    a, b = [pictures[i] for i, _ in pairs], [pictures[j] for _, j in pairs]
    labels = model.compare(a, b, "a red circle")
    one = raw(three, pictures, "a red circle")
    assert labels.p_a.tolist() == [float((one[i] > one[j]).sum() > 1.5) for i, j in pairs]
    assert not labels.tie.any()
    assert model.compare(a, a, "x").tie.all()
    assert (model.compare(a, a, "x").p_a == 0.5).all()
    for other in ("zscore", "rank"):  # a pair is a group of two, where all three say the same
        assert torch.equal(Grouped(of=[Part(m) for m in three], normalise=other).compare(a, b, "a red circle").p_a,
                           labels.p_a)  # fmt: skip


def test_invalid_and_lonely_media_of_a_group(three, pictures, make_photo, tmp_path):
    model = Grouped(of=[Part(m) for m in three], normalise="rank")
    media = [pictures[0], tmp_path / "no.png", pictures[2], pictures[1], pictures[4]]
    output = model.score(media, PROMPTS, on_invalid="nan")
    assert output.valid.tolist() == [True, False, True, False, True]
    assert "no such file" in str(output.errors[1])
    assert "medium 3: group_rank(" in str(output.errors[3])
    assert "needs at least two valid media of its prompt, got one" in str(output.errors[3])
    assert output.score.isnan().tolist() == [False, True, False, True, False]
    expected = model([pictures[0], pictures[2], pictures[4]], PROMPTS[0])
    assert torch.equal(output.score[[0, 2, 4]], expected)
    with pytest.raises(InvalidMediaError, match="at least two valid media"):
        model(pictures[:1], "a")
    pair = model.compare([pictures[0], media[1]], [pictures[1], pictures[2]], "a", on_invalid="nan")
    assert pair.valid.tolist() == [True, False]
    assert pair.p_a.isnan().tolist() == [False, True]


def test_group_formulas(pictures):
    model = load_reward_model("majority_vote(shapes+jpeg_compressibility)", device="cpu")
    assert (model.normalise, model.info.groupwise, model.info.nominal_range) == ("vote", True, (0.0, 1.0))
    assert reward_model_info(model.info.name) == model.info
    assert model(pictures, PROMPTS).isfinite().all()
    with pytest.raises(ValueError, match="normalise must be one of zscore, rank, vote, got 'softmax'"):
        Grouped(of="shapes", normalise="softmax")


def test_win_rate_of_a_judge(pictures):
    judge = Judge()
    model = WinRate(of=judge)
    widths = [p.width for p in pictures]
    found = model.score(pictures, PROMPTS)
    assert judge.asked == 3 + 1  # every pair of a group once, and none across groups
    for group in GROUPS:
        for i in group:
            results = [0.5 + 0.5 * ((widths[i] > widths[j]) - (widths[i] < widths[j])) for j in group if j != i]
            assert found.score[i].item() == pytest.approx(sum(results) / len(results))
        assert found.score[group].sum().item() == pytest.approx(len(group) / 2)
    soft = WinRate(of=judge, soft=True)(pictures, PROMPTS)
    expected = 1 / (1 + np.exp(-(widths[1] - widths[3]) / 50))
    assert soft[1].item() == pytest.approx(expected)
    assert soft[3].item() == pytest.approx(1 - expected)


def test_comparisons_that_fail_are_left_out(pictures):
    small = Image.new("RGB", (5, 5))
    output = WinRate(of=Judge()).score([pictures[0], small, pictures[1]], "a", on_invalid="nan")
    assert output.score[[0, 2]].tolist() == [0.0, 1.0]
    assert output.errors[1] == "medium 1: win_rate(judge): none of 2 comparisons within its prompt could be judged"
    with pytest.raises(InvalidMediaError, match="none of 0 comparisons"):
        WinRate(of=Judge())(pictures[0], "a")
    with pytest.raises(TypeError, match="scores whole groups of media only"):
        WinRate(of=Judge()).score_prepared([], [])


def test_win_rate_of_a_pointwise_model_keeps_its_scores(pictures, tmp_path):
    model = load_reward_model("win_rate(jpeg_compressibility)", device="cpu")
    sizes = JPEGSize()(pictures, PROMPTS)
    output = model.score([*pictures, tmp_path / "no.png"], [*PROMPTS, PROMPTS[0]], on_invalid="nan")
    assert torch.equal(output.dims["jpeg_compressibility"][:5], sizes)
    assert "no such file" in str(output.errors[5])
    for group in GROUPS:
        for i in group:
            expected = sum(float(sizes[i] > sizes[j]) for j in group if j != i) / (len(group) - 1)
            assert output.score[i].item() == pytest.approx(expected)
    assert reward_model_info(model.info.name) == model.info

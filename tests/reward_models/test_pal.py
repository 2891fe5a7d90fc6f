"""PAL's ideal-point model against its formulas, for known people and new ones, on a tiny CLIP."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F  # noqa: N812
from transformers import CLIPTokenizer

from diffalign.reward_models import PAL, InvalidMediaError, WeightsError, load_reward_model
from diffalign.reward_models.pal_heads import PALConfig, PALHead, fit_user

USERS = ("ann", "bob", "eve")
SMALL = PALConfig(users=USERS, in_dim=12, out_dim=6, hidden=1)
FORMS = {
    "B": SMALL,
    "B, distance, relu": PALConfig(users=USERS, in_dim=12, out_dim=6, preference="distance", activation="relu"),
    "A, f(P) w": PALConfig(form="A", prototypes=3, users=USERS, in_dim=12, out_dim=6),
    "A, f(w P), residual": PALConfig(
        form="A", users=USERS, in_dim=12, out_dim=12, residual=True, ideal="mix_then_project", preference="distance"
    ),
    "A, w P": PALConfig(form="A", users=USERS, in_dim=12, out_dim=6, ideal="mix", batch_norm=True),
}


def random_head(config: PALConfig, seed: int = 0) -> PALHead:
    head = PALHead(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in head.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) + 0.1 if value.ndim == 1
                            else torch.randn(value.shape, generator=generator) * 0.6)  # fmt: skip
        head.logit_scale.fill_(math.log(3.0))
        head.user_logits.copy_(torch.randn(head.user_logits.shape, generator=generator) * 2)
    return head.eval()


class Reference:
    """The model from its description, in NumPy, for one item and one person."""

    def __init__(self, config: PALConfig, state: dict[str, torch.Tensor]):
        self.c, self.w = config, {k: v.double().numpy() for k, v in state.items()}

    def project(self, x: np.ndarray, at: str) -> np.ndarray:
        y, number = x, 0
        for _ in range(self.c.hidden):
            y = self.w[f"{at}.layers.{number}.weight"] @ y + self.w[f"{at}.layers.{number}.bias"]
            if self.c.batch_norm:
                bn = {
                    k: self.w[f"{at}.layers.{number + 1}.{k}"]
                    for k in ("weight", "bias", "running_mean", "running_var")
                }
                y = (y - bn["running_mean"]) / np.sqrt(bn["running_var"] + 1e-5) * bn["weight"] + bn["bias"]
            gelu = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
            y = gelu if self.c.activation == "gelu" else np.maximum(y, 0)
            number += 4 if self.c.batch_norm else 3
        y = self.w[f"{at}.layers.{number}.weight"] @ y + self.w[f"{at}.layers.{number}.bias"]
        return y + x if self.c.residual else y

    def score(self, image: np.ndarray, text: np.ndarray, w: np.ndarray) -> float:
        if self.c.form == "B":
            ideal = sum(w[k] * self.project(text, f"texts.{k}") for k in range(len(w)))
        elif self.c.ideal == "mix":
            ideal = w @ self.w["prototypes"]
        elif self.c.ideal == "mix_then_project":
            ideal = self.project(w @ self.w["prototypes"], "items")
        else:
            ideal = sum(w[k] * self.project(self.w["prototypes"][k], "items") for k in range(len(w)))
        point = self.project(image, "items")
        if self.c.preference == "distance":
            return -float(np.linalg.norm(point - ideal))
        cosine = point @ ideal / np.linalg.norm(point) / np.linalg.norm(ideal)
        return float(min(math.exp(self.w["logit_scale"]), 100.0) * cosine)

    def weights(self, user: int) -> np.ndarray:
        odds = np.exp(self.w["user_logits"][user])
        return odds / odds.sum()


def embeddings(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images, texts = torch.randn(2, count, 12, generator=generator)
    return F.normalize(images, dim=-1), F.normalize(texts, dim=-1)


@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS.keys())
def test_every_form_equals_its_formula(config):
    head = random_head(config)
    reference = Reference(config, head.state_dict())
    images, texts = embeddings(4)
    with torch.no_grad():
        for user, name in enumerate(USERS):
            assert torch.equal(head.weights(name), head.weights(user))
            found = head(images, texts, head.weights(name))
            w = reference.weights(user)
            pairs = zip(images.double().numpy(), texts.double().numpy(), strict=True)
            np.testing.assert_allclose(
                found.numpy(), [reference.score(i, t, w) for i, t in pairs], rtol=1e-5, atol=1e-5
            )
        rows = torch.stack([head.weights(user) for user in (0, 1, 2, 0)])
        one_by_one = [head(images[i : i + 1], texts[i : i + 1], rows[i]) for i in range(4)]
        torch.testing.assert_close(head(images, texts, rows), torch.cat(one_by_one))


def test_the_scale_is_at_most_100():
    head = random_head(SMALL)
    with torch.no_grad():
        head.logit_scale.fill_(10.0)
        images, texts = embeddings(5)
        assert head(images, texts, head.weights(0)).abs().max() <= 100.0


@pytest.fixture(scope="module")
def head_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pal") / "pal.safetensors"
    random_head(SMALL).save(path)
    return path


@pytest.fixture(scope="module")
def pal(head_file, clip_folder) -> PAL:
    """Every test chooses its person."""
    return PAL(head_file, clip=clip_folder, device="cpu")


def test_scores_equal_numpy(pal, head_file, clip_folder, numpy_clip, numpy_crop, photos):
    clip = numpy_clip(load_file(clip_folder / "model.safetensors"), heads=(2, 2), act="gelu")
    reference = Reference(SMALL, load_file(head_file))
    text = clip.text(CLIPTokenizer.from_pretrained(clip_folder)("a red circle")["input_ids"])
    people = {name: reference.weights(i) for i, name in enumerate(USERS)}
    people[None] = np.mean([reference.weights(i) for i in range(3)], axis=0)
    for name, weights in people.items():
        pal.for_user(name)
        expected = [reference.score(clip.image(numpy_crop(image)), text, weights) for image in photos]
        np.testing.assert_allclose(pal(photos, "a red circle").numpy(), expected, rtol=1e-5, atol=1e-5)
        assert pal.info.name == ("pal" if name is None else f"pal-{name}")


def test_people_differ(pal, photos):
    prints, scores = set(), set()
    for name in USERS:
        pal.for_user(name)
        prints.add(pal.fingerprint())
        scores.add(tuple(pal(photos, "a").tolist()))
    assert (len(prints), len(scores)) == (3, 3)
    for bad in ("zoe", 3, -1):
        with pytest.raises(ValueError, match=f"unknown user {bad!r} \\(there are 3: 'ann', 'bob', 'eve'\\)"):
            pal.for_user(bad)


def test_matrix_equals_single_scores(pal, photos):
    pal.for_user("bob")
    prompts = ["a", "b c", "a"]
    matrix = pal.score_matrix(photos, prompts)
    torch.testing.assert_close(matrix, torch.stack([pal(photos, p) for p in prompts], dim=1), rtol=1e-5, atol=1e-5)


def test_gradient_to_the_pixels_is_right(head_file, clip_folder, make_photo, check_gradient):
    double = load_reward_model("pal", path=head_file, user="eve", clip=clip_folder, device="cpu", dtype=torch.float64)
    pixels = torch.from_numpy(make_photo(90, 70)).permute(2, 0, 1)[None] / 255
    check_gradient(lambda x: double.score_tensor(x, "a red circle"), pixels)
    assert double.info.name == "pal-eve"


def test_bfloat16_keeps_the_head_in_float32(pal, head_file, clip_folder, photos):
    pal.for_user(None)
    half = PAL(head_file, clip=clip_folder, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in half.head.parameters()} == {torch.float32}
    torch.testing.assert_close(half(photos, "a"), pal(photos, "a"), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("name", ["B", "B, distance, relu", "A, f(P) w"])
def test_a_new_person_is_known_from_a_few_pairs(name):
    """From 12 choices of a person of known weights: their choices among 400 new pairs are foreseen."""
    head = random_head(FORMS[name], seed=8)  # one for which the average person is no good guess
    true = torch.eye(head.config.prototypes)[0] * 0.9 + 0.1 / head.config.prototypes
    average = torch.full_like(true, 1 / len(true))

    def pairs(count: int, seed: int):
        (a, texts), (b, _) = embeddings(count, seed), embeddings(count, seed + 1)
        better = (head(a, texts, true) > head(b, texts, true))[:, None]
        return torch.where(better, a, b), torch.where(better, b, a), texts

    def agreement(weights: torch.Tensor) -> float:
        chosen, rejected, texts = pairs(400, 100)
        return float((head(chosen, texts, weights) > head(rejected, texts, weights)).float().mean())

    with torch.no_grad():
        logits = fit_user(head, *pairs(12, 7))
        assert torch.equal(logits, fit_user(head, *pairs(12, 7)))
        assert logits.argmax() == 0
        assert agreement(logits.softmax(-1)) > max(0.95, agreement(average) + 0.05)


def test_fitted_weights_are_the_minimum(head_file):
    """The gradient of the loss, written out, vanishes."""
    head = random_head(SMALL).double()
    (a, texts), (b, _) = embeddings(6, 1), embeddings(6, 2)
    logits = fit_user(head, a, b, texts, ridge=0.1).double().requires_grad_(True)
    assert not logits.allclose(torch.zeros(2, dtype=torch.float64), atol=1e-3)
    w = logits.softmax(-1)
    difference = head(a.double(), texts.double(), w) - head(b.double(), texts.double(), w)
    loss = (1 + (-difference).exp()).log().mean() + 0.05 * (logits**2).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.abs().max() < 1e-5
    for wrong, match in ((dict(ridge=0.0), "ridge must be positive"), ({}, "expected k >= 1 of each, got 6, 5 and 6")):
        with pytest.raises(ValueError, match=match):
            fit_user(head, a, b if wrong else b[:5], texts, **wrong)


def test_adapting_to_a_person_and_keeping_them(head_file, clip_folder, photos, tmp_path):
    pal = PAL(head_file, clip=clip_folder, device="cpu")
    ann = pal.head.weights("ann").clone()
    weights = pal.adapt("zoe", photos, photos[::-1], ["a", "b", "c"], batch_size=2)
    assert weights.sum().item() == pytest.approx(1.0)
    assert pal.info.name == "pal-zoe"
    again = PAL(head_file, clip=clip_folder, device="cpu", dtype=torch.float32)
    assert torch.equal(again.adapt("zoe", photos, photos[::-1], ["a", "b", "c"], batch_size=2), weights)
    pal.head.save(tmp_path / "pal.safetensors")
    kept = PAL(tmp_path, user="zoe", clip=clip_folder, device="cpu")
    torch.testing.assert_close(kept(photos, "a"), pal(photos, "a"))
    assert torch.equal(kept.head.weights("ann"), ann)
    assert not any(p.requires_grad for p in pal.parameters())
    with pytest.raises(ValueError, match="user 'zoe' is known already"):
        pal.adapt("zoe", photos, photos[::-1], "a")
    with pytest.raises(ValueError, match="needs k >= 1 pairs, got 3 chosen and 2 rejected"):
        pal.adapt("max", photos, photos[:2], "a")
    with pytest.raises(InvalidMediaError, match="no such file"):
        pal.adapt("max", tmp_path / "no.png", photos[0], "a")


def test_a_file_without_people_weighs_prototypes_alike(clip_folder, tmp_path, photos):
    random_head(PALConfig(in_dim=12, out_dim=6)).save(tmp_path / "pal.safetensors")
    pal = PAL(tmp_path, clip=clip_folder, device="cpu")
    assert pal.user_weights.tolist() == [0.5, 0.5]
    assert pal(photos, "a").isfinite().all()


def test_settings_that_contradict_each_other():
    for values, match in (
        ({"form": "C"}, "form must be one of A, B, got 'C'"),
        ({"prototypes": 0}, "prototypes must be at least 1"),
        ({"residual": True, "out_dim": 5}, "residual needs equal widths"),
    ):
        with pytest.raises(ValueError, match=match):
            PALConfig(**values)


def test_damaged_or_foreign_files_are_refused(head_file, clip_folder, tmp_path, photos):
    path = tmp_path / "pal.safetensors"
    state, header = load_file(head_file), json.dumps({**SMALL.__dict__})

    def refused(match: str, source=path) -> None:
        with pytest.raises(WeightsError, match=match) as caught:
            PAL(source, clip=clip_folder, device="cpu")
        assert "\n" not in str(caught.value)

    refused("'pal.safetensors' is not on the Hub; expected 'pal.safetensors' in a local folder", source=None)
    refused("has no 'pal.safetensors', only: nothing", source=tmp_path)
    path.write_bytes(head_file.read_bytes()[:900])
    refused("cannot read .* as weights of pal")
    save_file(state, path)
    refused("has no configuration of PAL in its header")
    save_file(state, path, metadata={"pal": "{"})
    refused("cannot read the configuration of PAL")
    save_file(state, path, metadata={"pal": json.dumps({"users": [], "depth": 3})})
    refused("cannot read the configuration of PAL .*unexpected keyword argument 'depth'")
    save_file({k: v for k, v in state.items() if k != "logit_scale"}, path, metadata={"pal": header})
    refused("1 tensors are missing, such as 'logit_scale'")
    save_file({**state, "user_logits": torch.zeros(2, 2)}, path, metadata={"pal": header})
    refused(r"'user_logits' is \[2, 2\] instead of \[3, 2\]")
    random_head(PALConfig(in_dim=8, out_dim=6)).save(path)
    refused("reads embeddings of width 8, .* gives 12")
    save_file({**state, "logit_scale": torch.tensor(math.nan)}, path, metadata={"pal": header})
    output = PAL(path, clip=clip_folder, device="cpu").score(photos, "a", on_invalid="nan")
    assert not output.valid.any()

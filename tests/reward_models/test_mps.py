"""MPS against its description computed in NumPy, head by head; its mask; and its file formats."""

from __future__ import annotations

import json
import os
import shutil
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from diffalign.reward_models import MPS, InvalidMediaError, WeightsError, load_reward_model
from diffalign.reward_models.mps import CONDITIONS
from diffalign.reward_models.mps_network import CrossConfig, CrossModel, _Rotary

CROSS = CrossConfig(dim=12, layers=2, heads=3, head_width=4, ff_mult=2)
PROMPTS = ["a red circle", "light on hair, clarity of texture", "x"]


def cross_state(seed: int = 3) -> dict[str, torch.Tensor]:
    """The published names; weights large enough that attention is far from even."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for layer in range(2):
        shapes = {
            "0.fn.norm.weight": (12,), "0.fn.norm.bias": (12,), "0.fn.to_q.weight": (12, 12),
            "0.fn.to_kv.weight": (8, 12), "0.fn.to_out.weight": (12, 12), "0.fn.ff.0.weight": (48, 12),
            "0.fn.ff.2.weight": (12, 24), "1.fn.norm.weight": (12,), "1.fn.norm.bias": (12,),
            "1.fn.rotary_emb.inv_freq": (2,), "1.fn.fused_attn_ff_proj.weight": (12 + 4 + 4 + 48, 12),
            "1.fn.attn_out.weight": (12, 12), "1.fn.ff_out.1.weight": (12, 24),
        }  # fmt: skip
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=generator) * (0.5 if len(shape) > 1 else 0.2)
            if name.endswith("norm.weight"):
                value += 1
            if name.endswith("norm.bias"):
                value = torch.zeros(shape)
            if name.endswith("inv_freq"):
                value = torch.tensor([1.0, 0.01])  # 10000^0 and 10000^(-2/4)
            state[f"cross_model.layers.{layer}.{name}"] = value
    return state


@pytest.fixture(scope="module")
def state(clip_folder) -> dict[str, torch.Tensor]:
    """Half precision, as published."""
    clip = {f"model.{name}": value for name, value in load_file(clip_folder / "model.safetensors").items()}
    return {name: value.half() for name, value in (clip | cross_state()).items()}


@pytest.fixture(scope="module")
def folder(clip_folder, state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mps")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(clip_folder / name, folder)
    torch.save(state, folder / "MPS_overall.pth")
    return folder


@pytest.fixture(scope="module")
def load(clip_folder, folder):
    config = json.loads((clip_folder / "config.json").read_text())
    sizes = {name: config[name] for name in ("text_config", "vision_config", "projection_dim")}

    def load(path=None, **options) -> MPS:
        options = {"processor": folder, "device": "cpu", "clip_config": sizes, "cross_config": CROSS, **options}
        return MPS(path or folder, **options)

    return load


@pytest.fixture(scope="module")
def mps(load) -> MPS:
    """No test may change it."""
    return load()


class Reference:
    """MPS from its description, in float64, one query of one head at a time."""

    def __init__(self, clip, tokenizer):
        self.clip, self.w, self.tokenizer = clip, clip.w, tokenizer

    def image_tokens(self, pixels: np.ndarray) -> np.ndarray:
        kernel = self.w["vision_model.embeddings.patch_embedding.weight"]
        p = kernel.shape[-1]
        cut = range(0, pixels.shape[-1], p)
        patches = [np.einsum("dcij,cij->d", kernel, pixels[:, i : i + p, j : j + p]) for i in cut for j in cut]
        x = np.stack([self.w["vision_model.embeddings.class_embedding"], *patches])
        x = x + self.w["vision_model.embeddings.position_embedding.weight"]
        x = self.clip._norm(x, "vision_model.pre_layrnorm")
        for layer in range(2):
            x = self.clip._block(x, "vision_model.", layer, 2, causal=False)
        return x @ self.w["visual_projection.weight"].T  # without the last norm

    def word_tokens(self, text: str) -> tuple[np.ndarray, int]:
        """All 77 projected states, and where the first end-of-text is."""
        ids = self.tokenizer(text, padding="max_length", truncation=True, max_length=77)["input_ids"]
        x = self.w["text_model.embeddings.token_embedding.weight"][ids]
        x = x + self.w["text_model.embeddings.position_embedding.weight"]
        for layer in range(2):
            x = self.clip._block(x, "text_model.", layer, 2, causal=True)
        x = self.clip._norm(x, "text_model.final_layer_norm")
        return x @ self.w["text_projection.weight"].T, ids.index(self.tokenizer.eos_token_id)

    def matches(self, prompt: str, condition: str) -> np.ndarray:
        words, asked = self.word_tokens(prompt)[0], self.word_tokens(condition)[0]
        return np.array([max(float(c @ word) for c in asked) for word in words])

    def attend(self, queries: np.ndarray, keys: np.ndarray, values: np.ndarray, visible) -> np.ndarray:
        """Queries [N, 3 * 4], one head of keys and values [L, 4]."""
        out = np.zeros_like(queries)
        for n, query in enumerate(queries):
            for head in range(3):
                part = slice(4 * head, 4 * head + 4)
                logits = np.array([query[part] @ key / 2.0 for key in keys])
                odds = np.where(visible, np.exp(logits - logits.max()), 0)
                out[n, part] = odds / odds.sum() @ values
        return out

    def swiglu(self, x: np.ndarray) -> np.ndarray:
        value, gate = np.split(x, 2, axis=-1)
        return value * gate / (1 + np.exp(-gate))

    def turn(self, x: np.ndarray, rates: np.ndarray) -> np.ndarray:
        """Rotary embedding by complex numbers: entry i and entry i + half are one of them."""
        half = len(rates)
        z = x[:, :half] + 1j * x[:, half:]
        z = z * np.exp(1j * np.arange(len(x))[:, None] * rates)
        return np.concatenate([z.real, z.imag], axis=-1)

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * self.w[name]

    def score(self, pixels: np.ndarray, prompt: str, visible: np.ndarray) -> float:
        x, (words, end) = self.image_tokens(pixels), self.word_tokens(prompt)
        for layer in range(2):
            at = f"cross_model.layers.{layer}.0.fn."
            y = self.norm(x, at + "norm.weight")
            keys, values = np.split(words @ self.w[at + "to_kv.weight"].T, 2, axis=-1)
            seen = self.attend(y @ self.w[at + "to_q.weight"].T, keys, values, visible)
            hidden = self.swiglu(y @ self.w[at + "ff.0.weight"].T)
            x = x + seen @ self.w[at + "to_out.weight"].T + hidden @ self.w[at + "ff.2.weight"].T
            at = f"cross_model.layers.{layer}.1.fn."
            fused = self.norm(x, at + "norm.weight") @ self.w[at + "fused_attn_ff_proj.weight"].T
            q, k, v, hidden = np.split(fused, [12, 16, 20], axis=-1)
            rates = self.w[at + "rotary_emb.inv_freq"]
            q = np.concatenate([self.turn(q[:, 4 * h : 4 * h + 4], rates) for h in range(3)], axis=-1)
            seen = self.attend(q, self.turn(k, rates), v, np.ones(len(x), dtype=bool))
            hidden = self.swiglu(hidden) @ self.w[at + "ff_out.1.weight"].T
            x = x + seen @ self.w[at + "attn_out.weight"].T + hidden
        a, b = words[end], x[0]
        return float(np.exp(self.w["logit_scale"]) * (a @ b) / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.fixture(scope="module")
def reference(state, folder, numpy_clip) -> Reference:
    clip = numpy_clip({k.removeprefix("model."): v for k, v in state.items()}, heads=(2, 2), act="gelu")
    return Reference(clip, CLIPTokenizer.from_pretrained(folder))


@pytest.mark.slow
def test_scores_equal_the_description(load, reference, numpy_crop, photos):
    output = load(mask_threshold=0.8).score(photos, PROMPTS)  # at 0.3 all words of random weights are visible
    assert tuple(output.dims) == ("aesthetics", "detail_quality", "semantic_alignment", "overall")
    for name, words in CONDITIONS.items():
        expected, hidden = [], 0
        for image, prompt in zip(photos, PROMPTS, strict=True):
            matches = reference.matches(prompt, words)
            visible = matches / matches.max() > 0.8
            hidden += int((~visible).sum())
            expected.append(reference.score(numpy_crop(image), prompt, visible))
        assert 0 < hidden < 3 * 77, "the mask of this fixture must matter"
        np.testing.assert_allclose(output.dims[name].numpy(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(output.score, output.dims["overall"])
    assert len({tuple(v.tolist()) for v in output.dims.values()}) >= 3


def test_the_released_mask_depends_on_the_batch_and_ours_does_not(load, mps, reference, numpy_crop, photos):
    ours = mps.score(photos, PROMPTS).score
    single = torch.cat([mps.score(image, prompt).score for image, prompt in zip(photos, PROMPTS, strict=True)])
    torch.testing.assert_close(ours, single, rtol=1e-5, atol=1e-5)
    released = load(mask_maximum="batch", mask_threshold=0.8)
    matches = np.stack([reference.matches(prompt, CONDITIONS["overall"]) for prompt in PROMPTS])
    visible = matches / matches.max() > 0.8
    assert (visible != (matches / matches.max(1, keepdims=True) > 0.8)).any(), "the two rules must differ here"
    output = released.score(photos, PROMPTS, on_invalid="nan")
    for i, (image, prompt) in enumerate(zip(photos, PROMPTS, strict=True)):
        if visible[i].any():
            assert output.score[i].item() == pytest.approx(
                reference.score(numpy_crop(image), prompt, visible[i]), rel=1e-5
            )
        else:
            assert "not finite" in str(output.errors[i])
    assert released.fingerprint() != mps.fingerprint()


def test_thresholds(mps, load, monkeypatch):
    matches = torch.tensor([[[5.0, 50.0, 0.2, 16.0]], [[0.5, 0.1, 0.2, 0.004]]])
    assert mps.visible(matches).int().tolist() == [[[0, 1, 0, 1]], [[1, 0, 1, 0]]]
    monkeypatch.setattr(mps, "mask_threshold", 0.01)
    assert mps.visible(matches).int().tolist() == [[[1, 1, 0, 1]], [[1, 1, 1, 0]]]
    monkeypatch.setattr(mps, "mask_maximum", "batch")
    assert mps.visible(matches).int().tolist() == [[[1, 1, 0, 1]], [[0, 0, 0, 0]]]


def test_no_visible_word_is_no_score(load, photos):
    blind = load(mask_threshold=1.0)  # the best match is 1 times itself, and not more
    output = blind.score(photos, "a", on_invalid="nan")
    assert not output.valid.any()
    assert output.score.isnan().all()


def test_bfloat16_is_near(load, mps, photos):
    half = load(dtype=torch.bfloat16).score(photos, PROMPTS)
    scale = mps.towers.scale
    torch.testing.assert_close(half.score / scale, mps.score(photos, PROMPTS).score / scale, rtol=2e-2, atol=2e-2)


def test_rotary_rates_are_never_cast():
    rotary = _Rotary(8).to(torch.bfloat16)
    assert rotary.inv_freq.dtype == torch.float32
    torch.testing.assert_close(rotary.inv_freq, torch.tensor([1.0, 0.1, 0.01, 0.001]))


def test_gradient_to_the_pixels_is_right(load, make_photo, check_gradient):
    double = load(conditions="overall", dtype=torch.float64)
    pixels = torch.from_numpy(make_photo(90, 70)).permute(2, 0, 1)[None] / 255
    check_gradient(lambda x: double.score_tensor(x, "a red circle"), pixels)


def test_score_tensor_is_the_primary_score(mps, make_photo):
    arrays = [make_photo(224, 224, seed=s) for s in range(2)]
    pixels = torch.stack([torch.from_numpy(a).permute(2, 0, 1) for a in arrays]) / 255
    torch.testing.assert_close(mps.score_tensor(pixels, PROMPTS[:2]), mps(arrays, PROMPTS[:2]), rtol=0, atol=1e-4)


def test_conditions(load, mps, photos):
    all_four = mps.score(photos, PROMPTS).dims
    one = load(conditions="aesthetics")
    assert (one.info.name, one.info.dims) == ("mps-aesthetics", ("aesthetics",))
    torch.testing.assert_close(one(photos, PROMPTS), all_four["aesthetics"])
    own = load(conditions={"mine": CONDITIONS["overall"]})
    torch.testing.assert_close(own(photos, PROMPTS), all_four["overall"])
    assert own.info.name == "mps-mine"
    assert mps.info.name == "mps"
    with pytest.raises(ValueError, match="unknown MPS condition 'beauty' \\(available: aesthetics"):
        load(conditions=("beauty", "overall"))
    with pytest.raises(ValueError, match="at least one condition"):
        load(conditions=())
    with pytest.raises(ValueError, match="mask_maximum must be 'sample' or 'batch', got 'all'"):
        load(mask_maximum="all")
    assert CONDITIONS["overall"].endswith("word, things.")


def test_found_by_name(folder, clip_folder, load):
    sizes = load().towers.model.config.to_dict()
    options = {"path": folder, "device": "cpu", "cross_config": CROSS, "clip_config": sizes}
    assert load_reward_model("mps-overall", **options).info.name == "mps-overall"


def test_equal_prompts_are_encoded_once_and_kept(load, photos, monkeypatch):
    model = load()
    seen: list[str] = []
    encode = model.towers.token_ids
    monkeypatch.setattr(model.towers, "token_ids", lambda texts: seen.extend(texts) or encode(texts))
    first = model.score(photos, ["one", "two", "one"])
    assert seen == ["one", "two", *CONDITIONS.values()]
    again = model.score(photos, ["one", "two", "one"])
    assert len(seen) == 6
    assert torch.equal(first.score, again.score)


@pytest.mark.slow
def test_every_layout_gives_the_same_scores(load, state, tmp_path, photos):
    expected = load()(photos, PROMPTS)
    load().save_weights(tmp_path / "own.safetensors")
    save_file({f"mps.{name}": value for name, value in state.items()}, tmp_path / "model.safetensors")
    for path in (tmp_path / "own.safetensors", tmp_path / "model.safetensors", tmp_path):
        torch.testing.assert_close(load(path)(photos, PROMPTS), expected)
    short = {k: v for k, v in state.items() if not (k.startswith("cross") and k.endswith(("norm.bias", "inv_freq")))}
    torch.save(short, tmp_path / "short.pth")
    torch.testing.assert_close(load(tmp_path / "short.pth")(photos, PROMPTS), expected, rtol=1e-3, atol=1e-3)


def module_file(path, state: dict[str, torch.Tensor], monkeypatch, extra: object = None) -> None:
    """A module pickled as a whole, by classes that are gone when it is read."""
    name = "trainer.models.clip_model"
    home = ModuleType(name)
    home.Model = type("Model", (torch.nn.Module,), {"__module__": name})
    with monkeypatch.context() as patch:
        for package in ("trainer", "trainer.models"):
            patch.setitem(sys.modules, package, ModuleType(package))
        patch.setitem(sys.modules, name, home)
        root = home.Model()
        root.config = {"eos": 2, "extra": extra}
        for key, value in state.items():
            *parents, leaf = key.split(".")
            module = root
            for parent in parents:
                if parent not in module._modules:
                    module.add_module(parent, home.Model())
                module = module._modules[parent]
            if leaf in ("bias", "inv_freq") and "cross_model" in key:
                module.register_buffer(leaf, value)
            else:
                module.register_parameter(leaf, torch.nn.Parameter(value))
        root.register_buffer("scratch", torch.ones(3), persistent=False)
        torch.save(root, path)


class Harm:
    """Would make a folder when unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickled_module_gives_its_tensors_and_runs_nothing(load, mps, state, tmp_path, photos, monkeypatch):
    path = tmp_path / "MPS_overall_checkpoint.pth"
    module_file(path, state, monkeypatch, extra=Harm(str(tmp_path / "harm")))
    with pytest.raises(WeightsError, match="whole pickled module; pass allow_pickle=True"):
        load(path)
    assert torch.equal(load(path, allow_pickle=True)(photos, PROMPTS), mps(photos, PROMPTS))
    assert not (tmp_path / "harm").exists()
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(
        WeightsError, match=r"cannot read .*MPS_overall_checkpoint.pth' as a pickled module of mps"
    ) as bad:
        load(path, allow_pickle=True)
    assert "\n" not in str(bad.value)
    torch.save({"a": 1}, path)
    with pytest.raises(WeightsError, match="there are no parameters in it"):
        load(path, allow_pickle=True)


def test_damaged_or_foreign_checkpoints_are_refused(load, folder, state, tmp_path):
    path = tmp_path / "MPS_overall.pth"

    def refused(match: str) -> None:
        with pytest.raises(WeightsError, match=match) as caught:
            load(path)
        assert "\n" not in str(caught.value)

    path.write_bytes((folder / path.name).read_bytes()[:10000])
    refused("cannot read .*MPS_overall.pth' as weights of mps")
    gone = "cross_model.layers.1.1.fn.attn_out.weight"
    torch.save({k: v for k, v in state.items() if k != gone}, path)
    refused(f"1 tensors are missing, such as '{gone}'")
    torch.save({**state, "head.weight": torch.ones(2)}, path)
    refused("1 tensors are not of this model, such as 'head.weight'")
    torch.save({**state, gone: torch.ones(2, 2)}, path)
    refused(r"attn_out.weight' is \[2, 2\] instead of \[12, 12\]")
    path.unlink()
    home = r"expected 'model.safetensors' of Hub id 'RE-N-Y/mpsv1' or 'MPS_overall_checkpoint.pth' from https://github"
    with pytest.raises(WeightsError, match=f"no 'model.safetensors', only: nothing; {home}"):
        load(tmp_path)
    with pytest.raises(WeightsError, match="cross model is 1024 wide and CLIP's space 12"):
        load(cross_config=CrossConfig())


def test_bad_media_and_weights_are_no_zeros(load, state, tmp_path, photos):
    broken = {
        **state,
        "model.visual_projection.weight": torch.full_like(state["model.visual_projection.weight"], torch.nan),
    }
    torch.save(broken, tmp_path / "MPS_overall.pth")
    with pytest.raises(InvalidMediaError, match="medium 0: mps gave a score that is not finite"):
        load(tmp_path)(photos, "a")
    output = load().score([photos[0], tmp_path / "no.png"], "a", on_invalid="nan")
    assert output.valid.tolist() == [True, False]
    assert all(values.isnan().tolist() == [False, True] for values in output.dims.values())


def test_cross_model_keeps_what_it_reads_where_weights_are_zero():
    cross = CrossModel(CROSS)
    tokens, words = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    for weight in cross.parameters():
        torch.nn.init.zeros_(weight)
    assert torch.equal(cross(tokens, words, torch.ones(2, 7, dtype=torch.bool)), tokens)

"""FID and CMMD: closed forms, the networks' way in, and the comparison of two folders."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from transformers import CLIPModel

from diffalign.cli import cli
from diffalign.eval.image_features import INCEPTION, clip_features, load_features
from diffalign.eval.image_quality import (
    Gaussian,
    cmmd,
    compare_folders,
    frechet_distance,
    jackknife,
    read_pictures,
    read_statistics,
    render,
)
from diffalign.reward_models.base import WeightsError
from tests.reward_models.conftest import MEAN, STD, NumpyCLIP, photo, save_hf_clip


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def means(images):
    """A tiny network: mean, spread and slope of every channel, [B, 9]."""
    pixels = torch.stack([pil_to_tensor(image) for image in images]).float() / 255
    slopes = pixels[..., :, -1].mean(-1) - pixels[..., :, 0].mean(-1)
    return torch.cat([pixels.mean((2, 3)), pixels.std((2, 3)), slopes], dim=1)


def fill(folder, count, seed=0, side=16, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        Image.fromarray(photo(side, side, seed=seed + k)).save(folder / f"{k:03d}{suffix}")
    return folder


# --- distances -------------------------------------------------------------------------------------------------------


def test_distance_of_two_gaussians():
    """With commuting covariances it is |m - n|^2 + sum (sqrt(a) - sqrt(b))^2 of their eigenvalues."""
    basis, _ = torch.linalg.qr(randn(5, 5))
    a, b = torch.tensor([4.0, 1, 9, 0.25, 0]).double(), torch.tensor([1.0, 1, 4, 4, 16]).double()
    first = Gaussian.from_covariance(torch.zeros(5), basis @ a.diag() @ basis.T)
    second = Gaussian.from_covariance(torch.tensor([3.0, 0, 4, 0, 0]), basis @ b.diag() @ basis.T)
    expected = 25 + float((a.sqrt() - b.sqrt()).square().sum())
    assert frechet_distance(first, second) == pytest.approx(expected, abs=1e-9)
    assert frechet_distance(second, first) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("counts", [(40, 50), (5, 50), (4, 3)])
def test_distance_is_that_of_the_definition(counts):
    """Also with fewer pictures than features, where the covariance is singular."""
    from scipy import linalg

    a, b = randn(counts[0], 8), randn(counts[1], 8, seed=1) * 2 + 1
    covariances = [np.cov(x.numpy(), rowvar=False) for x in (a, b)]
    roots = [linalg.fractional_matrix_power(c + 1e-13 * np.eye(8), 0.5) for c in covariances]
    inner = roots[0] @ covariances[1] @ roots[0]
    trace = np.sqrt(np.clip(np.linalg.eigvalsh((inner + inner.T) / 2), 0, None)).sum()
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + sum(map(np.trace, covariances)) - 2 * trace
    assert frechet_distance(Gaussian.of(a), Gaussian.of(b)) == pytest.approx(expected, abs=1e-4)
    assert frechet_distance(Gaussian.of(a), Gaussian.of(a)) == pytest.approx(0, abs=1e-10)


def test_one_picture_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2 pictures"):
        Gaussian.of(randn(1, 8))


def test_cmmd_golden_value():
    """Two single orthonormal embeddings: 1000 (2 - 2 exp(-2 / 200))."""
    one, other = torch.eye(2)[:1], torch.eye(2)[1:]
    assert cmmd(one, other) == pytest.approx(1000 * (2 - 2 * math.exp(-0.01)))
    assert cmmd(one, other) == pytest.approx(19.9003, abs=5e-5)
    assert cmmd(one, one) == 0


def test_cmmd_by_brute_force(monkeypatch):
    monkeypatch.setattr("diffalign.eval.image_quality._ROWS", 3)
    a, b = (torch.nn.functional.normalize(x, dim=-1) for x in (randn(7, 4), randn(5, 4, seed=1) + 1))

    def kernel(x, y):
        return np.mean([[math.exp(-float((p - q).square().sum()) / 200) for q in y] for p in x])

    assert cmmd(a, b) == pytest.approx(1000 * (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)), abs=1e-9)


def test_jackknife_of_a_mean_is_the_known_one():
    """For a mean it is the usual standard error, here of 12 blocks that hold one value twice."""
    values = randn(12, 1) + 5
    plain = jackknife(lambda x: float(x.mean()), torch.cat([values, values]), blocks=12)
    assert plain is not None
    error = float(values.std() / math.sqrt(12))
    assert plain.low == pytest.approx(float(values.mean()) - 1.959964 * error)
    assert plain.high == pytest.approx(float(values.mean()) + 1.959964 * error)
    assert jackknife(lambda x: 0.0, values, blocks=7) is None
    assert jackknife(lambda x: float(x.mean()), values - 5, blocks=2).low == 0


def test_jackknife_covers_the_spread_of_fid():
    """Its width follows what other pictures of the same number would give."""
    reference = Gaussian.of(randn(4000, 3, seed=99))

    def distance(features):
        return frechet_distance(Gaussian.of(features), reference)

    samples = [randn(300, 3, seed=seed) + 1 for seed in range(12)]
    spread = np.std([distance(sample) for sample in samples], ddof=1)
    widths = [(i.high - i.low) / (2 * 1.96) for s in samples[:4] if (i := jackknife(distance, s)) is not None]
    assert 0.5 * spread < np.mean(widths) < 2 * spread


# --- statistics files ------------------------------------------------------------------------------------------------


def test_statistics_files(tmp_path):
    features = randn(50, 4)
    np.savez(tmp_path / "s.npz", mu=features.mean(0).numpy(), sigma=np.cov(features.numpy(), rowvar=False))
    other = Gaussian.of(randn(60, 4, seed=1))
    read = read_statistics(tmp_path / "s.npz")
    assert frechet_distance(read, other) == pytest.approx(frechet_distance(Gaussian.of(features), other), abs=1e-9)


def test_statistics_files_that_are_none(tmp_path):
    path = tmp_path / "s.npz"
    for write in (
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(b"torn"),
        lambda: np.savez(path, mu=np.zeros(3)),
        lambda: np.savez(path, mu=np.zeros(3), sigma=np.eye(2)),
        lambda: np.savez(path, mu=np.zeros(2), sigma=np.full((2, 2), np.nan)),
        lambda: np.savez(path, mu=np.array([{}], dtype=object), sigma=np.eye(1)),
    ):
        write()
        with pytest.raises(ValueError, match=r"s\.npz"):
            read_statistics(path)


# --- networks --------------------------------------------------------------------------------------------------------


def test_clip_squashes_the_whole_picture(tmp_path):
    """Bicubic without antialiasing (a = -3/4), straight to a square, compared with a CLIP written in NumPy."""
    folder = save_hf_clip(tmp_path, act="quick_gelu", seed=20)
    images = [Image.fromarray(photo(230, 150, seed=k)) for k in range(2)]
    found = clip_features(folder, torch.device("cpu"))(images)
    clip = NumpyCLIP(CLIPModel.from_pretrained(folder).state_dict(), (2, 2), "quick_gelu")

    def matrix(out, size):
        rows = np.zeros((out, size))
        for i in range(out):
            place = (i + 0.5) * size / out - 0.5
            base, t = math.floor(place), place - math.floor(place)
            for k in range(-1, 3):
                d = abs(t - k)
                weight = (1.25 * d - 2.25) * d * d + 1 if d <= 1 else ((-0.75 * d + 3.75) * d - 6) * d + 3
                rows[i, min(max(base + k, 0), size - 1)] += weight
        return rows

    for image, embedding in zip(images, found, strict=True):
        pixels = np.asarray(image).transpose(2, 0, 1) / 255
        square = matrix(224, 230) @ pixels @ matrix(224, 150).T
        expected = clip.image((square - MEAN[:, None, None]) / STD[:, None, None])
        np.testing.assert_allclose(embedding, expected, atol=1e-5)


@pytest.mark.slow
def test_inception_is_the_librarys(tmp_path):
    fidelity = pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed")
    kind = fidelity.FeatureExtractorInceptionV3
    network = kind.__new__(kind)
    loaded = []
    # The library has no way to an untrained network: its own file is filled in while it is built.
    network.load_state_dict = lambda state: loaded.append(state)
    path = tmp_path / INCEPTION.weights[0].filename
    torch.save({}, path)
    network.__init__("inception", ["2048"], feature_extractor_weights_path=str(path))
    del network.load_state_dict
    torch.save(network.state_dict(), path)
    image = Image.fromarray(photo(40, 60))
    found = load_features("fid", path, "cpu")([image, image])
    assert found.shape == (2, 2048)
    torch.testing.assert_close(found[0], network(pil_to_tensor(image)[None])[0][0], atol=1e-5, rtol=1e-5)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="no weights of the Inception"):
        load_features("fid", path, "cpu")


def test_fid_without_its_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match=r"pip install 'diffalign\[fid\]'"):
        load_features("fid", None, "cpu")


# --- folders ---------------------------------------------------------------------------------------------------------


def test_folders_are_compared(tmp_path):
    mine, theirs = fill(tmp_path / "a" / "images", 44), fill(tmp_path / "b", 30, seed=500)
    report = compare_folders(tmp_path / "a", theirs, networks={"fid": means, "cmmd": means})
    features = [read_pictures(folder, {"x": means}).features["x"] for folder in (mine, theirs)]
    fid = frechet_distance(*map(Gaussian.of, features))
    assert report.scores["fid"].value == pytest.approx(fid)
    assert report.scores["cmmd"].value == pytest.approx(cmmd(*features))
    for score in report.scores.values():
        assert score.n == 44
        assert score.details["n_reference"] == 30
        assert score.ci95.low <= score.value <= score.ci95.high
        assert not score.higher_is_better
    assert any("fid of 44 generated pictures is biased upwards" in text for text in report.warnings)
    assert "44 against 30" in render(report)
    json.dumps(report.to_dict(), allow_nan=False)

    same = compare_folders(mine, mine, ["cmmd"], networks={"cmmd": means}, blocks=0)
    assert same.scores["cmmd"].value == pytest.approx(0, abs=1e-9)
    assert same.scores["cmmd"].ci95 is None
    assert same.protocol_hash != report.protocol_hash


def test_the_reference_belongs_to_the_protocol(tmp_path):
    mine, one, other = (fill(tmp_path / name, 4, seed) for name, seed in (("a", 0), ("b", 50), ("c", 90)))
    again = fill(tmp_path / "d", 4, 50)
    hashes = [
        compare_folders(mine, against, ["cmmd"], networks={"cmmd": means}, blocks=0).protocol_hash
        for against in (one, other, again)
    ]
    assert hashes[0] == hashes[2] != hashes[1]
    fewer = compare_folders(mine, one, ["cmmd"], networks={"cmmd": means}, blocks=0, limit=3)
    assert fewer.scores["cmmd"].n == 3
    assert fewer.protocol_hash != hashes[0]


def test_what_differs_between_folders_is_said(tmp_path):
    mine, theirs = fill(tmp_path / "a", 3), fill(tmp_path / "b", 3, side=24, suffix=".jpg")
    (mine / "torn.png").write_bytes((mine / "000.png").read_bytes()[:60])
    (mine / "clip.mp4").write_bytes(b"")
    report = compare_folders(mine, theirs, ["cmmd"], networks={"cmmd": means}, blocks=0)
    text = " ".join(report.warnings)
    assert "sizes differ (16x16 generated, 24x24 reference)" in text
    assert "file formats differ (.png generated, .jpg reference)" in text
    assert "2 generated pictures could not be read" in text
    assert str(tmp_path) not in text
    assert (report.n_expected, report.n_missing, report.scores["cmmd"].n_missing) == (5, 2, 2)
    assert "PARTIAL: 2 of 5" in render(report)


@pytest.mark.slow
def test_pictures_of_several_sizes_and_sources(tmp_path):
    """Batches hold one size; a parquet file with bytes and a folder with a list give the same."""
    folder = tmp_path / "a"
    fill(folder, 3)
    Image.fromarray(photo(20, 20, seed=7)).save(folder / "001b.png")
    found = read_pictures(folder, {"x": means}, batch_size=2)
    alone = torch.cat([means([Image.open(path)]) for path in sorted(folder.iterdir())])
    torch.testing.assert_close(found.features["x"], alone)
    assert found.sizes == {(16, 16): 3, (20, 20): 1}
    files = [{"bytes": path.read_bytes(), "path": path.name} for path in sorted(folder.iterdir())]
    broken = {"bytes": b"torn", "path": "torn.png"}
    pq.write_table(pa.table({"image": [*files, broken]}), tmp_path / "set.parquet")
    packed = read_pictures(tmp_path / "set.parquet", {"x": means})
    torch.testing.assert_close(packed.features["x"], alone)
    assert len(packed.failed) == 1
    assert packed.digest == found.digest


def test_statistics_as_the_reference(tmp_path):
    mine = fill(tmp_path / "a", 5)
    features = read_pictures(mine, {"x": means}).features["x"].double()
    np.savez(tmp_path / "s.npz", mu=features.mean(0).numpy(), sigma=np.cov(features.numpy(), rowvar=False))
    report = compare_folders(mine, tmp_path / "s.npz", ["fid"], networks={"fid": means}, blocks=0)
    assert report.scores["fid"].value == pytest.approx(0, abs=1e-9)
    assert "an unknown number" in render(report)
    assert any("is not known" in text for text in report.warnings)
    with pytest.raises(ValueError, match="holds statistics for FID; for cmmd"):
        compare_folders(mine, tmp_path / "s.npz", networks={"fid": means, "cmmd": means})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["kid"]}, "unknown metric 'kid'"),
        ({"metrics": []}, "unknown metric None"),
        ({"metrics": ["cmmd"], "blocks": 1}, "blocks must be 0 or at least 2"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        compare_folders(tmp_path, tmp_path, networks={"cmmd": means}, **options)


def test_a_folder_without_pictures(tmp_path):
    mine = fill(tmp_path / "a", 2)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "torn.png").write_bytes(b"torn")
    with pytest.raises(ValueError, match="no picture that can be read; the first of 1"):
        compare_folders(mine, tmp_path / "b", ["cmmd"], networks={"cmmd": means})


@pytest.mark.slow
def test_the_command(tmp_path):
    clip = save_hf_clip(tmp_path / "clip", act="quick_gelu", seed=20)
    mine, theirs = fill(tmp_path / "a", 4), fill(tmp_path / "b", 4, seed=50)
    arguments = ["evaluate-images", str(mine), "--against", str(theirs), "--cmmd-weights", str(clip)]
    output = tmp_path / "report.json"
    done = CliRunner().invoke(cli, [*arguments, "--metric", "cmmd", "--output", str(output)])
    assert done.exit_code == 0, done.output
    assert "4 against 4" in done.output
    network = {"cmmd": clip_features(clip, torch.device("cpu"))}
    expected = compare_folders(mine, theirs, ["cmmd"], networks=network, blocks=0).scores["cmmd"].value
    assert json.loads(output.read_text())["scores"]["cmmd"]["value"] == pytest.approx(expected)
    wrong = CliRunner().invoke(cli, [*arguments, "--metric", "cmmd", "kid"])
    assert wrong.exit_code == 2
    assert "unknown metric 'kid'" in wrong.output

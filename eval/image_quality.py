"""FID and CMMD: how far a set of pictures is from another one, whatever they show.

Both compare distributions of features, see `image_features`; here are the distances, their intervals, and a report.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.eval.base import Report, Score
from diffalign.eval.image_features import CLIP_336, INCEPTION, Features, load_features
from diffalign.eval.statistics import Interval
from diffalign.reward_models.inputs import Row, open_input
from diffalign.reward_models.media import InvalidMediaError, to_rgb

__all__ = ["Gaussian", "cmmd", "compare_folders", "frechet_distance", "jackknife", "read_statistics", "render"]

logger = logging.getLogger("diffalign")

SIGMA, SCALE = 10.0, 1000.0
"""CMMD's kernel width and the factor that makes it readable."""
BLOCKS = 20
"""Parts of the generated pictures that are left out in turn for an interval."""
ENOUGH: dict[str, int] = {"fid": 10_000, "cmmd": 1_000}
"""Pictures below which a report warns: FID is biased upwards by few pictures, CMMD only noisy."""
_ROWS = 4096


@dataclass(frozen=True)
class Gaussian:
    """What FID keeps of a set of pictures.

    Attributes:
        mean: [D], float64.
        root: A matrix [k, D] with root' root = covariance, float64; k is smaller than D for few pictures.
    """

    mean: Tensor
    root: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Gaussian:
        """Of features [N, D], with the unbiased covariance (N - 1).

        Raises:
            ValueError: If there are fewer than two.
        """
        if len(features) < 2:
            raise ValueError(f"a covariance needs at least 2 pictures, got {len(features)}")
        wide = features.double()
        mean = wide.mean(0)
        centred = (wide - mean) / (len(wide) - 1) ** 0.5
        # A triangle of at most D rows has the same product with itself.
        root = torch.linalg.qr(centred, mode="r").R if len(wide) > wide.shape[1] else centred
        return cls(mean, root)

    @classmethod
    def from_covariance(cls, mean: Tensor, covariance: Tensor) -> Gaussian:
        """Of a mean [D] and a covariance [D, D]; eigenvalues below zero, which are rounding, become zero."""
        values, vectors = torch.linalg.eigh(covariance.double())
        return cls(mean.double(), values.clamp(min=0).sqrt()[:, None] * vectors.T)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium"
    (arXiv:1706.08500), Eq. 6. The trace of the root is the sum of the singular values of root_a root_b', which needs no
    root of a matrix that is not symmetric and stays exact where a covariance is singular.
    """
    between = torch.linalg.svdvals(a.root @ b.root.T).sum()
    return float((a.mean - b.mean).square().sum() + a.root.square().sum() + b.root.square().sum() - 2 * between)


def cmmd(a: Tensor, b: Tensor) -> float:
    """1000 times the squared maximum mean discrepancy of unit embeddings [N, D] and [M, D].

    Jayasumana et al. 2024, "Rethinking FID: Towards a Better Evaluation Metric for Image Generation"
    (arXiv:2401.09603): the biased estimator (a picture is compared with itself, too), a Gaussian kernel with sigma 10.
    """
    return SCALE * (_kernel_mean(a, a) + _kernel_mean(b, b) - 2 * _kernel_mean(a, b))


def _kernel_mean(a: Tensor, b: Tensor) -> float:
    """Mean of exp(-|x - y|^2 / (2 sigma^2)) over all pairs, some rows at a time."""
    a, b = a.double(), b.double()
    squares = b.square().sum(-1)
    total = 0.0
    for start in range(0, len(a), _ROWS):
        rows = a[start : start + _ROWS]
        distances = rows.square().sum(-1)[:, None] + squares - 2 * rows @ b.T
        total += float(torch.exp(-distances / (2 * SIGMA**2)).sum())
    return total / (len(a) * len(b))


def jackknife(distance: Callable[[Tensor], float], features: Tensor, blocks: int = BLOCKS) -> Interval | None:
    """A 95 % interval of a distance to a fixed reference, by leaving out one block of pictures in turn.

    Grouped jackknife: with g blocks and the distances d_j without block j, the variance is (g - 1) / g times the sum of
    (d_j - mean)^2. A bootstrap is no choice here: drawing pictures twice makes the set look less diverse, and both
    distances larger. The interval says how much the distance would move with other pictures of the same number; it does
    not mend FID's bias, and close to 0 it is too narrow to test whether two sets are alike.

    Args:
        distance: Of some features.
        features: Of the generated pictures, [N, D]; every blocks-th one is in the same block.
        blocks: How many blocks, >= 2.

    Returns:
        The interval, not below 0; None with fewer than two pictures in a block.
    """
    if len(features) < 2 * blocks:
        return None
    place = torch.arange(len(features)) % blocks
    found = np.array([distance(features[place != block]) for block in range(blocks)])
    error = float(np.sqrt((blocks - 1) / blocks * np.square(found - found.mean()).sum()))
    value = distance(features)
    return Interval(max(0.0, value - 1.959964 * error), value + 1.959964 * error)


def read_statistics(path: str | Path) -> Gaussian:
    """Mean and covariance from a file as FID's tools write it: .npz with `mu` [D] and `sigma` [D, D].

    The file does not say how its pictures were resized or how many there were; a distance is only as good as that is
    known.

    Raises:
        ValueError: If the file is not as described.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            mean, covariance = np.asarray(content["mu"], float), np.asarray(content["sigma"], float)
    except (OSError, KeyError, ValueError, EOFError) as error:
        raise ValueError(f"cannot read {path} as statistics for FID: {error}; expected .npz with mu, sigma") from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or not np.isfinite(covariance).all():
        raise ValueError(f"{path}: expected finite mu [D] and sigma [D, D], found {mean.shape} and {covariance.shape}")
    return Gaussian.from_covariance(torch.from_numpy(mean), torch.from_numpy(covariance))


@dataclass(frozen=True)
class Pictures:
    """A folder's pictures as features.

    Attributes:
        features: By metric, [N, D] each.
        failed: Why a picture could not be read, by its name.
        sizes: How many pictures have which width and height.
        suffixes: How many have which ending.
        digest: SHA-256 of their pixels.
    """

    features: Mapping[str, Tensor]
    failed: Mapping[str, str]
    sizes: Counter[tuple[int, int]]
    suffixes: Counter[str]
    digest: str

    @property
    def n(self) -> int:
        """Pictures that were read."""
        return sum(self.sizes.values())


def read_pictures(
    source: str | Path, networks: Mapping[str, Features], limit: int | None = None, batch_size: int = 32
) -> Pictures:
    """Features of all pictures of a source, in its order.

    Args:
        source: A folder, an index or a parquet file, as `diffalign score` reads them.
        networks: What each metric makes of pictures.
        limit: Take only the first so many.
        batch_size: Consecutive pictures of one size per forward pass.

    Raises:
        ValueError: If it holds no picture that can be read.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in networks}
    failed: dict[str, str] = {}
    sizes: Counter[tuple[int, int]] = Counter()
    suffixes: Counter[str] = Counter()
    pixels = hashlib.sha256()
    batch: list[Image.Image] = []

    def flush() -> None:
        for name, network in networks.items() if batch else ():
            found[name].append(network(batch))
        batch.clear()

    for row in islice(open_input(source), limit):
        try:
            image = _open(row)
        except InvalidMediaError as error:
            failed[row.id] = str(error).replace(str(row.media), row.id) if isinstance(row.media, Path) else str(error)
            continue
        if len(batch) == batch_size or (batch and batch[0].size != image.size):
            flush()
        batch.append(image)
        pixels.update(image.tobytes())
        sizes[image.size] += 1
        suffixes[Path(row.image).suffix.lower()] += 1
    flush()
    if not sizes:
        first = f"; the first of {len(failed)}: {next(iter(failed.values()))}" if failed else ""
        raise ValueError(f"{source} holds no picture that can be read{first}")
    features = {name: torch.cat(parts) for name, parts in found.items()}
    return Pictures(features, failed, sizes, suffixes, pixels.hexdigest())


def _open(row: Row) -> Image.Image:
    if row.is_video or row.media is None:
        raise InvalidMediaError("a video" if row.is_video else row.error or "there is no picture")
    if isinstance(row.media, Path):
        return to_rgb(row.media)
    try:
        return to_rgb(Image.open(io.BytesIO(row.media)))
    except OSError as error:
        raise InvalidMediaError(f"cannot be read as a picture ({error})") from error


def compare_folders(
    folder: str | Path,
    against: str | Path,
    metrics: Sequence[str] = ("fid", "cmmd"),
    *,
    networks: Mapping[str, Features] | None = None,
    weights: Mapping[str, str | Path] | None = None,
    limit: int | None = None,
    blocks: int = BLOCKS,
    device: str | torch.device = "auto",
    local_files_only: bool | None = None,
) -> Report:
    """The distances of a folder's pictures from those of another one.

    Args:
        folder: Generated pictures: a folder, also with folders below, or whatever else `diffalign score` reads.
        against: Reference pictures likewise; for FID alone also an .npz file of statistics, see `read_statistics`.
        metrics: Which distances.
        networks: Loaded networks by metric instead of `weights`, `device` and `local_files_only`.
        weights: Paths of weights by metric; None are the published ones.
        limit: Take only the first so many pictures of each folder, by name.
        blocks: For the intervals, see `jackknife`; 0 leaves them out, which saves most of the time after the features.
        device: As in `load_features`.
        local_files_only: As in `load_features`.

    Raises:
        ValueError: If there are no metrics, or no pictures, or a metric cannot be computed from what is given.
        WeightsError: If a network's weights cannot be loaded.
    """
    metrics = tuple(dict.fromkeys(metrics))
    unknown = [name for name in metrics if name not in ENOUGH]
    if unknown or not metrics:
        raise ValueError(f"unknown metric {unknown[0] if unknown else None!r} (available: {', '.join(ENOUGH)})")
    if blocks != 0 and blocks < 2:
        raise ValueError(f"blocks must be 0 or at least 2, got {blocks}")
    statistics = read_statistics(against) if Path(against).suffix.lower() == ".npz" else None
    if statistics is not None and metrics != ("fid",):
        raise ValueError(f"{against} holds statistics for FID; for {metrics[-1]} give the folder of the pictures")
    if networks is None:
        networks = {name: load_features(name, (weights or {}).get(name), device, local_files_only) for name in metrics}
    logger.info("features of %s", folder)
    mine = read_pictures(folder, networks, limit)
    logger.info("features of %s", against)
    theirs = None if statistics is not None else read_pictures(against, networks, limit)
    digest = hashlib.sha256(Path(against).read_bytes()).hexdigest() if theirs is None else theirs.digest
    scores: dict[str, Score] = {}
    for name in metrics:
        distance = _distance(name, statistics if theirs is None else theirs.features[name])
        features = mine.features[name]
        interval = jackknife(distance, features, blocks) if blocks else None
        details = {"n_reference": None if theirs is None else theirs.n}
        scores[name] = Score(distance(features), interval, len(features), len(mine.failed), False, details)
    return Report(
        benchmark="image_quality",
        benchmark_version="1",
        protocol=_protocol(metrics, blocks) | {"reference_sha256": digest[:16]},
        sampling={"pictures": mine.n},
        scores=scores,
        groups={},
        n_expected=mine.n + len(mine.failed),
        n_missing=len(mine.failed),
        warnings=tuple(_warnings(metrics, mine, theirs)),
    )


def _distance(name: str, reference: Gaussian | Tensor | None) -> Callable[[Tensor], float]:
    """The distance of features from a reference: its features [M, D], or for FID its Gaussian."""
    if isinstance(reference, Tensor) and name == "cmmd":
        embeddings = reference
        return lambda features: cmmd(features, embeddings)
    fixed = Gaussian.of(reference) if isinstance(reference, Tensor) else reference
    assert fixed is not None, "a reference without pictures is a Gaussian"
    return lambda features: frechet_distance(Gaussian.of(features), fixed)


def _protocol(metrics: Sequence[str], blocks: int) -> dict[str, Any]:
    how = {
        "fid": {
            "network": INCEPTION.weights[0].filename,
            "resize": "8 bits to 299x299, bilinear of TensorFlow 1, no antialiasing",
            "covariance": "unbiased",
        },
        "cmmd": {
            "network": CLIP_336.weights[0].repo,
            "resize": "whole picture to a square, bicubic, no antialiasing",
            "sigma": SIGMA,
            "scale": SCALE,
            "estimator": "biased",
        },
    }
    interval = {"interval": "grouped jackknife over generated pictures, reference fixed", "blocks": blocks}
    return {name: how[name] for name in metrics} | interval


def _warnings(metrics: Sequence[str], mine: Pictures, theirs: Pictures | None) -> list[str]:
    found = []
    for side, pictures in (("generated", mine), ("reference", theirs)):
        if pictures is None:
            continue
        for name in metrics:
            if pictures.n < ENOUGH[name]:
                why = "biased upwards, and more so the fewer there are" if name == "fid" else "noisy"
                found.append(f"{name} of {pictures.n} {side} pictures is {why}; compare it only at equal numbers")
        if pictures.failed:
            path, reason = next(iter(pictures.failed.items()))
            found.append(f"{len(pictures.failed)} {side} pictures could not be read, such as {path}: {reason}")
    if theirs is None:
        found.append("the reference is a file of statistics: whether it was made with the same resizing is not known")
        return found
    for what, a, b in (
        ("sizes", mine.sizes.most_common(1)[0][0], theirs.sizes.most_common(1)[0][0]),
        ("file formats", mine.suffixes.most_common(1)[0][0], theirs.suffixes.most_common(1)[0][0]),
    ):
        if a != b:
            shown = [f"{x[0]}x{x[1]}" if isinstance(x, tuple) else x for x in (a, b)]
            found.append(
                f"{what} differ ({shown[0]} generated, {shown[1]} reference): resizing and compression alone move FID"
            )
    return found


def render(report: Report) -> str:
    """A report for a terminal."""
    partial = f" PARTIAL: {report.n_missing} of {report.n_expected} pictures are missing" * report.partial
    lines = [f"distance from the reference, smaller is better{partial}"]
    for name, score in report.scores.items():
        ends = f" [{score.ci95.low:.3f}, {score.ci95.high:.3f}]" if score.ci95 is not None else ""
        against = score.details["n_reference"]
        lines.append(f"{name:<6}{score.value:>10.3f}{ends}  {score.n} against {against or 'an unknown number'}")
    return "\n".join([*lines, *(f"warning: {text}" for text in report.warnings)])

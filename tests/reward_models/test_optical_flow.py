"""RAFT's way in, VBench's rules on its flow, and the two reward models of motion."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torchvision.models.optical_flow import raft_large

from diffalign.reward_models import Video, load_reward_model
from diffalign.reward_models.base import RewardInfo, WeightsError
from diffalign.reward_models.fetched_files import find_or_fetch
from diffalign.reward_models.media import InvalidMediaError
from diffalign.reward_models.optical_flow import (
    RAFT_THINGS,
    OpticalFlow,
    enlarged,
    halfway,
    is_static,
    motion_margin,
    top_magnitude,
    unpadded,
    warp,
)

INFO = RewardInfo(name="flow", license="", weights=(RAFT_THINGS,))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights in torchvision's layout, under the published name."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = raft_large(weights=None)
    folder = tmp_path_factory.mktemp("raft")
    torch.save(network.state_dict(), folder / RAFT_THINGS.filename)
    return folder


class Drift(nn.Module):
    """A network that sees every pixel move by the difference of the frames' mean grey levels, to the right."""

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, first, second, num_flow_updates):
        step = (second - first).mean(dim=(1, 2, 3)) * 127.5
        flow = torch.zeros(len(first), 2, *first.shape[-2:])
        flow[:, 0] = step[:, None, None]
        return [flow]


def drifting(steps, side=128):
    """A clip of grey frames whose levels rise by `steps`, uint8 [T, 3, side, side]."""
    levels = torch.tensor([0, *steps]).cumsum(0)
    return levels.to(torch.uint8)[:, None, None, None].expand(-1, 3, side, side).contiguous()


@pytest.fixture(scope="module")
def degree(weights):
    model = load_reward_model("dynamic_degree", path=weights, device="cpu")
    model.flow.network = Drift()
    return model


@pytest.fixture(scope="module")
def smooth(weights):
    model = load_reward_model("flow_smoothness", path=weights, device="cpu")
    model.flow.network = Drift()
    return model


# --- rules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("magnitudes", "frames", "moving"),
    [
        ([6.1] * 4 + [0.0] * 11, 16, True),  # round(4 * 16 / 16) = 4 pairs above 6
        ([6.1] * 3 + [0.0] * 12, 16, False),
        ([6.0] * 15, 16, False),  # above, not at
        ([6.1] * 2 + [0.0] * 7, 10, True),  # round(2.5) = 2: half to even, as in the original
        ([6.1] + [0.0] * 8, 10, False),
        ([6.1, 0.0], 3, True),  # round(0.75) = 1
        ([0.0], 2, False),  # the original's round(0.5) = 0 would call this moving
        ([6.1], 2, True),
    ],
)
def test_dynamic_degree_threshold(magnitudes, frames, moving):
    assert (motion_margin(magnitudes, frames, 256) > 1) is moving
    assert (motion_margin([2 * m for m in magnitudes], frames, 512) > 1) is moving


@pytest.mark.parametrize(
    ("magnitudes", "around", "frames", "static"),
    [
        ([3.0] * 15, [12.0, 12.0], 16, True),  # at the thresholds: 3, and 3 * 2 * 2
        ([3.1] * 2 + [0.0] * 13, [0.0, 0.0], 16, True),  # two may
        ([3.1] * 3 + [0.0] * 12, [0.0, 0.0], 16, False),
        ([0.0] * 15, [12.1, 0.0], 16, False),
        ([0.0] * 15, [0.0, 12.1], 16, False),
    ],
)
def test_static_filter(magnitudes, around, frames, static):
    assert is_static(magnitudes, around, frames, 256) is static


def test_top_magnitude_is_the_mean_of_the_longest():
    flow = torch.zeros(2, 10, 10)
    flow[0, 0, :5], flow[1, 0, :5] = 3.0, 4.0
    flow[0, 5, 5] = 1.0
    assert top_magnitude(flow, 0.05) == pytest.approx(5.0)
    assert top_magnitude(flow, 0.06) == pytest.approx((25 + 1) / 6)


def test_small_frames_are_enlarged_and_others_left():
    small = torch.randint(256, (2, 3, 48, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert enlarged(small).shape == (2, 3, 128, 171)
    big = torch.zeros(1, 3, 128, 300, dtype=torch.uint8)
    assert enlarged(big) is big


# --- warping --------------------------------------------------------------------------------------------------------


def test_warp_reads_where_the_flow_points():
    picture = torch.arange(24.0).reshape(1, 1, 4, 6)
    flow = torch.zeros(1, 2, 4, 6)
    flow[:, 0], flow[:, 1] = 1.0, 2.0
    moved = warp(picture, flow)
    torch.testing.assert_close(moved[..., :2, :5], picture[..., 2:, 1:])
    torch.testing.assert_close(moved[..., 0, 5], picture[..., 2, 5])  # beyond the border: the border


def test_halfway_of_a_steady_motion_is_the_frame_between():
    wide = torch.rand(1, 3, 20, 40, generator=torch.Generator().manual_seed(0))
    before, now, after = (wide[..., k : k + 24] for k in (4, 2, 0))  # the content moves right by 2 pixels a frame
    forward = torch.zeros(1, 2, 20, 24)
    forward[:, 0] = 4.0
    made = halfway(before, after, forward, -forward)
    torch.testing.assert_close(made[..., 2:-2], now[..., 2:-2], atol=1e-5, rtol=0)
    assert (made - halfway(before, after, -forward, forward)).abs().max() > 0.1


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_flow_is_torchvisions_on_padded_frames(weights):
    """Frames of 132 x 140 become 136 x 144: two rows at each end; two columns."""
    flow = OpticalFlow(INFO, weights, updates=2)
    frames = torch.randint(256, (2, 3, 132, 140), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    ((start, found),) = flow.pairs(frames, [(1, 0)])
    network = raft_large(weights=None).eval()
    network.load_state_dict(torch.load(weights / RAFT_THINGS.filename, weights_only=True))
    padded = F.pad(frames.float(), (2, 2, 2, 2), mode="replicate") / 255 * 2 - 1
    with torch.no_grad():
        expected = network(padded[1:], padded[:1], num_flow_updates=2)[-1]
    assert start == 0
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert unpadded(found, 132, 140).shape == (1, 2, 132, 140)


def test_weights_of_another_network_are_refused(tmp_path):
    file = tmp_path / RAFT_THINGS.filename
    torch.save({"a": torch.zeros(1)}, file)
    with pytest.raises(WeightsError, match="tensors are missing"):
        OpticalFlow(INFO, tmp_path)
    file.write_bytes(b"torn")
    with pytest.raises(WeightsError, match="cannot read"):
        OpticalFlow(INFO, tmp_path)
    with pytest.raises(WeightsError, match=r"raft_large_C_T_V1-22a6c225\.pth"):
        OpticalFlow(INFO, tmp_path / "nowhere")


def test_a_file_is_fetched_once_and_only_with_its_checksum(tmp_path, monkeypatch):
    from hashlib import sha256

    from diffalign.reward_models.base import WeightSpec

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    home = tmp_path / "home.pth"
    home.write_bytes(b"weights")
    digest = sha256(b"weights").hexdigest()[:8]
    spec = WeightSpec("", f"net-{digest}.pth", "torch", url=home.as_uri())
    with pytest.raises(WeightsError, match="is not in"):
        find_or_fetch(INFO, None, spec, local_files_only=True)
    assert find_or_fetch(INFO, None, spec, local_files_only=False).read_bytes() == b"weights"
    home.unlink()
    assert find_or_fetch(INFO, None, spec, local_files_only=True).read_bytes() == b"weights"
    home.write_bytes(b"other")
    wrong = WeightSpec("", "net-00000000.pth", "torch", url=home.as_uri())
    with pytest.raises(WeightsError, match="cannot fetch"):
        find_or_fetch(INFO, None, wrong, local_files_only=False)
    assert not (tmp_path / "cache" / "checkpoints" / wrong.filename).exists()


# --- reward models ---------------------------------------------------------------------------------------------------


def test_dynamic_degree_of_clips(degree):
    """At 128 pixels the threshold is 3; of 8 frames 2 pairs must pass it."""
    moving, still = drifting([4, 4, 0, 0, 0, 0, 0]), drifting([4, 2, 2, 2, 2, 2, 2])
    output = degree.score([moving, still])
    assert output.score.tolist() == [1.0, 0.0]
    torch.testing.assert_close(output.dims["margin"], torch.tensor([4 / 3, 2 / 3]))
    assert list(output.dims)[-1] == degree.info.dims[-1] == "dynamic_degree"


def test_every_other_frame_of_sixteen_a_second(degree):
    clip = drifting([4, -4] * 8)
    assert degree.score([Video(clip, fps=16)]).score.tolist() == [0.0]  # the flicker between them is not seen
    assert degree.score([Video(clip, fps=8)]).score.tolist() == [1.0]
    assert degree.score([clip]).score.tolist() == [1.0]  # frames without a rate count as 8 a second


def test_margin_as_the_score(weights):
    model = load_reward_model("dynamic_degree-margin", path=weights, device="cpu")
    model.flow.network = Drift()
    assert model.info.name == "dynamic_degree-margin"
    torch.testing.assert_close(model([drifting([4, 4, 0, 0, 0, 0, 0])], ""), torch.tensor([4 / 3]))


def test_clips_that_are_too_short_have_no_score(degree, smooth):
    output = degree.score([drifting([4]), drifting([]), Video(drifting([4]), fps=24)], on_invalid="nan")
    assert output.valid.tolist() == [True, False, False]
    assert output.score[1:].isnan().all()
    assert "2 frames" in str(output.errors[1])
    with pytest.raises(InvalidMediaError, match="at least 3 frames"):
        smooth.score([drifting([4])])


def test_options_of_dynamic_degree(weights):
    with pytest.raises(ValueError, match="score must be"):
        load_reward_model("dynamic_degree", path=weights, score="mean")
    with pytest.raises(ValueError, match="fps must be positive"):
        load_reward_model("dynamic_degree", path=weights, fps=0)


def test_smoothness_is_the_error_of_made_frames(smooth):
    """Grey frames are warped onto themselves: the made frame has the mean level of its neighbours."""
    steady, jumping = drifting([10, 10, 10, 10]), drifting([50, -50, 50, -50, 0])
    output = smooth.score([steady, jumping])
    # Of six frames the odd ones 1 and 3 have two neighbours; frame 5 has one.
    torch.testing.assert_close(output.score, torch.tensor([1.0, (255 - 50) / 255]))
